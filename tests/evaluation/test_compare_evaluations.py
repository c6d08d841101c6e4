"""Two evaluations, problem by problem."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from scipy import stats

from polarity.data import Row
from polarity.errors import UserError
from polarity.evaluation import Generation, Task, compare_evaluations, in_batches, run_evaluation
from polarity.rewards import exact

ROWS = [{"id": f"p{i}", "problem": "?", "answer": "1"} for i in range(12)]
BASE = [0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 8]  # of 8 correct
BETTER = [0, 1, 2, 4, 3, 6, 6, 6, 8, 7, 8, 7]


def make(out: Path, counts: Sequence[int], rows: Sequence[Row] = ROWS, samples: int = 8, **settings: object) -> Path:
    right = {row["id"]: count for row, count in zip(ROWS, counts, strict=True)}

    def generate(rows: Sequence[Row], samples: int, split: str) -> list[Generation]:
        return [Generation(str(int(j < right[row["id"]])), 1.0, 0.1, False) for row in rows for j in range(samples)]

    tasks = [Task("toy", rows, exact, "exact")]
    run_evaluation(tasks, in_batches(generate, 4), samples, {"temperature": 0.6, **settings}, model=out.name, out=out)
    return out


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    return lambda **settings: (make(tmp_path / "better", BETTER), make(tmp_path / "base", BASE, **settings))


def test_differences_and_tests(pair: Callable[..., tuple[Path, Path]]):
    found = compare_evaluations(*pair())
    assert found["notes"] == []
    accuracy = found["tasks"]["toy"]["metrics"]["accuracy"]
    a, b = [c / 8 for c in BETTER], [c / 8 for c in BASE]
    assert accuracy["this"] == pytest.approx(sum(a) / 12)
    assert accuracy["difference"] == pytest.approx(sum(a) / 12 - sum(b) / 12)
    assert accuracy["p_t"] == pytest.approx(float(stats.ttest_rel(a, b).pvalue))
    exact_p = stats.permutation_test((a, b), lambda x, y: (x - y).mean(), permutation_type="samples", vectorized=False)
    assert accuracy["p_permutation"] == pytest.approx(float(exact_p.pvalue))
    assert accuracy["low"] < accuracy["difference"] < accuracy["high"]
    assert {"pass@2", "pass@4", "pass@8", "maj@4", "maj@8"} <= found["tasks"]["toy"]["metrics"].keys()


def test_classes_by_the_other_runs_rate(pair: Callable[..., tuple[Path, Path]]):
    classes = compare_evaluations(*pair())["tasks"]["toy"]["by_rate"]
    assert [(c["rate"], c["problems"]) for c in classes] == [
        *[("0", 2), ("(0, 0.25]", 2), ("(0.25, 0.5]", 2), ("(0.5, 0.75]", 2), ("(0.75, 1)", 2), ("1", 2)]
    ]
    assert classes[0] == {"rate": "0", "problems": 2, "this": pytest.approx(1 / 16), "other": 0.0}
    assert sum(c["problems"] * c["this"] for c in classes) / 12 == pytest.approx(sum(BETTER) / 96)


def test_what_differs_is_said(tmp_path: Path):
    a = make(tmp_path / "a", BETTER)
    b = make(tmp_path / "b", BASE, samples=4, rows=ROWS[:10], temperature=1.0)
    found = compare_evaluations(a, b)
    assert "the two differ in temperature: 0.6 and 1.0" in found["notes"]
    assert "the two differ in samples: 8 and 4" in found["notes"]
    assert "toy: 2 problems are in one of the two only and are left out" in found["notes"]
    assert "pass@8" not in found["tasks"]["toy"]["metrics"]


def test_nothing_in_common_is_refused(tmp_path: Path):
    a = make(tmp_path / "a", BETTER, rows=ROWS[:3])
    b = make(tmp_path / "b", BASE, rows=ROWS[3:])
    with pytest.raises(UserError, match="no problem in common"):
        compare_evaluations(a, b)
