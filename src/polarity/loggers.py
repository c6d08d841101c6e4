"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio. Names, steps and values are the same.

metrics.jsonl stays the record. A logger that fails in mid-run is given up with one line on stderr, and training goes
on. A resumed run continues what its loggers hold: rows after the step it resumes from are hidden (TensorBoard),
written anew (trackio, W&B off-line), or stand there twice at the same step (W&B on-line).

The packages are extras and are imported here alone, when a run asks for them.
"""

import os
import re
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import yaml

from polarity.errors import UserError, nearest
from polarity.rundir import RunReader  # it stands on the same floor; only metrics.jsonl is read

Row = Mapping[str, float]
PROJECT = "polarity"
FINISH_SECONDS = 60.0  # what a W&B server that does not answer may delay the end of a run


class Logger(Protocol):
    """Takes the rows of metrics.jsonl, in step order, right after they are written there."""

    def log(self, row: Row) -> None:
        """Log one row: `step` and the metrics by name. Never raises."""

    def close(self) -> None:
        """Write what is still buffered. While an exception unwinds, the run is marked as failed. Never raises."""


def make_loggers(names: Sequence[str], run: Path, config: Mapping[str, Any]) -> list[Logger]:
    """The loggers of a run that is about to train, each once.

    run: the run directory, with config.yaml; what metrics.jsonl holds already (rewound, when a run is resumed) is taken
    as logged. config: the resolved configuration, JSON data. Raises UserError for what `check_loggers` refuses, and
    when a logger cannot start.
    """
    check_loggers(names)
    rows = RunReader(run).metrics
    return [_Guarded(name, KNOWN[name], run.resolve(), config, rows) for name in dict.fromkeys(names)]


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError for a name that is not known, and for one whose package is not installed."""
    for name in names:
        if name not in KNOWN:
            raise UserError(f"unknown logger {name!r}; {nearest(name, KNOWN)}")
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # None: no package, but a folder of that name, as run directories have
            raise UserError(f'logger {name} is not installed; pip install "polarity-rl[{name}]"')


class _Guarded:
    """A logger that must not cost a run: what it raises while training is one line, and the last that is heard of it.

    `except Exception`: the packages raise errors of their own, of sqlite3, of sockets, of files; none may end training.
    """

    def __init__(
        self, name: str, make: Callable[..., Logger], run: Path, config: Mapping[str, Any], rows: list[dict[str, float]]
    ):
        self.name = name
        try:
            self.logger: Logger | None = make(run, config, rows)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"logger {name} does not start ({_line(error)}); {FIX[name]}") from error

    def log(self, row: Row) -> None:
        if self.logger is not None:
            try:
                self.logger.log(row)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        if self.logger is not None:
            try:
                self.logger.close()
            except Exception as error:
                self._give_up(error)
            self.logger = None

    def _give_up(self, error: Exception) -> None:
        self.logger = None
        print(f"warning: logger {self.name} failed and is left out from here on ({_line(error)})", file=sys.stderr)


class TensorBoard:
    """Event files in RUN/tensorboard, a scalar a metric, in float32. `tensorboard --logdir RUN` shows them."""

    def __init__(self, run: Path, config: Mapping[str, Any], rows: list[dict[str, float]]):
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        going_on = any(folder.glob("events.*"))
        after = int(rows[-1]["step"]) + 1 if rows else 0
        self.writer = SummaryWriter(str(folder), purge_step=after if going_on else None)
        if not going_on:
            text = yaml.safe_dump(dict(config), sort_keys=False)
            self.writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))
            for row in rows:
                self.log(row)

    def log(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(row["step"]))
        self.writer.flush()  # a run that is killed has all its rows here, too

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, its files in RUN/wandb and its id in RUN/wandb/run_id, so that --resume goes on in it.

    W&B refuses rows with a decreasing step of its own, and a resumed run repeats steps: `step` is logged as a metric
    like the others, and is the x axis of all. W&B's own variables hold (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY,
    WANDB_RUN_GROUP, ...), but for name, id and directory, which are the run's.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], rows: list[dict[str, float]]):
        import wandb

        (run / "wandb").mkdir(exist_ok=True)  # where W&B would make it, too
        id_file = run / "wandb" / "run_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_name(run),
            id=id_file.read_text(),
            resume="allow",
            dir=str(run),
            config=dict(config),
            reinit="create_new",
            settings=wandb.Settings(console="off", finish_timeout=FINISH_SECONDS, quiet=True),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        if not self.run.resumed:  # off-line, or new to the server
            for row in rows:
                self.log(row)

    def log(self, row: Row) -> None:
        self.run.log(dict(row))

    def close(self) -> None:
        self.run.finish(exit_code=1 if sys.exc_info()[0] else 0)


class Trackio:
    """A run of trackio, in RUN/trackio unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say otherwise.

    trackio has no way to take rows back, so a local store gets a resumed run anew. It prints on stdout, which is for
    results: here that goes to stderr.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], rows: list[dict[str, float]]):
        folder = Path(os.environ.get("TRACKIO_DIR") or run / "trackio")
        self.trackio = trackio = _import_trackio(folder)
        id_file = run / "trackio" / "run_id"
        id_file.parent.mkdir(exist_ok=True)
        former = id_file.read_text() if id_file.exists() else None
        remote = bool(os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
        with redirect_stdout(sys.stderr):
            if former and not remote and (folder / f"{PROJECT}.db").exists():
                for found in trackio.Api().runs(PROJECT):
                    if found.id == former:
                        found.delete()
            self.run = trackio.init(
                PROJECT, name=run_name(run), config=dict(config), resume="allow" if former and remote else "never",
                embed=False, auto_log_cpu=False, auto_log_gpu=False,
            )  # fmt: skip
        id_file.write_text(self.run.id)
        if not (former and remote):
            for row in rows:
                self.log(row)

    def log(self, row: Row) -> None:
        self.run.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self.trackio.finish()


def _import_trackio(folder: Path) -> Any:
    """trackio with its files in `folder`: it reads TRACKIO_DIR when it is imported, and never again."""
    given = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder)
    try:
        import trackio
        from trackio.utils import TRACKIO_DIR
    finally:
        del os.environ["TRACKIO_DIR"]
        if given is not None:
            os.environ["TRACKIO_DIR"] = given
    if folder != TRACKIO_DIR:
        raise UserError(
            f"trackio writes to {TRACKIO_DIR} in this process already; start each run in a process of its own, or set "
            "TRACKIO_DIR for all of them"
        )
    return trackio


def run_name(run: Path) -> str:
    """The run directory's name; of a comparison's METHOD/seed_K, both parts."""
    return f"{run.parent.name}-{run.name}" if re.fullmatch(r"seed_\d+", run.name) else run.name


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


KNOWN: dict[str, Callable[..., Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
FIX = {
    "tensorboard": "take it out of log.to",
    "wandb": "log in with `wandb login`, set WANDB_MODE=offline, or take it out of log.to",
    "trackio": "take it out of log.to",
}
