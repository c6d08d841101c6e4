"""Methods with a critic: token rewards, generalised advantage estimation, and the critic's loss.

N responses of a rollout step (n of a micro-batch), T padded length. A value at position t is the critic's estimate
before token t is emitted. Follows the PPO baseline of Zhu et al. and verl's current recursion, which steps over masked
positions (multi-turn) instead of relying on their values being 0.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from polarity.methods.aggregation import aggregate
from polarity.methods.inputs import Denominators, LossOutput
from polarity.methods.part import Part

Unit = Annotated[float, Field(ge=0, le=1)]


class CriticAdvantage(Part):
    """Generalised advantage estimation (GAE) with a critic; rewards may carry a KL penalty."""

    kind: Literal["gae"] = "gae"
    """Token advantages from a critic."""
    gamma: Unit = 1.0
    """Discount per token."""
    lam: Unit = 1.0
    """GAE's lambda: 1 trusts the rewards, 0 the critic."""
    whiten: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over all valid tokens of the step."""
    reward_kl: NonNegativeFloat = 1e-3
    """Coefficient of the penalty logp_old - logp_ref (k1) in each token's reward; 0 means no reference policy."""
    value_clip: Annotated[float, Field(gt=0)] | None = 0.5
    """The critic may move at most this far from its old values per step's updates; null: any distance."""


def token_rewards(
    part: CriticAdvantage, rewards: Tensor, mask: Tensor, logp_old: Tensor | None, logp_ref: Tensor | None
) -> Tensor:
    """(N,) rewards on each response's last valid token, minus the KL penalty on every token: (N, T) float32."""
    T = mask.shape[1]
    position = torch.arange(T, device=mask.device)
    last = torch.where(mask, position, -1).amax(1, keepdim=True) if T else position[None, :0]
    out = torch.where((position == last) & mask, rewards.float()[:, None], 0.0)
    if part.reward_kl == 0:
        return out
    if logp_old is None or logp_ref is None:
        raise ValueError("advantage.reward_kl: advantages() needs logp_old and logp_ref (see Method.needs)")
    return out - part.reward_kl * torch.where(mask, logp_old.float() - logp_ref.float(), 0.0)


def gae(part: CriticAdvantage, token_reward: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """(N, T) float32 advantages before whitening, zero outside the mask. The loop is over T, backwards."""
    values = torch.where(mask, values.float(), 0.0)
    following = torch.zeros_like(values[:, 0]) if values.shape[1] else values.sum(1)
    running = torch.zeros_like(following)
    out = torch.zeros_like(values)
    for t in range(values.shape[1] - 1, -1, -1):
        inside = mask[:, t]
        error = token_reward[:, t] + part.gamma * following - values[:, t]
        running = torch.where(inside, error + part.gamma * part.lam * running, running)
        following = torch.where(inside, values[:, t], following)
        out[:, t] = torch.where(inside, running, 0.0)
    return out


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """(A - mean) / sqrt(var + 1e-8) over the mask, with Bessel's correction; fewer than two tokens: unchanged."""
    inside = advantages[mask].double()
    if inside.numel() < 2:
        return advantages
    scale = torch.rsqrt(inside.var() + 1e-8)
    return torch.where(mask, (advantages.double() - inside.mean()) * scale, 0.0).float()


def value_loss(
    part: CriticAdvantage,
    values: Tensor,
    values_old: Tensor,
    targets: Tensor,
    mask: Tensor,
    denominators: Denominators | None = None,
) -> LossOutput:
    """Half the token mean of max((v - target)^2, (v clipped around v_old - target)^2); all (n, T).

    The factor one half is Zhu et al.'s code; the A3PO authors' has none.
    """
    denominators = denominators or Denominators.of(mask)
    v, old, target = (torch.where(mask, x, 0.0) for x in (values, values_old.detach(), targets.detach()))
    error = (v - target) ** 2
    near = v if part.value_clip is None else old + (v - old).clamp(-part.value_clip, part.value_clip)
    clipped_error = (near - target) ** 2
    loss = 0.5 * aggregate(torch.maximum(error, clipped_error), mask, "token_mean", denominators)
    n = float(mask.sum())
    clipped = float(((clipped_error > error) & mask).sum())
    return LossOutput(loss, {"value/error": (float(error.detach().sum()), n), "value/clip_fraction": (clipped, n)})
