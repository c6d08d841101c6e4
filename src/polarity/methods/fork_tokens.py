"""Fork Tokens: only the tokens of highest entropy are trained on (Wang et al. 2025, "Beyond the 80/20 rule").

n responses, T padded length. Paper and code differ in the denominator: the paper divides by all tokens, the code by
the kept ones, five times the weight at ratio 0.2. And the code ranks within one micro-batch on one rank, so its result
depends on how a mini-batch is split; `minibatch` does not.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from polarity.methods.part import Part
from polarity.methods.selection import ceil_count, lowest, lowest_of_all, row_counts


class ForkTokens(Part):
    """Policy loss on the highest-entropy tokens only; KL penalty and entropy bonus stay on all tokens."""

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

    def kept(self, entropy: Tensor, mask: Tensor) -> Tensor:
        """(n, T) entropy and mask of the whole scope -> (n, T) bool, exactly k by rank, no gradient."""
        entropy = entropy.detach()
        if self.scope == "response":
            return lowest(-entropy, mask, ceil_count(row_counts(mask), self.ratio))
        return lowest_of_all(-entropy, mask, ceil_count(mask.sum(), self.ratio))
