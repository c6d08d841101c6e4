"""Terms beside the policy loss: the penalty for leaving the reference policy, and the entropy bonus's place.

All (n, T); `d` is logp_ref - logp.
"""

from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from polarity.methods.part import Part

Estimator = Literal["k1", "k2", "k3", "k1+", "k3+"]


class KL(Part):
    """Penalty coefficient * KL(policy || reference), estimated on the sampled tokens."""

    coefficient: NonNegativeFloat = 0.0
    """Weight of the penalty in the loss; 0 means that no reference policy is kept."""
    estimator: Estimator = "k3"
    """k1 = -d, k2 = d^2/2, k3 = e^d - d - 1 with d = logp_ref - logp; `+`: that value with the gradient of k2."""


def kl_estimate(logp: Tensor, logp_ref: Tensor, mask: Tensor, estimator: Estimator) -> Tensor:
    """Per-token KL estimate (n, T), zero outside the mask.

    As losses, k1 and k3 do not have the gradient of the KL divergence; k2 does, and so do `k1+` and `k3+`, which keep
    the value of k1 and k3 and take the gradient of k2 (verl's names). k3 is clamped as in verl: d to +-20, the
    result to +-10, so its gradient is 0 where d > 2.6109.
    """
    d = torch.where(mask, logp_ref - logp, 0.0)
    if estimator.endswith("+"):
        k2 = d * d / 2
        return k2 + (_forward(d, estimator[:2]) - k2).detach()
    return _forward(d, estimator)


def _forward(d: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d * d / 2
    d = d.clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)
