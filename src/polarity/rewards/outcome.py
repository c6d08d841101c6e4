"""What a verifier says about one response."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from polarity.errors import UserError

Status = Literal["correct", "wrong", "unparsed", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict on one response. Polarity is `correct`, a boolean; `score` is what becomes the reward.

    status: tells wrong from unparsed (no answer found), timeout and error (the verifier itself failed).
    extracted: the answer as read from the response, or what a failed verifier said; strategy: the name of the
    reasoning strategy, where a verifier can tell strategies apart (worlds do, exactly).
    """

    correct: bool
    status: Status
    score: float
    extracted: str | None = None
    strategy: str | None = None


# A verifier, built in or a user's: (response, gold answer, whole problem row) -> verdict.
Verifier = Callable[..., "Outcome | bool | float"]


def as_outcome(verdict: Any) -> Outcome:
    """A verifier's return value as an Outcome. A number (also NumPy's or PyTorch's) is correct at score >= 0.5."""
    if isinstance(verdict, Outcome):
        return verdict
    number = verdict.item() if hasattr(verdict, "item") else verdict
    if not isinstance(number, (bool, int, float)) or math.isnan(number):
        raise UserError(f"the verifier returned {verdict!r}; it must return an Outcome, a bool or a number")
    score = float(number)
    correct = score >= 0.5
    return Outcome(correct, "correct" if correct else "wrong", score)


def verify(verifier: Verifier, response: str, row: Mapping[str, Any]) -> Outcome:
    """Run `verifier` on one response to the problem `row` (keys: answer, and whatever the verifier wants).

    A verifier that raises has failed on this response: status error, score 0.
    """
    try:
        verdict = verifier(response, row["answer"], row=row)
    except Exception as error:  # a user's code on a model's text: one odd response must not end a run
        return Outcome(False, "error", 0.0, extracted=f"{type(error).__name__}: {error}")
    return as_outcome(verdict)


def verify_all(verifier: Verifier, responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """One Outcome a response; N responses to the problems of N rows. Raises UserError when all of them failed."""
    outcomes = [verify(verifier, response, row) for response, row in zip(responses, rows, strict=True)]
    if outcomes and all(o.status == "error" for o in outcomes):
        raise UserError(
            f"the verifier failed on every response, with {outcomes[0].extracted}; "
            f"it is called as verifier(response, gold, row=row)"
        )
    return outcomes
