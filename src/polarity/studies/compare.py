"""`polarity compare`: several methods x seeds, each run in its own process, then one table and one page.

A run that fails does not stop the others, finished runs are kept, and `resume` goes on where a comparison stopped.

    OUT/comparison.json        the plan at first, at the end every number of the tables (see report/summary.py)
    OUT/comparison.md          the tables
    OUT/report.html            the page
    OUT/METHOD/seed_K/         the runs
    OUT/logs/METHOD-seed_K.log what each process printed
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from polarity.config import RunConfig, load_config, refuse_changes
from polarity.errors import UserError
from polarity.report import write_report
from polarity.report.runs import load_runs
from polarity.report.summary import markdown, summarise
from polarity.rundir import RunReader

POLL_SECONDS = 0.5
STOP_SECONDS = 10.0
PLAIN_SHARE = 4  # without a terminal, a line every quarter of a run


@dataclass
class Job:
    """One run of the plan and, once started, its process."""

    method: str
    seed: int
    config: RunConfig
    folder: Path
    log: Path
    command: list[str]
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"{self.method} seed {self.seed}"

    def begun(self) -> bool:
        return (self.folder / "config.yaml").exists()

    def finished(self) -> bool:
        """Whether the run lies complete on disk: its last checkpoint is the last thing that a run writes.

        Raises UserError when the run on disk was started with other settings.
        """
        if not self.begun():
            return False
        reader = RunReader(self.folder)
        refuse_changes(self.folder, reader.config, self.config)
        return max(reader.checkpoints, default=0) >= self.config.steps


@dataclass(frozen=True)
class Comparison:
    """summary: the numbers (None when no run has any); failed: name of a run -> the last line it printed."""

    summary: dict[str, Any] | None
    failed: dict[str, str]
    report: Path | None


def compare(
    config: Path | None, overrides: Mapping[str, str], methods: Sequence[str], seeds: Sequence[int], out: Path,
    *, reference: str | None = None, jobs: int | None = None, resume: bool = False, overwrite: bool = False,
) -> Comparison:  # fmt: skip
    """Train every method with every seed on one configuration and compare them.

    overrides: dotted keys with their text, as `polarity train` takes them. reference: the method that differences are
    taken from (default dapo where it is among the methods, else the first). jobs: runs at the same time (default: the
    cores this process has). Raises UserError before anything starts when the input is wrong. Ctrl-C stops every run.
    """
    _check_names(methods, seeds, overrides, reference)
    plan = _plan(config, overrides, methods, seeds, out)
    _open_folder(out, resume, overwrite)
    reference = reference or ("dapo" if "dapo" in methods else methods[0])
    left = [job for job in plan if not job.finished()]
    _write(out / "comparison.json", {"methods": list(methods), "reference": reference, "results": {}})
    failed = _run_all(left, jobs or _cores(), len(plan))
    try:
        summary = summarise(load_runs([out], reference))
    except UserError:
        if not failed:
            raise
        return Comparison(None, failed, None)
    _write(out / "comparison.json", {**summary, "failed": failed})
    (out / "comparison.md").write_text(markdown(summary), encoding="utf-8")
    return Comparison(summary, failed, write_report([out], out / "report.html", summary["reference"]))


def _check_names(
    methods: Sequence[str], seeds: Sequence[int], overrides: Mapping[str, str], reference: str | None
) -> None:
    for kind, given in (("method", methods), ("seed", seeds)):
        if not given:
            raise UserError(f"no {kind} given; for example --{kind}s {'dapo,a3po' if kind == 'method' else '0,1,2'}")
        repeated = next((item for item in given if given.count(item) > 1), None)
        if repeated is not None:
            raise UserError(f"--{kind}s names {repeated} twice; name each {kind} once")
        if kind in overrides:
            raise UserError(f"compare takes --{kind}s {overrides[kind]},... instead of --{kind}")
    if reference is not None and reference not in methods:
        raise UserError(f"reference {reference!r} is not among the methods {', '.join(methods)}")


def _plan(
    config: Path | None, overrides: Mapping[str, str], methods: Sequence[str], seeds: Sequence[int], out: Path
) -> list[Job]:
    """Every run, in the order of the command line, each with a configuration that was read and checked."""
    jobs = []
    for method in methods:
        for seed in seeds:
            mine = {"method": method, **overrides, "seed": str(seed)}
            resolved = load_config(config, mine)
            name = method.replace(":", ".")
            folder = out / name / f"seed_{seed}"
            options = [text for key, value in mine.items() for text in (f"--{key}", value)]
            train = [sys.executable, "-m", "polarity", "train", *([str(config)] if config else []), *options]
            jobs.append(
                Job(method, seed, resolved, folder, out / "logs" / f"{name}-seed_{seed}.log",
                    [*train, "--out", str(folder), "--no-report"])
            )  # fmt: skip
    return jobs


def _open_folder(out: Path, resume: bool, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    used = out.is_dir() and any(out.iterdir())
    if used and not (out / "comparison.json").exists():
        raise UserError(f"{out} holds files that are not a comparison; choose another --out")
    if resume and not used:
        raise UserError(f"there is no comparison in {out} to resume; drop --resume to start it")
    if used and not (resume or overwrite):
        raise UserError(
            f"{out} already holds a comparison; add --resume to go on, --overwrite to replace it, or another --out"
        )
    if used and overwrite:
        shutil.rmtree(out)
    (out / "logs").mkdir(parents=True, exist_ok=True)


def _run_all(waiting: list[Job], jobs: int, planned: int) -> dict[str, str]:
    """Run the jobs, at most `jobs` at a time, and return the failures. Every process is stopped if this one is."""
    if len(waiting) < planned:
        print(f"{planned - len(waiting)} of {planned} runs are finished already", file=sys.stderr)
    failed: dict[str, str] = {}
    running: list[Job] = []
    todo = list(waiting)
    display = Display(waiting)
    try:
        with display.progress:
            while todo or running:
                while todo and len(running) < jobs:
                    running.append(_start(todo.pop(0)))
                for job in running:
                    assert job.process is not None
                    code = job.process.poll()
                    if code:
                        failed[job.name] = _last_line(job.log) or f"ended with code {code}"
                    display.update(job, failed.get(job.name) if code else "done" if code == 0 else None)
                running = [job for job in running if job.process and job.process.returncode is None]
                time.sleep(POLL_SECONDS if running else 0)
    finally:
        _stop(running)
    return failed


def _cores() -> int:
    """Cores this process may use, where the system can tell them from those it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(job: Job) -> Job:
    """One thread a run: the runs fill the cores, and threads that wait for each other would only heat them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    with job.log.open("ab") as log:
        job.process = subprocess.Popen(
            [*job.command, *(["--resume"] if job.begun() else [])],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the runs
        )  # fmt: skip
    return job


def _stop(jobs: Sequence[Job]) -> None:
    """Ask, wait, insist. A run may be stopped at any moment: its checkpoints are complete or absent."""
    processes = [job.process for job in jobs if job.process is not None]
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Display:
    """One bar a run in a terminal; elsewhere a line at each quarter of a run and at its end."""

    def __init__(self, jobs: Sequence[Job]):
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {
            job.name: self.progress.add_task(job.name, total=job.config.steps, start=False, state="waits")
            for job in jobs
        }
        self.told: dict[str, int] = {}

    def update(self, job: Job, end: str | None) -> None:
        """Show where `job` is. end: "done", the message of a failed run, or None while it runs."""
        rows = RunReader(job.folder).metrics if job.begun() else []
        row = next((row for row in reversed(rows) if "accuracy/mean" in row), {"step": 0})
        step = int(row["step"])
        numbers = ", ".join(
            f"{name} {row[key]:.3f}"
            for name, key in (("accuracy", "accuracy/mean"), ("entropy", "entropy/mean"))
            if key in row
        )
        state = f"failed: {end}" if end not in (None, "done") else numbers or "starts"
        task = self.tasks[job.name]
        self.progress.start_task(task)
        self.progress.update(task, completed=step, state=state)
        quarter = PLAIN_SHARE * step // job.config.steps
        if not self.console.is_terminal and (end or quarter > self.told.get(job.name, 0)):
            print(f"{job.name}: step {step}/{job.config.steps}, {state}", file=sys.stderr, flush=True)
        self.told[job.name] = quarter


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else ""


def _write(path: Path, value: Mapping[str, Any]) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=1), encoding="utf-8")
    aside.replace(path)
