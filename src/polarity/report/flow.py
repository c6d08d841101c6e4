"""Accuracy patterns of the evaluation problems and how problems move between them, as an alluvial picture.

A column an evaluation: its problems, stacked by their pattern as of then (analysis/patterns.py), mastery on top. A
ribbon between two columns: the problems that went from one pattern to the other. Seeds are pooled: the same problem
under two seeds counts twice.
"""

from typing import Any

from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Range1d

from polarity.analysis.patterns import pattern_flow
from polarity.analysis.validation import problem_accuracies
from polarity.report.figures import Block, Figure, Section, blank_figure, spread
from polarity.report.runs import Run, Runs, splits_of

MOST_COLUMNS = 9
NODE = 0.09  # half the width of a column, in columns
ALL = "all splits"

# top to bottom; colours that white and near-black ground both carry
LOOKS: dict[str, tuple[str, str]] = {
    "mastery": ("#1f8f66", "accuracy at 90 % or above in every evaluation so far"),
    "sharpen": ("#5fb0dd", "more than 10 points above the model before training"),
    "fluctuation": ("#9aa3ad", "within 10 points of the model before training"),
    "degradation": ("#e08a2e", "more than 10 points below the model before training"),
    "struggle": ("#b8443c", "accuracy at 10 % or below in every evaluation so far"),
}


def flow_section(runs: Runs) -> Section | None:
    """A figure a method, with the data of each split; None where no run has kept two evaluations of a problem."""
    splits = splits_of(runs.runs)
    choices = ([ALL] if len(splits) > 1 else []) + splits
    figures, lacks = [], []
    for label in runs.labels:
        found = {choice: flow for choice in choices if (flow := _flow(runs.of(label), splits, choice))}
        if found:
            data = {"template": "flow", "splits": found, "patterns": list(LOOKS)}
            figures.append(Figure(label, "", data, method=label))
        else:
            lacks.append(label)
    if not figures:
        return None
    shown = {choice for figure in figures for choice in (figure.data or {})["splits"]}
    about = (
        "Each evaluation problem by how its accuracy has developed since the model before training, and how problems "
        "move from one evaluation to the next; columns are stacked in the order of the key. "
        "Accuracies are shares of few responses: some of the movement is chance."
    )
    extra = {"legend": LOOKS, "splits": [choice for choice in choices if choice in shown]}
    return Section("patterns", "Accuracy patterns", about, [Block("", figures, "methods")], tuple(lacks), extra)


def _flow(runs: list[Run], splits: list[str], choice: str) -> dict[str, Any] | None:
    """Columns, nodes and ribbons of one picture, in problems; None below two evaluations or without problems.

    steps; problems; nodes: [column, pattern, bottom, top, count]; ribbons: [column, from, to, bottom and top at its
    left, bottom and top at its right, count]. Patterns are numbered as in LOOKS.
    """
    of_runs = []
    for run in runs:
        found = {split: problem_accuracies(run.records, split) for split in splits if choice in (ALL, split)}
        if all(len(steps) > 1 for steps, _ in found.values()):
            of_runs.append((run.seed, found))
    if not of_runs:
        return None
    steps = sorted(set.intersection(*(set(own) for _, found in of_runs for own, _ in found.values())))
    accuracies: dict[str, list[float | None]] = {}
    for seed, found in of_runs:
        for split, (own, problems) in found.items():
            at = [own.index(step) for step in steps]
            accuracies |= {f"{seed} {split} {problem}": [v[i] for i in at] for problem, v in problems.items()}
    flow = pattern_flow(accuracies)
    if len(steps) < 2 or not flow["problems"]:
        return None
    chosen = spread(list(range(len(steps))), MOST_COLUMNS)
    order = {pattern: i for i, pattern in enumerate(LOOKS)}
    paths = [[order[found[e]] for e in chosen] for found in flow["patterns"].values()]
    total = len(paths)
    nodes, ribbons = [], []
    starts: list[list[int]] = []  # of each column: top of each pattern's node
    for column in range(len(chosen)):
        top, starts_here = total, []
        for pattern in range(len(order)):
            count = sum(path[column] == pattern for path in paths)
            starts_here.append(top)
            if count:
                nodes.append([column, pattern, top - count, top, count])
            top -= count
        starts.append(starts_here)
    for column in range(len(chosen) - 1):
        left, right = list(starts[column]), list(starts[column + 1])
        for a in range(len(order)):
            for b in range(len(order)):
                count = sum(path[column] == a and path[column + 1] == b for path in paths)
                if count:
                    ribbons.append([column, a, b, left[a] - count, left[a], right[b] - count, right[b], count])
                    left[a] -= count
                    right[b] -= count
    return {
        "steps": [steps[e] for e in chosen], "problems": total, "left_out": flow["left_out"], "of": len(steps),
        "seeds": len(of_runs), "nodes": nodes, "ribbons": ribbons,
    }  # fmt: skip


def flow_template() -> Any:
    """The empty Bokeh figure: ribbons as patches, columns as quads, over one data source each."""
    plot = blank_figure(Range1d(start=0, end=1), height=300, x_range=Range1d(start=0, end=1))
    plot.grid.visible = False
    plot.xaxis.ticker = FixedTicker(ticks=[])
    ribbons = ColumnDataSource({name: [] for name in ("xs", "ys", "colour", "what", "count", "when")})
    nodes = ColumnDataSource({n: [] for n in ("left", "right", "bottom", "top", "colour", "what", "count", "when")})
    flowing = plot.patches("xs", "ys", source=ribbons, fill_color="colour", fill_alpha=0.38, line_color=None)
    flowing.name, flowing.hover_glyph = "ribbons", None
    standing = plot.quad("left", "right", "top", "bottom", source=nodes, fill_color="colour", line_color=None)
    standing.name = "nodes"
    tips = [("", "@what"), ("problems", "@count"), ("step", "@when")]
    plot.add_tools(HoverTool(renderers=[flowing, standing], tooltips=tips))
    return json_item(plot)
