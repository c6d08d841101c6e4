"""How a weight changes over a run. A plain number is a constant; a mapping is a schedule.

Steps are rollout steps, the first is s = 0 (one generate-and-update cycle; not optimiser steps: counted in those,
A3PO's boost would be over after a dozen rollouts).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, Tag, model_validator

from polarity.methods.part import Part

# What closed-loop schedules remember between steps; saved in checkpoints.
State = Mapping[str, float]


class LinearDecay(Part):
    """max(start - per_step * s, floor): A3PO, Eq. 2, with rho = start and alpha = per_step."""

    kind: Literal["decay"] = "decay"
    """Linear decay from start to floor."""
    start: NonNegativeFloat
    """Weight at the first rollout step (rho in the A3PO paper)."""
    floor: NonNegativeFloat = 1.0
    """Weight that the decay ends at; 1 leaves the advantage as it is."""
    per_step: NonNegativeFloat | None = None
    """Decrease per rollout step (alpha in the A3PO paper). Give this or `until`."""
    until: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of the run after which the floor is reached; becomes per_step when the configuration is read."""

    @model_validator(mode="after")
    def _check(self) -> "LinearDecay":
        if (self.per_step is None) == (self.until is None):
            raise ValueError("give exactly one of per_step (decrease per rollout step) and until (fraction of the run)")
        if self.start < self.floor:
            raise ValueError(
                f"start {self.start:g} is below floor {self.floor:g}, so the weight would always be the floor; "
                f"for a constant weight write the number itself"
            )
        return self

    @property
    def steps(self) -> float:
        """Rollout steps until the floor is reached; infinite when it never is."""
        if self.start == self.floor:
            return 0.0
        return (self.start - self.floor) / self.per_step if self.per_step else float("inf")

    def over(self, steps: int) -> "LinearDecay":
        """The same decay with `until` turned into `per_step` for a run of `steps` rollout steps."""
        if self.until is None:
            return self
        per_step = (self.start - self.floor) / (self.until * steps)
        return LinearDecay(start=self.start, floor=self.floor, per_step=per_step)

    def value(self, step: int) -> float:
        """The weight at rollout step `step` >= 0."""
        if self.per_step is None:
            raise ValueError("a decay with `until` has no value before the run's length is known: call over(steps)")
        return max(self.start - self.per_step * step, self.floor)


def _kind(value: Any) -> str:
    return "decay" if isinstance(value, (Mapping, LinearDecay)) else "number"


Schedule = Annotated[
    Annotated[NonNegativeFloat, Tag("number")] | Annotated[LinearDecay, Tag("decay")], Discriminator(_kind)
]


def weight_at(schedule: float | LinearDecay, step: int, state: State | None = None) -> float:
    """The weight in force at rollout step `step`. `state` is read by closed-loop schedules only; there is none yet."""
    return schedule.value(step) if isinstance(schedule, LinearDecay) else schedule


def changes(schedule: float | LinearDecay) -> bool:
    """Whether the weight depends on the step at all."""
    return isinstance(schedule, LinearDecay) and schedule.start != schedule.floor and schedule.per_step != 0
