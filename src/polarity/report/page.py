"""One self-contained HTML page from run directories: it opens off-line and asks the network for nothing.

Everything that runs wrote reaches the page in two ways only. Short texts (names, settings) go through Jinja2 with
automatic escaping. Figures and samples are JSON, compressed and base64-encoded, which cannot close a script element;
the page's scripts unpack them and show text with textContent. A content security policy in the page forbids every
load from outside it.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml
from bokeh.resources import Resources

from polarity import __version__
from polarity.errors import UserError
from polarity.report.attribution import LINES, attribution_section, attribution_template
from polarity.report.curves import colours, line_templates
from polarity.report.difficulty import difficulty_block
from polarity.report.figures import Section
from polarity.report.flow import flow_section, flow_template
from polarity.report.overview import MARKS, glance, notes, provenance, settings
from polarity.report.panels import sections
from polarity.report.runs import Runs, load_runs
from polarity.report.samples import pack_samples
from polarity.report.summary import describe_units, summarise
from polarity.report.text import visible

HERE = Path(__file__).parent
SCRIPTS = ("figures.js", "microscope.js", "page.js")


def write_report(paths: Sequence[Path], out: Path, reference: str | None = None) -> Path:
    """Write the page for the runs at or below `paths` to `out` and return `out`.

    Raises UserError when there is no run to report (see load_runs).
    """
    runs = load_runs(paths, reference)
    if out.is_dir():
        raise UserError(f"{out} is a directory; give --out a file, such as {out / 'report.html'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(out.name + ".partial")
    aside.write_text(render(runs), encoding="utf-8")
    aside.replace(out)
    return out


def render(runs: Runs, *, live: bool = False, revision: str | None = None) -> str:
    """The page as text.

    live: for a server that makes the page anew while its runs go on. The page asks it for /revision every two seconds,
    and loads itself again, at the reader's place, once the answer is another text than `revision`: what the server
    would have answered when it read the runs (None: the first answer that the page gets).
    """
    summary = summarise(runs)
    parts = _sections(runs)
    figures = [figure.data for section in parts for block in section.blocks for figure in block.figures]
    rows = [glance(runs.of(label)) for label in runs.labels]
    missing = [row["missing"] for row in rows]
    page = _environment().get_template("page.html")
    return page.render(
        title=_title(runs),
        runs=runs.runs,
        styles=colours(runs.labels),
        glance=rows,
        missing=missing[0] if all(names == missing[0] for names in missing) else None,
        marks=MARKS,
        notes=notes(runs),
        settings=settings(runs.runs),
        provenance=provenance(runs.runs),
        configs=[(label, yaml.safe_dump(runs.of(label)[0].config, sort_keys=False)) for label in runs.labels],
        summary=summary,
        groups=list(dict.fromkeys(column["group"] for column in summary["quantities"])),
        units=describe_units(summary),
        sections=parts,
        lines=LINES,
        version=__version__,
        bokeh_version=version("bokeh"),
        css=_read("page.css"),
        scripts=[_read(name) for name in (*SCRIPTS, *(["live.js"] if live else []))],
        live=live,
        revision=revision,
        bokeh_js=squeeze(Resources(mode="inline", components=["bokeh"]).js_raw[0]),
        figures=pack({"templates": _bokeh_templates(figures, runs.labels), "figures": figures}),
        samples=[pack(samples) for samples in pack_samples(runs.runs)],
    )


def _environment() -> jinja2.Environment:
    loader = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, finalize=_finalize
    )
    loader.filters["number"] = _number
    loader.filters["signed"] = lambda value: f"{value:+.3f}" if abs(value) < 10 else f"{value:+.1f}"
    return loader


def _finalize(value: Any) -> Any:
    """Unseen characters of everything that is not marked as safe."""
    return visible(value) if type(value) is str else value


def pack(value: Any) -> str:
    """JSON, squeezed."""
    return squeeze(json.dumps(value, separators=(",", ":"), allow_nan=False))


def squeeze(text: str) -> str:
    """gzip, base64: the page undoes it with the browser's own DecompressionStream."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _sections(runs: Runs) -> list[Section]:
    """Line figures, and among them, in their places, the sections that are drawn in ways of their own."""
    parts = {section.anchor: section for section in sections(runs)}
    if (found := difficulty_block(runs)) and "evaluation" in parts:
        parts["evaluation"].blocks.append(found)
    for section in (flow_section(runs), attribution_section(runs)):
        if section:
            parts[section.anchor] = section
    order = ("learning", "evaluation", "patterns", "polarity", "sharpening", "difficulty", "attribution", "mismatch")
    return [parts[a] for a in (*order, "update", "other") if a in parts]


def _bokeh_templates(figures: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
    """The Bokeh figures that the page's panels start from."""
    used = {data["template"] for data in figures if data}
    own = {"flow": flow_template, "attribution": attribution_template}
    return line_templates(used - own.keys(), labels) | {name: make() for name, make in own.items() if name in used}


def _title(runs: Runs) -> str:
    labels = runs.labels
    named = labels if len(labels) <= 6 else [*labels[:4], f"{len(labels) - 4} more methods"]
    return named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
