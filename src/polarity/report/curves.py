"""Line figures: a metric over steps (or pass@k over k), a line a method, a band over its seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from bokeh.embed import json_item
from bokeh.models import BasicTicker, ColumnDataSource, DataRange1d, FixedTicker, HoverTool

from polarity.report.figures import SIDES, Figure, blank_figure, lacking, places_for, short
from polarity.report.runs import Runs, values_of

# Told apart on white and on near-black, and by most colour-blind readers; more methods than colours repeat them dashed.
PALETTE = ["#3b82d0", "#dd7a12", "#1f9d72", "#d9483b", "#9a66cc", "#19a3b8", "#cf5f9a", "#a0764a", "#93a01f", "#8390a0"]
DASHES = ("solid", "dashed", "dotted")
MOST_POINTS = 400
MOST_DOTS = 30  # lines of more points are drawn without dots

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Panel:
    """What one figure shows: a metric over steps. `about` is read by people, units included."""

    metric: str
    title: str
    about: str = ""


def colours(labels: Sequence[str]) -> dict[str, dict[str, str]]:
    """Label -> CSS colour and Bokeh line dash."""
    n = len(PALETTE)
    return {label: {"colour": PALETTE[i % n], "dash": DASHES[i // n % len(DASHES)]} for i, label in enumerate(labels)}


def aggregate(series: Iterable[tuple[Sequence[int], Sequence[float]]]) -> Columns | None:
    """Columns step, mean, low, high, each (steps,) float64, over the seeds that have a value at a step; None if none.

    series: steps and values of each seed. More than MOST_POINTS steps are binned: the mean of the means, the lowest
    low, the highest high of each bin.
    """
    at: dict[int, list[float]] = {}
    for steps, values in series:
        for step, value in zip(steps, values, strict=True):
            at.setdefault(step, []).append(value)
    if not at:
        return None
    table = np.array([[step, sum(at[step]) / len(at[step]), min(at[step]), max(at[step])] for step in sorted(at)])
    width = -(-len(table) // MOST_POINTS)
    if width > 1:
        bins = [table[i : i + width] for i in range(0, len(table), width)]
        table = np.array([[b[-1, 0], b[:, 1].mean(), b[:, 2].min(), b[:, 3].max()] for b in bins])
    return dict(zip(("step", "mean", "low", "high"), table.T, strict=True))


def columns_of(runs: Runs, metric: str) -> dict[str, Columns]:
    """Label -> aggregated columns, for the methods that have the metric."""
    found = {label: aggregate(values_of(run, metric) for run in runs.of(label)) for label in runs.labels}
    return {label: data for label, data in found.items() if data is not None}


def lines(runs: Runs, panels: Iterable[Panel]) -> list[Figure]:
    """One figure a panel; panels whose metric no run has are left out."""
    out = []
    for panel in panels:
        if columns := columns_of(runs, panel.metric):
            lacks = lacking(runs, panel.metric)
            out.append(Figure(panel.title, in_units(panel.about, runs), line_data(columns), lacks))
    return out


def in_units(text: str, runs: Runs) -> str:
    """What is said of a length, in the unit that the runs have it in."""
    return runs.length_unit if text == "tokens" else text.replace("Length, tokens", f"Length, {runs.length_unit}")


def on_one_scale(runs: Runs, panels: Sequence[Panel]) -> list[Figure]:
    """Figures that are read against each other: their y axes agree. Where only some have values the others stay, empty;
    where none has, there are no figures."""
    panels = [replace(panel, about=in_units(panel.about, runs)) for panel in panels]
    found = [columns_of(runs, panel.metric) for panel in panels]
    return scaled(panels, found, [lacking(runs, panel.metric) for panel in panels])


def scaled(
    panels: Sequence[Panel], found: Sequence[Mapping[str, Columns]], lacks: Sequence[tuple[str, ...]]
) -> list[Figure]:
    """`on_one_scale`, of the columns, and of the names without any, that have been found for each panel."""
    values = [data[end] for columns in found for data in columns.values() for end in ("low", "high")]
    if not values:
        return []
    low, high = float(min(v.min() for v in values)), float(max(v.max() for v in values))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    out = []
    for panel, columns, names in zip(panels, found, lacks, strict=True):
        data = line_data(columns, (low - margin, high + margin)) if columns else None
        out.append(Figure(panel.title, panel.about, data, names if columns else ()))
    return out


def pair(runs: Runs, panel: Panel) -> list[Figure]:
    """positive/METRIC and negative/METRIC on one scale; empty where no run has either."""
    figures = on_one_scale(runs, [replace(panel, metric=f"{side}/{panel.metric}") for side in SIDES])
    return [replace(figure, side=side) for figure, side in zip(figures, SIDES, strict=bool(figures))]


def pass_at_k(runs: Runs, splits: Sequence[str]) -> list[Figure]:
    """pass@k over k (log scale) at the last evaluation, one figure a split; left out below two values of k."""
    out = []
    for split in splits:
        columns = {}
        for label in runs.labels:
            at: dict[int, list[float]] = {}
            for run in runs.of(label):
                final = run.final_evaluation()
                for metric, value in (final[1].get(split, {}) if final else {}).items():
                    if metric.startswith("pass@"):
                        at.setdefault(int(metric[5:]), []).append(value)
            rows = np.array([[np.log2(k), np.mean(v), min(v), max(v)] for k, v in sorted(at.items())])
            if len(rows) > 1:
                columns[label] = dict(zip(("step", "mean", "low", "high"), rows.T, strict=True))
        if columns:
            lacks = tuple(label for label in runs.labels if label not in columns)
            data = line_data(columns) | {"template": "pass at k"}
            out.append(Figure(f"pass@k, {split}", "", data, lacks))
    return out


def line_data(columns: Mapping[str, Columns], scale: tuple[float, float] | None = None) -> dict[str, Any]:
    """What figures.js hands to a template: label -> [x, mean] or, with a band, [x, mean, low, high]."""
    ends = [float(end) for data in columns.values() for end in (data["low"].min(), data["high"].max())]
    places = places_for(max(ends) - min(ends))
    series = {}
    for label, data in columns.items():
        banded = not (np.array_equal(data["low"], data["mean"]) and np.array_equal(data["high"], data["mean"]))
        kept = ("step", "mean", "low", "high") if banded else ("step", "mean")
        series[label] = [[short(value, places) for value in data[name].tolist()] for name in kept]
    dots = all(len(data["step"]) <= MOST_DOTS for data in columns.values())
    more = {"dots": dots} | ({"scale": [float(end) for end in scale]} if scale else {})
    return {"template": "lines", "lines": series, **more}


def line_templates(names: Iterable[str], labels: Sequence[str]) -> dict[str, Any]:
    """Name -> the JSON of an empty Bokeh figure, for the names that line_data and pass_at_k gave."""
    return {name: json_item(_template(name, labels)) for name in sorted(set(names))}


def _template(name: str, labels: Sequence[str]) -> Any:
    """Lines with bands, without numbers. Every glyph is named by its method: figures.js fills and hides them by it."""
    at_k = name == "pass at k"
    plot = blank_figure(DataRange1d(only_visible=True, default_span=0.2))
    plot.xaxis.ticker = BasicTicker(min_interval=1, desired_num_ticks=5)  # steps are whole
    if at_k:
        plot.xaxis.ticker = FixedTicker(ticks=list(range(13)))
        plot.xaxis.major_label_overrides = {power: str(2**power) for power in range(13)}
    drawn, width = [], 2 if len(labels) <= 6 else 1.4
    for label, style in colours(labels).items():
        source = ColumnDataSource({c: [] for c in ("x", "mean", "low", "high", "dots", "at", "range")})
        look: dict[str, Any] = {"source": source, "name": label}
        plot.varea("x", "low", "high", fill_color=style["colour"], fill_alpha=0.22, **look)
        drawn.append(plot.line("x", "mean", color=style["colour"], line_width=width, line_dash=style["dash"], **look))
        plot.scatter("x", "dots", color=style["colour"], size=5, **look)
    tips = [("method", "$name"), ("k" if at_k else "step", "@at"), ("value", "@mean{%.6g}@range")]
    mode: Literal["vline", "mouse"] = "vline" if len(labels) == 1 else "mouse"
    plot.add_tools(HoverTool(renderers=drawn, tooltips=tips, formatters={"@mean": "printf"}, mode=mode))
    return plot
