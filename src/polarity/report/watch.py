"""`polarity watch`: runs that go on, in a terminal: progress, numbers with their course, and the report's verdicts.

metrics.jsonl is read once and then only where it grows. Text that runs wrote (names, splits) is shown without its
control characters. Where the terminal's encoding is not UTF-8, everything is ASCII.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from polarity.errors import UserError
from polarity.report.overview import MARKS, verdicts
from polarity.report.runs import Run, run_folders, splits_of, values_of
from polarity.report.text import visible
from polarity.report.verdicts import LEVELS, Verdict
from polarity.rundir import RunReader

SECONDS = 1.0  # between two frames
FIND_SECONDS = 5.0  # between two looks for runs that have come or gone
RATE_STEPS = 20  # the rate is a mean over the last so many steps
SILENT_SECONDS, SILENT_STEPS = (
    60.0,
    10.0,
)  # a run that writes no row for so long, and so many steps' time, is called silent
DETAILS = 26  # lines that one run takes, and those around it
BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-=+*%#"
IN_ASCII = str.maketrans({"→": "->", "–": "-", "…": "...", "✓": "+", "•": "*", "✗": "x", "⟨": "<", "⟩": ">"})
STYLES = {"good": "green", "plain": "", "warn": "yellow", "bad": "red", "positive": "green", "negative": "red"}
NUMBERS = (
    ("accuracy/mean", "train accuracy"),
    ("reward/mean", "reward"),
    ("entropy/mean", "entropy, nats"),
    ("length/mean", "length, tokens"),
    ("length/truncated", "truncated"),
    ("kept", "kept"),
    ("sharpening/n3", "sharpening, n 3"),
    ("discovery/n3", "discovery, n 3"),
)
PAIRS = (("entropy", "entropy"), ("length", "length"))  # under positive/ and negative/, on one scale


def watch(paths: Sequence[Path], *, once: bool = False) -> None:
    """Show the runs at or below `paths` until q or Ctrl-C.

    With `once`, and where stdout is no terminal, one frame is printed, with all runs in full. Raises UserError when a
    path does not exist, and with `once` when there is no run.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; give a run directory or a folder of runs")
    console = Console(highlight=False)
    board = Board(paths)
    if once or not console.is_terminal:
        board.update()
        if not board.runs:
            reasons = "; ".join(f"{folder}: {why}" for folder, why in board.unread.items())
            where = ", ".join(map(str, paths))
            raise UserError(reasons or f"no run at or below {where}; a run directory holds config.yaml")
        console.print(board.everything(console))
        return
    try:
        with keys() as key, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                board.update()
                live.update(board.frame(console), refresh=True)
                pressed = key(SECONDS)
                if pressed == "q":
                    return
                board.choose({"j": 1, "k": -1}.get(pressed, 0))
                board.table ^= pressed == "t"
    except KeyboardInterrupt:
        return


