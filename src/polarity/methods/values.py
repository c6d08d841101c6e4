"""Methods with a critic: token rewards, generalised advantage estimation, and the critic's loss.

N responses of a rollout step (n of a micro-batch), T padded length. A value at position t is the critic's estimate
before token t is emitted. Follows the PPO baseline of Zhu et al. and verl's current recursion, which steps over masked
positions (multi-turn) instead of relying on their values being 0.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from polarity.methods.aggregation import aggregate
from polarity.methods.inputs import Denominators, LossOutput, Scored, given
from polarity.methods.part import Part, Unit
from polarity.methods.selection import row_counts

# Rows of a step that are worked on at a time: bounds the extra memory.
_ROWS = 1024


class CriticAdvantage(Part):
    """Generalised advantage estimation (GAE) with a critic: PPO; rewards may carry a KL penalty."""

    compares_group: ClassVar[bool] = False
    token_level: ClassVar[bool] = True

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

    def compute(self, scored: Scored) -> Tensor:
        """(N, T) float32, zero outside the mask; whitened over all tokens of the step unless `whiten` is off."""
        mask, values = given(scored.mask, "mask"), given(scored.values, "values")
        advantages = self._unwhitened(scored.rewards, mask, values, scored.logp_old, scored.logp_ref)
        return whitened(advantages, mask) if self.whiten else advantages

    def targets(
        self, rewards: Tensor, mask: Tensor, values: Tensor, logp_old: Tensor | None, logp_ref: Tensor | None
    ) -> Tensor:
        """(N, T) float32 returns that the critic is fitted to: advantages before whitening, plus values."""
        advantages = self._unwhitened(rewards, mask, values, logp_old, logp_ref)
        return torch.where(mask, advantages + values.float(), 0.0)

    def _unwhitened(
        self, rewards: Tensor, mask: Tensor, values: Tensor, logp_old: Tensor | None, logp_ref: Tensor | None
    ) -> Tensor:
        reward = token_rewards(self.reward_kl, rewards, mask, logp_old, logp_ref)
        return gae(reward, values, mask, self.gamma, self.lam)


def token_rewards(
    reward_kl: float, rewards: Tensor, mask: Tensor, logp_old: Tensor | None, logp_ref: Tensor | None
) -> Tensor:
    """(N,) rewards on each response's last valid token, minus the KL penalty on every token: (N, T) float32."""
    out = torch.zeros(mask.shape, device=mask.device)
    if mask.shape[1]:
        last = mask.shape[1] - 1 - mask.flip(1).byte().argmax(1, keepdim=True)
        out.scatter_(1, last, torch.where(mask.any(1), rewards.float(), 0.0)[:, None])
    if reward_kl == 0:
        return out
    if logp_old is None or logp_ref is None:
        raise ValueError("advantage.reward_kl: advantages() needs logp_old and logp_ref (see Method.needs)")
    return out - reward_kl * torch.where(mask, logp_old.float() - logp_ref.float(), 0.0)


def gae(token_reward: Tensor, values: Tensor | None, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """(N, T) float32 advantages before whitening, zero outside the mask; without values the discounted returns.

    A_t = delta_t + gamma lam A_next with delta_t = r_t + gamma V_next - V_t, where next is the next valid position.
    """
    out = torch.empty(mask.shape, device=mask.device)
    for rows in (slice(start, start + _ROWS) for start in range(0, len(mask), _ROWS)):
        inside = mask[rows].t().contiguous()  # positions first: the recursions then read and write whole rows
        error = torch.where(inside, token_reward[rows].float().t(), 0.0)
        if values is not None:
            value = torch.where(inside, values[rows].float().t(), 0.0)
            following = _backwards(value, (~inside).float())
            error[:-1] += torch.where(inside[:-1], gamma * following[1:], 0.0)
            error -= value
        advantages = _backwards(error, torch.where(inside, gamma * lam, 1.0))
        out[rows] = torch.where(inside, advantages, 0.0).t()
    return out


def _backwards(terms: Tensor, factors: Tensor) -> Tensor:
    """x_t = terms_t + factors_t * x_{t+1} from the end, all (T, n)."""
    out = terms.clone()
    for t in range(len(out) - 2, -1, -1):
        torch.addcmul(terms[t], factors[t], out[t + 1], out=out[t])
    return out


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """(A - mean) / sqrt(var + 1e-8) over the mask, with Bessel's correction; fewer than two tokens: unchanged.

    advantages (N, T), zero outside the mask, and so is the result.
    """
    n = int(row_counts(mask).sum())
    if n < 2:
        return advantages
    mean = float(advantages.sum(dtype=torch.float64)) / n
    centred = (advantages - mean).masked_fill_(~mask, 0.0)
    squares = sum(float(rows.square().sum(dtype=torch.float64)) for rows in centred.split(_ROWS))
    return centred.mul_((squares / (n - 1) + 1e-8) ** -0.5)


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
    near = v
    if part.value_clip is not None:
        move = v - old
        near = torch.where(move.abs() > part.value_clip, old + move.clamp(-part.value_clip, part.value_clip), v)
    clipped_error = (near - target) ** 2
    loss = 0.5 * aggregate(torch.maximum(error, clipped_error), mask, "token_mean", denominators)
    n = float(mask.sum())
    clipped = float(((clipped_error > error) & mask).sum())
    return LossOutput(loss, {"value/error": (float(error.detach().sum()), n), "value/clip_fraction": (clipped, n)})
