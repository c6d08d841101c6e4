"""How a weight changes over a run. A plain number is a constant; a mapping is a schedule.

Steps are rollout steps, the first is s = 0 (one generate-and-update cycle; not optimiser steps: counted in those,
A3PO's boost would be over after a dozen rollouts).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, Tag, model_validator

from polarity.methods.part import Part

# What closed-loop schedules remember between steps, by the dotted path of the schedule; saved in checkpoints.
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


class ClosedLoop(Part):
    """A weight that follows a measurement: ours, beyond the paper, whose decay is the same whatever the policy does.

    After each rollout step the weight rises by `step` where the metric was below the band [low, high], falls by `step`
    where it was above, and stays where it was inside; it never leaves [floor, ceiling]. The sign is the same for both
    metrics: low entropy asks for more exploration, and a wide mismatch is what strong weights on negative samples
    cause (A3PO paper, Appendix H).
    """

    METRICS: ClassVar[Mapping[str, str]] = {"entropy": "entropy/mean", "mismatch": "mismatch/mean"}

    kind: Literal["closed_loop"] = "closed_loop"
    """Kept so that a measured number stays in a band."""
    metric: Literal["entropy", "mismatch"] = "entropy"
    """Mean token entropy of the step's rollouts in nats, or mean |p_rollout - p_old| of their tokens."""
    low: NonNegativeFloat
    """Lower end of the target band of the metric."""
    high: NonNegativeFloat
    """Upper end of the target band of the metric."""
    start: NonNegativeFloat = 1.0
    """Weight at the first rollout step."""
    step: Annotated[float, Field(gt=0)] = 0.05
    """How far the weight moves in one rollout step."""
    floor: NonNegativeFloat = 1.0
    """Smallest weight."""
    ceiling: NonNegativeFloat = 3.0
    """Largest weight."""

    @model_validator(mode="after")
    def _check(self) -> "ClosedLoop":
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}: the band is empty")
        if not self.floor <= self.start <= self.ceiling:
            raise ValueError(f"start {self.start:g} is not between floor {self.floor:g} and ceiling {self.ceiling:g}")
        return self

    @property
    def watches(self) -> str:
        """Name of the metric, as in metrics.jsonl."""
        return self.METRICS[self.metric]

    def following(self, weight: float, metrics: Mapping[str, float]) -> float:
        """The weight of the next step; unchanged after a step that could not measure the metric (it had no tokens)."""
        measured = metrics.get(self.watches)
        if measured is None:
            return weight
        return self.within(weight + self.step * ((measured < self.low) - (measured > self.high)))

    def within(self, weight: float) -> float:
        """The weight, no further than floor or ceiling (an earlier phase may have left one beyond them)."""
        return min(max(weight, self.floor), self.ceiling)


def _kind(value: Any) -> str:
    if isinstance(value, LinearDecay | ClosedLoop):
        return value.kind
    return str(value.get("kind", "decay")) if isinstance(value, Mapping) else "number"


Schedule = Annotated[
    Annotated[NonNegativeFloat, Tag("number")]
    | Annotated[LinearDecay, Tag("decay")]
    | Annotated[ClosedLoop, Tag("closed_loop")],
    Discriminator(_kind),
]


def weight_at(schedule: float | LinearDecay | ClosedLoop, step: int, state: State | None, path: str) -> float:
    """The weight in force at rollout step `step`; a closed loop's is in `state` under its dotted `path`."""
    if isinstance(schedule, LinearDecay):
        return schedule.value(step)
    if isinstance(schedule, ClosedLoop):
        return schedule.within((state or {}).get(path, schedule.start))
    return schedule


def changes(schedule: float | LinearDecay | ClosedLoop) -> bool:
    """Whether the weight depends on the step or on what was measured."""
    if isinstance(schedule, ClosedLoop):
        return schedule.floor != schedule.ceiling
    return isinstance(schedule, LinearDecay) and schedule.start != schedule.floor and schedule.per_step != 0
