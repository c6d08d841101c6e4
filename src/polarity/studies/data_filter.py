"""`polarity data filter`: keep the training problems that a model solves sometimes.

A problem that is always or never solved gives every response of its group the same reward, so a method that compares
rewards within a group learns nothing from it. The pass rate is the share of correct ones among `samples` responses, so
a problem that is solved once in a hundred times will mostly go.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polarity.data import Row, load_problems
from polarity.errors import UserError
from polarity.evaluation import Stream, Task, read_evaluation, run_evaluation
from polarity.rewards import Verifier
from polarity.studies.evaluate import evaluate_model


@dataclass(frozen=True)
class Filtered:
    """How many problems were always solved, never solved, and kept (solved sometimes); `path` holds those."""

    path: Path
    always: int
    never: int
    kept: int

    def summary(self) -> str:
        total = self.kept + self.always + self.never
        gone = f"{self.always:,} always solved, {self.never:,} never"
        return f"{self.path}: {self.kept:,} of {total:,} problems kept; {gone}"


def filter_with_model(
    model: Path,
    train: str,
    out: Path,
    overrides: Mapping[str, Any],
    *,
    samples: int = 8,
    columns: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Filtered:
    """Sample `samples` responses to each problem of `train`, and write those with 0 < pass rate < 1 to `out`.

    model, overrides: as in `polarity eval`: a model directory or a run; data.verifier, data.template, data.stop,
    evaluation.temperature (1 unless set, as in training) and the like. out: JSONL of the rows, with `pass_rate` added;
    next to it, NAME.evaluation/ holds every response, and a filter that was stopped goes on from there.
    Raises UserError as `polarity eval` does, and where no problem is left (`out` is not written).
    """
    _check(samples)
    rows = load_problems(train, columns).rows
    evaluate_model(model, overrides, samples=samples, data=Path(train), out=responses_of(out), progress=progress)
    return _keep(rows, out)


def filter_problems(
    rows: Sequence[Row],
    out: Path,
    stream: Stream,
    verifier: Verifier,
    *,
    samples: int = 8,
    template: str = "{problem}",
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Filtered:
    """The same with any generator: `stream` and settings as in `polarity.evaluation.run_evaluation`."""
    _check(samples)
    task = Task("filter", rows, verifier, getattr(verifier, "__name__", type(verifier).__name__), template)
    run_evaluation([task], stream, samples, dict(settings or {}), model="", out=responses_of(out), progress=progress)
    return _keep(rows, out)


def responses_of(out: Path) -> Path:
    """The directory next to `out` that holds the responses, in the format of `polarity eval`."""
    return out.with_suffix(".evaluation")


def _check(samples: int) -> None:
    if samples < 2:
        raise UserError(f"samples {samples} cannot tell sometimes from always or never; give 2 or more, for example 8")


def _keep(rows: Sequence[Row], out: Path) -> Filtered:
    (graded,) = read_evaluation(responses_of(out))[1].values()
    rates = {name: sum(problem.correct) / len(problem.correct) for name, problem in graded.items()}
    kept = [{**row, "pass_rate": rates[row["id"]]} for row in rows if 0 < rates.get(row["id"], 0) < 1]
    found = Filtered(
        out, sum(rate == 1 for rate in rates.values()), sum(rate == 0 for rate in rates.values()), len(kept)
    )
    if not kept:
        raise UserError(
            f"no problem is solved sometimes: {found.always:,} always, {found.never:,} never; take more samples, or "
            f"see in {responses_of(out)} whether template, stop strings and response limit suit the model"
        )
    aside = out.with_name(out.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in kept)
    aside.replace(out)
    return found
