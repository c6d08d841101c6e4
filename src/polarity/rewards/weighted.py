"""Several rewards in one score, with one verifier to say what is correct."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from polarity.errors import UserError, nearest
from polarity.rewards.extraction import last_boxed
from polarity.rewards.outcome import Item, Outcome, Verifier, check_many, refuse_failure


def boxed_format(response: str, gold: str, row: Mapping[str, Any] | None = None) -> Outcome:
    r"""1 for a response with a complete, non-empty \boxed{...}, whatever it holds; else unparsed. A reward for form."""
    found = last_boxed(response)
    return Outcome(found is not None, "unparsed" if found is None else "correct", float(found is not None), found)


class WeightedVerifier:
    """The weighted sum of several verifiers' scores; everything else of the Outcome is one verifier's.

    parts: {name: (verifier, weight)}. correct: the name of the part whose correct, status, extracted and strategy the
    Outcome carries, so that polarity stays with it, whatever the others add to or take from the score.

    A part that fails on a response adds nothing for it. One that fails on every item of a `check_many` raises
    UserError; where that is the part named by `correct`, it is left to the caller, as with any verifier.
    """

    def __init__(self, parts: Mapping[str, tuple[Verifier, float]], correct: str):
        if correct not in parts:
            raise UserError(f"no weighted verifier is named {correct!r}; {nearest(correct, parts)}")
        for name, (_, weight) in parts.items():
            if not math.isfinite(weight):
                raise UserError(f"the weight of verifier {name!r} is {weight}; give a finite number")
        self.parts, self.correct = dict(parts), correct

    def __call__(self, response: str, gold: str, row: Mapping[str, Any] | None = None) -> Outcome:
        return self._weigh({name: check_many(part, [(response, gold, row)]) for name, (part, _) in self.parts.items()})[
            0
        ]

    def check_many(self, items: Iterable[Item]) -> list[Outcome]:
        """One Outcome an item, (response, gold) or (response, gold, row), in order."""
        items = list(items)
        found = {name: check_many(part, items) for name, (part, _) in self.parts.items()}
        for name, outcomes in found.items():
            if name != self.correct:
                refuse_failure(outcomes, f"the weighted verifier {name!r}")
        return self._weigh(found)

    def _weigh(self, found: Mapping[str, list[Outcome]]) -> list[Outcome]:
        weights = [self.parts[name][1] for name in found]
        scores = [
            math.fsum(weight * part.score for weight, part in zip(weights, outcomes, strict=True))
            for outcomes in zip(*found.values(), strict=True)
        ]
        return [replace(named, score=score) for named, score in zip(found[self.correct], scores, strict=True)]
