"""Exact match of a short final answer."""

from collections.abc import Iterable, Mapping
from typing import Any

from polarity.rewards.outcome import Item, Outcome

MARK = "####"


def exact(response: str, gold: str, row: Mapping[str, Any] | None = None) -> Outcome:
    """Compare what follows the last `####` (GSM8K's mark; the whole response where it is absent) with `gold`.

    White space at the ends, a full stop, a dollar sign and thousands commas do not count. An empty answer is unparsed.
    Not covered: any other notation of the same value (1/2 against 0.5).
    """
    answer = _normal(response.rpartition(MARK)[2])
    if not answer:
        return Outcome(False, "unparsed", 0.0)
    correct = answer == _normal(gold)
    return Outcome(correct, "correct" if correct else "wrong", float(correct), extracted=answer)


class ExactVerifier:
    """`exact`, with the interface of the other verifiers."""

    def __call__(self, response: str, gold: str, row: Mapping[str, Any] | None = None) -> Outcome:
        return exact(response, gold, row)

    def check_many(self, items: Iterable[Item]) -> list[Outcome]:
        """One Outcome an item, (response, gold) or (response, gold, row), in order."""
        return [exact(item[0], item[1]) for item in items]


def _normal(text: str) -> str:
    text = text.strip().rstrip(".").strip().removeprefix("$").strip()
    digits = text.replace(",", "")
    return digits if digits.lstrip("-").replace(".", "", 1).isdigit() else text
