"""The page's figures: which metric stands in which panel, and the Bokeh figure of each.

Bokeh because its whole JavaScript is one file inside its Python package (1.3 MB, a quarter of Plotly's), it runs from
that file without a network, it draws on canvas (thirty panels stay fast), and its parts take colours from CSS
variables, so the page's light and dark themes reach into the plots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from bokeh.embed import json_item
from bokeh.models import BasicTicker, ColumnDataSource, DataRange1d, FixedTicker, HoverTool, Range1d
from bokeh.plotting import figure

from polarity.report.runs import Run, Runs, metrics_of, splits_of, values_of

# Told apart on white and on near-black, and by most colour-blind readers; more methods than colours repeat them dashed.
PALETTE = ["#3b82d0", "#dd7a12", "#1f9d72", "#d9483b", "#9a66cc", "#19a3b8", "#cf5f9a", "#a0764a", "#93a01f", "#8390a0"]
MOST_POINTS = 400
SIDES: tuple[Literal["positive", "negative"], ...] = ("positive", "negative")


@dataclass(frozen=True)
class Panel:
    """One figure: a metric over steps, one line a method. `about` is read by people, units included."""

    metric: str
    title: str
    about: str


LEARNING = (
    Panel("accuracy/mean", "Train accuracy", "share of all generated rollouts that are correct"),
    Panel("reward/mean", "Reward", "mean over all generated rollouts"),
    Panel("accuracy/fully_solved", "Problems fully solved", "share of groups in which every response is correct"),
    Panel("accuracy/unsolved", "Problems unsolved", "share of groups in which no response is correct"),
    Panel("entropy/mean", "Entropy", "of the policy, nats per token"),
    Panel("length/mean", "Response length", "tokens"),
    Panel("length/truncated", "Truncated", "share of responses that hit the length limit"),
)
# Metrics under positive/ and negative/: correct and wrong rollouts in two panels with one scale.
POLARITY = (
    Panel("share", "Share of rollouts", "of all generated rollouts"),
    Panel("entropy", "Entropy", "nats per token"),
    Panel("length", "Length", "tokens"),
    Panel("probability", "Probability of sampled tokens", "mean over all generated tokens"),
    Panel("shaped_share", "Shaped tokens", "share of trained tokens whose advantage the method reweights"),
    Panel(
        "gradient_share", "Share of gradient mass", "this polarity's part of the sum of |shaped advantage| x (1 - p)"
    ),
    Panel("shaped_gradient_share", "Gradient mass on shaped tokens", "share of this polarity's gradient mass"),
    Panel("clip_fraction", "Clipped tokens", "share of tokens whose gradient the clip removes"),
)
UPDATE = (
    Panel("update/loss", "Loss", "mean over updates"),
    Panel("update/grad_norm", "Gradient norm", "before clipping"),
    Panel("update/ratio", "Importance ratio", "mean over tokens"),
    Panel("update/clip_fraction", "Clipped tokens", "share of all tokens"),
    Panel("update/count", "Updates", "optimiser updates per rollout step"),
    Panel("rollouts/kept", "Rollouts kept", "rows left after the method's drop"),
)


@dataclass(frozen=True)
class Figure:
    """A drawn panel. item: Bokeh's JSON for the page to embed, None where there is nothing to draw; side: of a pair."""

    title: str
    about: str
    item: Any | None
    side: Literal["positive", "negative"] | None = None


@dataclass(frozen=True)
class Section:
    """A titled group of figures."""

    anchor: str
    title: str
    about: str
    figures: list[Figure]


