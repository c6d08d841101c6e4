"""`polarity data filter`: by the pass rate of given responses, resumed, and with a real model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from polarity.data import read_problems
from polarity.errors import UserError
from polarity.evaluation import Generation, Task
from polarity.rewards import exact
from polarity.studies.data_filter import filter_problems, filter_with_model
from polarity.worlds import resolve_world

ROWS = [{"id": f"p{i}", "problem": f"{i}", "answer": str(i), "topic": "t"} for i in range(5)]


class Counted:
    """Problem i is solved in i of 4 samples; `calls` are the rows that were asked for; fails after `limit` of them."""

    def __init__(self, limit: int = 99):
        self.calls: list[int] = []
        self.limit = limit

    def __call__(
        self, task: Task, indices: Sequence[int], samples: int
    ) -> Iterator[Mapping[int, Sequence[Generation]]]:
        for i in indices:
            if len(self.calls) == self.limit:
                raise KeyboardInterrupt
            self.calls.append(i)
            answer = task.rows[i]["answer"]
            yield {i: [Generation(f"#### {answer if j < i else 'no'}", 3, 0.1, False) for j in range(samples)]}


def test_problems_solved_sometimes_stay_with_their_rate(tmp_path: Path):
    found = filter_problems(ROWS, tmp_path / "kept.jsonl", Counted(), exact, samples=4)
    assert (found.always, found.never, found.kept) == (1, 1, 3)
    rows = read_problems(tmp_path / "kept.jsonl")
    assert rows == [{**ROWS[i], "pass_rate": i / 4} for i in (1, 2, 3)]
    assert "3 of 5 problems kept; 1 always solved, 1 never" in found.summary()


def test_a_stopped_filter_goes_on(tmp_path: Path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "kept.jsonl"
    filter_problems(ROWS, whole, Counted(), exact, samples=4)
    with pytest.raises(KeyboardInterrupt):
        filter_problems(ROWS, out, Counted(limit=2), exact, samples=4)
    assert not out.exists()
    second = Counted()
    filter_problems(ROWS, out, second, exact, samples=4)
    assert second.calls == [2, 3, 4]
    assert out.read_text() == whole.read_text()
    with pytest.raises(UserError, match="samples = 4, not 8"):
        filter_problems(ROWS, out, Counted(), exact, samples=8)


def test_refused(tmp_path: Path):
    with pytest.raises(UserError, match="samples 1 cannot tell"):
        filter_problems(ROWS, tmp_path / "kept.jsonl", Counted(), exact, samples=1)
    with pytest.raises(UserError, match="no problem is solved sometimes: 0 always, 1 never"):
        filter_problems(ROWS[:1], tmp_path / "kept.jsonl", Counted(), exact, samples=4)
    assert not (tmp_path / "kept.jsonl").exists()
    train = tmp_path / "t.jsonl"
    train.write_text(json.dumps(ROWS[0]))
    with pytest.raises(UserError, match="is neither a run nor a model directory"):
        filter_with_model(tmp_path, str(train), tmp_path / "kept.jsonl", {})


def ledger_verifier(response: str, gold: str, row: Any = None) -> Any:
    return resolve_world("ledger").verify(response, gold, row)


def test_with_a_model(tmp_path: Path):
    world = resolve_world("ledger")
    rows = world.problems(next(iter(world.splits)), 24)
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"id": f"{i}", **row}) + "\n" for i, row in enumerate(rows)))
    overrides = {
        "data.verifier": f"{__name__}:ledger_verifier", "data.stop": ["\n\n"],
        "rollout.max_new_tokens": 64, "threads": 1,
    }  # fmt: skip
    base = world.base_path(next(iter(world.bases)))
    found = filter_with_model(base, str(train), tmp_path / "a.jsonl", overrides, samples=4)
    assert found.kept + found.always + found.never == 24
    assert 0 < found.kept < 24
    rates = [row["pass_rate"] for row in read_problems(tmp_path / "a.jsonl")]
    assert set(rates) <= {0.25, 0.5, 0.75}
    filter_with_model(base, str(train), tmp_path / "b.jsonl", overrides, samples=4)
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
