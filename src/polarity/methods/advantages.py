"""Rewards -> advantages, one a response (N,) or one a token (N, T).

N responses, each with the id of its group (the G responses to one occurrence of a prompt), T padded length. Ids are any
integers, in any order, and groups may differ in size. Arithmetic is in float64: equal rewards such as -0.3 have a
float32 mean that differs from them, and dividing by a standard deviation of about 0 turns that rounding into an
advantage. A new kind is a Part with a `kind` and a `compute`, and a place in `Advantage`.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonPositiveFloat
from torch import Tensor

from polarity.errors import UserError
from polarity.methods.inputs import Scored, given
from polarity.methods.part import Part, Unit
from polarity.methods.values import CriticAdvantage, gae, token_rewards, whitened

# Rewards of a group that differ by less than this are equal.
_SAME = 1e-9


class GroupAdvantage(Part):
    """(R - mean) / (std + eps) over the group: GRPO. A group of one, or of equal rewards, has advantage 0."""

    compares_group: ClassVar[bool] = True
    token_level: ClassVar[bool] = False

    kind: Literal["group"] = "group"
    """Reward normalised over the responses to the same prompt."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the standard deviation (verl 1e-6, TRL 1e-4)."""

    def compute(self, scored: Scored) -> Tensor:
        """(N,) float32."""
        return group_normalised(scored.rewards, scored.groups, self.eps)


class CentredAdvantage(Part):
    """R - mean over the group, not divided by the standard deviation: Dr. GRPO. A group of one has advantage 0."""

    compares_group: ClassVar[bool] = True
    token_level: ClassVar[bool] = False

    kind: Literal["centred"] = "centred"
    """Reward minus the mean over the responses to the same prompt."""

    def compute(self, scored: Scored) -> Tensor:
        """(N,) float32."""
        return _Groups(scored.rewards, scored.groups).centred.float()


class LeaveOneOutAdvantage(Part):
    """R minus the mean of the other responses to the same prompt: RLOO; G/(G-1) times the centred reward."""

    compares_group: ClassVar[bool] = True
    token_level: ClassVar[bool] = False

    kind: Literal["leave_one_out"] = "leave_one_out"
    """Reward minus the mean over the other responses to the same prompt; a group of one has 0."""

    def compute(self, scored: Scored) -> Tensor:
        """(N,) float32."""
        groups = _Groups(scored.rewards, scored.groups)
        size = groups.size[groups.index]
        return (groups.centred * size / (size - 1).clamp(min=1)).float()


class SignedAdvantage(Part):
    """One number for every correct response and one for every wrong one, whatever the rest of the group did.

    Decided by correctness, never by a reward's value (Zhu et al., section 3), so a continuous score counts through the
    verifier's verdict alone. With `graded` (ours; their paper leaves continuous rewards open) a score R in [0, 1]
    scales it: positive * R for correct responses, negative * (1 - R) for wrong ones; scores of 1 and 0 give the plain
    form.
    """

    compares_group: ClassVar[bool] = False
    token_level: ClassVar[bool] = False

    kind: Literal["signed"] = "signed"
    """A fixed advantage by correctness."""
    positive: NonNegativeFloat = 1.0
    """Advantage of a correct response (lambda in W-REINFORCE)."""
    negative: NonPositiveFloat = -1.0
    """Advantage of a wrong response."""
    graded: bool = False
    """Scale by a continuous score in [0, 1]: positive * R where correct, negative * (1 - R) where wrong."""

    def compute(self, scored: Scored) -> Tensor:
        """(N,) float32. Raises UserError when graded scores leave [0, 1]."""
        score = scored.rewards.float()
        right, wrong = torch.full_like(score, self.positive), torch.full_like(score, self.negative)
        if self.graded:
            if ((score < 0) | (score > 1)).any():
                raise UserError("advantage.graded needs scores between 0 and 1; rescale the verifier's score")
            right, wrong = right * score, wrong * (1 - score)
        return torch.where(scored.correct, right, wrong)


class ReturnsAdvantage(Part):
    """Discounted returns of token rewards, whitened over all tokens of the step: REINFORCE++.

    Whitening weighs every token alike, so long responses dominate the mean. With baseline `group` the group's mean is
    taken off the rewards first (the REINFORCE++-baseline variant).
    """

    token_level: ClassVar[bool] = True

    kind: Literal["returns"] = "returns"
    """Token returns, whitened over the step."""
    gamma: Unit = 1.0
    """Discount per token."""
    reward_kl: NonNegativeFloat = 0.0
    """Coefficient of the penalty logp_old - logp_ref (k1) in each token's reward; 0 means no reference policy."""
    baseline: Literal["none", "group"] = "none"
    """What is taken off the reward before the returns: nothing, or the mean over the responses to the same prompt."""

    @property
    def compares_group(self) -> bool:
        return self.baseline == "group"

    def compute(self, scored: Scored) -> Tensor:
        """(N, T) float32, zero outside the mask."""
        mask = given(scored.mask, "mask")
        rewards = _Groups(scored.rewards, scored.groups).centred if self.baseline == "group" else scored.rewards
        returns = gae(
            token_rewards(self.reward_kl, rewards, mask, scored.logp_old, scored.logp_ref), None, mask, self.gamma, 1.0
        )
        return whitened(returns, mask)


AnyAdvantage = (
    GroupAdvantage | CentredAdvantage | LeaveOneOutAdvantage | SignedAdvantage | ReturnsAdvantage | CriticAdvantage
)
Advantage = Annotated[AnyAdvantage, Field(discriminator="kind")]


class _Groups:
    """Statistics of (N,) rewards by group, in float64: index (N,) of each row's group, size and mean of each group."""

    def __init__(self, rewards: Tensor, groups: Tensor) -> None:
        ids, self.index = torch.unique(groups, return_inverse=True)
        self.rewards = rewards.double()
        self.zeros = self.rewards.new_zeros(len(ids))
        self.size = self.sum(torch.ones_like(self.rewards))
        self.mean = self.sum(self.rewards) / self.size

    def sum(self, values: Tensor) -> Tensor:
        return self.zeros.index_add(0, self.index, values)

    @property
    def centred(self) -> Tensor:
        """(N,) rewards minus their group's mean; exactly 0 where all rewards of the group are the same."""
        highest = self.zeros.scatter_reduce(0, self.index, self.rewards, "amax", include_self=False)
        lowest = self.zeros.scatter_reduce(0, self.index, self.rewards, "amin", include_self=False)
        return torch.where((highest - lowest < _SAME)[self.index], 0.0, self.rewards - self.mean[self.index])


def group_normalised(rewards: Tensor, groups: Tensor, eps: float = 1e-6) -> Tensor:
    """(N,) rewards, (N,) int group ids -> (N,) float32 advantages; unbiased standard deviation (ddof 1)."""
    stats = _Groups(rewards, groups)
    centred = stats.centred
    variance = stats.sum(centred * centred) / (stats.size - 1).clamp(min=1)
    return (centred / (variance.sqrt() + eps)[stats.index]).float()


def mixed_groups(groups: Tensor, correct: Tensor) -> Tensor:
    """(N,) bool: rows whose group holds both correct and wrong responses, or is a group of one (DAPO's filter)."""
    stats = _Groups(correct, groups)
    right = stats.sum(stats.rewards)
    return ((right > 0) & (right < stats.size) | (stats.size == 1))[stats.index]
