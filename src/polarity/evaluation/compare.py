"""Two evaluations of the same problems, problem by problem."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polarity.analysis.statistics import paired_tests
from polarity.errors import UserError
from polarity.evaluation.metrics import POWERS, Graded, all_values
from polarity.evaluation.run import read_evaluation

# Classes of problems by how often the other run solves them, and the upper ends of all but the last two.
ENDS = (0.0, 0.25, 0.5, 0.75)
RATES = ("0", "(0, 0.25]", "(0.25, 0.5]", "(0.5, 0.75]", "(0.75, 1)", "1")
COMPARED = ("pass@", "maj@")
# Settings that may differ between two evaluations without a word.
OF_THE_MODEL = ("model", "weights", "responses", "dtype", "seed")


def compare_evaluations(path: Path, other: Path) -> dict[str, Any]:
    """{"tasks": {task: {"metrics", "by_rate"}}, "notes"}: the evaluation in `path` minus the one in `other`.

    metrics: accuracy, and each pass@k and maj@k that both have, with both means and `Paired` (difference, 95 %
    bootstrap interval, p of the paired t test and of the sign-flip test), over the problems both have. by_rate: the
    problems by their pass rate in `other` (never solved, up to 1/4, ... above 3/4, always): how many, and the mean
    accuracy in both. The class of a problem is chosen by the other run's luck too, so its accuracy there is drawn
    towards the class's end, and the two means of a class differ even between two runs of one model.
    """
    settings, mine = read_evaluation(path)
    others_settings, theirs = read_evaluation(other)
    tasks, notes = {}, _differences(settings, others_settings)
    for task in mine.keys() & theirs.keys():
        common = [key for key in mine[task] if key in theirs[task]]
        if not common:
            continue
        left = len(mine[task]) + len(theirs[task]) - 2 * len(common)
        if left:
            notes.append(f"{task}: {left} problems are in one of the two only and are left out")
        a, b = ([graded[key] for key in common] for graded in (mine[task], theirs[task]))
        tasks[task] = {"metrics": _metrics(a, b), "by_rate": _by_rate(a, b)}
    if not tasks:
        raise UserError(f"{path} and {other} have no problem in common; compare evaluations of the same data")
    return {"tasks": {task: tasks[task] for task in mine if task in tasks}, "notes": notes}


def _metrics(a: Sequence[Graded], b: Sequence[Graded]) -> dict[str, dict[str, Any]]:
    fewest = min(len(problem.outcomes) for problem in [*a, *b])
    ks = [k for k in POWERS if 1 < k <= fewest]
    ours, theirs = ([_values(problem, ks) for problem in problems] for problems in (a, b))
    found = {}
    for name in ours[0]:
        if all(name in values for values in [*ours, *theirs]):
            x, y = [values[name] for values in ours], [values[name] for values in theirs]
            tests = asdict(paired_tests(x, y))
            found[name] = {"this": sum(x) / len(x), "other": sum(y) / len(y), "difference": tests.pop("mean"), **tests}
    return found


def _values(problem: Graded, ks: Sequence[int]) -> dict[str, float]:
    values = {k: v for k, v in all_values(problem, ks).items() if k.startswith(COMPARED)}
    return {"accuracy": sum(problem.correct) / len(problem.correct), **values}


def _by_rate(a: Sequence[Graded], b: Sequence[Graded]) -> list[dict[str, Any]]:
    classes: dict[str, list[tuple[float, float]]] = {}
    for ours, theirs in zip(a, b, strict=True):
        rate, other = (sum(p.correct) / len(p.correct) for p in (ours, theirs))
        place = RATES[-1] if other == 1 else RATES[sum(other > end for end in ENDS)]
        classes.setdefault(place, []).append((rate, other))
    return [
        {
            "rate": place,
            "problems": len(pairs),
            "this": sum(x for x, _ in pairs) / len(pairs),
            "other": sum(y for _, y in pairs) / len(pairs),
        }
        for place in RATES
        if (pairs := classes.get(place))
    ]


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What else differs between two evaluations than the model."""
    keys = [
        key for key in {**a, **b} if key not in ("model", "weights", "server", "responses", "responses_hash", "seed")
    ]
    return [f"the two differ in {key}: {a.get(key)!r} and {b.get(key)!r}" for key in keys if a.get(key) != b.get(key)]
