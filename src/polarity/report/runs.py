"""Run directories, found, read and sorted under the method each of them trained with."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from polarity.errors import UserError
from polarity.report.foreign import adopt, converted, nothing_at
from polarity.report.text import visible
from polarity.rundir import RunReader


@dataclass(frozen=True)
class Run:
    """One run, read once. `label` names its method; runs that differ only in their seed share a label.

    metrics: the training rows (step >= 1), in step order.
    evaluations: step -> {split: {metric: value}}; step 0 is the model before training.
    """

    label: str
    seed: int
    path: Path
    reader: RunReader
    config: dict[str, Any]
    metrics: list[dict[str, float]]
    evaluations: dict[int, dict[str, dict[str, float]]]

    @property
    def name(self) -> str:
        return f"{self.label} seed {self.seed}"

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def finished(self) -> bool:
        return self.last_step >= int(self.config.get("steps") or 0)

    @property
    def notes(self) -> list[str]:
        """What the source of a converted run lacks, in words."""
        return [str(note) for note in self.config.get("notes") or []]

    @property
    def length_unit(self) -> str:
        """tokens; words where a converted run's source has no tokens."""
        return str(self.config.get("length_unit") or "tokens")

    @cached_property
    def columns(self) -> dict[str, tuple[list[int], list[float]]]:
        """Training metric -> its steps and values, where finite."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for row in self.metrics:
            for name, value in row.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
        return found

    @cached_property
    def records(self) -> dict[int, dict[str, Any]]:
        """Step -> the content of its file under evaluations/, read once."""
        return self.reader.evaluations

    def final_evaluation(self) -> tuple[int, dict[str, dict[str, float]]] | None:
        """The last evaluation of the trained model: (step, {split: {metric: value}})."""
        steps = [step for step in self.evaluations if step > 0]
        return (max(steps), self.evaluations[max(steps)]) if steps else None

    @cached_property
    def final_verdicts(self) -> dict[str, dict[str, list[bool]]]:
        """Split -> problem id -> the verdict on each of its samples in the final evaluation; empty if not kept."""
        final = self.final_evaluation()
        kept = self.records.get(final[0], {}).get("samples", {}) if final else {}
        return {split: {str(row["problem_id"]): row["correct"] for row in rows} for split, rows in kept.items()}


@dataclass(frozen=True)
class Runs:
    """The runs of a page: every run, labels in order of appearance, and the method the others are compared with."""

    runs: list[Run]
    reference: str
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(run.label for run in self.runs))

    def of(self, label: str) -> list[Run]:
        return [run for run in self.runs if run.label == label]

    @property
    def length_unit(self) -> str:
        return " or ".join(dict.fromkeys(run.length_unit for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})


def load_runs(paths: Sequence[Path], reference: str | None = None) -> Runs:
    """Read every run at or below `paths` (a run directory, or a folder of them up to METHOD/seed_K deep).

    reference: label of the method that the others are compared with; None takes the comparison's own, else dapo, else
    grpo, else the first. Raises UserError when there is no run, or no such method.
    """
    folders = list(dict.fromkeys(folder.resolve() for path in paths for folder in _find(path)))
    read, unread = [], []
    for folder in folders:
        try:
            read.append(_read(folder))
        except UserError as error:
            if len(folders) == 1:
                raise
            unread.append(f"left out: {error}")
    runs = _labelled(read)
    notes = unread + [f"{run.name} has no training step yet and is left out" for run in runs if not run.metrics]
    runs = [run for run in runs if run.metrics]
    if not runs:
        raise UserError(f"no run at {', '.join(map(str, paths))} has completed a step yet; nothing to report")
    labels = {run.label for run in runs}
    if reference is not None and reference not in labels:
        raise UserError(f"reference {reference!r} is not among the methods: {', '.join(sorted(labels))}")
    plan = _plan(paths)
    order = {label: i for i, label in enumerate(plan.get("methods", []))}
    runs.sort(key=lambda run: (order.get(run.label, len(order)), run.seed))
    wishes = [reference, plan.get("reference"), "dapo", "grpo", runs[0].label]
    return Runs(runs, next(w for w in wishes if w in labels), notes)


def _find(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run directory or a folder of runs")
    if not (folders := [*run_folders(path), *converted(path)]):
        raise nothing_at(path)
    return folders


def run_folders(path: Path) -> list[Path]:
    """The run directories at or below `path`, up to METHOD/seed_K deep; hidden folders are not looked into."""
    found: list[Path] = []
    for pattern in ("config.yaml", "*/config.yaml", "*/*/config.yaml"):
        found = found or sorted(file.parent for file in path.glob(pattern) if not file.parent.name.startswith("."))
    return found


def _plan(paths: Sequence[Path]) -> dict[str, Any]:
    """What `polarity compare` noted about its methods, when the paths are one comparison."""
    file = paths[0] / "comparison.json"
    plan: dict[str, Any] = json.loads(file.read_text()) if len(paths) == 1 and file.exists() else {}
    return plan


def _read(folder: Path) -> Run:
    reader = RunReader(folder)
    adopt(reader)
    config, rows = reader.config, reader.metrics
    method = config.get("method", {})
    named = method if isinstance(method, dict) else {"name": method}
    label = named.get("base") or named.get("name") or "unnamed"
    evaluations: dict[int, dict[str, dict[str, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("eval/"):
                _, split, metric = key.split("/", 2)
                evaluations.setdefault(int(row["step"]), {}).setdefault(split, {})[metric] = value
    training = [row for row in rows if row["step"] > 0]
    return Run(visible(str(label)), int(config.get("seed", 0)), folder, reader, config, training, evaluations)


def _labelled(runs: list[Run]) -> list[Run]:
    """Give runs of one method but different settings, or with the same seed, labels that tell them apart."""
    out = []
    for run in runs:
        peers = [peer for peer in runs if peer.label == run.label]
        same = [peer for peer in peers if _settings(peer) == _settings(run)]
        repeated = sum(peer.seed == run.seed for peer in same) > 1
        if len(same) == len(peers) and not repeated:
            out.append(run)
            continue
        folder = run.path.parent if run.path.name.startswith("seed_") else run.path
        label = folder.name if run.label in folder.name else f"{run.label} ({folder.name})"
        out.append(replace(run, label=label))
    return out


def _settings(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key not in ("seed", "threads", "device")}


def values_of(run: Run, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric of a run, where finite; eval/* includes step 0."""
    if not metric.startswith("eval/"):
        return run.columns.get(metric, ([], []))
    _, split, name = metric.split("/", 2)
    pairs = [(step, splits.get(split, {}).get(name)) for step, splits in sorted(run.evaluations.items())]
    kept = [(step, float(value)) for step, value in pairs if value is not None and math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def splits_of(runs: Iterable[Run]) -> list[str]:
    """Evaluation splits in the order in which runs report them."""
    return list(dict.fromkeys(split for run in runs for splits in run.evaluations.values() for split in splits))


def metrics_of(runs: Iterable[Run]) -> list[str]:
    """Names of the training metrics that any run has, in order of appearance."""
    return list(dict.fromkeys(name for run in runs for name in run.columns if name != "step"))