@contextmanager
def keys() -> Iterator[Callable[[float], str]]:
    """A function that waits up to so many seconds for a key and returns it, or "". Typed keys are not echoed."""
    try:
        import select
        import termios
        import tty

        before = termios.tcgetattr(sys.stdin)
    except (ImportError, OSError, ValueError, termios.error):  # no terminal to type on
        yield _no_keys
        return
    descriptor = sys.stdin.fileno()

    def key(seconds: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        typed = os.read(descriptor, 1) if ready else b""
        if ready and not typed:  # the terminal is gone
            return "q"
        return typed.decode("ascii", "replace").lower()

    try:
        tty.setcbreak(descriptor)
        yield key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _no_keys(seconds: float) -> str:
    time.sleep(seconds)
    return ""


# ---- reading ----


class Tail:
    """The rows of a metrics.jsonl, read as they come."""

    def __init__(self, file: Path):
        self.file = file
        self.offset, self.last = 0, b""  # what was read ends with the line `last`

    def read(self) -> list[dict[str, Any]] | None:
        """The rows that are new, up to the last whole line. None: the file is another one (rewound, or begun again),
        or gone; the next call reads it from its start."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset - len(self.last))
                data = file.read()
        except FileNotFoundError:
            data = b""
        if not data.startswith(self.last):
            self.offset, self.last = 0, b""
            return None
        lines = data[len(self.last) : data.rfind(b"\n") + 1].splitlines(keepends=True)
        if lines:
            self.offset, self.last = self.offset + sum(map(len, lines)), lines[-1]
        return [json.loads(line) for line in lines]


class Watched:
    """One run, kept up to date."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.written: int | None = None  # config.yaml's time: a run that is resumed may have more steps
        self.verdicts: list[Verdict] = []

    def update(self) -> None:
        """Read what is new. Raises OSError, ValueError or UserError where the run is gone or half written."""
        written = (self.folder / "config.yaml").stat().st_mtime_ns
        if written != self.written:
            self._begin()
            self.written = written
        rows = self.tail.read()
        if rows is None:
            self._begin()
            rows = self.tail.read() or []
        if rows:
            self._add(rows)

    def _begin(self) -> None:
        reader = RunReader(self.folder)
        config = reader.config
        self.run = Run(self.name, int(config.get("seed") or 0), self.folder, reader, config, [], {})
        self.tail = Tail(self.folder / "metrics.jsonl")
        self.verdicts = []

    def _add(self, rows: Sequence[dict[str, Any]]) -> None:
        run = self.run
        for row in rows:
            if row["step"] > 0:
                run.metrics.append(row)
            if row.get("rollouts/generated"):
                row["kept"] = row.get("rollouts/kept", 0.0) / row["rollouts/generated"]
            for key, value in row.items():
                if key.startswith("eval/"):
                    _, split, metric = key.split("/", 2)
                    run.evaluations.setdefault(int(row["step"]), {}).setdefault(split, {})[metric] = value
                    vars(run).pop("records", None)  # what Run keeps of files that have changed
        vars(run).pop("columns", None)
        self.verdicts = verdicts([run])

    @property
    def steps(self) -> int:
        return int(self.run.config.get("steps") or 0)

    @property
    def seconds(self) -> float | None:
        """Seconds a step, evaluations included, lately."""
        rows = self.run.metrics[-RATE_STEPS:]
        times = [row["time/step"] + row.get("time/evaluation", 0.0) for row in rows if "time/step" in row]
        return sum(times) / len(times) if times else None

    @property
    def silent(self) -> float | None:
        """Seconds since the last row, of a run that is not done and should have written one."""
        file = self.folder / "metrics.jsonl"
        if self.run.finished or not file.exists():
            return None
        age = time.time() - file.stat().st_mtime
        return age if age > max(SILENT_SECONDS, SILENT_STEPS * (self.seconds or 0)) else None


class Board:
    """The runs at or below some paths, which one is chosen, and whether their table is shown beside it."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = [path.resolve() for path in paths]
        self.runs: list[Watched] = []
        self.chosen = 0
        self.table = True
        self.found_at = -math.inf
        self.unread: dict[Path, str] = {}  # runs that could not be read, and why

    def choose(self, by: int) -> None:
        self.chosen = max(0, min(len(self.runs) - 1, self.chosen + by))

    def update(self) -> None:
        if time.monotonic() - self.found_at > FIND_SECONDS or not self.runs:
            self.found_at = time.monotonic()
            known = {run.folder: run for run in self.runs}
            self.runs = [known.get(folder) or Watched(folder, name) for folder, name in self._folders().items()]
        for run in list(self.runs):
            try:
                run.update()
            except (
                OSError,
                ValueError,
                KeyError,
                UserError,
            ) as error:  # deleted, or half of it; looked for again
                self.unread[run.folder] = str(error) or type(error).__name__
                self.runs.remove(run)
                self.found_at = -math.inf
        self.choose(0)

    def _folders(self) -> dict[Path, str]:
        """Run directories, and what to call each."""
        found: dict[Path, str] = {}
        for path in self.paths:
            for folder in run_folders(path):
                found.setdefault(folder, visible(str(folder.relative_to(path.parent if folder == path else path))))
        return found

    def everything(self, console: Console) -> RenderableType:
        """The table, and every run."""
        parts: list[RenderableType] = [self._table(console, range(len(self.runs)), marked=False), Text()]
        for run in self.runs:
            parts += [details(run, console), Text()]
        return Group(*(parts if len(self.runs) > 1 else parts[2:3]))

    def frame(self, console: Console) -> RenderableType:
        """What fits into the terminal: the table around the chosen run, and that run."""
        if not self.runs:
            return Text("waiting for a run; q quits")
        if len(self.runs) == 1:
            return Group(details(self.runs[0], console), Text("q quits", style="dim"))
        words = f"{len(self.runs)} runs; j and k choose, t {'hides' if self.table else 'shows'} the table, q quits"
        parts: list[RenderableType] = [Text(words, style="dim"), details(self.runs[self.chosen], console)]
        if self.table:
            most = max(3, console.height - DETAILS)
            first = max(0, min(self.chosen - most // 2, len(self.runs) - most))
            parts.insert(0, self._table(console, range(first, min(first + most, len(self.runs))), marked=True))
        return Group(*parts)

    def _table(self, console: Console, which: Sequence[int], *, marked: bool) -> Table:
        table = Table(box=None, expand=True, padding=(0, 1, 0, 0), pad_edge=False)
        split = next(iter(splits_of([run.run for run in self.runs])), "")
        for name in ("", "run", "step", "accuracy", "entropy", "length", "truncated", f"pass@1 {visible(split)}"):
            wide = name in ("accuracy", "entropy")
            table.add_column(name, no_wrap=True, overflow="crop", ratio=1 if wide else None, header_style="dim")
        width = max(4, (console.width - 62) // 2)
        for i in which:
            run = self.runs[i]
            worst = next((level for level in LEVELS for verdict in run.verdicts if verdict.level == level), "plain")
            mark = Text(MARKS[worst] if run.verdicts else " ", style=STYLES[worst])
            cells = [mark, Text(("> " if i == self.chosen else "  ") * marked + run.name)]
            cells.append(Text(f"{run.run.last_step}/{run.steps}", style="yellow" if run.silent else ""))
            for metric in ("accuracy/mean", "entropy/mean"):
                cells.append(Text(f"{_last(run, metric)} {_course(run, metric, width, console)}"))
            cells += [Text(_last(run, "length/mean")), Text(_last(run, "length/truncated"))]
            cells.append(Text(_last(run, f"eval/{split}/pass@1")))
            table.add_row(*(_fit(cell, console) for cell in cells))
        return table


# ---- drawing ----


def details(run: Watched, console: Console) -> RenderableType:
    """Everything about one run."""
    found = [_progress(run, console)]
    for verdict in run.verdicts:
        words = f"{MARKS[verdict.level]} {verdict.name}: {verdict.text}"
        found.append(_fit(Text(words, style=STYLES[verdict.level]), console))
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), pad_edge=False, show_header=bool(run.run.metrics))
    for name, justify in (("", "left"), ("first", "right"), ("last", "right")):
        table.add_column(name, justify=justify, no_wrap=True, overflow="crop", header_style="dim")  # type: ignore[arg-type]
    table.add_column("", ratio=1, no_wrap=True, overflow="crop")
    width = max(8, min(60, console.width - 44))
    for metric, title in NUMBERS:
        _add_row(table, run, metric, title, width, console)
    for metric, title in PAIRS:
        both = [v for side in ("positive", "negative") for v in values_of(run.run, f"{side}/{metric}")[1]]
        for side in ("positive", "negative"):
            _add_row(table, run, f"{side}/{metric}", f"{side} {title}", width, console, scale=both, style=STYLES[side])
    for split in splits_of([run.run]):
        _add_evaluation(table, run, split, console)
    if evaluated := run.run.final_evaluation():
        table.add_row(_fit(Text(f"last evaluation: step {evaluated[0]}", style="dim"), console))
    return Group(*found, table)


def _progress(run: Watched, console: Console) -> RenderableType:
    """Name, step of steps, rate, time to go."""
    done, steps, seconds = run.run.last_step, run.steps, run.seconds
    facts = [f"step {done} of {steps}" if steps else f"step {done}"]
    if not run.run.metrics:
        facts = ["waiting for the first step"]
    if seconds:
        facts.append(f"{number(seconds)} s a step")
    if run.run.finished and run.run.metrics:
        facts.append("done")
    elif silent := run.silent:
        facts.append(f"no new row for {timedelta(seconds=round(silent))}")
    elif seconds and steps:
        facts.append(f"{timedelta(seconds=round(seconds * (steps - done)))} to go")
    line = Table.grid(expand=True, padding=(0, 1, 0, 0))
    line.add_column(no_wrap=True, overflow="crop")
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right", overflow="crop")
    bar = ProgressBar(total=max(1, steps), completed=done, finished_style="green", complete_style="cyan")
    style = "yellow" if run.silent else ""
    line.add_row(_fit(Text(run.name, style="bold"), console), bar, _fit(Text(", ".join(facts), style=style), console))
    return line


def _add_row(
    table: Table, run: Watched, metric: str, title: str, width: int, console: Console,
    scale: Sequence[float] = (), style: str = "",
) -> None:  # fmt: skip
    values = values_of(run.run, metric)[1]
    if values:
        course = sparkline(values, width, scale or values, ascii_only=console.options.ascii_only)
        cells = [Text(title), Text(number(values[0])), Text(number(values[-1])), Text(course, style=style)]
        table.add_row(*(_fit(cell, console) for cell in cells))


def _add_evaluation(table: Table, run: Watched, split: str, console: Console) -> None:
    """One line a split: pass@1, and behind its course the pass@K with the most samples."""
    names = {name for splits in run.run.evaluations.values() for name in splits.get(split, {})}
    ks = sorted(int(name[5:]) for name in names if name.startswith("pass@"))
    if not ks:
        return
    first, *more = (values_of(run.run, f"eval/{split}/pass@{k}")[1] for k in dict.fromkeys((ks[0], ks[-1])))
    course = sparkline(first, 12, first, ascii_only=console.options.ascii_only).ljust(12)
    best = "".join(
        f"  pass@{ks[-1]} " + " → ".join(dict.fromkeys((number(values[0]), number(values[-1])))) for values in more
    )
    cells = (f"{visible(split)} pass@{ks[0]}", number(first[0]), number(first[-1]), course + best)
    table.add_row(*(_fit(Text(cell), console) for cell in cells))


def _last(run: Watched, metric: str) -> str:
    values = values_of(run.run, metric)[1]
    return number(values[-1]) if values else ""


def _course(run: Watched, metric: str, width: int, console: Console) -> str:
    values = values_of(run.run, metric)[1]
    return sparkline(values, width, values, ascii_only=console.options.ascii_only)


def sparkline(values: Sequence[float], width: int, scale: Sequence[float], *, ascii_only: bool = False) -> str:
    """`values` (finite) as at most `width` blocks, each the mean of a bin, between lowest and highest of `scale`."""
    levels = ASCII if ascii_only else BLOCKS
    n = min(width, len(values))
    edges = [round(i * len(values) / n) for i in range(n + 1)] if n else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(scale, default=0.0), max(scale, default=0.0)
    span = high - low
    places = [(mean - low) / span if span > 0 else 0.5 for mean in means]
    return "".join(levels[max(0, min(len(levels) - 1, int(place * len(levels))))] for place in places)


def number(value: float) -> str:
    """Three decimals below ten, fewer above, so that a column stays narrow."""
    if value and abs(value) < 0.0005:
        return f"{value:.0e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 10_000 else f"{value:.0f}"


def _fit(text: Text, console: Console) -> Text:
    """The text as the terminal can show it."""
    if console.options.ascii_only:
        text = Text(text.plain.translate(IN_ASCII).encode("ascii", "replace").decode(), style=text.style)
    return text
