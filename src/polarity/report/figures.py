"""What the page's sections are made of, and the empty Bokeh figure that every plot starts from.

Bokeh because its whole JavaScript is one file inside its Python package, it runs from that file without a network, it
draws on canvas (a hundred panels stay fast), and its parts take colours from CSS variables, so the page's light and
dark themes reach into the plots.

Building a Bokeh figure takes a fifth of a second, and its JSON is mostly the same from one figure to the next. So a
page holds one empty figure of each kind, its template, and each panel only its numbers, as finely as they can be seen;
figures.js draws a panel by embedding the template and handing the numbers to its data sources.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bokeh.models import PrintfTickFormatter
from bokeh.plotting import figure

from polarity.report.runs import Runs, values_of

HEIGHT = 200
Side = Literal["positive", "negative"]
SIDES: tuple[Side, ...] = ("positive", "negative")


@dataclass(frozen=True)
class Figure:
    """One plot. data: {"template": name, ...}, what figures.js hands to the template; None where there is nothing to
    draw. lacks: names of the methods, or of single runs, that have no value. side: of a pair. method: set
    where the whole plot is about one method."""

    title: str
    about: str
    data: dict[str, Any] | None
    lacks: tuple[str, ...] = ()
    side: Side | None = None
    method: str | None = None


@dataclass(frozen=True)
class Block:
    """Figures that belong together. layout: grid; pairs (positive beside negative); fours (rows of four);
    methods (a figure a method). folded: shown when the reader opens it, for which it needs a title."""

    title: str
    figures: list[Figure]
    layout: Literal["grid", "pairs", "fours", "methods"] = "grid"
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A titled group of blocks. lacks: who has none of the section's metrics, where others do. extra: what the page's
    template shows beside the figures (legends, tables); depends on the section."""

    anchor: str
    title: str
    about: str
    blocks: list[Block]
    lacks: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


def lacking(runs: Runs, metric: str) -> tuple[str, ...]:
    """Methods without any value of the metric; of a method that has it in some seeds only, the runs without."""
    out: list[str] = []
    for label in runs.labels:
        without = [run.name for run in runs.of(label) if not values_of(run, metric)[0]]
        out += [label] if len(without) == len(runs.of(label)) else without
    return tuple(out)


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def short(value: float, places: int = 0) -> float | int:
    """Four significant digits, or `places` decimals where that is more; whole numbers keep all digits.

    A third of the bytes, and finer than can be seen where `places` is that of `places_for`.
    """
    whole = int(value)
    if whole == value and abs(whole) < 10_000_000:
        return whole
    return round(value, max(places, 3 - math.floor(math.log10(abs(value)))))


def places_for(span: float) -> int:
    """Decimals that tell two thousand values apart within `span`: ten to a pixel of a figure's height."""
    return max(0, 4 - math.floor(math.log10(span))) if span > 0 else 0


def blank_figure(y_range: Any, height: int = HEIGHT, **more: Any) -> Any:
    """An empty figure in the page's manner: as wide as its place. Without a toolbar, which would cover the curves:
    dragging zooms, and figures.js takes a double click for the reset."""
    plot = figure(
        height=height, sizing_mode="stretch_width", y_range=y_range, tools="box_zoom", toolbar_location=None, **more
    )
    plot.min_border = 4
    plot.axis.formatter = PrintfTickFormatter(format="%.6g")  # not 4.000e-3
    return plot
