"""The top of the page: verdicts, first and last numbers, settings, versions, notes."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from polarity.analysis.validation import problem_accuracies
from polarity.report.runs import Run, Runs, splits_of, values_of
from polarity.report.summary import end_of_training
from polarity.report.verdicts import Finding, Verdict, checked, combine, judge

GLANCE = ("accuracy/mean", "entropy/mean", "length/mean", "length/truncated")
SETTINGS = (
    "world", "base", "model", "data.train", "steps", "rollout.prompts", "rollout.group", "rollout.temperature",
    "rollout.max_new_tokens", "rollout.max_rounds", "rollout.truncated", "update.mini_batch_prompts", "update.epochs",
    "update.learning_rate", "evaluation.problems", "evaluation.samples", "evaluation.final_samples",
    "evaluation.temperature",
)  # fmt: skip
MARKS = {"good": "✓", "plain": "•", "warn": "!", "bad": "✗"}


def glance(runs: Sequence[Run]) -> dict[str, Any]:
    """What is said of one method: its verdicts, and its first step and end of training, means over its runs."""
    rows = {}
    for metric in GLANCE:
        firsts = [values[0] for run in runs if (values := values_of(run, metric)[1])]
        lasts = [value for run in runs if (value := end_of_training(run, metric)) is not None]
        if firsts and lasts:
            rows[metric] = (sum(firsts) / len(firsts), sum(lasts) / len(lasts))
    seconds = [sum(values_of(run, "time/step")[1]) for run in runs]
    there, missing = checked({metric: column for run in runs for metric, column in run.columns.items()})
    return {
        "label": runs[0].label,
        "seeds": [run.seed for run in runs],
        "steps": [_progress(run) for run in runs],
        "rows": rows,
        "time": str(timedelta(seconds=round(max(seconds)))) if any(seconds) else None,
        "verdicts": verdicts(runs),
        "checked": there,
        "missing": missing,
    }


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """What the runs of one method agree and disagree on."""
    return combine({run.seed: _judged(run) for run in runs})


def _judged(run: Run) -> list[Finding]:
    return judge(run.columns, max_rounds=_max_rounds(run), problems=_problems(run), length_unit=run.length_unit)


def _progress(run: Run) -> str:
    return str(run.last_step) if run.finished else f"{run.last_step} of {run.config.get('steps')}"


def _max_rounds(run: Run) -> int | None:
    rounds = (run.config.get("rollout") or {}).get("max_rounds")
    return int(rounds) if rounds else None


def _problems(run: Run) -> dict[str, tuple[list[float], list[float]]]:
    """Split -> accuracy of each of its problems before training and at the last evaluation."""
    found = {}
    for split in splits_of([run]):
        steps, accuracies = problem_accuracies(run.records, split)
        both = [(v[0], v[-1]) for v in accuracies.values() if v[0] is not None and v[-1] is not None]
        if len(steps) > 1 and steps[0] == 0 and both:
            found[split] = ([a for a, _ in both], [b for _, b in both])
    return found


def settings(runs: Sequence[Run]) -> dict[str, str]:
    """The settings a reader asks for first; where runs differ, all values."""
    found: dict[str, list[str]] = {}
    for dotted in SETTINGS:
        for run in runs:
            value: Any = run.config
            for part in dotted.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            _note(found, dotted, value)
    return _joined(found)


def provenance(runs: Sequence[Run]) -> dict[str, str]:
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
            _note(found, key, value)
    return _joined(found)


def notes(runs: Runs) -> dict[str, list[str]]:
    """Note -> the runs it is on: what their sources lack."""
    found: dict[str, list[str]] = {}
    for run in runs.runs:
        for note in run.notes:
            found.setdefault(note, []).append(run.name)
    return found


def _note(found: dict[str, list[str]], key: str, value: Any) -> None:
    if value is not None and str(value) not in found.setdefault(key, []):
        found[key].append(str(value))


def _joined(found: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {key: " / ".join(values) for key, values in found.items() if values}
