"""Evaluation of a sampler that is not there: what is asked of it, and what is counted."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from polarity.data import Row
from polarity.errors import UserError
from polarity.evaluation import Generation, evaluate
from polarity.rewards import Outcome
from polarity.studies.evaluate import evaluate_model
from polarity.worlds import resolve_world

SPLITS = {
    "a": [{"id": f"a{i}", "problem": "?", "answer": str(i)} for i in range(3)],
    "b": [{"id": "b0", "answer": "1"}],
}


def speak(rows: Sequence[Row], samples: int, split: str) -> list[Generation]:
    """Response j to a problem is the number j, of j + 1 tokens of entropy 0.1 j; the last one is cut off."""
    return [Generation(str(j), j + 1, 0.1 * j, j == samples - 1) for _ in rows for j in range(samples)]


def verify(response: str, gold: str, row: Any = None) -> Outcome:
    correct = int(response) <= int(gold) and row["answer"] == gold
    return Outcome(correct, "correct" if correct else "wrong", 0.0, strategy="odd" if int(response) % 2 else "even")


def test_results_and_samples():
    found = evaluate(speak, SPLITS, verify, 8)
    a = found["results"]["a"]  # 1, 2 and 3 of 8 are correct
    assert a["pass@1"] == pytest.approx(6 / 24)
    assert a["pass@8"] == 1.0
    assert "pass@64" not in a
    assert a["length"] == pytest.approx(4.5)
    assert a["entropy"] == pytest.approx(sum((j + 1) * 0.1 * j for j in range(8)) / 36)  # over tokens
    assert a["truncated"] == pytest.approx(1 / 8)
    assert a["distinct_strategies"] == pytest.approx((1 + 2 + 2) / 3)  # among correct responses
    assert a["strategies"] == {"even": 0.5, "odd": 0.5}  # of all responses
    right = [0, 0, 1, 0, 1, 2]  # the numbers of the correct responses, which are j + 1 tokens long
    assert a["positive/length"] == pytest.approx(sum(j + 1 for j in right) / 6)
    assert a["positive/entropy"] == pytest.approx(sum((j + 1) * 0.1 * j for j in right) / sum(j + 1 for j in right))
    wrong = [j for j in range(8) for _ in range(3)]
    for j in right:
        wrong.remove(j)
    assert a["negative/length"] == pytest.approx(sum(j + 1 for j in wrong) / 18)
    assert a["negative/entropy"] == pytest.approx(sum((j + 1) * 0.1 * j for j in wrong) / sum(j + 1 for j in wrong))
    assert a["reward"] == 0.0
    assert all(isinstance(value, float) for name, value in a.items() if name != "strategies")
    assert [row["problem_id"] for row in found["samples"]["a"]] == ["a0", "a1", "a2"]
    assert found["samples"]["a"][2]["correct"] == [True] * 3 + [False] * 5
    assert found["samples"]["b"][0] == {
        "problem_id": "b0", "level": None, "correct": [True] * 2 + [False] * 6, "lengths": list(range(1, 9)),
        "entropies": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], "strategies": ["even", "odd"] * 4, "scores": [0.0] * 8,
        "first_response": "0",
    }  # fmt: skip


def test_responses_without_tokens():
    found = evaluate(
        lambda rows, n, split: [Generation("", 0, 0.0, False)] * n * len(rows), SPLITS, lambda *_, row: 0, 2
    )
    zeros = dict.fromkeys(("pass@1", "entropy", "length", "truncated", "negative/length", "reward"), 0.0)
    assert found["results"]["a"] == zeros  # no positive response, and no token for negative/entropy


def test_as_many_k_as_samples_allow():
    assert [k for k in evaluate(speak, SPLITS, verify, 1)["results"]["b"] if k.startswith("pass")] == ["pass@1"]
    many = evaluate(speak, SPLITS, verify, 256)["results"]["b"]
    assert [k for k in many if k.startswith("pass")] == ["pass@1", "pass@8", "pass@64", "pass@256"]


def test_verifiers_that_return_numbers_and_name_no_strategy():
    found = evaluate(speak, SPLITS, lambda response, gold, row=None: 0.5 if response == gold else 0.4, 8)
    assert found["results"]["a"]["pass@1"] == pytest.approx(1 / 8)
    assert "strategies" not in found["results"]["a"]
    assert found["results"]["a"]["reward"] == pytest.approx((0.5 + 7 * 0.4) / 8)
    first = found["samples"]["a"][1]
    assert "strategies" not in first
    assert first["scores"] == [0.4, 0.5] + [0.4] * 6


def test_levels_and_what_a_generator_does_not_say():
    rows = [{"id": "x", "answer": "1", "level": "Level 3"}]

    def say(rows: Sequence[Row], samples: int, split: str) -> list[Generation]:
        return [Generation("1", None if j else 7, 1 / 3, None) for j in range(samples)]

    found = evaluate(say, {"s": rows}, lambda response, gold, row=None: 1 / 3, 2)
    assert found["results"]["s"] == {"pass@1": 0.0, "reward": pytest.approx(1 / 3)}
    kept = found["samples"]["s"][0]
    assert (kept["level"], kept["lengths"]) == ("3", [7, None])
    assert kept["entropies"] == kept["scores"] == [0.33333, 0.33333]


def test_a_verifier_that_always_fails():
    with pytest.raises(UserError, match=r"failed on every response, with ZeroDivisionError"):
        evaluate(speak, SPLITS, lambda response, gold, row=None: 1 / 0, 2)


def test_polarity_eval_uses_the_threads_it_is_given(monkeypatch: pytest.MonkeyPatch):
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    base = resolve_world("ledger").base_path("general-small")
    settings = {"threads": 1, "evaluation.problems": 1, "evaluation.splits": ["id"]}
    assert evaluate_model(base, settings, samples=1)["settings"]["samples"] == 1
    assert used == [1]
