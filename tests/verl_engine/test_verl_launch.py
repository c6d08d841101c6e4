"""Starting verl: what is printed, what is refused, what is left of a run that ends, whoever ends it."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from polarity.config import RunConfig, load_config, save_config
from polarity.engines.verl import launch
from polarity.engines.verl.overrides import Cluster, checkpoints
from polarity.errors import UserError
from polarity.rundir import RunWriter

# A leader with a child in a process group of its own, as Ray's workers are, and a grandchild; all sleep.
FAMILY = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
child = "import os, subprocess, sys, time; os.setpgid(0, 0); subprocess.Popen({0!r}); time.sleep(600)".format(sleep)
subprocess.Popen([sys.executable, "-c", child])
print("family", flush=True)
time.sleep(600)
"""


def configured(**changes: Any) -> RunConfig:
    base = {"method": "a3po", "world": "ledger", "steps": 4, "rollout.prompts": 4, "update.mini_batch_prompts": 2}
    return load_config(None, base | {key.replace("__", "."): value for key, value in changes.items()})


def test_dry_run_prints_the_command_and_does_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    cluster = Cluster(address="10.0.0.1:6379", nodes=2, gpus=8, overrides=("trainer.balance_batch=False",))
    assert launch.train(configured(), out, cluster=cluster, dry_run=True) == 0
    assert list(tmp_path.iterdir()) == []
    words = shlex.split(capsys.readouterr().out.replace("\\\n", ""))
    assert words[0] == "VERL_USE_EXTERNAL_MODULES=polarity.engines.verl.plugin"
    at = words.index("-m")
    assert words[at - 1 : at + 2] == [sys.executable, "-m", "verl.trainer.main_ppo"]
    assert "trainer.v1.trainer_mode=polarity" in words
    assert "trainer.nnodes=2" in words
    assert words[-1] == "trainer.balance_batch=False"


def test_preset_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    launch.train(configured(), tmp_path / "run", preset="cpu-demo", cluster=Cluster(gpus=2), dry_run=True)
    words = shlex.split(capsys.readouterr().out.replace("\\\n", ""))
    modules = next(word for word in words if word.startswith("VERL_USE_EXTERNAL_MODULES="))
    assert modules.endswith("polarity.engines.verl.cpu.platform,polarity.engines.verl.plugin")  # platform first
    assert "trainer.n_gpus_per_node=2" in words
    with pytest.raises(UserError, match="did you mean 'cpu-demo'"):
        launch.train(configured(), tmp_path / "run", preset="cpu_demo", dry_run=True)
    with pytest.raises(UserError, match="drop the cluster's address"):
        launch.train(configured(), tmp_path / "run", preset="cpu-demo", cluster=Cluster(address="auto"), dry_run=True)


