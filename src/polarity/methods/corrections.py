"""Importance weights against train-inference mismatch: the sampler's numbers differ from the trainer's.

The log-ratio is logp_old - logp_rollout (training engine minus rollout engine, both at the sampling parameters). The
weights carry no gradient, multiply the policy loss only, and never enter a denominator. n responses, T padded length.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from polarity.methods.part import Part

Level = Literal["token", "sequence"]


class Truncated(Part):
    """Truncated importance sampling (TIS): weight min(ratio, cap)."""

    kind: Literal["truncated"] = "truncated"
    """Cap the ratio from above."""
    level: Level = "token"
    """Ratio of each token, or the product over the response."""
    cap: Annotated[float, Field(gt=0)] = 2.0
    """Largest weight (verl: 2 for tokens, 2 to 10 for sequences; TRL: 3)."""

    def weights(self, log_ratio: Tensor) -> Tensor:
        """min(ratio, cap), elementwise."""
        return log_ratio.exp().clamp(max=self.cap)


class Masked(Part):
    """Masked importance sampling (MIS, IcePop): the ratio inside [low, high], 0 outside."""

    kind: Literal["masked"] = "masked"
    """Drop what lies outside the bounds, keep the ratio as weight inside."""
    level: Level = "token"
    """Ratio of each token, or the product over the response."""
    low: Annotated[float, Field(ge=0)] = 0.5
    """Smallest ratio that is kept."""
    high: Annotated[float, Field(gt=0)] = 2.0
    """Largest ratio that is kept."""

    @model_validator(mode="after")
    def _check(self) -> "Masked":
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self

    def weights(self, log_ratio: Tensor) -> Tensor:
        """The ratio inside the bounds, 0 outside, elementwise."""
        ratio = log_ratio.exp()
        return torch.where((ratio >= self.low) & (ratio <= self.high), ratio, 0.0)


Correction = Annotated[Truncated | Masked, Field(discriminator="kind")]


def correction_weights(correction: Truncated | Masked, logp_old: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    """Weights (n, T), or (n, 1) at sequence level, without gradient."""
    log_ratio = torch.where(mask, logp_old - logp_rollout, 0.0).detach()
    if correction.level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True)
    return correction.weights(log_ratio.clamp(-20, 20))


class OffPolicyMask(Part):
    """Negative samples that have drifted off-policy lose their loss (off-policy sequence masking, DeepSeek-V3.2).

    A response with A < 0 is dropped when the mean of logp_rollout - logp over its tokens is above delta; the mean sees
    both sources of drift, the updates since the rollout and the mismatch of the two engines. Denominators stay.
    """

    delta: Annotated[float, Field(gt=0)] = 0.5
    """Largest mean log-ratio of a negative sample, in nats per token."""

    def dropped(self, logp: Tensor, logp_rollout: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """(n, T) bool, the tokens that lose their loss; no gradient."""
        drift = torch.where(mask, logp_rollout - logp.detach(), 0.0).sum(1) / mask.sum(1).clamp(min=1)
        return (advantages < 0) & (drift > self.delta)[:, None] & mask
