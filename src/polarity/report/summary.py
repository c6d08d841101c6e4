"""The final numbers of several runs: means, 95 % intervals and paired tests against a reference method.

The unit of an interval or a test is always named. With two or more seeds it is the seed: the interval is Student's t
over the per-seed values, the test is the paired t test over the seeds two methods share. With one seed it is the
evaluation problem: t over the per-problem values, paired by problem; it speaks of these problems and this one training
run, and says nothing of what another seed would give. Numbers at the end of training (mean over the last END_STEPS
steps) have no such unit for one seed, because steps of one run are not independent, and carry no interval then.
p values are not corrected for the number of comparisons.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from polarity.analysis.pass_at_k import pass_at_k
from polarity.report.runs import Run, Runs, splits_of, values_of

END_STEPS = 10
END_METRICS = {
    "accuracy/mean": "train accuracy",
    "entropy/mean": "entropy (nats)",
    "length/mean": "length (tokens)",
}


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` units with its 95 % t interval; low and high are None below two units. p: two-sided, of a
    difference from 0, None when undefined (below two units, or all units differ by the very same amount)."""

    mean: float
    low: float | None
    high: float | None
    n: int
    unit: str
    p: float | None = None


def estimate(values: Sequence[float], unit: str, *, test: bool = False) -> Estimate:
    """Mean and 95 % t interval of `values`; with `test`, the t test against 0 (of paired differences)."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, None, None, n, unit)
    if float(np.ptp(values)) < 1e-12:
        return Estimate(mean, mean, mean, n, unit, 1.0 if test and abs(mean) < 1e-12 else None)
    result = stats.ttest_1samp(values, 0.0)
    interval = result.confidence_interval(0.95)
    return Estimate(mean, float(interval.low), float(interval.high), n, unit, float(result.pvalue) if test else None)


@dataclass(frozen=True)
class Quantity:
    """One column of the tables. key: "end/METRIC" or "eval/SPLIT/METRIC"; group: the table it stands in."""

    key: str
    title: str
    group: str


def quantities(runs: Runs) -> list[Quantity]:
    """Train accuracy, entropy and length at the end; then pass@k of each split for each k that runs report."""
    found = [
        Quantity(f"end/{metric}", title.replace("tokens", runs.length_unit), "end of training")
        for metric, title in END_METRICS.items()
        if any(metric in row for run in runs.runs for row in run.metrics)
    ]
    final = [evaluation[1] for run in runs.runs if (evaluation := run.final_evaluation())]
    ks = sorted({int(m[5:]) for splits in final for values in splits.values() for m in values if m.startswith("pass@")})
    splits = splits_of(runs.runs)
    return found + [Quantity(f"eval/{split}/pass@{k}", split, f"pass@{k}") for k in ks for split in splits]


def summarise(runs: Runs) -> dict[str, Any]:
    """Everything the tables show, as plain JSON data (comparison.json is this).

    Methods map to cells by quantity key: mean, low, high, n, unit, per-seed values, and `difference` (method minus
    reference, with p) or None. Runs that stopped early are left out, with a note, where others finished.
    """
    kept, notes = _comparable(runs)
    columns = quantities(kept)
    cells: dict[str, dict[str, Any]] = {}
    for label in kept.labels:
        cells[label] = {}
        for column in columns:
            per_seed = _per_seed(kept.of(label), column.key)
            if per_seed:
                cells[label][column.key] = {
                    **asdict(_over(kept.of(label), column.key, per_seed)),
                    "values": {str(seed): value for seed, value in per_seed.items()},
                    "difference": _difference(kept, label, column.key),
                }
    steps = sorted({final[0] for run in kept.runs if (final := run.final_evaluation())})
    if len(steps) > 1:
        notes.append(f"final evaluations were made after different numbers of steps: {', '.join(map(str, steps))}")
    return {
        "methods": kept.labels,
        "seeds": {label: [run.seed for run in kept.of(label)] for label in kept.labels},
        "reference": kept.reference,
        "end_steps": END_STEPS,
        "evaluation_steps": steps,
        "quantities": [asdict(column) for column in columns],
        "base": _before_training(kept, columns),
        "results": cells,
        "notes": notes,
    }


def _comparable(runs: Runs) -> tuple[Runs, list[str]]:
    finished = [run for run in runs.runs if run.finished]
    notes = list(runs.notes)
    stopped = [run for run in runs.runs if not run.finished]
    for run in stopped:
        what = "left out of the tables" if finished else "not finished: the tables show it as far as it is"
        notes.append(f"{run.name} is at step {run.last_step} of {run.config.get('steps')}; {what}")
    kept = finished or runs.runs
    labels = [run.label for run in kept]
    return Runs(kept, runs.reference if runs.reference in labels else labels[0], notes), notes


def end_of_training(run: Run, metric: str) -> float | None:
    """Mean of a metric over the last END_STEPS steps of a run."""
    steps, values = values_of(run, metric)
    tail = [value for step, value in zip(steps, values, strict=True) if step > run.last_step - END_STEPS]
    return float(np.mean(tail)) if tail else None


def _value(run: Run, key: str) -> float | None:
    kind, rest = key.split("/", 1)
    if kind == "end":
        return end_of_training(run, rest)
    split, metric = rest.split("/", 1)
    final = run.final_evaluation()
    return final[1].get(split, {}).get(metric) if final else None


def _per_seed(runs: Sequence[Run], key: str) -> dict[int, float]:
    return {run.seed: value for run in runs if (value := _value(run, key)) is not None}


def _per_problem(run: Run, key: str) -> dict[str, float]:
    """Problem id -> its unbiased pass@k in the final evaluation of `run`; empty where a quantity has no problems."""
    kind, split, metric = key.split("/", 2)
    if kind != "eval":
        return {}
    k = int(metric.removeprefix("pass@"))
    verdicts = run.final_verdicts.get(split, {})
    return {problem: pass_at_k(len(c), sum(c), k) for problem, c in verdicts.items() if len(c) >= k}


def _over(runs: Sequence[Run], key: str, per_seed: dict[int, float]) -> Estimate:
    if len(per_seed) == 1:
        problems = _per_problem(next(run for run in runs if run.seed in per_seed), key)
        if problems:
            return estimate(list(problems.values()), "problems")
    return estimate(list(per_seed.values()), "seeds")


def _difference(runs: Runs, label: str, key: str) -> dict[str, Any] | None:
    """`label` minus the reference, over the seeds both have; over problems when they share just one seed."""
    if label == runs.reference:
        return None
    mine, theirs = _per_seed(runs.of(label), key), _per_seed(runs.of(runs.reference), key)
    shared = sorted(mine.keys() & theirs.keys())
    if not shared:
        return None
    if len(shared) == 1:
        a, b = (_per_problem(_with_seed(runs, name, shared[0]), key) for name in (label, runs.reference))
        common = sorted(a.keys() & b.keys())
        if common:
            return asdict(estimate([a[problem] - b[problem] for problem in common], "problems", test=True))
    return asdict(estimate([mine[seed] - theirs[seed] for seed in shared], "seeds", test=True))


def _with_seed(runs: Runs, label: str, seed: int) -> Run:
    return next(run for run in runs.of(label) if run.seed == seed)


def _before_training(runs: Runs, columns: Sequence[Quantity]) -> dict[str, float]:
    """Evaluation of the model before training: the mean over the runs that made one (all start from the same model)."""
    base = {}
    for column in columns:
        kind, rest = column.key.split("/", 1)
        if kind == "eval":
            split, metric = rest.split("/", 1)
            found = [v for run in runs.runs if (v := run.evaluations.get(0, {}).get(split, {}).get(metric)) is not None]
            if found:
                base[column.key] = float(np.mean(found))
    return base


def describe_units(summary: dict[str, Any]) -> list[str]:
    """The sentences that must stand beside the numbers: what was averaged, over what, and what was tested."""
    units = {cell["unit"] for row in summary["results"].values() for cell in row.values() if cell["low"] is not None}
    lines = [f"End of training = mean over the last {summary['end_steps']} steps."]
    if summary["evaluation_steps"]:
        steps = ", ".join(map(str, summary["evaluation_steps"]))
        lines.append(f"pass@k is the unbiased estimate at the last evaluation (step {steps}).")
    if "seeds" in units:
        lines.append("Intervals: 95 % t intervals over seeds.")
    if "problems" in units:
        lines.append(
            "Intervals with one seed: 95 % t intervals over evaluation problems; "
            "they do not cover what another seed would give."
        )
    differences = [
        cell["difference"] for row in summary["results"].values() for cell in row.values() if cell["difference"]
    ]
    if differences:
        lines.append(f"Δ = difference from {summary['reference']}.")
    tested = sorted({difference["unit"] for difference in differences if difference["low"] is not None})
    if tested:
        lines.append(
            f"p: paired t test over {' or '.join(tested)}, two-sided, not corrected for the number of comparisons."
        )
    return lines + list(summary["notes"])


def markdown(summary: dict[str, Any]) -> str:
    """The tables as Markdown, padded so that they also read well in a terminal."""
    blocks = []
    for group in dict.fromkeys(column["group"] for column in summary["quantities"]):
        columns = [column for column in summary["quantities"] if column["group"] == group]
        rows = [["method", *(column["title"] for column in columns)]]
        if any(column["key"] in summary["base"] for column in columns):
            rows.append(["(before training)", *(_short(summary["base"].get(column["key"])) for column in columns)])
        for label in summary["methods"]:
            cells = [summary["results"][label].get(column["key"]) for column in columns]
            rows.append([label, *(_cell(cell) for cell in cells)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        blocks.append(f"**{group}**\n\n" + "\n".join(lines))
    return "\n\n".join([*blocks, "\n".join(f"- {line}" for line in describe_units(summary))]) + "\n"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    text = _short(cell["mean"])
    if cell["low"] is not None:
        text += f" [{_short(cell['low'])}, {_short(cell['high'])}]"
    if cell["difference"]:
        text += f" Δ {cell['difference']['mean']:+.3f}"
        if cell["difference"]["p"] is not None:
            text += f" p={cell['difference']['p']:.2g}"
    return text


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
