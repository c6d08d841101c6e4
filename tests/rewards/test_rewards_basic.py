"""Outcomes, the exact verifier, the random control, weighted rewards."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from polarity.errors import UserError
from polarity.rewards import (
    ExactVerifier,
    Outcome,
    RandomVerifier,
    WeightedVerifier,
    as_outcome,
    exact,
    resolve_verifier,
    verify,
    verify_all,
)


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


@pytest.mark.parametrize("verdict", [None, "yes", float("nan"), float("inf"), [1.0]])
def test_other_verdicts_are_refused(verdict: object):
    with pytest.raises(UserError, match="must return an Outcome, a bool or a number"):
        as_outcome(verdict)


@pytest.mark.parametrize("outcome", [Outcome(True, "correct", float("nan")), Outcome(True, "fine", 1.0)])  # type: ignore[arg-type]
def test_outcomes_that_no_caller_could_use_are_refused(outcome: Outcome):
    with pytest.raises(UserError, match="status: correct, wrong, unparsed, timeout, error; score: a finite number"):
        as_outcome(outcome)


def test_a_verifier_sees_answer_and_row_and_may_fail():
    row = {"id": "1", "answer": "4", "level": 3}
    assert verify(lambda response, gold, row=None: gold == "4" and row["level"] == 3, "", row).correct
    outcome = verify(lambda response, gold, row=None: int(response) == 4, "four", row)
    assert (outcome.correct, outcome.status, outcome.score) == (False, "error", 0.0)
    assert outcome.extracted
    assert outcome.extracted.startswith("ValueError: invalid literal")


def test_exact_in_bulk():
    items = [("#### 72", "72"), ("#### 72", "71", {"id": "1"})]
    assert ExactVerifier().check_many(items) == [exact(*item) for item in items]


def test_names():
    assert isinstance(resolve_verifier("exact"), ExactVerifier)
    with pytest.raises(UserError, match=r"unknown verifier 'maths'; did you mean .math.*or module:NAME"):
        resolve_verifier("maths")


def test_a_verifier_with_check_many_gets_all_items_at_once():
    class Counting:
        calls = 0

        def __call__(self, response, gold, row=None):
            raise AssertionError("one after the other")

        def check_many(self, items):
            self.calls += 1
            return [as_outcome(response == gold and row["id"] == "1") for response, gold, row in items]

    verifier = Counting()
    rows = [{"id": "1", "answer": "4"}, {"id": "2", "answer": "4"}]
    assert [o.correct for o in verify_all(verifier, ["4", "4"], rows)] == [True, False]
    assert verifier.calls == 1


def test_a_verifier_that_always_fails_is_named():
    def broken(response, gold, row=None):
        raise KeyError("level")

    row = {"id": "1", "answer": "4"}
    with pytest.raises(UserError, match="the verifier failed on every response, with KeyError: 'level'"):
        verify_all(broken, ["4", "5"], [row, row])
    assert verify_all(broken, [], []) == []


# --- the random control

PAIRS = [(f"response {i}", f"{i % 7}") for i in range(2000)]


def test_random_rewards_do_not_depend_on_order_or_number():
    verifier = RandomVerifier(seed=1)
    found = verifier.check_many(PAIRS)
    assert verifier.check_many(PAIRS[::-1]) == found[::-1]
    assert [verifier(*pair, {"id": "x"}) for pair in PAIRS[:9]] == found[:9]
    assert RandomVerifier(seed=2).check_many(PAIRS) != found
    assert all(o.score == o.correct and o.status == ("correct" if o.correct else "wrong") for o in found)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_random_rewards_have_their_probability(p: float):
    mean = float(np.mean([o.correct for o in RandomVerifier(p).check_many(PAIRS)]))
    assert mean == pytest.approx(p, abs=4 * (p * (1 - p) / len(PAIRS)) ** 0.5 + 1e-9)


def test_random_rewards_tell_where_the_gold_ends_and_take_any_text():
    verifier = RandomVerifier()
    swapped = [(f"{i}", f"1{i}") for i in range(64)], [(f"{i}1", f"{i}") for i in range(64)]
    assert verifier.check_many(swapped[0]) != verifier.check_many(swapped[1])
    verifier("\ud800", "")
    with pytest.raises(UserError, match="between 0 and 1"):
        RandomVerifier(1.5)


# --- several rewards


def short(response: str, gold: str, row: object = None) -> float:
    return -len(response) / 10


def test_weights_make_the_score_and_one_verifier_the_polarity():
    verifier = WeightedVerifier({"exact": (ExactVerifier(), 0.5), "short": (short, 2.0)}, correct="exact")
    items = [("#### 72", "72"), ("#### 71", "72", None), ("", "72")]
    found = verifier.check_many(items)
    assert found == [verifier(*item) for item in items]
    assert [(o.correct, o.status, o.extracted) for o in found] == [
        (True, "correct", "72"), (False, "wrong", "71"), (False, "unparsed", None),
    ]  # fmt: skip
    assert [o.score for o in found] == pytest.approx([0.5 - 1.4, -1.4, 0.0])


def test_names_and_weights_as_in_a_configuration():
    verifier = resolve_verifier("exact", rewards={"boxed_format": 0.25})
    found = verify_all(verifier, [r"\boxed{5} #### 5", "#### 5", r"\boxed{5}"], [{"answer": "5"}] * 3)
    assert [(o.correct, o.score) for o in found] == [(True, 1.25), (True, 1.0), (False, 0.25)]
    verifier = resolve_verifier("exact", rewards={"boxed_format": 0.2, "exact": 0.8})
    assert verify_all(verifier, [r"\boxed{5} #### 5"], [{"answer": "5"}])[0].score == pytest.approx(1.0)


def test_a_part_that_always_fails_is_named_and_one_that_sometimes_fails_adds_nothing():
    def picky(response, gold, row=None):
        return 1 / len(response)

    verifier = WeightedVerifier({"exact": (exact, 1.0), "picky": (picky, 1.0)}, correct="exact")
    assert [o.score for o in verifier.check_many([("", "5"), ("5", "5")])] == [0.0, 2.0]
    with pytest.raises(UserError, match="weighted verifier 'picky' failed on every response, with ZeroDivisionError"):
        verifier.check_many([("", "5"), ("", "6")])


def test_weights_that_are_refused():
    with pytest.raises(UserError, match="no weighted verifier is named 'exat'; did you mean 'exact'"):
        WeightedVerifier({"exact": (exact, 1.0)}, correct="exat")
    with pytest.raises(UserError, match="weight of verifier 'exact' is nan"):
        WeightedVerifier({"exact": (exact, float("nan"))}, correct="exact")
    with pytest.raises(UserError, match="unknown verifier 'boxd'"):
        resolve_verifier("exact", rewards={"boxd": 1.0})
    with pytest.raises(UserError, match="'exact' needs no time limit"):
        resolve_verifier("exact", limit=2.0)


def test_core_imports_stay_light():
    heavy = "torch sympy math_verify numpy transformers"
    code = f"import sys, polarity.rewards; print(*(set('{heavy}'.split()) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
