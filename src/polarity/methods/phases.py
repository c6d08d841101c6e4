"""A method that is a sequence of methods, such as NSR for 50 steps and then DAPO.

The NSR paper (Appendix E) proposes negative samples alone as a warm-up before ordinary reinforcement learning; this is
the general form. s counts the rollout steps of the whole run; decays begin anew with the phase that they belong to, and
a closed loop goes on from the weight that an earlier phase's loop at the same place had reached.
"""

import re
from typing import Annotated

from pydantic import Field, SerializeAsAny, model_validator

from polarity.methods.catalog import METHODS
from polarity.methods.method import Method
from polarity.methods.part import Part
from polarity.methods.schedules import LinearDecay
from polarity.methods.shaping import scale_path

# A sequence by name: nsr_50_then_dapo, psr_10_then_nsr_20_then_dapo.
SEQUENCE = "{METHOD}_{STEPS}_then_{METHOD}"
_STEP = re.compile(r"(.+?)_([1-9]\d*)_then_(.+)")


class Phase(Part):
    """One method and how long it is in force."""

    method: SerializeAsAny[Method]
    """The method of this phase."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Rollout steps; null in the last phase: to the end of the run."""
    base: str | None = None
    """What the method was made from, where it is a user's own (module:NAME)."""


class Phases(Part):
    """Methods in turn. Ask `at(step)` for the one in force; that is what has rewards, advantages, shape and loss."""

    name: Annotated[str, Field(min_length=1)]
    """Name in tables and run directories."""
    source: str = ""
    """Where the definition comes from."""
    phases: Annotated[tuple[Phase, ...], Field(min_length=2)]
    """The methods in turn; all but the last with a number of steps."""

    @model_validator(mode="after")
    def _check(self) -> "Phases":
        if any(phase.steps is None for phase in self.phases[:-1]):
            raise ValueError("every phase but the last needs its number of steps")
        if self.phases[-1].steps is not None:
            raise ValueError("the last phase goes on to the end of the run: drop its steps")
        return self

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that a run goes through."""
        return tuple(phase.method for phase in self.phases)

    @property
    def needs(self) -> frozenset[str]:
        """What an engine must be able to compute in some phase; ask `at(step).needs` for what a step takes."""
        return frozenset().union(*(method.needs for method in self.methods))

    @property
    def watches(self) -> frozenset[str]:
        """Names of the metrics that closed-loop schedules of some phase read."""
        return frozenset().union(*(method.watches for method in self.methods))

    @property
    def compares_group(self) -> bool:
        """Whether some phase compares a response with its group."""
        return any(method.compares_group for method in self.methods)

    @property
    def skips_zero_advantage(self) -> bool:
        """Whether rows with A = 0 carry no gradient in any phase; ask `at(step)` for that of a step."""
        return all(method.skips_zero_advantage for method in self.methods)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first rollout step of each phase."""
        starts = [0]
        for phase in self.phases[:-1]:
            starts.append(starts[-1] + (phase.steps or 0))
        return tuple(starts)

    def at(self, step: int) -> Method:
        """The method in force at rollout step `step`, its decays counted from the start of its phase."""
        index = sum(start <= step for start in self.starts) - 1
        return _delayed(self.phases[index].method, self.starts[index])


def _delayed(method: Method, steps: int) -> Method:
    """The method with every decay begun `steps` later: a line that is `steps` higher at s = 0."""
    changes = {}
    for name, part in method.shaping.parts:
        decay = part.scale
        if isinstance(decay, LinearDecay) and decay.per_step and steps:
            changes[scale_path(name)] = {**decay.model_dump(), "start": decay.start + decay.per_step * steps}
    return method.vary(changes) if changes else method


def named_sequence(name: str) -> Phases | None:
    """The sequence that a name spells out, of methods of the catalog; None where it spells none.

    Raises KeyError when a method in it is unknown.
    """
    phases: list[Phase] = []
    rest, told = name, []
    while match := _STEP.fullmatch(rest):
        first, steps, rest = match.groups()
        phases.append(Phase(method=METHODS[first], steps=int(steps)))
        told.append(f"{first} for {steps} rollout steps")
    if not phases:
        return None
    return Phases(name=name, source=", then ".join([*told, rest]), phases=(*phases, Phase(method=METHODS[rest])))
