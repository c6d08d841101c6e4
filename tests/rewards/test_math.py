"""MathVerifier against cases of our own, the labelled cases, and the answers of whole benchmarks."""

import json
import os
import pickle
from pathlib import Path

import pytest
from math_cases import CASES
from rewrite_answers import rewrites

from polarity.errors import UserError
from polarity.rewards import MathVerifier, Outcome
from polarity.rewards.comparison import matches
from polarity.rewards.extraction import last_boxed

DATA = os.environ.get("POLARITY_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="POLARITY_TEST_DATA, the folder of benchmark files, is not set")
BENCHMARKS = [
    *("aime24", "aime25", "amc23", "math500", "math_test", "math_train", "gsm8k_test", "gsm8k_train"),
    *("olympiadbench_en_math", "dapo_math_17k"),
]


@pytest.fixture(scope="module")
def verifier():
    made = MathVerifier()
    yield made
    made.close()


def rows(name):
    return [
        json.loads(line)
        for line in (Path(DATA or "") / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    ]


def boxed(answer):
    return f"So the answer is $\\boxed{{{answer}}}$."


# extraction


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3} but \boxed{4", "3"),  # the last complete one
        (r"\boxed{3} then \boxed{}", "3"),  # an empty box is no answer
        (r"\boxed 2 is it", "2"),
        (r"\boxed\frac12", r"\frac12"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        ("no box, the answer is 5", None),
        ("", None),
    ],
)
def test_the_last_complete_box_counts(response, found):
    assert last_boxed(response) == found


# equality


@pytest.mark.parametrize("category", CASES)
def test_answers_that_state_the_same_and_answers_that_do_not(verifier, category):
    listed = CASES[category]
    outcomes = verifier.check_many([(boxed(answer), gold) for gold, answer, _ in listed])
    mistaken = [case for case, outcome in zip(listed, outcomes, strict=True) if outcome.correct != case[2]]
    assert not mistaken


def test_outcomes_say_what_was_read(verifier):
    right, wrong, none = verifier.check_many([(boxed("0.5"), r"\frac12"), (boxed("3"), "4"), ("I do not know", "4")])
    assert (right.correct, right.status, right.score, right.extracted) == (True, "correct", 1.0, "0.5")
    assert (wrong.correct, wrong.status, wrong.score, wrong.extracted) == (False, "wrong", 0.0, "3")
    assert (none.correct, none.status, none.score, none.extracted) == (False, "unparsed", 0.0, None)


@pytest.mark.parametrize("gold", ["", "  ", None, 7])
def test_a_reference_that_is_no_answer_is_an_error_not_a_wrong_response(verifier, gold):
    assert verifier(boxed("7"), gold).status == "error"


def test_order_repeats_and_the_cache_do_not_change_verdicts():
    items = [(boxed(a), g) for g in ("x^2+1", r"\frac12", "7") for a in ("7", "1+x^2", "0.5", "0.50", "7")] * 2
    with_cache, without = MathVerifier(), MathVerifier(cache=False)
    first = with_cache.check_many(items)
    assert first == with_cache.check_many(items) == without.check_many(items) == [without(*item) for item in items]
    with_cache.close()
    without.close()


@pytest.mark.parametrize(
    "answer", [" 42 ", "42\n", "42\u200b", "\u200f42", "\u00a042", "\ufeff42", "\u202f42", "4\u20612"]
)
def test_white_space_and_invisible_characters_say_nothing(verifier, answer):
    assert verifier(boxed(answer), "42").correct


def test_nearly_all_pairs_are_decided_in_this_process():
    pairs = [(gold, answer) for listed in CASES.values() for gold, answer, _ in listed]
    assert sum(matches(gold, answer) is None for gold, answer in pairs) < len(pairs) / 40


def test_equal_pairs_go_to_a_worker_once(monkeypatch):
    verifier = MathVerifier()
    sent = []

    def pool(items):
        sent.extend(items)
        return [Outcome(True, "correct", 1.0) for _ in items]

    monkeypatch.setattr(verifier._pool, "check_many", pool)
    items = [(boxed(r"1-\cos^2 x"), r"\sin^2 x"), (boxed("3"), "3"), (boxed(r"1-\cos^2 x"), r"\sin^2 x")]
    assert [o.extracted for o in verifier.check_many(items * 2)] == [r"1-\cos^2 x", "3", r"1-\cos^2 x"] * 2
    assert verifier(*items[0]).correct  # from the cache
    assert sent == [(r"1-\cos^2 x", r"\sin^2 x")]


def test_a_copy_in_another_process_has_the_same_settings():
    copy = pickle.loads(pickle.dumps(MathVerifier("answer", limit=1.5, max_chars=7, cache=False)))
    assert (copy.mode, copy.limit, copy.max_chars, copy.cache) == ("answer", 1.5, 7, False)


def test_long_answers_are_compared_as_text():
    verifier = MathVerifier(max_chars=20)
    assert verifier(boxed("1+" * 20 + "1"), "1+" * 20 + "1").correct
    assert verifier(boxed("1+" * 20 + "1"), "21").status == "wrong"


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="'boxed' or 'answer'"):
        MathVerifier("box")


# whole files


@needs_data
def test_labelled_cases(verifier):
    cases = [r for r in rows("verifier_cases") if not r.get("ambiguous") and isinstance(r["gold"], str)]
    cases = [r for r in cases if r["gold"].strip()]
    found = verifier.check_many([(r["response"], r["gold"]) for r in cases])
    right = [o.correct == r["should_match"] for o, r in zip(found, cases, strict=True)]
    false_positives = [r for o, r in zip(found, cases, strict=True) if o.correct and not r["should_match"]]
    assert len(cases) > 280
    assert sum(right) / len(right) >= 0.97
    assert len(false_positives) <= 1


@needs_data
def test_solutions_of_math_state_their_own_answers(verifier):
    solved = [row for name in ("math_train", "math_test") for row in rows(name)]
    found = verifier.check_many([(row["solution"], row["answer"]) for row in solved])
    assert len(solved) == 12_500
    assert [o.status for o in found if not o.correct] == ["unparsed"] * 2  # whose boxes are empty upstream


@needs_data
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_reference_answer_matches_itself(verifier, name):
    golds = [row["answer"] for row in rows(name)]
    found = verifier.check_many([(boxed(gold), gold) for gold in golds])
    assert [gold for gold, o in zip(golds, found, strict=True) if not o.correct] == []


@needs_data
def test_answers_of_math500_written_differently(verifier):
    pairs = [(boxed(form), row["answer"]) for row in rows("math500") for form in rewrites(row["answer"])]
    found = verifier.check_many(pairs)
    assert [pair for pair, o in zip(pairs, found, strict=True) if not o.correct] == []
