"""What moves entropy: each logged step's entropy change, attributed to cells of tokens, as signed stacked bars.

The eight cells are polarity x probability x entropy of the tokens; `regularizer`, `momentum` and `rest` complete the
predicted change, which stands beside the measured one (docs/metrics.md). Contributions above zero stack upwards from
it, those below downwards. Hue tells the polarity, shade the probability, hatching a high entropy.
"""

from typing import Any

import numpy as np
from bokeh.embed import json_item
from bokeh.models import BasicTicker, ColumnDataSource, HoverTool, Range1d

from polarity.report.figures import Block, Figure, Section, blank_figure, lacking, short
from polarity.report.runs import Run, Runs, values_of

MOST_BARS = 60
_SHADES = {("positive", "low"): "#8fc1ea", ("positive", "high"): "#2f78bd"}
_SHADES |= {("negative", "low"): "#f3b27a", ("negative", "high"): "#cf6a0f"}

# part -> (words, colour, hatched); stacked in this order, from zero outwards
PARTS: dict[str, tuple[str, str, bool]] = {
    f"{side}/{prob}_prob_{entropy}_entropy": (
        f"{'+' if side == 'positive' else '−'} {prob} probability, {entropy} entropy",
        _SHADES[side, prob],
        entropy == "high",
    )
    for side in ("positive", "negative")
    for prob in ("high", "low")
    for entropy in ("low", "high")
}
PARTS |= {
    "regularizer": ("regularizer", "#b08bd0", False),
    "momentum": ("momentum", "#9aa3ad", False),
    "rest": ("rest", "#9aa3ad", True),
}
LINES = ("measured", "predicted")
METRICS = tuple(f"attribution/{name}" for name in (*PARTS, *LINES))


def attribution_section(runs: Runs) -> Section | None:
    """A figure a method, all on one scale, and the table of the sums; None where no run measured it."""
    tables = {label: table for label in runs.labels if (table := contributions(runs.of(label)))}
    if not tables:
        return None
    data = {label: _bars(table) for label, table in tables.items()}
    ends = [end for bars in data.values() for end in bars.pop("ends")]
    margin = 0.05 * (max(ends) - min(ends)) or 1e-3
    scale = [short(min(ends) - margin), short(max(ends) + margin)]
    figures = []
    for label, bars in data.items():
        n = len(tables[label]["step"])
        about = f"{_seeds(runs.of(label))}; {n} logged steps"
        figures.append(Figure(label, about, {"template": "attribution", "scale": scale, **bars}, method=label))
    lacks = tuple(name for name in lacking(runs, "attribution/predicted") if name in runs.labels)
    about = (
        "First-order attribution of each step's change of mean token entropy (nats): how much of it the update made "
        "through which tokens of correct (+) and of wrong (−) rollouts. Bars: contributions, upwards where they raise "
        "entropy. Line: the change that was measured; dashed: the predicted one, the sum of the bars."
    )
    extra = {"legend": PARTS, "totals": {label: totals(table) for label, table in tables.items()}}
    return Section("attribution", "What moves entropy", about, [Block("", figures, "methods")], lacks, extra)


def contributions(runs: list[Run]) -> dict[str, np.ndarray]:
    """step and each part and line, (steps,), mean over the runs that have a step; parts that a run leaves out are 0.

    Empty where no run has attribution/predicted.
    """
    at: dict[int, list[dict[str, float]]] = {}
    for run in runs:
        columns = {name: dict(zip(*values_of(run, f"attribution/{name}"), strict=True)) for name in (*PARTS, *LINES)}
        for step in columns["predicted"]:
            found = {name: column.get(step, 0.0) for name, column in columns.items()}
            found["measured"] = columns["measured"].get(step, float("nan"))
            at.setdefault(step, []).append(found)
    if not at:
        return {}
    steps = sorted(at)
    means = {name: np.array([np.mean([row[name] for row in at[s]]) for s in steps]) for name in (*PARTS, *LINES)}
    return {"step": np.array(steps), **means}