def test_without_verl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    found = lambda name: None  # noqa: E731
    monkeypatch.setattr("polarity.engines.verl.composition.find_spec", found)
    monkeypatch.setattr("polarity.engines.verl.launch.find_spec", found)
    with pytest.raises(UserError, match=r"polarity-rl\[verl\]"):
        launch.train(configured(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert launch.train(configured(), tmp_path / "run", dry_run=True) == 0
    assert "verl is not installed here" in capsys.readouterr().err


def test_another_version_of_verl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("polarity.engines.verl.composition.version", lambda name: "0.8.0")
    with pytest.raises(UserError, match=r"verl 0\.8\.0 is installed.*pip install verl==0\.9\.1"):
        launch.train(configured(), tmp_path / "run")


def started(out: Path, config: RunConfig, done: int | None = None) -> Path:
    RunWriter.create(out, save_config(config), seed=0)
    checkpoints(out).mkdir(parents=True)
    if done is not None:
        (checkpoints(out) / "latest_checkpointed_iteration.txt").write_text(str(done))
    return out


def test_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = configured()
    with pytest.raises(UserError, match="there is no run"):
        launch.train(config, tmp_path / "none", resume=True)
    embedded = tmp_path / "embedded"
    RunWriter.create(embedded, save_config(config), seed=0)
    with pytest.raises(UserError, match="embedded engine"):
        launch.train(config, embedded, resume=True)
    run = started(tmp_path / "run", config, done=2)
    with pytest.raises(UserError, match=r"rollout\.group"):
        launch.train(configured(rollout__group=4), run, resume=True, dry_run=True)
    launch.train(config, run, resume=True, dry_run=True)
    assert "trainer.resume_mode=auto" in capsys.readouterr().out
    fresh = started(tmp_path / "fresh", config)
    launch.train(config, fresh, resume=True, dry_run=True)
    assert "trainer.val_before_train=true" in capsys.readouterr().out
    finished = started(tmp_path / "finished", config, done=4)
    assert launch.train(config, finished, resume=True) == 0
    assert "has completed its 4 steps already" in capsys.readouterr().err


def test_a_directory_in_use_is_refused_before_anything_is_written(tmp_path: Path):
    out = started(tmp_path / "run", configured())
    with pytest.raises(UserError, match="already holds a run"):
        launch.train(configured(), out)
    assert not (out / "verl" / "train.parquet").exists()


def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A module in place of verl's entry point."""
    (tmp_path / "entry_stub.py").write_text(code)
    monkeypatch.setattr(launch, "ENTRY", "entry_stub")
    monkeypatch.chdir(tmp_path)  # where python -m looks first


WRITES = """
import json, pathlib, sys
out = pathlib.Path(next(a for a in sys.argv if a.startswith("hydra.run.dir=")).partition("=")[2]).parent
row = {"reward/mean": 0.5, "entropy/mean": 0.2, "length/mean": 30.0}
with (out / "metrics.jsonl").open("a") as file:
    for step in range(1, STEPS + 1):
        file.write(json.dumps({"step": step, **row}) + "\\n")
"""


def test_a_run_that_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stub(tmp_path, monkeypatch, WRITES.replace("STEPS", "4"))
    assert launch.train(configured(), tmp_path / "run", progress=False) == 0
    assert {path.name for path in (tmp_path / "run" / "verl").iterdir()} == {
        "command.sh", "log.txt", "train.parquet", "validation.parquet"
    }  # fmt: skip
    assert "python -m entry_stub" in (tmp_path / "run" / "verl" / "command.sh").read_text()


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("raise ValueError('no such thing')", "verl ended with exit code 1: ValueError: no such thing; see"),
        ("import os; os.kill(os.getpid(), 9)", "verl was ended by SIGKILL: its log names no error; see"),
        ("", "failed after step 2: verl ended with exit code 0: its log names no error"),  # before the last step
    ],
)
def test_a_run_that_fails_says_why_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: str, said: str
):
    stub(tmp_path, monkeypatch, WRITES.replace("STEPS", "2") + ending)
    assert launch.train(configured(), tmp_path / "run", progress=False) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1
    assert said in lines[0]


def test_the_last_error_of_a_log():
    log = (
        "\x1b[36m(TaskRunnerV1 pid=12)\x1b[0m ValueError: first\nray.exceptions.RayTaskError(ValueError): ray::T.r()\n"
    )
    assert launch.last_error(log) == "ValueError: first"
    log += "torch.OutOfMemoryError: CUDA out of memory. Tried to\n  warn ValueError: not a line of its own\nfine: 3\n"
    assert launch.last_error(log) == "OutOfMemoryError: CUDA out of memory. Tried to"
    log += "(W pid=1) polarity.errors.UserError: set x [repeated 3x across cluster]\nRuntimeError: worker died\n"
    assert launch.last_error(log) == "set x"
    assert launch.last_error("step 1\n") is None


def family(log: Path) -> int:
    """The session's id, once all three processes are there."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and log.exists() and "family" in log.read_text():
                members = launch._members(int(entry.name))
                if len(members) == 3 and str(log) in Path(f"/proc/{entry.name}/cmdline").read_text():
                    return int(entry.name)
        time.sleep(0.1)
    raise AssertionError("the processes did not start")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_ends_a_run_nothing_is_left_of_it(tmp_path: Path, number: int):
    """From a process of its own, as a user's or `polarity compare`'s is."""
    log = tmp_path / "log.txt"
    code = (
        "import os, sys; from pathlib import Path; from polarity.engines.verl.launch import run\n"
        f"run([sys.executable, '-c', {FAMILY!r}, {str(log)!r}], dict(os.environ), Path({str(log)!r}))"
    )
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        session = family(log)
        process.send_signal(number)
        assert process.wait(60) != 0
        assert launch._members(session) == []
        assert bystander.poll() is None
    finally:
        for left in (process, bystander):
            left.kill()
            left.wait()


def test_what_a_leader_leaves_behind_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "GRACE", 1.0)
    log, seen = tmp_path / "log.txt", []
    code = FAMILY.replace("time.sleep(600)\n", "print('session', os.getsid(0), flush=True); time.sleep(1)\n")
    done = launch.run([sys.executable, "-c", code], dict(os.environ), log, lambda: seen.append(1))
    assert done == 0
    assert seen
    session = int(log.read_text().split("session ")[1].split()[0])
    assert launch._members(session) == []


def test_other_threads_may_run_it(tmp_path: Path):
    codes: list[int] = []
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    thread = threading.Thread(target=lambda: codes.append(launch.run(command, dict(os.environ), tmp_path / "log.txt")))
    thread.start()
    thread.join(60)
    assert codes == [3]
