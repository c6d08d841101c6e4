"""Outcomes and the exact verifier."""

import numpy as np
import pytest
import torch

from polarity.errors import UserError
from polarity.rewards import Outcome, as_outcome, exact, resolve_verifier, verify


@pytest.mark.parametrize(
    ("response", "gold", "status"),
    [
        ("12 + 60 = 72\n#### 72", "72", "correct"),
        ("#### 71\nno: #### 72", "72", "correct"),  # the last one counts
        ("72", "72", "correct"),  # no mark: the whole response
        (" $1,234. ", "1234", "correct"),
        ("#### 1234", "1,234", "correct"),
        ("-5", "-5", "correct"),
        ("#### 72\nand so on", "72", "wrong"),
        ("72 73", "73", "wrong"),
        ("#### 0.5", "1/2", "wrong"),  # documented
        ("a, b", "a,b", "wrong"),  # commas go from numbers only
        ("B", "B", "correct"),
        ("", "72", "unparsed"),
        ("####  ", "72", "unparsed"),
        ("72 #### $.", "72", "unparsed"),
    ],
)
def test_exact(response: str, gold: str, status: str):
    outcome = exact(response, gold)
    assert outcome.status == status
    assert outcome.correct == (status == "correct") == (outcome.score == 1.0)


@pytest.mark.parametrize(
    ("verdict", "correct", "score"),
    [
        *((True, True, 1.0), (False, False, 0.0), (1, True, 1.0), (0.5, True, 0.5), (0.49, False, 0.49)),
        *((-1.0, False, -1.0), (np.bool_(True), True, 1.0), (np.float32(0.25), False, 0.25)),
        (torch.tensor(1.0), True, 1.0),
    ],
)
def test_numbers_as_outcomes(verdict: object, correct: bool, score: float):
    assert as_outcome(verdict) == Outcome(correct, "correct" if correct else "wrong", score)


def test_outcomes_say_themselves_what_is_correct():
    """Rewards of -1 and 1, or with a length penalty, do not change polarity."""
    outcome = Outcome(True, "correct", -0.5)
    assert as_outcome(outcome) is outcome


@pytest.mark.parametrize("verdict", [None, "yes", float("nan"), [1.0]])
def test_other_verdicts_are_refused(verdict: object):
    with pytest.raises(UserError, match="must return an Outcome, a bool or a number"):
        as_outcome(verdict)


def test_a_verifier_sees_answer_and_row_and_may_fail():
    row = {"id": "1", "answer": "4", "level": 3}
    assert verify(lambda response, gold, row=None: gold == "4" and row["level"] == 3, "", row).correct
    outcome = verify(lambda response, gold, row=None: int(response) == 4, "four", row)
    assert (outcome.correct, outcome.status, outcome.score) == (False, "error", 0.0)
    assert outcome.extracted
    assert outcome.extracted.startswith("ValueError: invalid literal")


def test_names():
    assert resolve_verifier("exact") is exact
    with pytest.raises(UserError, match=r"unknown verifier 'math_'; .*exact.*or module:NAME"):
        resolve_verifier("math_")
