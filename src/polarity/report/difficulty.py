"""Evaluation accuracy over steps, split by the difficulty of the problems (analysis/validation.py)."""

from collections.abc import Mapping
from typing import Any

from polarity.analysis.validation import validation
from polarity.report.curves import Panel, aggregate, scaled
from polarity.report.figures import Block, Figure, spread
from polarity.report.runs import Runs, splits_of

MOST_CLASSES = 8
MOST_STEPS = 13  # evaluations of a run, evenly spaced, first and last among them
BANDS = ("unsolved", "hard", "easy", "solved")


def difficulty_block(runs: Runs) -> Block | None:
    """A row a split: accuracy of its problems by level where the data has levels, else by their accuracy at the first
    evaluation. Levels beyond MOST_CLASSES are left out. None where no run has kept two evaluations."""
    found = {}
    for run in runs.runs:
        if len(run.records) > 1:
            found[run.name] = validation({step: run.records[step] for step in spread(sorted(run.records), MOST_STEPS)})
    figures: list[Figure] = []
    for split in splits_of(runs.runs):
        own = {name: splits[split] for name, splits in found.items() if split in splits}
        kinds = {of["difficulty"] for of in own.values()}
        if len(kinds) != 1:
            continue
        kind, names = kinds.pop(), list(dict.fromkeys(name for of in own.values() for name in of["problems"]))
        classes = [name for name in BANDS if name in names] if kind == "band" else names[:MOST_CLASSES]
        panels, columns = [], []
        for name in classes:
            counts = sorted({of["problems"][name] for of in own.values() if name in of["problems"]})
            about = f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} problems"
            panels.append(Panel("", f"{split}, {'level ' if kind == 'level' else ''}{name}", about))
            series = {
                label: aggregate(_accuracy(own[run.name], name) for run in runs.of(label) if run.name in own)
                for label in runs.labels
            }
            columns.append({label: data for label, data in series.items() if data is not None})
        lacks = [tuple(label for label in runs.labels if label not in drawn) for drawn in columns]
        figures += scaled(panels, columns, lacks)
    title = "Accuracy by difficulty: the data's levels, or how many responses were correct at the first evaluation"
    return Block(title, figures, "grid", folded=True) if figures else None


def _accuracy(split: Mapping[str, Any], name: str) -> tuple[list[int], list[float]]:
    """Steps and accuracies of one class of problems."""
    at = {e["step"]: e["classes"][name]["accuracy"] for e in split["evaluations"] if name in e["classes"]}
    return list(at), list(at.values())
