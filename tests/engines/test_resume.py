"""Stopping and going on: bit for bit, wherever a run is stopped, and never from half a checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from polarity.config import RunConfig, save_config
from polarity.engines.embedded import checkpoint, prepare, train, trainer
from polarity.engines.embedded.policy import Policy
from polarity.errors import UserError
from polarity.rundir import RunReader

SIX = {"steps": 6, "checkpoint__every": 1, "evaluation__every": 2, "update__epochs": 2, "update__warmup_steps": 3}


def run(config: RunConfig, out: Path, **how: bool) -> Path:
    train(config, out, progress=False, **how)
    return out


def stopped(config: RunConfig, out: Path, after: int, where: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that Ctrl-C stops in `where` (a function of the trainer) once `after` steps are done."""
    call = getattr(trainer, where)
    calls = [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == after + 1:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config, out)
    return out


def tensors(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested state as flat keys."""
    if not isinstance(tree, (dict, list)):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, value in items for k, v in tensors(value, f"{prefix}/{key}").items()}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, trainer state, metrics (not time/*), rollouts and evaluations, all exactly."""
    first, second = RunReader(one), RunReader(other)
    assert sorted(first.checkpoints) == sorted(second.checkpoints)
    last = max(first.checkpoints)
    a, b = first.checkpoints[last], second.checkpoints[last]
    states = [
        {f"{f.parent.name}/{k}": v for f in sorted(p.glob("**/*.safetensors")) for k, v in load_file(f).items()}
        | tensors(torch.load(p / "trainer.pt", weights_only=True))
        for p in (a, b)
    ]
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) > 60
    for name, value in states[0].items():
        same = torch.equal(value, states[1][name]) if isinstance(value, torch.Tensor) else value == states[1][name]
        assert same, name
    rows = [[{k: v for k, v in m.items() if not k.startswith("time/")} for m in r.metrics] for r in (first, second)]
    assert rows[0] == rows[1]
    assert first.rollout_steps == second.rollout_steps
    assert all(first.rollouts(s) == second.rollouts(s) for s in first.rollout_steps)
    assert first.evaluations == second.evaluations


@pytest.fixture
def whole(small_run: Callable[..., RunConfig], tmp_path: Path) -> tuple[RunConfig, Path]:
    """Six steps of A3PO, not interrupted."""
    config = small_run("a3po", **SIX)
    return config, run(config, tmp_path / "whole")


