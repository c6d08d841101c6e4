"""The run directory: one writer, one reader, also while a run is going on."""

import json
from pathlib import Path

import pytest

from polarity.errors import UserError
from polarity.rundir import RunReader, RunWriter


@pytest.fixture
def writer(tmp_path: Path) -> RunWriter:
    writer = RunWriter.create(tmp_path / "run", "method: {name: dapo}\nsteps: 4\n", seed=3)
    for step in range(5):
        writer.metrics({"step": step, "reward/mean": step / 4})
        writer.rollouts(step, [{"step": step, "response": "a\u2028b\nc", "tokens": ["é"]}])
        writer.evaluation(step, {"step": step, "results": {}})
    return writer


def test_what_is_written_is_read(writer: RunWriter):
    reader = RunReader(writer.path)
    assert reader.config == {"method": {"name": "dapo"}, "steps": 4}
    assert reader.environment["seed"] == 3
    assert reader.metrics == [{"step": step, "reward/mean": step / 4} for step in range(5)]
    assert reader.rollout_steps == list(range(5))
    assert reader.rollouts(2) == [{"step": 2, "response": "a\u2028b\nc", "tokens": ["é"]}]
    assert reader.evaluations[4] == {"step": 4, "results": {}}
    assert reader.checkpoints == {}


def test_half_written_rows_are_left_out(writer: RunWriter):
    with (writer.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "reward')
    assert [row["step"] for row in RunReader(writer.path).metrics] == list(range(5))
    writer.rewind(4)
    writer.metrics({"step": 5})
    assert [row["step"] for row in RunReader(writer.path).metrics] == list(range(6))


@pytest.mark.parametrize("step", [-1, 0, 2, 4, 9])
def test_rewind(writer: RunWriter, step: int):
    writer.rewind(step)
    reader = RunReader(writer.path)
    left = [s for s in range(5) if s <= step]
    assert [row["step"] for row in reader.metrics] == left
    assert reader.rollout_steps == left
    assert sorted(reader.evaluations) == left


def test_unfinished_checkpoints_are_not_seen(writer: RunWriter):
    folder = writer.checkpoint_path(2)
    folder.mkdir(parents=True)
    folder.with_name("partial_step_000003").mkdir()
    assert RunReader(writer.path).checkpoints == {2: folder}


def test_a_run_is_not_replaced_unasked(writer: RunWriter):
    with pytest.raises(UserError, match=r"already holds a run; add --resume to go on, --overwrite"):
        RunWriter.create(writer.path, "steps: 1\n", seed=0)
    assert len(RunReader(writer.path).metrics) == 5
    RunWriter.create(writer.path, "steps: 1\n", seed=0, overwrite=True)
    assert RunReader(writer.path).metrics == []
    assert sorted(p.name for p in writer.path.iterdir()) == ["config.yaml", "environment.json"]


def test_not_a_run(tmp_path: Path):
    with pytest.raises(UserError, match=r"is not a run directory \(it has no config.yaml\)"):
        RunReader(tmp_path)


def test_a_run_from_elsewhere_may_lack_files(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("method: {name: dapo}\n")
    reader = RunReader(tmp_path)
    assert (reader.metrics, reader.environment, reader.rollout_steps, reader.evaluations) == ([], {}, [], {})


def test_environment_says_what_ran(writer: RunWriter):
    found = json.loads((writer.path / "environment.json").read_text())
    assert found["git"].keys() == {"revision", "diff"}
    assert {"polarity-rl", "torch", "transformers"} <= found["packages"].keys()


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("config.yaml", "", "config.yaml holds no settings"),
        ("config.yaml", "a: [", "config.yaml is malformed YAML"),
        ("metrics.jsonl", '{"step": 1}\n{"step"\n', "metrics.jsonl line 2 is no JSON"),
        ("metrics.jsonl", '{"reward/mean": 1}\n', "line 1 is no metrics row"),
        ("rollouts/step_000001.jsonl", '{"step": 1', "step_000001.jsonl line 1 is no JSON"),
        ("evaluations/step_000001.json", '{"results": {', "step_000001.json line 1 is no JSON"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, file: str, text: str, match: str):
    (tmp_path / "config.yaml").write_text("steps: 1\n")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    reader = RunReader(tmp_path)
    with pytest.raises(UserError, match=match) as error:
        _ = reader.config, reader.metrics, [reader.rollouts(s) for s in reader.rollout_steps], reader.evaluations
    assert "\n" not in str(error.value)


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path):
    writer = RunWriter.create(tmp_path / "run", "steps: 1\n", seed=0)
    writer.metrics({"step": 1, "reward/mean": float("nan"), "entropy/mean": float("inf"), "length/mean": 3.0})
    assert RunReader(tmp_path / "run").metrics == [{"step": 1, "length/mean": 3.0}]
