"""Loggers hold what metrics.jsonl holds, after a resume too, and never end a run. W&B has processes of its own."""

import json
import os
import random
import struct
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2 as wandb_records
from wandb_server import WandbServer

from polarity import loggers
from polarity.errors import UserError
from polarity.loggers import check_loggers, make_loggers
from polarity.rundir import RunReader, RunWriter

HERE = Path(__file__).parent
CONFIG = {"method": {"name": "dapo", "base": "dapo"}, "steps": 9, "base": None, "data": {"stop": ["a: b", "é"]}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return RunWriter.create(tmp_path / "dapo" / "seed_3", yaml.safe_dump(CONFIG), seed=3).path


@pytest.fixture
def server():
    server = WandbServer()
    yield server
    server.stop()


def make_rows(first: int, last: int, seed: int = 0) -> list[dict[str, float]]:
    """Rows as a trainer writes them: not every name in every row, evaluations now and then, step 0 without training."""
    rng = random.Random(seed)
    rows = []
    for step in range(first, last + 1):
        row: dict[str, float] = {"step": step}
        if step:
            row |= {"reward/mean": rng.uniform(-1, 1), "rollouts/kept": float(rng.randint(0, 256)), "time/step": 1e-7}
        if step and rng.random() < 0.7:
            row["positive/entropy"] = rng.random() * 1e-3
        if step % 3 == 0:
            row |= {"eval/id/pass@1": rng.random(), "eval/a b/length": 123456.789}
        rows.append(row)
    return rows


class Driver:
    """A process that logs row by row (drive_loggers.py)."""

    def __init__(self, run: Path, names: str, *, finish: float = 30.0, **variables: str):
        home = {"HOME": str(run.parent), "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TRACKIO"))}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "drive_loggers.py"), str(run), names, str(finish)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment | home | variables,
        )  # fmt: skip
        self.heard = self.process.stdout.readline()

    def send(self, line: str) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def log(self, rows: list[dict[str, float]]) -> None:
        for row in rows:
            assert self.send(json.dumps(row)) == "done\n"

    def end(self) -> tuple[int, str]:
        """Exit code and stderr. Nothing but the driver's own words may have reached stdout."""
        out, error = self.process.communicate(timeout=60)
        assert out == ""
        return self.process.returncode, error


def log(run: Path, names: str, rows: list[dict[str, float]], **variables: str) -> str:
    driver = Driver(run, names, **variables)
    assert driver.heard == "ready\n"
    driver.log(rows)
    code, error = driver.end()
    assert code == 0, error
    return error


# ---- names ----


def test_unknown_and_missing_loggers_are_refused_before_anything_is_written(run: Path, monkeypatch):
    with pytest.raises(UserError, match=r"unknown logger 'tensorbord'; did you mean 'tensorboard'\?"):
        make_loggers(["tensorbord"], run, CONFIG)
    with pytest.raises(UserError, match="known: tensorboard, wandb, trackio"):
        check_loggers(["mlflow"])
    for spec in (None, ModuleSpec("wandb", None)):  # not there; only a folder of that name, as a run directory has
        monkeypatch.setattr(loggers, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(UserError, match=r'wandb is not installed; pip install "polarity-rl\[wandb\]"'):
            make_loggers(["wandb"], run, CONFIG)
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "environment.json"]
    assert make_loggers([], run, CONFIG) == []


def test_a_logger_that_fails_is_given_up_with_one_line(run: Path, monkeypatch, capsys):
    class Fails:
        def __init__(self, *_):
            self.logged = 0

        def log(self, row):
            self.logged += 1
            if self.logged == 2:
                raise OSError("disk full\nsecond line")
            assert self.logged < 3, "called again after it failed"

        def close(self):
            raise AssertionError("closed after it failed")

    monkeypatch.setitem(loggers.KNOWN, "tensorboard", Fails)
    made = make_loggers(["tensorboard", "tensorboard"], run, CONFIG)
    assert len(made) == 1
    for row in make_rows(1, 4):
        made[0].log(row)
    made[0].close()
    line = "warning: logger tensorboard failed and is left out from here on (OSError: disk full second line)\n"
    assert capsys.readouterr().err == line

    def does_not_start(*_):
        raise OSError("read-only")

    monkeypatch.setitem(loggers.KNOWN, "tensorboard", does_not_start)
    with pytest.raises(UserError, match=r"tensorboard does not start \(OSError: read-only\); take it out of log\.to"):
        make_loggers(["tensorboard"], run, CONFIG)


# ---- TensorBoard ----


