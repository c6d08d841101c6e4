"""Policy losses: one configuration and one function each, (n, T) tokens -> (n, T) losses.

n responses, T padded length. A new loss is a Part with a `kind` and a `token_loss`, and a place in `Surrogate`;
masking, weights, aggregation and metrics are not its business. Losses are linear in the advantage's size, so a weight
on the advantage is a weight on the token's loss and gradient.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from polarity.methods.inputs import LossInputs
from polarity.methods.part import Part


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """What a surrogate sees: float32 or better, 0 outside the mask (and ratio 1), so that garbage has no gradient.

    log_ratio: logp - logp_old clamped to +-20; ratio: its exponential.
    """

    logp: Tensor
    logp_old: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor
    mask: Tensor

    @classmethod
    def of(cls, inputs: LossInputs) -> "PolicyTokens":
        mask = inputs.mask
        logp = torch.where(mask, at_least_float32(inputs.logp), 0.0)
        logp_old = torch.where(mask, at_least_float32(inputs.logp_old).detach(), 0.0)
        advantages = torch.where(mask, at_least_float32(inputs.advantages).detach(), 0.0)
        log_ratio = (logp - logp_old).clamp(-20, 20)
        return cls(logp, logp_old, log_ratio, log_ratio.exp(), advantages, mask)


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """loss: (n, T) with gradient; clipped, dual_clipped: (n, T) bool, where the bound on the ratio is in force."""

    loss: Tensor
    clipped: Tensor
    dual_clipped: Tensor | None = None


class Clip(Part):
    """PPO's clipped ratio with separate bounds (DAPO's clip-higher) and an optional bound for wrong responses."""

    kind: Literal["clip"] = "clip"
    """The clipped ratio of PPO."""
    low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The ratio is clipped from below at 1 - low."""
    high: NonNegativeFloat = 0.2
    """The ratio is clipped from above at 1 + high; larger than low is DAPO's clip-higher."""
    dual: Annotated[float, Field(gt=1)] | None = None
    """Dual clip: where A < 0 the loss is at most -A * dual, and a larger ratio has no gradient; null: off."""

    def token_loss(self, tokens: PolicyTokens) -> TokenLoss:
        """max(-A r, -A clip(r)), and where A < 0 at most -A * dual."""
        negated = -tokens.advantages
        free = negated * tokens.ratio
        bounded = negated * tokens.ratio.clamp(1 - self.low, 1 + self.high)
        loss = torch.maximum(free, bounded)
        clipped = bounded > free
        if self.dual is None:
            return TokenLoss(loss, clipped)
        ceiling = negated * self.dual
        dual_clipped = (loss > ceiling) & (negated > 0)
        return TokenLoss(torch.where(dual_clipped, ceiling, loss), clipped, dual_clipped)


Surrogate = Clip


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
