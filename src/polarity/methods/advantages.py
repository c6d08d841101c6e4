"""Rewards -> one advantage a response.

N responses, each with the id of its group (the G responses to one occurrence of a prompt). Ids are any integers, in
any order, and groups may differ in size. Arithmetic is in float64: equal rewards such as -0.3 have a float32 mean that
differs from them, and dividing by a standard deviation of about 0 turns that rounding into an advantage.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonPositiveFloat
from torch import Tensor

from polarity.methods.part import Part
from polarity.methods.values import CriticAdvantage

# Rewards of a group that differ by less than this are equal.
_SAME = 1e-9


class GroupAdvantage(Part):
    """(R - mean) / (std + eps) over the group: GRPO. A group of one, or of equal rewards, has advantage 0."""

    kind: Literal["group"] = "group"
    """Reward normalised over the responses to the same prompt."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the standard deviation (verl 1e-6, TRL 1e-4)."""


class SignedAdvantage(Part):
    """One number for every correct response and one for every wrong one, whatever the rest of the group did.

    Decided by correctness, never by a reward's value (Zhu et al., section 3).
    """

    kind: Literal["signed"] = "signed"
    """A fixed advantage by correctness."""
    positive: NonNegativeFloat = 1.0
    """Advantage of a correct response (lambda in W-REINFORCE)."""
    negative: NonPositiveFloat = -1.0
    """Advantage of a wrong response."""


Advantage = Annotated[GroupAdvantage | SignedAdvantage | CriticAdvantage, Field(discriminator="kind")]


def group_normalised(rewards: Tensor, groups: Tensor, eps: float = 1e-6) -> Tensor:
    """(N,) rewards, (N,) int group ids -> (N,) float32 advantages; unbiased standard deviation (ddof 1)."""
    ids, index = torch.unique(groups, return_inverse=True)
    r = rewards.double()
    zeros = r.new_zeros(len(ids))
    size = zeros.index_add(0, index, torch.ones_like(r))
    mean = zeros.index_add(0, index, r) / size
    centred = r - mean[index]
    variance = zeros.index_add(0, index, centred * centred) / (size - 1).clamp(min=1)
    spread = zeros.scatter_reduce(0, index, r, "amax", include_self=False) - zeros.scatter_reduce(
        0, index, r, "amin", include_self=False
    )
    advantages = centred / (variance.sqrt() + eps)[index]
    return torch.where((spread < _SAME)[index], 0.0, advantages).float()


def signed(correct: Tensor, positive: float, negative: float) -> Tensor:
    """(N,) bool -> (N,) float32: `positive` where correct, `negative` elsewhere."""
    values = torch.tensor([negative, positive], dtype=torch.float32, device=correct.device)
    return values[correct.long()]


def mixed_groups(groups: Tensor, correct: Tensor) -> Tensor:
    """(N,) bool: rows whose group holds both correct and wrong responses, or is a group of one (DAPO's filter)."""
    ids, index = torch.unique(groups, return_inverse=True)
    zeros = torch.zeros(len(ids), dtype=torch.long, device=groups.device)
    size = zeros.index_add(0, index, torch.ones_like(index))
    right = zeros.index_add(0, index, correct.long())
    return ((right > 0) & (right < size) | (size == 1))[index]