def scalars(run: Path) -> dict[tuple[str, int], list[float]]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found: dict[tuple[str, int], list[float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault((name, event.step), []).append(event.value)
    return found


def expected(rows: list[dict[str, float]]) -> dict[tuple[str, int], list[float]]:
    return {(n, int(row["step"])): [float(np.float32(v))] for row in rows for n, v in row.items() if n != "step"}


def train(run: Path, rows: list[dict[str, float]], *, killed: bool = False) -> None:
    """What a trainer does, in this process: TensorBoard keeps no state in it."""
    (logger,) = make_loggers(["tensorboard"], run, CONFIG)
    for row in rows:
        RunWriter(run).metrics(row)
        logger.log(row)
    if not killed:
        logger.close()


def test_tensorboard_holds_every_value_at_its_step(run: Path):
    rows = make_rows(0, 9)
    train(run, rows)
    assert scalars(run) == expected(rows)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert yaml.safe_load("".join(line[4:] + "\n" for line in text.splitlines())) == CONFIG


@pytest.mark.parametrize("kept", [4, -1])
def test_tensorboard_shows_steps_that_are_logged_again_once(run: Path, kept: int):
    train(run, make_rows(0, 7), killed=True)
    assert scalars(run) == expected(make_rows(0, 7))  # a run that dies leaves its rows: every row is flushed

    RunWriter(run).rewind(kept)
    left, again = RunReader(run).metrics, make_rows(kept + 1, 9, seed=1)
    assert len(left) == kept + 1
    train(run, again)
    assert scalars(run) == expected(left + again)


# ---- Weights & Biases ----


def wandb_file(run: Path) -> tuple[dict, list[dict[str, float]]]:
    """Run record and history of the newest .wandb file: W&B's records in LevelDB's log format, 32 KiB blocks."""
    file = max((run / "wandb").glob("*run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    data, at, part, start, history = file.read_bytes(), 7, b"", {}, []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            record, part = wandb_records.Record.FromString(part), b""
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                history.append({name: value for name, value in items.items() if not name.startswith("_")})
            elif record.WhichOneof("record_type") == "run" and not start:
                config = {u.key: json.loads(u.value_json) for u in record.run.config.update if u.key != "_wandb"}
                start = {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
                start["config"] = config
    return start, history


def test_wandb_offline_holds_every_value_and_asks_nobody(run: Path, server: WandbServer):
    rows = make_rows(0, 9)
    nowhere = dict.fromkeys(("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), server.url)
    log(run, "wandb", rows, **nowhere)
    start, history = wandb_file(run)
    assert start == {
        "id": (run / "wandb" / "run_id").read_text(), "project": "polarity", "name": "dapo-seed_3", "config": CONFIG,
    }  # fmt: skip
    assert history == rows
    assert server.requests == []
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "environment.json", "metrics.jsonl", "wandb"]


def test_wandb_offline_writes_a_resumed_run_anew_under_its_id_and_syncs_it(run: Path, server: WandbServer):
    log(run, "wandb", make_rows(0, 7), WANDB_PROJECT="mine")
    first, _ = wandb_file(run)
    RunWriter(run).rewind(4)
    left, again = RunReader(run).metrics, make_rows(5, 9, seed=1)
    log(run, "wandb", again, WANDB_PROJECT="mine")
    second, history = wandb_file(run)
    assert second == first
    assert first["project"] == "mine"
    assert history == left + again
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2

    sync = [sys.executable, "-m", "wandb", "sync", str(run / "wandb" / "latest-run")]  # as docs/logging.md says
    subprocess.run(sync, env=os.environ | online(server) | {"HOME": str(run)}, capture_output=True, check=True)
    assert without_own(server.history) == history
    assert server.ids == {first["id"]}


def online(server: WandbServer) -> dict[str, str]:
    return {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "20"}


def without_own(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in history]


def test_wandb_online_goes_on_in_the_same_run_and_repeats_steps(run: Path, server: WandbServer):
    log(run, "wandb", make_rows(0, 7), **online(server))
    assert without_own(server.history) == make_rows(0, 7)
    RunWriter(run).rewind(4)
    again = make_rows(5, 9, seed=1)
    log(run, "wandb", again, **online(server))
    assert server.ids == {(run / "wandb" / "run_id").read_text()}
    assert without_own(server.history) == make_rows(0, 7) + again
    own = [row["_step"] for row in server.history]
    assert own == sorted(set(own))
    assert server.finished == [0, 0]


def test_a_wandb_server_that_dies_does_not_end_the_run(run: Path, server: WandbServer):
    driver = Driver(run, "wandb", finish=2.0, **online(server))
    driver.log(make_rows(0, 3))
    server.stop()
    driver.log(make_rows(4, 9))
    code, error = driver.end()
    assert code == 0
    assert "wandb sync" in error
    assert RunReader(run).metrics == [*make_rows(0, 3), *make_rows(4, 9)]
    assert wandb_file(run)[1] == RunReader(run).metrics


def test_a_wandb_process_that_dies_does_not_end_the_run(run: Path):
    driver = Driver(run, "wandb")
    driver.log(make_rows(0, 3))
    assert driver.send("kill core") == "done\n"
    driver.log(make_rows(4, 9))
    code, error = driver.end()
    assert code == 0
    assert error.count("warning: logger wandb failed and is left out from here on") == 1
    assert RunReader(run).metrics == [*make_rows(0, 3), *make_rows(4, 9)]


def test_wandb_that_cannot_start_is_an_error_before_training(run: Path, server: WandbServer):
    driver = Driver(run, "wandb", **(online(server) | {"WANDB_API_KEY": ""}))
    code, error = driver.end()
    assert driver.heard == ""
    assert code == 1
    assert "UserError: logger wandb does not start" in error
    assert "set WANDB_MODE=offline, or take it out of log.to" in error


def test_wandb_marks_a_run_that_failed(run: Path, server: WandbServer):
    driver = Driver(run, "wandb", **online(server))
    driver.log(make_rows(0, 3))
    driver.send("raise")
    code, error = driver.end()
    assert (code, server.finished) == (1, [1])
    assert error.rstrip().endswith("RuntimeError: training failed")