def colours(labels: Sequence[str]) -> dict[str, dict[str, str]]:
    """Label -> CSS colour and Bokeh line dash."""
    dashes = ("solid", "dashed", "dotted")
    n = len(PALETTE)
    return {label: {"colour": PALETTE[i % n], "dash": dashes[i // n % 3]} for i, label in enumerate(labels)}


def sections(runs: Runs) -> list[Section]:
    """All figures of a page. Metrics that no panel names (a user's method may report its own) come last."""
    splits = splits_of(runs.runs)
    about = "mean over problems; step 0 is the model before training"
    evaluation = [Panel(f"eval/{split}/pass@1", f"pass@1, {split}", about) for split in splits]
    named = {panel.metric for panel in (*LEARNING, *UPDATE)}
    named |= {f"{side}/{panel.metric}" for side in SIDES for panel in POLARITY}
    rest = [m for m in metrics_of(runs.runs) if m not in named and not m.startswith("eval/")]
    other = [Panel(metric, metric, "") for metric in sorted(rest)]
    band = "line: mean over seeds; band: lowest and highest seed" if len(runs.seeds) > 1 else "one seed: no band"
    found = [
        Section("learning", "Learning", band, _figures(runs, LEARNING)),
        Section("evaluation", "Evaluation", band, _figures(runs, evaluation) + _pass_at_k(runs, splits)),
        Section(
            "polarity",
            "Positive and negative",
            "left: correct rollouts; right: wrong rollouts; one scale",
            _pairs(runs),
        ),
        Section("update", "Update", band, _figures(runs, UPDATE)),
        Section("other", "Other metrics", "as named in metrics.jsonl", _figures(runs, other)),
    ]
    return [section for section in found if section.figures]


def aggregate(runs: Sequence[Run], metric: str) -> dict[str, np.ndarray] | None:
    """Columns step, mean, low, high, each (steps,) float32, over the runs that have the metric at a step; None if none.

    More than MOST_POINTS steps are binned: the mean of the means, the lowest low, the highest high of each bin.
    """
    at: dict[int, list[float]] = {}
    for run in runs:
        for step, value in zip(*values_of(run, metric), strict=True):
            at.setdefault(step, []).append(value)
    if not at:
        return None
    steps = sorted(at)
    table = np.array([[s, np.mean(at[s]), min(at[s]), max(at[s])] for s in steps])
    width = -(-len(steps) // MOST_POINTS)
    bins = [table[i : i + width] for i in range(0, len(steps), width)]
    binned = np.array([[b[-1, 0], b[:, 1].mean(), b[:, 2].min(), b[:, 3].max()] for b in bins], dtype=np.float32)
    return dict(zip(("step", "mean", "low", "high"), binned.T, strict=True))


def _figures(runs: Runs, panels: Sequence[Panel]) -> list[Figure]:
    out = []
    for panel in panels:
        if columns := _columns(runs, panel.metric):
            plot = _draw(columns, colours(runs.labels), y_range=DataRange1d(only_visible=True, default_span=0.2))
            out.append(Figure(panel.title, panel.about, json_item(plot)))
    return out


def _pairs(runs: Runs) -> list[Figure]:
    out = []
    for panel in POLARITY:
        sides = {side: _columns(runs, f"{side}/{panel.metric}") for side in SIDES}
        values = [
            column for columns in sides.values() for data in columns.values() for column in (data["low"], data["high"])
        ]
        if not values:
            continue
        low, high = float(min(v.min() for v in values)), float(max(v.max() for v in values))
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
        for side, columns in sides.items():
            scale = Range1d(start=low - margin, end=high + margin)
            item = json_item(_draw(columns, colours(runs.labels), y_range=scale)) if columns else None
            out.append(Figure(panel.title, panel.about, item, side))
    return out


def _columns(runs: Runs, metric: str) -> dict[str, dict[str, np.ndarray]]:
    """Label -> aggregated columns, for the methods that have the metric."""
    return {label: data for label in runs.labels if (data := aggregate(runs.of(label), metric)) is not None}


def _pass_at_k(runs: Runs, splits: Sequence[str]) -> list[Figure]:
    """pass@k over k (log scale) at the last evaluation, one panel a split; left out below two values of k."""
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
            rows = np.array([[np.log2(k), np.mean(v), min(v), max(v)] for k, v in sorted(at.items())], dtype=np.float32)
            if len(rows) > 1:
                columns[label] = dict(zip(("step", "mean", "low", "high"), rows.T, strict=True))
        if columns:
            plot = _draw(
                columns, colours(runs.labels), y_range=DataRange1d(only_visible=True, default_span=0.2), x_name="log2 k"
            )
            powers = sorted({int(x) for data in columns.values() for x in data["step"]})
            plot.xaxis.ticker = FixedTicker(ticks=powers)
            plot.xaxis.major_label_overrides = {power: str(2**power) for power in powers}
            plot.xaxis.axis_label = "k"
            out.append(Figure(f"pass@k, {split}", "at the last evaluation", json_item(plot)))
    return out


def _draw(
    columns: dict[str, dict[str, np.ndarray]], styles: dict[str, dict[str, str]], *, y_range: Any, x_name: str = "step"
) -> Any:
    """Lines with bands. Every glyph is named by its method, so that the page's legend can hide it in all figures."""
    plot = figure(
        height=210, sizing_mode="stretch_width", y_range=y_range, tools="box_zoom,reset", toolbar_location="above"
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.toolbar_inner = True
    plot.xaxis.axis_label = x_name
    plot.xaxis.ticker = BasicTicker(min_interval=1)  # steps are whole
    plot.min_border = 4
    for label, data in columns.items():
        source, colour = ColumnDataSource(dict(data)), styles[label]["colour"]
        plot.varea("step", "low", "high", source=source, name=label, fill_color=colour, fill_alpha=0.22)
        line = plot.line(
            "step", "mean", source=source, name=label, color=colour, line_width=2, line_dash=styles[label]["dash"]
        )
        if len(data["step"]) <= 30:
            plot.scatter("step", "mean", source=source, name=label, color=colour, size=5)
        tips = [
            ("method", label),
            (x_name, "@step{0.[0]}"),
            ("mean", "@mean{0.0000}"),
            ("range", "@low{0.0000} to @high{0.0000}"),
        ]
        plot.add_tools(HoverTool(renderers=[line], tooltips=tips, mode="vline" if len(columns) == 1 else "mouse"))
    return plot
