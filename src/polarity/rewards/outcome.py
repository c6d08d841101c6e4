"""What a verifier says about one response."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from polarity.errors import UserError

Status = Literal["correct", "wrong", "unparsed", "timeout", "error"]
STATUSES: tuple[Status, ...] = get_args(Status)


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


# A verifier, built in or a user's: (response, gold answer, whole problem row) -> verdict. A verifier that can do better
# than one after the other also has check_many(items) -> list[Outcome], in order; it raises nothing for a bad response.
Verifier = Callable[..., "Outcome | bool | float"]
Item = tuple[str, str] | tuple[str, str, Mapping[str, Any] | None]  # response, gold, row


def as_outcome(verdict: Any) -> Outcome:
    """A verifier's return value as an Outcome. A number (also NumPy's or PyTorch's) is correct at score >= 0.5."""
    if isinstance(verdict, Outcome):
        if verdict.status not in STATUSES or not math.isfinite(verdict.score):
            raise UserError(f"the verifier returned {verdict}; status: {', '.join(STATUSES)}; score: a finite number")
        return verdict
    number = verdict.item() if hasattr(verdict, "item") else verdict
    if not isinstance(number, (bool, int, float)) or not math.isfinite(number):
        raise UserError(f"the verifier returned {verdict!r}; it must return an Outcome, a bool or a number")
    score = float(number)
    correct = score >= 0.5
    return Outcome(correct, "correct" if correct else "wrong", score)


def verify(verifier: Verifier, response: str, row: Mapping[str, Any]) -> Outcome:
    """Run `verifier` on one response to the problem `row` (keys: answer, and whatever the verifier wants).

    A verifier that raises has failed on this response: status error, score 0.
    """
    return _judge(verifier, response, row["answer"], row)


def check_many(verifier: Verifier, items: Sequence[Item]) -> list[Outcome]:
    """One Outcome an item, in order: by the verifier's own `check_many` where it has one, else one after the other."""
    if hasattr(verifier, "check_many"):
        return verifier.check_many(items)
    return [_judge(verifier, item[0], item[1], item[2] if len(item) > 2 else None) for item in items]


def verify_all(verifier: Verifier, responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """One Outcome a response; N responses to the problems of N rows. Raises UserError when all of them failed."""
    items = [(response, row["answer"], row) for response, row in zip(responses, rows, strict=True)]
    outcomes = check_many(verifier, items)
    refuse_failure(outcomes, "the verifier")
    return outcomes


def refuse_failure(outcomes: Sequence[Outcome], who: str) -> None:
    """Raise UserError when there are outcomes and every one is an error: that is the verifier, not the responses."""
    if outcomes and all(outcome.status == "error" for outcome in outcomes):
        raise UserError(
            f"{who} failed on every response, with {outcomes[0].extracted}; "
            f"it is called as verifier(response, gold, row=row)"
        )


def _judge(verifier: Verifier, response: str, gold: str, row: Mapping[str, Any] | None) -> Outcome:
    try:
        verdict = verifier(response, gold, row=row)
    except Exception as error:  # a user's code on a model's text: one odd response must not end a run
        return Outcome(False, "error", 0.0, extracted=f"{type(error).__name__}: {error}")
    return as_outcome(verdict)
