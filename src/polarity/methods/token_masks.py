"""Which tokens the policy loss counts: Fork Tokens (the most uncertain ones) and Clip-Cov (all but a few).

n responses, T padded length. KL penalty and entropy bonus stay on all tokens.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Generator, Tensor

from polarity.methods.inputs import LossInputs, Selection, given
from polarity.methods.part import Part
from polarity.methods.selection import ceil_count, covariance, extreme_of_all, lowest, row_counts


class ForkTokens(Part):
    """Only the tokens of highest entropy are trained on (Wang et al. 2025, "Beyond the 80/20 rule").

    Paper and code differ in the denominator: the paper divides by all tokens, the code by the kept ones, five times the
    weight at ratio 0.2. And the code ranks within one micro-batch on one rank, so its result depends on how a
    mini-batch is split; `minibatch` does not.
    """

    kind: Literal["fork"] = "fork"
    """The share of tokens with the highest entropy."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of tokens that are trained on, rounded up, at least one."""
    scope: Literal["microbatch", "minibatch", "step", "response"] = "minibatch"
    """What the share is taken of. microbatch is the authors' code and depends on how the mini-batch is split."""
    entropy_from: Literal["current", "old"] = "current"
    """Entropy of the policy as it is now, or as it was at rollout time."""
    denominator: Literal["all", "kept"] = "all"
    """Token mean over all tokens (paper) or over the kept ones (the authors' code)."""

    @model_validator(mode="after")
    def _check(self) -> "ForkTokens":
        if self.scope == "step" and self.entropy_from == "current":
            raise ValueError("scope step spans several updates, so it needs entropy_from: old")
        return self

    @property
    def needs(self) -> frozenset[str]:
        """What an engine computes for it, of the names in `Method.needs`."""
        entropy = "entropy" if self.entropy_from == "current" else "entropy_old"
        return frozenset({entropy, "select"} if self.scope in ("minibatch", "response") else {entropy})

    def select(self, inputs: LossInputs, generator: Generator | None, clipped: Callable[[], Tensor]) -> Selection:
        """The kept tokens of a batch."""
        name = "entropy" if self.entropy_from == "current" else "entropy_old"
        entropy = inputs.entropy if self.entropy_from == "current" else inputs.entropy_old
        kept = self.kept(given(entropy, name), inputs.mask)
        return Selection(kept, count=int(kept.sum()) if self.denominator == "kept" else None)

    def kept(self, entropy: Tensor, mask: Tensor) -> Tensor:
        """(n, T) entropy and mask of the whole scope -> (n, T) bool, exactly k by rank, no gradient."""
        entropy = entropy.detach()
        if self.scope == "response":
            return lowest(-entropy, mask, ceil_count(row_counts(mask), self.ratio))
        return extreme_of_all(entropy, mask, ceil_count(row_counts(mask).sum(), self.ratio), "high")


class ClipCov(Part):
    """A few tokens of high covariance between advantage and log-probability lose their loss (Cui et al. 2025).

    Those tokens cost most entropy. Of the tokens that the surrogate does not clip and whose covariance is inside the
    bounds, floor(ratio * all tokens), at least one, are drawn at random. Means and draw are of the whole mini-batch.
    """

    scope: ClassVar[str] = "minibatch"

    kind: Literal["clip_cov"] = "clip_cov"
    """All tokens but a few of high covariance, drawn at random."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Share of all tokens that lose their loss."""
    lower: float = 1.0
    """Only tokens with more covariance than this."""
    upper: float = 5.0
    """Only tokens with less covariance than this."""

    @property
    def needs(self) -> frozenset[str]:
        """What an engine does for it, of the names in `Method.needs`."""
        return frozenset({"select"})

    def select(self, inputs: LossInputs, generator: Generator | None, clipped: Callable[[], Tensor]) -> Selection:
        """Every token but the drawn ones; clipped() is (n, T) bool, where the surrogate's bound is in force."""
        spread = covariance(inputs)
        candidates = (inputs.mask & ~clipped() & (spread > self.lower) & (spread < self.upper)).nonzero()
        count = max(1, int(self.ratio * int(inputs.mask.sum()) + 1e-9))
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(candidates), generator=generator, device=generator.device)
        drawn = candidates[order[:count].to(candidates.device)]
        kept = inputs.mask.clone()
        kept[drawn[:, 0], drawn[:, 1]] = False
        return Selection(kept)


def _kind(value: Any) -> str:
    if isinstance(value, ForkTokens | ClipCov):
        return value.kind
    return str(value.get("kind", "fork")) if isinstance(value, Mapping) else "fork"


TokenMask = Annotated[
    Annotated[ForkTokens, Tag("fork")] | Annotated[ClipCov, Tag("clip_cov")],
    Discriminator(_kind),
]
