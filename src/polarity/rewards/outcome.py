"""What a verifier says about one response."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["correct", "wrong", "unparsed", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict on one response. Polarity is `correct`, a boolean; `score` is what becomes the reward.

    status: tells wrong from unparsed (no answer found), timeout and error (the verifier itself failed).
    extracted: the answer as read from the response; strategy: the name of the reasoning strategy, where a
    verifier can tell strategies apart (worlds do, exactly).
    """

    correct: bool
    status: Status
    score: float
    extracted: str | None = None
    strategy: str | None = None


# A verifier, built in or a user's: (response, gold answer, whole problem row) -> verdict.
Verifier = Callable[..., "Outcome | bool | float"]


def as_outcome(verdict: "Outcome | bool | float") -> Outcome:
    """A verifier's return value as an Outcome. A float is correct at score >= 0.5."""
    if isinstance(verdict, Outcome):
        return verdict
    if not isinstance(verdict, (bool, int, float)):
        raise TypeError(f"a verifier returns Outcome, bool or float, not {type(verdict).__name__}")
    score = float(verdict)
    correct = score >= 0.5
    return Outcome(correct, "correct" if correct else "wrong", score)


def verify(verifier: Verifier, response: str, row: Mapping[str, Any]) -> Outcome:
    """Run `verifier` on one response to the problem `row` (keys: answer, and whatever the verifier wants)."""
    return as_outcome(verifier(response, row["answer"], row=row))
