"""Penalties on a few chosen tokens, whose policy loss is then left unclipped: KL-Cov and Lp-Reg.

n responses, T padded length, V vocabulary, c tokens of a chunk. On the chosen tokens the loss is -A r + penalty. The
penalty is a regulariser: importance weights against train-inference mismatch do not multiply it.
"""

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Generator, Tensor

from polarity.methods.inputs import LossInputs, Selection, given
from polarity.methods.part import Part
from polarity.methods.regularizers import kl_estimate
from polarity.methods.selection import covariance, extreme_of_all, floor_count
from polarity.methods.surrogates import PolicyTokens, at_least_float32

# Logit of a filtered vocabulary entry (authors' code): finite, so that a filtered token's log-probability is, too.
_FILTERED = -1e4


class KLCov(Part):
    """Tokens of highest covariance between advantage and log-probability are held to the old policy (Cui et al. 2025).

    The penalty is coefficient * |log p - log p_old|. Published with a surrogate that clips nothing.
    """

    scope: ClassVar[str] = "minibatch"

    kind: Literal["kl_cov"] = "kl_cov"
    """|log p - log p_old| on the tokens of highest covariance."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 2e-3
    """Share of a mini-batch's tokens, rounded down, at least one (authors: 0.002 for 7B, 0.0002 for 32B)."""
    coefficient: NonNegativeFloat = 1.0
    """Weight of the penalty (authors: 1; verl's default is 0.1)."""

    @property
    def needs(self) -> frozenset[str]:
        """What an engine does for it, of the names in `Method.needs`."""
        return frozenset({"select"})

    def select(self, inputs: LossInputs, generator: Generator | None, clipped: Callable[[], Tensor]) -> Selection:
        """The tokens of highest covariance, exactly k by rank."""
        spread = covariance(inputs)
        return Selection(extreme_of_all(spread, inputs.mask, floor_count(inputs.mask.sum(), self.ratio), "high"))

    def penalty(self, tokens: PolicyTokens, inputs: LossInputs) -> Tensor:
        """(n, T) with gradient, for every token."""
        return self.coefficient * tokens.log_ratio.abs()


class LpReg(Part):
    """Rare tokens that a min-p filter of the old policy does not call noise are held up (Huang et al. 2025, Lp-Reg).

    Of the tokens with A < 0, those of lowest current probability are candidates; the ones whose probability has fallen
    below the proxy's get a penalty KL(policy || proxy), estimated by k3. The proxy is the old policy without the
    entries below kappa times its largest probability; a sampled token that was itself filtered is noise and gets none.
    The authors' code takes the share of one micro-batch; here it is of the mini-batch. As there, a single token counts
    as none.
    """

    scope: ClassVar[str] = "minibatch"

    kind: Literal["lp_reg"] = "lp_reg"
    """KL to a filtered old policy on the rarest tokens of negative samples."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the tokens with A < 0, rounded down (authors: 0.01 for 14B, 0.005 for 32B)."""
    kappa: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Vocabulary entries below kappa times the largest probability are filtered out of the proxy."""
    coefficient: NonNegativeFloat = 1.0
    """Weight of the penalty."""

    @property
    def needs(self) -> frozenset[str]:
        """What an engine computes for it, of the names in `Method.needs`."""
        return frozenset({"select", "logp_proxy"})

    @torch.no_grad()
    def logp_proxy(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """(c,) float32 log-probabilities of `tokens` (c,) under the proxy made from old `logits` (c, V)."""
        logits = logits.float()
        floor = logits.amax(-1, keepdim=True) + math.log(self.kappa)
        kept = torch.where(logits >= floor, logits, _FILTERED)
        return kept.gather(-1, tokens[..., None])[..., 0] - kept.logsumexp(-1)

    def select(self, inputs: LossInputs, generator: Generator | None, clipped: Callable[[], Tensor]) -> Selection:
        """The rarest tokens with A < 0 that are below the proxy."""
        logp, proxy = inputs.logp.detach(), given(inputs.logp_proxy, "logp_proxy")
        negative = inputs.mask & (inputs.advantages < 0)
        count = floor_count(negative.sum(), self.ratio)
        rarest = extreme_of_all(logp, negative, torch.where(count > 1, count, 0), "low")
        return Selection(rarest & (logp < proxy))

    def penalty(self, tokens: PolicyTokens, inputs: LossInputs) -> Tensor:
        """(n, T) with gradient, for every token."""
        proxy = at_least_float32(given(inputs.logp_proxy, "logp_proxy"))
        return self.coefficient * kl_estimate(tokens.logp, proxy, inputs.mask, "k3")


TokenPenalty = Annotated[KLCov | LpReg, Field(discriminator="kind")]
