"""`polarity compare` runs processes: real tiny runs, a failure beside them, resuming, and refusing bad input."""

import json

import pytest

from polarity.errors import UserError
from polarity.studies import compare as module
from polarity.studies.compare import compare

TINY = {
    "steps": "2", "rollout.prompts": "2", "rollout.group": "4", "rollout.max_new_tokens": "16",
    "evaluation.every": "2", "evaluation.problems": "2", "evaluation.samples": "2", "evaluation.final_samples": "2",
    "evaluation.splits": "[id]",
}  # fmt: skip


def test_runs_are_made_compared_kept_and_resumed(tmp_path, monkeypatch):
    out = tmp_path / "two"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_method.py").write_text(
        "import os\nfrom polarity.methods import METHODS\n"
        "if os.environ.get('OMP_NUM_THREADS') == '1' and os.path.exists('broken'):\n    raise OSError('it broke')\n"
        "mine = METHODS['dapo'].vary({'name': 'mine'})\n"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # so that only the runs' own processes see 1
    (tmp_path / "broken").touch()
    first = compare(None, TINY, ["dapo", "my_method:mine"], [0], out, jobs=2)
    assert list(first.failed) == ["my_method:mine seed 0"]
    assert "it broke" in first.failed["my_method:mine seed 0"]
    assert first.summary["methods"] == ["dapo"]
    assert first.report.exists()
    finished = (out / "dapo" / "seed_0" / "metrics.jsonl").stat().st_mtime_ns

    with pytest.raises(UserError, match="already holds a comparison"):
        compare(None, TINY, ["dapo"], [0], out)
    with pytest.raises(UserError, match=r"rollout\.group = 4, not 2"):
        compare(None, {**TINY, "rollout.group": "2"}, ["dapo"], [0], out, resume=True)

    (tmp_path / "broken").unlink()
    second = compare(None, TINY, ["dapo", "my_method:mine"], [0], out, jobs=2, resume=True)
    assert second.failed == {}
    assert second.summary["methods"] == ["dapo", "my_method:mine"]
    assert (out / "dapo" / "seed_0" / "metrics.jsonl").stat().st_mtime_ns == finished
    saved = json.loads((out / "comparison.json").read_text())
    assert saved["results"]["dapo"]["eval/id/pass@1"]["n"] == 2
    assert "| my_method:mine" in (out / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("methods", "seeds", "overrides", "message"),
    [
        ([], [0], {}, "no method given"),
        (["dapo", "dapo"], [0], {}, "names dapo twice"),
        (["dapo"], [1, 1], {}, "names 1 twice"),
        (["dapo"], [0], {"seed": "3"}, "takes --seeds 3"),
        (["dapo", "a3p"], [0], {}, "did you mean 'a3po'"),
    ],
)
def test_bad_plans_start_nothing(tmp_path, methods, seeds, overrides, message):
    with pytest.raises(UserError, match=message):
        compare(None, overrides, methods, seeds, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a comparison"):
        compare(None, TINY, ["dapo"], [0], tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_stopping_the_comparison_stops_its_runs(tmp_path, monkeypatch):
    started = []

    def start_then_interrupt(job):
        if started:
            raise KeyboardInterrupt
        started.append(original(job))
        return started[0]

    original = module._start
    monkeypatch.setattr(module, "_start", start_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(None, {**TINY, "steps": "500"}, ["dapo", "grpo"], [0], tmp_path / "out", jobs=2)
    assert started[0].process.returncode is not None
