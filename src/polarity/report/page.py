"""One self-contained HTML page from run directories: it opens off-line and asks the network for nothing.

Everything that runs wrote reaches the page in two ways only. Short texts (names, settings) go through Jinja2 with
automatic escaping. Figures and samples are JSON, compressed and base64-encoded, which cannot close a script element;
page.js unpacks them and shows text with textContent. A content security policy in the page forbids every load from
outside it.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml
from bokeh.resources import Resources

from polarity import __version__
from polarity.report.curves import colours, sections
from polarity.report.runs import Run, Runs, load_runs, values_of
from polarity.report.samples import pack_samples
from polarity.report.summary import describe_units, end_of_training, summarise

HERE = Path(__file__).parent
SETTINGS = (
    "world", "base", "model", "data.train", "steps", "rollout.prompts", "rollout.group", "rollout.temperature",
    "rollout.max_new_tokens", "rollout.max_rounds", "rollout.truncated", "update.mini_batch_prompts", "update.epochs",
    "update.learning_rate", "evaluation.problems", "evaluation.samples", "evaluation.final_samples",
    "evaluation.temperature",
)  # fmt: skip


def write_report(paths: Sequence[Path], out: Path, reference: str | None = None) -> Path:
    """Write the page for the runs at or below `paths` to `out` and return `out`.

    Raises UserError when there is no run to report (see load_runs).
    """
    runs = load_runs(paths, reference)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(out.name + ".partial")
    aside.write_text(render(runs), encoding="utf-8")
    aside.replace(out)
    return out


def render(runs: Runs) -> str:
    """The page as text."""
    summary = summarise(runs)
    curves = sections(runs)
    figures = [figure.item for section in curves for figure in section.figures]
    loader = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined)
    loader.filters["number"] = _number
    loader.filters["signed"] = lambda value: f"{value:+.3f}" if abs(value) < 10 else f"{value:+.1f}"
    return loader.get_template("page.html").render(
        title=_title(runs),
        runs=runs.runs,
        styles=colours(runs.labels),
        glance=[_glance(runs.of(label)) for label in runs.labels],
        settings=_settings(runs.runs),
        provenance=_provenance(runs.runs),
        configs=[(label, yaml.safe_dump(runs.of(label)[0].config, sort_keys=False)) for label in runs.labels],
        summary=summary,
        groups=list(dict.fromkeys(column["group"] for column in summary["quantities"])),
        units=describe_units(summary),
        sections=curves,
        version=__version__,
        bokeh_version=version("bokeh"),
        bokeh_js=Resources(mode="inline", components=["bokeh"]).js_raw[0],
        css=(HERE / "page.css").read_text(),
        js=(HERE / "page.js").read_text(),
        figures=pack(figures),
        samples=[pack(samples) for samples in pack_samples(runs.runs)],
    )


def pack(value: Any) -> str:
    """JSON, gzip, base64: page.js undoes it with the browser's own DecompressionStream."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _title(runs: Runs) -> str:
    labels = runs.labels
    return labels[0] if len(labels) == 1 else ", ".join(labels[:-1]) + " and " + labels[-1]


def _glance(runs: Sequence[Run]) -> dict[str, Any]:
    """First step and end of training of a method, means over its runs, and the words for what happened."""
    rows = {}
    for metric in ("accuracy/mean", "entropy/mean", "length/mean", "length/truncated"):
        firsts = [values[0] for run in runs if (values := values_of(run, metric)[1])]
        lasts = [value for run in runs if (value := end_of_training(run, metric)) is not None]
        if firsts and lasts:
            rows[metric] = (sum(firsts) / len(firsts), sum(lasts) / len(lasts))
    seconds = [sum(values_of(run, "time/step")[1]) for run in runs]
    return {
        "label": runs[0].label,
        "seeds": [run.seed for run in runs],
        "steps": sorted({run.last_step for run in runs}),
        "rows": rows,
        "time": str(timedelta(seconds=round(max(seconds)))) if any(seconds) else None,
    }


def _settings(runs: Sequence[Run]) -> dict[str, str]:
    """The settings a reader asks for first; where runs differ, all values."""
    table = {}
    for dotted in SETTINGS:
        found: list[str] = []
        for run in runs:
            value: Any = run.config
            for part in dotted.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None and str(value) not in found:
                found.append(str(value))
        if found:
            table[dotted] = " / ".join(found)
    return table


def _provenance(runs: Sequence[Run]) -> dict[str, str]:
    """Versions, code and hardware of the runs, as environment.json has them; where runs differ, all values."""
    found: dict[str, list[str]] = {}
    for run in runs:
        environment = run.reader.environment
        packages = {f"{name} version": number for name, number in environment.get("packages", {}).items()}
        git = environment.get("git") or {}
        code = git.get("revision") and git["revision"][:12] + (" with uncommitted changes" if git.get("diff") else "")
        named = {**packages, "code revision": code}
        named |= {key: environment.get(key) for key in ("python", "platform", "device", "cpus", "threads")}
        for key, value in named.items():
            if value is not None and str(value) not in found.setdefault(key, []):
                found[key].append(str(value))
    return {key: " / ".join(values) for key, values in found.items() if values}


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