@pytest.mark.parametrize("where", ["train_step", "save_checkpoint"])
def test_stopped_at_every_step(
    whole: tuple[RunConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    """Between two steps, and after a step's metrics are written and before its checkpoint is."""
    config, uninterrupted = whole
    for after in range(6) if where == "train_step" else (0, 3):
        out = stopped(config, tmp_path / f"{after}", after, where, monkeypatch)
        assert len(RunReader(out).checkpoints) == min(after, 1)
        assert_same_run(uninterrupted, run(config, out, resume=True))


def test_stopped_twice_with_few_checkpoints(
    small_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a reference policy, and steps that have to be repeated because no checkpoint holds them."""
    config = small_run("grpo_zhu", **SIX | {"checkpoint__every": 2, "checkpoint__keep": 2, "log__rollouts_every": 1})
    out = stopped(config, tmp_path / "stopped", 3, "_record", monkeypatch)
    assert sorted(RunReader(out).checkpoints) == [2]
    again = {"resume": True}
    with monkeypatch.context() as patch:
        step = trainer.train_step
        patch.setattr(trainer, "train_step", lambda r: step(r) if r.step < 5 else (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            run(config, out, **again)
    assert sorted(RunReader(out).checkpoints) == [2, 4]
    assert_same_run(run(config, tmp_path / "whole"), run(config, out, **again))
    assert sorted(RunReader(out).checkpoints) == [4, 6]


def test_with_a_critic(small_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = small_run("ppo", **SIX | {"checkpoint__every": 2})
    whole = run(config, tmp_path / "whole")
    path = RunReader(whole).checkpoints[6]
    assert sorted(p.name for p in path.iterdir() if p.is_dir()) == ["critic", "ngrams"]
    AutoModelForCausalLM.from_pretrained(path)
    AutoTokenizer.from_pretrained(path)
    resumed = prepare(config, path)
    assert resumed.critic is not None
    assert resumed.critic.head.weight.any()
    for after in (2, 3):
        out = stopped(config, tmp_path / f"{after}", after, "train_step", monkeypatch)
        assert_same_run(whole, run(config, out, resume=True))


PHASES = {"phases": [{"method": "grpo_zhu", "steps": 2}, {"method": "ppo", "steps": 2}, {"method": "a3po"}]}
# Below its band at every step, so that the weight rises by 0.25 a step until it is at the ceiling.
LOOP = {"kind": "closed_loop", "metric": "entropy", "low": 90, "high": 91, "start": 1.0, "step": 0.25, "ceiling": 2.0}


def test_across_phases(small_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Within a phase and at its end; with a critic and a reference policy that only some phases have use for."""
    config = small_run(PHASES, **SIX)
    assert config.method["name"] == "grpo_zhu_2_then_ppo_2_then_a3po"
    whole = run(config, tmp_path / "whole")
    rows = RunReader(whole).metrics[1:]
    assert ["update/kl" in row for row in rows] == [True, True, True, True, False, False]
    assert ["value/error" in row for row in rows] == [False, False, True, True, False, False]
    shaped = [row["negative/shaped_share"] > 0 for row in rows]
    assert shaped == [False] * 4 + [True, False]  # the decay begins with its phase, and is over at half of it
    for after in (2, 3):
        out = stopped(config, tmp_path / f"{after}", after, "train_step", monkeypatch)
        assert_same_run(whole, run(config, out, resume=True))


def test_other_phases_are_refused(small_run: Callable[..., RunConfig], tmp_path: Path):
    out = run(small_run(PHASES, steps=6), tmp_path / "run")
    first, second, third = PHASES["phases"]
    low = {"base": "ppo", "surrogate.low": 0.1}
    for phases, match in [
        ([{**first, "steps": 3}, second, third], r"method.name = 'grpo_zhu_2_then_ppo_2_then_a3po', not 'grpo_zhu_3_"),
        ([first, {**second, "method": low}, third], r"method.phases.1.method.surrogate.low = 0.2, not 0.1; only steps"),
        ([first, third], r"method.name = 'grpo_zhu_2_then_ppo_2_then_a3po', not 'grpo_zhu_2_then_a3po'"),
    ]:
        with pytest.raises(UserError, match=match):
            run(small_run({"phases": phases}, steps=6), out, resume=True)
    with pytest.raises(UserError, match=r"6 steps and a decay"):  # the last phase's decay is laid out over the rest
        run(small_run(PHASES, steps=9), out, resume=True)


def test_a_closed_loop_goes_on_where_it_was(
    small_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = small_run("a3po", **SIX, method__shaping__positive__scale=LOOP, log__rollouts_every=1)
    whole = run(config, tmp_path / "whole")
    found = RunReader(whole)
    state = checkpoint.load_state(found.checkpoints[6])
    assert state.method == {"shaping.positive.scale": 2.0}
    for step, weight in enumerate([1.0, 1.25, 1.5, 1.75, 2.0, 2.0], 1):
        positive = {w for row in found.rollouts(step) if row["kept"] and row["advantage"] > 0 for w in row["weight"]}
        assert positive <= {1.0, weight}
        assert weight in positive
    for after in (2, 4):
        out = stopped(config, tmp_path / f"{after}", after, "train_step", monkeypatch)
        assert_same_run(whole, run(config, out, resume=True))


def test_fewer_steps_then_more(small_run: Callable[..., RunConfig], tmp_path: Path):
    settings = SIX | {"evaluation__every": 0, "log__rollouts_every": 1}
    out = run(small_run("dapo", **settings | {"steps": 2}), tmp_path / "run")
    assert_same_run(
        run(small_run("dapo", **settings), tmp_path / "whole"),
        run(small_run("dapo", **settings), out, resume=True),
    )
    assert RunReader(out).config["steps"] == 6
    with pytest.raises(UserError, match=r"has completed 6 steps already; give --steps 6 or more"):
        run(small_run("dapo", **settings | {"steps": 2}), out, resume=True)
    assert RunReader(out).config["steps"] == 6


def test_two_runs_of_one_seed_are_the_same_and_of_two_seeds_are_not(
    whole: tuple[RunConfig, Path], small_run: Callable[..., RunConfig], tmp_path: Path
):
    config, first = whole
    torch.manual_seed(7)  # global random state is not what a run depends on
    assert_same_run(first, run(config, tmp_path / "again"))
    other = run(small_run("a3po", **SIX, seed=1), tmp_path / "other")
    with pytest.raises(AssertionError):
        assert_same_run(first, other)


def test_killed_in_mid_run(small_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = small_run("a3po", **SIX, threads=torch.get_num_threads())
    (tmp_path / "config.yaml").write_text(save_config(config))
    code = (
        "from pathlib import Path; from polarity.config import load_config; from polarity.engines import embedded;"
        "embedded.train(load_config(Path('config.yaml')), Path('killed'), progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "SLOW": "0.02"})
    out = tmp_path / "killed"
    deadline = time.monotonic() + 60
    while not (out / "checkpoints").exists() or not RunReader(out).checkpoints:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(RunReader(out).metrics) < 7
    assert_same_run(run(config, tmp_path / "whole"), run(config, out, resume=True))


@pytest.mark.parametrize("broken", ["fsync", "rename"])
def test_half_a_checkpoint_is_never_seen(
    small_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
):
    """A machine that stops while the second checkpoint is being written leaves the first one, whole."""
    config = small_run("dapo", checkpoint__every=1)
    saves = [0]

    def save(path: Path, *args: Any) -> None:
        saves[0] += 1
        with monkeypatch.context() as patch:
            if saves[0] == 2 and broken == "fsync":
                patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
            if saves[0] == 2 and broken == "rename":
                patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("input/output error")))
            checkpoint.save_checkpoint(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", save)
        with pytest.raises(OSError, match=r"error|space"):
            run(config, tmp_path / "run")
    checkpoints = RunReader(tmp_path / "run").checkpoints
    assert sorted(checkpoints) == [1]
    AutoModelForCausalLM.from_pretrained(checkpoints[1])
    assert_same_run(run(config, tmp_path / "whole"), run(config, tmp_path / "run", resume=True))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000003"]  # nothing is left over


def test_checkpoints_are_model_directories(whole: tuple[RunConfig, Path]):
    config, out = whole
    path = RunReader(out).checkpoints[6]
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.decode(tokenizer.encode("What is 1+1?")) == "What is 1+1?"
    resumed = prepare(config, path)
    assert (resumed.step, resumed.policy.eos) == (6, tuple(range(40)))
    for a, b in zip(model.parameters(), resumed.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match=r"no trainer.pt"):
        prepare(config, Path(config.model or ""))


def test_a_checkpoint_may_hold_folders(policy: Policy, tmp_path: Path):
    policy.tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    folder = tmp_path / "step_000001"
    checkpoint.save_checkpoint(folder, policy, None, None, checkpoint.TrainerState(1, 8, {"gain": 0.5}, {}), keep=1)
    assert (folder / "additional_chat_templates").is_dir()
    assert checkpoint.load_state(folder).method == {"gain": 0.5}


def test_other_settings_are_refused(whole: tuple[RunConfig, Path], small_run: Callable[..., RunConfig]):
    _, out = whole
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(UserError, match=r"update.learning_rate = 0.001, not 0.002"):
        run(small_run("a3po", **SIX, update__learning_rate=2e-3), out, resume=True)
    with pytest.raises(UserError, match=r"seed = 0, not 5"):
        run(small_run("a3po", **SIX, seed=5), out, resume=True)
    with pytest.raises(UserError, match=r"6 steps and a decay"):  # decay_until lays the decay out over the run's steps
        run(small_run("a3po", **SIX | {"steps": 12}), out, resume=True)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


def test_resume_of_nothing_and_overwriting(small_run: Callable[..., RunConfig], tmp_path: Path):
    config = small_run("dapo", steps=1)
    with pytest.raises(UserError, match="drop --resume"):
        run(config, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    out = run(config, tmp_path / "run")
    metrics = (out / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        run(config, out)
    assert (out / "metrics.jsonl").read_text() == metrics
    with pytest.raises(UserError, match="no model directory"):  # what cannot start does not destroy either
        run(config.model_copy(update={"model": "missing"}), out, overwrite=True)
    assert (out / "metrics.jsonl").read_text() == metrics
    run(small_run("dapo", steps=2), out, overwrite=True)
    assert [row["step"] for row in RunReader(out).metrics] == [1, 2]
    run(small_run("dapo", steps=2), out, resume=True)  # a finished run has nothing left to do
    assert [row["step"] for row in RunReader(out).metrics] == [1, 2]


def test_environment_is_recorded(whole: tuple[RunConfig, Path]):
    config, out = whole
    found = json.loads((out / "environment.json").read_text())
    assert found["seed"] == config.seed
    assert found["packages"]["torch"] == torch.__version__
    assert {"started", "command", "python", "git", "platform", "cpus", "device", "threads"} <= found.keys()
