r"""Does a response reach the reference answer of a mathematical problem?

`mode="boxed"`: the last complete `\boxed{...}` counts (`polarity.rewards.extraction`). It is compared exactly, in this
process and in tens of microseconds (`polarity.rewards.comparison` states the conventions). The few pairs that exact
algebra leaves open go to math-verify in a `WorkerPool`, where what hangs is killed. `mode="answer"`: DAPO's rules
(`polarity.rewards.math_answer`).

Limits. Answers longer than `max_chars` are compared as strings. Not decided, hence wrong: equations of different
degree with the same solutions, sets written by a condition ({x | ...}), radians against degrees, a base against none
with other digits, functions under other names. Variables are what their letters say: e and i are the constants, f and
g are functions.
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

from polarity.errors import UserError
from polarity.rewards.comparison import matches
from polarity.rewards.extraction import last_boxed
from polarity.rewards.latex import tokenize
from polarity.rewards.math_answer import answer_line, same_answer
from polarity.rewards.outcome import Item, Outcome
from polarity.rewards.pool import WorkerPool

CACHED = 65_536  # verdicts kept
HARD = 400  # tokens; a longer formula is not given to the computer algebra system
_INTEGER = re.compile(r"[+-]?\d{1,400}")
_UNPARSED = Outcome(False, "unparsed", 0.0)
_NO_GOLD = Outcome(False, "error", 0.0, extracted="the reference answer is not a non-empty string")


class MathVerifier:
    """(response, gold, row=None) -> Outcome; status wrong, unparsed (no answer found), timeout, error; score 1 or 0.

    mode: "boxed" or "answer"; limit: seconds of wall-clock time for one pair that goes to a worker; workers: how many,
    at most; max_chars: length of the longest answer that is read as mathematics; cache: remember verdicts on (gold,
    answer). `extracted` is the answer as it was read. Works from any thread; workers start when the first pair needs
    one.
    """

    def __init__(
        self,
        mode: Literal["boxed", "answer"] = "boxed",
        *,
        limit: float = 3.0,
        workers: int | None = None,
        max_chars: int = 50_000,
        cache: bool = True,
    ):
        if mode not in ("boxed", "answer"):
            raise UserError(f"mode {mode!r} of MathVerifier; use 'boxed' or 'answer'")
        self.mode, self.limit, self.workers, self.max_chars, self.cache = mode, limit, workers, max_chars, cache
        self._pool = WorkerPool("polarity.rewards.math_worker:grade", workers=workers, limit=limit)
        self._verdicts: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, response: str, gold: str, row: Mapping[str, Any] | None = None) -> Outcome:
        return self.check_many([(response, gold)])[0]

    def check_many(self, items: Iterable[Item]) -> list[Outcome]:
        """One Outcome an item, (response, gold) or (response, gold, row), in order; equal pairs are worked out once."""
        outcomes: list[Outcome | None] = []
        open_pairs: dict[tuple[str, str], list[int]] = {}  # answer and gold -> items; dictionaries keep their order
        for at, item in enumerate(items):
            outcome = self._quick(item[0], item[1])
            if isinstance(outcome, str):
                open_pairs.setdefault((outcome, item[1]), []).append(at)
            outcomes.append(None if isinstance(outcome, str) else outcome)
        if open_pairs:
            for (answer, gold), verdict in zip(open_pairs, self._pool.check_many(list(open_pairs)), strict=True):
                if verdict.status in ("correct", "wrong"):
                    self._remember(gold, answer, verdict.correct)
                    verdict = _outcome(verdict.correct, answer)
                for at in open_pairs[answer, gold]:
                    outcomes[at] = verdict
        return [outcome for outcome in outcomes if outcome is not None]

    def start(self) -> None:
        """Start the workers now and wait until they are ready, rather than with the first pair that needs one."""
        self._pool.start()

    def close(self) -> None:
        """End the workers; a later check starts them again."""
        self._pool.close()

    def __reduce__(self) -> tuple[Any, ...]:
        options: dict[str, Any] = {
            "limit": self.limit,
            "workers": self.workers,
            "max_chars": self.max_chars,
            "cache": self.cache,
        }
        return partial(MathVerifier, self.mode, **options), ()

    def _quick(self, response: Any, gold: Any) -> Outcome | str:
        """The verdict, or the answer where it takes a worker."""
        if not isinstance(gold, str) or not gold.strip():
            return _NO_GOLD
        if not isinstance(response, str):
            return _UNPARSED
        if self.mode == "answer":
            found = answer_line(response)
            return _UNPARSED if found is None else _outcome(same_answer(found, gold), found)
        answer = last_boxed(response)
        if answer is None:
            return _UNPARSED
        if answer == gold:
            return _outcome(True, answer[: self.max_chars])
        if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
            return _outcome(int(answer) == int(gold), answer)
        if max(len(answer), len(gold)) > self.max_chars:
            return _outcome(answer == gold.strip(), answer[: self.max_chars])
        verdict = self._verdicts.get((gold, answer)) if self.cache else None
        if verdict is None:
            try:
                verdict = matches(gold, answer)
            except Exception as error:  # one odd answer must not end a run
                return Outcome(False, "error", 0.0, extracted=f"{type(error).__name__}: {error}"[:500])
            if verdict is None and max(len(tokenize(answer)), len(tokenize(gold))) <= HARD:
                return answer
            self._remember(gold, answer, bool(verdict))
        return _outcome(bool(verdict), answer)

    def _remember(self, gold: str, answer: str, verdict: bool) -> None:
        """Keep a verdict; the oldest one leaves. A look-up does not move its entry: reads need no lock."""
        if not self.cache or len(gold) + len(answer) > 1000:
            return
        with self._lock:
            self._verdicts[gold, answer] = verdict
            if len(self._verdicts) > CACHED:
                self._verdicts.popitem(last=False)


def _outcome(correct: bool, answer: str) -> Outcome:
    return Outcome(correct, "correct" if correct else "wrong", float(correct), extracted=answer)
