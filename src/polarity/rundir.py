"""The run directory, polarity's public format (docs/run_directory.md): one writer, one reader.

Steps are counted as completed: the row, rollouts, checkpoint and evaluation of the first rollout step (s = 0) carry
step 1; step 0 is the model before training.
"""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from polarity.errors import UserError

Record = dict[str, Any]


class RunWriter:
    """Writes one run. Text files are replaced whole, and metrics rows are flushed as they come.

    listeners: called with each metrics row after it is written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.listeners: list[Callable[[Mapping[str, float]], None]] = []

    @classmethod
    def create(cls, path: Path, config_yaml: str, *, seed: int, overwrite: bool = False) -> "RunWriter":
        """Start a new run directory. Refuses one that holds a run (or anything else) unless `overwrite`."""
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; choose another --out")
        if path.is_dir() and any(path.iterdir()):
            if not (path / "config.yaml").exists():
                raise UserError(f"{path} holds files that are not a run; choose another --out")
            if not overwrite:
                raise UserError(
                    f"{path} already holds a run; add --resume to go on, --overwrite to replace it, or another --out"
                )
        try:
            if (path / "config.yaml").exists():
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
            _write_text(path / "config.yaml", config_yaml)  # first: what has it is a run
            _write_text(path / "environment.json", json.dumps(environment(seed), indent=1))
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); choose another --out") from error
        return cls(path)

    def config(self, config_yaml: str) -> None:
        """Replace config.yaml: a resumed run may have more steps than it was started with."""
        _write_text(self.path / "config.yaml", config_yaml)

    def metrics(self, row: Mapping[str, float]) -> None:
        """Append a row. What is not finite is left out: such a number is no JSON, and no measurement."""
        row = {name: value for name, value in row.items() if math.isfinite(value)}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        for listener in self.listeners:
            listener(row)

    def rollouts(self, step: int, rows: Iterable[Record]) -> None:
        self._json_lines(self.path / "rollouts" / f"step_{step:06d}.jsonl", rows)

    def evaluation(self, step: int, results: Record) -> None:
        path = self.path / "evaluations" / f"step_{step:06d}.json"
        path.parent.mkdir(exist_ok=True)
        _write_text(path, json.dumps(results))

    def checkpoint_path(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:06d}"

    def rewind(self, step: int) -> None:
        """Forget everything written after `step` steps, so that a resumed run writes it once."""
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            kept = [row for row in RunReader(self.path).metrics if row["step"] <= step]
            _write_text(metrics, "".join(json.dumps(row) + "\n" for row in kept))
        for folder in ("rollouts", "evaluations"):
            for file in (self.path / folder).glob("step_*"):
                if _step(file) > step:
                    file.unlink()

    def _json_lines(self, path: Path, rows: Iterable[Record]) -> None:
        path.parent.mkdir(exist_ok=True)
        _write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class RunReader:
    """Reads one run, also while it is being written (a half-written last metrics row is left out)."""

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.yaml").exists():
            raise UserError(f"{path} is not a run directory (it has no config.yaml)")

    @property
    def config(self) -> Record:
        file = self.path / "config.yaml"
        try:
            config: Record = yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            raise UserError(f"{file} is malformed YAML; mend it, or give another run") from error
        if not isinstance(config, dict):
            raise UserError(f"{file} holds no settings; give another run")
        return config

    @property
    def environment(self) -> Record:
        file = self.path / "environment.json"
        found: Record = json.loads(file.read_text()) if file.exists() else {}
        return found

    @property
    def metrics(self) -> list[Record]:
        file = self.path / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        rows = _json_rows(file, text[: text.rfind("\n") + 1])
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or "step" not in row:
                raise UserError(f"{file} line {number} is no metrics row: it has no step; take the line out")
        return rows

    @property
    def rollout_steps(self) -> list[int]:
        return sorted(_step(f) for f in (self.path / "rollouts").glob("step_*.jsonl"))

    def rollouts(self, step: int) -> list[Record]:
        file = self.path / "rollouts" / f"step_{step:06d}.jsonl"
        return _json_rows(file, file.read_text())

    @property
    def evaluations(self) -> dict[int, Record]:
        files = sorted((self.path / "evaluations").glob("step_*.json"))
        return {_step(f): _json_rows(f, f.read_text().replace("\n", " "))[0] for f in files}

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Complete checkpoints by step. Half-written ones lie under another name and are not seen."""
        folders = sorted((self.path / "checkpoints").glob("step_*"))
        return {_step(f): f for f in folders}


def environment(seed: int) -> Record:
    """Versions, code revision, uncommitted changes and hardware, for the record."""
    import torch

    packages = {}
    for name in ("polarity-rl", "torch", "transformers", "trl", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    cuda = torch.cuda.is_available()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": packages,
        "git": {"revision": _git("rev-parse", "HEAD"), "diff": _git("diff", "HEAD")},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def _git(*arguments: str) -> str | None:
    """What git says about the code that runs, or None where polarity does not run from a checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _json_rows(file: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line:
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{file} line {number} is no JSON; take the line (or the file) out") from error
    return rows


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_").split(".")[0])


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
