"""Evaluations over time by polarity and difficulty, against sums over single responses."""

import random
from typing import Any

import numpy as np
import pytest

from polarity.analysis.pass_at_k import pass_at_k
from polarity.analysis.validation import problem_accuracies, validation


def record(rng: random.Random, problem: int, n: int, level: str | None = None) -> dict[str, Any]:
    rate = problem / 9
    return {
        "problem_id": f"p{problem}", "level": level, "correct": [rng.random() < rate for _ in range(n)],
        "lengths": [rng.randint(0, 20) for _ in range(n)], "entropies": [rng.random() for _ in range(n)],
        "scores": [rng.random() for _ in range(n)],
    }  # fmt: skip


def evaluations(levels: bool = False) -> dict[int, dict[str, Any]]:
    rng = random.Random(0)
    found = {}
    for step, n in ((0, 4), (10, 4), (20, 7)):
        rows = [record(rng, i, n, str(i % 3) if levels else None) for i in range(10)]
        found[step] = {"step": step, "samples": {"id": rows, "other": rows[:2]}}
    return found


def numbers(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What `validation` should say of some records, response by response."""
    flat = [x for r in rows for x in zip(r["correct"], r["lengths"], r["entropies"], r["scores"], strict=True)]
    found = {"problems": len(rows), "responses": len(flat), "accuracy": np.mean([np.mean(r["correct"]) for r in rows])}
    k = 2
    while k <= min(len(r["correct"]) for r in rows):
        found[f"pass@{k}"] = np.mean([pass_at_k(len(r["correct"]), sum(r["correct"]), k) for r in rows])
        k *= 2
    found["reward"] = np.mean([score for *_, score in flat])
    for name, own in (
        ("", flat), ("positive/", [x for x in flat if x[0]]), ("negative/", [x for x in flat if not x[0]])
    ):  # fmt: skip
        if name:
            found[f"{name}share"] = len(own) / len(flat)
        if own:
            found[f"{name}length"] = np.mean([length for _, length, *_ in own])
        if tokens := sum(length for _, length, *_ in own):
            found[f"{name}entropy"] = sum(length * entropy for _, length, entropy, _ in own) / tokens
    return found


def test_by_bands_of_the_first_evaluation():
    given = evaluations()
    found = validation(given)["id"]
    assert found["difficulty"] == "band"
    first = {r["problem_id"]: np.mean(r["correct"]) for r in given[0]["samples"]["id"]}

    def band(a: float) -> str:
        return "unsolved" if a == 0 else "hard" if a < 0.5 else "easy" if a < 1 else "solved"

    order = [name for name in ("unsolved", "hard", "easy", "solved") if name in map(band, first.values())]
    assert list(found["problems"]) == order
    assert len(order) >= 3
    assert sum(found["problems"].values()) == 10
    for entry in found["evaluations"]:
        rows = given[entry["step"]]["samples"]["id"]
        assert entry["all"] == pytest.approx(numbers(rows))
        assert list(entry["classes"]) == order
        for name, values in entry["classes"].items():
            own = [r for r in rows if band(first[r["problem_id"]]) == name]
            assert len(own) == found["problems"][name]
            assert values == pytest.approx(numbers(own))
    assert "pass@4" in found["evaluations"][2]["all"]
    assert "pass@8" not in found["evaluations"][2]["all"]


def test_by_level_where_every_problem_has_one():
    given = evaluations(levels=True)
    found = validation(given)["id"]
    assert found["difficulty"] == "level"
    assert found["problems"] == {"0": 4, "1": 3, "2": 3}
    assert list(found["evaluations"][0]["classes"]) == ["0", "1", "2"]
    given[0]["samples"]["id"][3]["level"] = None
    given[10]["samples"]["id"][3]["level"] = None
    given[20]["samples"]["id"][3]["level"] = None
    assert validation(given)["id"]["difficulty"] == "band"
    rows = [{"problem_id": str(i), "level": level, "correct": [True]} for i, level in enumerate(["10", "9", "hard"])]
    assert list(validation({0: {"samples": {"s": rows}}})["s"]["problems"]) == ["9", "10", "hard"]


def test_records_that_say_little_and_problems_that_come_and_go():
    given = {
        0: {"samples": {"s": [{"problem_id": "a", "correct": [True, False]}, {"problem_id": "e", "correct": []}]}},
        5: {
            "samples": {
                "s": [{"problem_id": "a", "correct": [True, True]}, {"problem_id": "b", "correct": [False, False]}],
                "late": [{"problem_id": "c", "correct": [True], "lengths": [None], "entropies": [0.1]}],
                "empty": [],
            }
        },
    }
    found = validation(given)
    assert list(found) == ["s", "late"]
    assert found["s"]["problems"] == {"easy": 1}
    first, second = found["s"]["evaluations"]
    assert first["all"] == {
        "problems": 1, "responses": 2, "accuracy": 0.5, "pass@2": 1.0, "positive/share": 0.5, "negative/share": 0.5,
    }  # fmt: skip
    assert second["all"]["problems"] == 2
    assert second["classes"] == {
        "easy": {
            "problems": 1, "responses": 2, "accuracy": 1.0, "pass@2": 1.0, "positive/share": 1.0, "negative/share": 0.0,
        }
    }  # fmt: skip
    assert "length" not in found["late"]["evaluations"][0]["all"]
    assert problem_accuracies(given, "s") == ([0, 5], {"a": [0.5, 1.0], "b": [None, 0.0]})
    assert problem_accuracies(given, "late") == ([5], {"c": [1.0]})
    assert problem_accuracies(given, "none") == ([], {})