def totals(table: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Sum of each part and line over the logged steps, and `correlation`, of predicted and measured change over steps
    (None below three steps, or where either does not vary)."""
    sums: dict[str, float | None] = {name: float(np.nansum(table[name])) for name in (*PARTS, *LINES)}
    known = np.isfinite(table["measured"])
    pair = table["predicted"][known], table["measured"][known]
    varied = known.sum() > 2 and all(float(np.ptp(side)) > 0 for side in pair)
    return sums | {"correlation": float(np.corrcoef(*pair)[0, 1]) if varied else None}


def _bars(table: dict[str, np.ndarray]) -> dict[str, Any]:
    """Edges of at most MOST_BARS bars (means over neighbouring steps), each part's bottom and top, and the lines."""
    steps = table["step"]
    bins = np.array_split(np.arange(len(steps)), min(MOST_BARS, len(steps)))
    # a bar reaches half the usual way to its neighbours, or less where they are nearer; with a little space between
    gaps = np.diff(steps) if len(steps) > 1 else np.ones(1)
    reach = np.minimum(0.46 * np.median(gaps), 0.46 * np.concatenate([[np.inf], gaps, [np.inf]]))
    left = [short(steps[b[0]] - reach[b[0]]) for b in bins]
    right = [short(steps[b[-1]] + reach[b[-1] + 1]) for b in bins]
    values = {name: np.array([np.mean(table[name][b]) for b in bins]) for name in (*PARTS, *LINES)}
    up, down = np.zeros(len(bins)), np.zeros(len(bins))
    parts = {}
    for name in PARTS:
        value = values[name]
        bottom = np.where(value >= 0, up, down)
        parts[name] = [[short(x) for x in bottom.tolist()], [short(x) for x in (bottom + value).tolist()]]
        up, down = up + np.maximum(value, 0), down + np.minimum(value, 0)
    lines = {name: [short(x) if np.isfinite(x) else None for x in values[name].tolist()] for name in LINES}
    spans = [f"{steps[b[0]]}" if len(b) == 1 else f"{steps[b[0]]} to {steps[b[-1]]}" for b in bins]
    known = [x for line in lines.values() for x in line if x is not None]
    ends = [*up.tolist(), *down.tolist(), *known]
    return {"edges": [left, right], "at": spans, "parts": parts, "bars": lines, "ends": ends}


def _seeds(runs: list[Run]) -> str:
    return f"mean of {len(runs)} seeds" if len(runs) > 1 else f"seed {runs[0].seed}"


def attribution_template() -> Any:
    """The empty Bokeh figure: a quad glyph a part, named by it, and the two lines; all over one data source."""
    plot = blank_figure(Range1d(), height=260)
    plot.xaxis.ticker = BasicTicker(min_interval=1, desired_num_ticks=5)
    bars = []
    for name, (words, colour, hatched) in PARTS.items():
        source = ColumnDataSource({column: [] for column in ("left", "right", "bottom", "top", "change", "at")})
        hatch = {"hatch_pattern": "right_diagonal_line", "hatch_color": "#ffffff", "hatch_alpha": 0.75}
        bar = plot.quad(
            "left", "right", "top", "bottom", source=source, name=words, fill_color=colour, line_color=None,
            hatch_scale=6, **(hatch if hatched else {}),
        )  # fmt: skip
        bar.tags = [name]
        bars.append(bar)
    tips = [("step", "@at"), ("tokens", "$name"), ("change", "@change{%+.3g} nats")]
    plot.add_tools(HoverTool(renderers=bars, tooltips=tips, formatters={"@change": "printf"}))
    for name, dash in zip(LINES, ("solid", "dashed"), strict=True):
        line = plot.line("x", "y", source=ColumnDataSource({"x": [], "y": []}), name=name, line_width=2, line_dash=dash)
        line.tags = ["ink", name]
    return json_item(plot)
