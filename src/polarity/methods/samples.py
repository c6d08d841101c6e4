"""Which responses are trained on, and the penalty on long ones. N responses of a rollout step."""

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from polarity.methods.advantages import mixed_groups
from polarity.methods.part import Part


class Filter(Part):
    """Which responses are trained on. The others leave every denominator."""

    polarity: Literal["all", "positive", "negative"] = "all"
    """all responses, only correct ones (PSR), or only wrong ones (NSR)."""
    dynamic_sampling: bool = False
    """Drop groups whose responses are all correct or all wrong, and generate on until enough are left (DAPO)."""

    @property
    def dropped(self) -> str | None:
        """The polarity that is not trained on."""
        return {"positive": "negative", "negative": "positive"}.get(self.polarity)

    def keep(self, groups: Tensor, correct: Tensor) -> Tensor:
        """(N,) bool, by correctness only. groups: (N,) int; correct: (N,) bool."""
        keep = torch.ones_like(correct, dtype=torch.bool)
        if self.polarity != "all":
            keep = correct == (self.polarity == "positive")
        return keep & mixed_groups(groups, correct) if self.dynamic_sampling else keep


class Overlong(Part):
    """DAPO's soft penalty for length: from 0 at max_length - buffer down to -factor at max_length."""

    buffer: Annotated[int, Field(ge=1)] = 4096
    """Tokens below the response limit in which the penalty grows."""
    factor: NonNegativeFloat = 1.0
    """Penalty at the response limit."""

    def penalised(self, rewards: Tensor, lengths: Tensor, max_length: int | None) -> Tensor:
        """(N,) rewards after the penalty. lengths: (N,) tokens with EOS."""
        if max_length is None:
            raise ValueError("overlong: rewards() needs max_length, the run's response limit")
        if self.buffer > max_length:
            raise ValueError(
                f"overlong.buffer {self.buffer} is longer than the response limit {max_length}: "
                f"set overlong.buffer to about a fifth of it"
            )
        excess = (lengths - (max_length - self.buffer)) / self.buffer
        return rewards - self.factor * excess.clamp(min=0)
