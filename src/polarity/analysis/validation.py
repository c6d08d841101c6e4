"""A run's evaluations over time, split by polarity and by the problems' difficulty: plain data for pages and tables.

Input: step -> the content of evaluations/step_NNNNNN.json (`RunReader.evaluations`; docs/run_directory.md). Records
need problem_id and correct; what else is missing or null is left out of the numbers, never 0.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from polarity.analysis.difficulty import bands
from polarity.analysis.pass_at_k import pass_at_k

POLARITIES = (("positive", True), ("negative", False))

Evaluations = Mapping[int, Mapping[str, Any]]
Record = Mapping[str, Any]


def problem_accuracies(evaluations: Evaluations, split: str) -> tuple[list[int], dict[str, list[float | None]]]:
    """Steps, in order, of the evaluations that have the split, and each problem's accuracy at each of them.

    None where the problem was not in that evaluation: what `patterns.pattern_flow` takes.
    """
    records = {step: _records(evaluations[step], split) for step in sorted(evaluations)}
    steps = [step for step, own in records.items() if own]
    columns = [{r["problem_id"]: _accuracy(r) for r in records[step]} for step in steps]
    problems = dict.fromkeys(problem for column in columns for problem in column)
    return steps, {problem: [column.get(problem) for column in columns] for problem in problems}


def validation(evaluations: Evaluations) -> dict[str, dict[str, Any]]:
    """{split: {"difficulty": "level" | "band", "problems": {class: number}, "evaluations": [one a step]}}.

    Each evaluation: {"step", "all": VALUES, "classes": {class: VALUES}}. A problem's class is the data's own level
    where every problem of the split has one, else the band of its accuracy at the run's first evaluation (unsolved
    a = 0, hard 0 < a < 0.5, easy 0.5 <= a < 1, solved a = 1); problems that were not in that evaluation have no class
    and count under "all" alone.

    VALUES: problems and responses, how many; accuracy, mean over problems (avg@k, with all k = responses a problem);
    pass@k, unbiased, mean over problems, for k = 2, 4, 8 ... up to the fewest responses a problem has; length, mean
    over responses; entropy, mean over tokens, nats; reward, mean score; and {positive,negative}/{share,entropy,length}
    of the responses of that polarity.

    A band is chosen by the luck of the first evaluation too: with 8 responses, a problem that is solved one time in ten
    is `unsolved` with probability 0.43. So bands drift towards the middle at the second evaluation without training.
    """
    splits = dict.fromkeys(split for step in sorted(evaluations) for split in evaluations[step].get("samples", {}))
    return {split: found for split in splits if (found := _split(evaluations, split))}


def _split(evaluations: Evaluations, split: str) -> dict[str, Any]:
    found = {step: _records(evaluations[step], split) for step in sorted(evaluations)}
    records = {step: own for step, own in found.items() if own}
    if not records:
        return {}
    levels = {r["problem_id"]: r.get("level") for own in records.values() for r in own}
    if None in levels.values():
        kind, classes = "band", _bands(records[min(records)])
        names = list(dict.fromkeys(classes.values()))
    else:
        kind, classes = "level", {problem: str(level) for problem, level in levels.items()}
        names = sorted(set(classes.values()), key=_level_order)
    count = Counter(classes.values())
    return {
        "difficulty": kind,
        "problems": {name: count[name] for name in names},
        "evaluations": [
            {"step": step, "all": _values(own), "classes": _by_class(own, classes, names)}
            for step, own in records.items()
        ],
    }


def _records(evaluation: Mapping[str, Any], split: str) -> list[Record]:
    """Of the problems with a response."""
    return [record for record in evaluation.get("samples", {}).get(split, []) if record["correct"]]


def _bands(records: Sequence[Record]) -> dict[str, str]:
    """Problem to its band, the hardest first."""
    counts = torch.tensor([[len(r["correct"]), sum(r["correct"])] for r in records])
    found = bands(counts[:, 0], counts[:, 1])
    return {records[i]["problem_id"]: name for name, own in found.items() for i in own.nonzero()[:, 0].tolist()}


def _by_class(
    records: Sequence[Record], classes: Mapping[str, str], names: Iterable[str]
) -> dict[str, dict[str, float]]:
    own = {name: [r for r in records if classes.get(r["problem_id"]) == name] for name in names}
    return {name: _values(chosen) for name, chosen in own.items() if chosen}


def _level_order(level: str) -> tuple[bool, int, str]:
    return (not level.isdigit(), int(level) if level.isdigit() else 0, level)


def _accuracy(record: Record) -> float:
    return sum(record["correct"]) / len(record["correct"])


def _values(records: Sequence[Record]) -> dict[str, float]:
    counts = [(len(r["correct"]), sum(r["correct"])) for r in records]
    fewest, total = min(n for n, _ in counts), sum(n for n, _ in counts)
    found: dict[str, float] = {"problems": len(records), "responses": total}
    found["accuracy"] = sum(c / n for n, c in counts) / len(counts)
    for k in (2**i for i in range(1, fewest.bit_length())):
        found[f"pass@{k}"] = sum(pass_at_k(n, c, k) for n, c in counts) / len(counts)
    scores = _column(records, "scores")
    if None not in scores:
        found["reward"] = sum(scores) / total
    lengths, entropies = _column(records, "lengths"), _column(records, "entropies")
    found |= _means(lengths, entropies)
    correct = [c for r in records for c in r["correct"]]
    for name, polarity in POLARITIES:
        own = [i for i, c in enumerate(correct) if c == polarity]
        found[f"{name}/share"] = len(own) / total
        means = _means([lengths[i] for i in own], [entropies[i] for i in own])
        found |= {f"{name}/{metric}": value for metric, value in means.items()}
    return found


def _column(records: Sequence[Record], key: str) -> list[Any]:
    """One entry a response; None where a record does not have it, or not one for each response."""
    lists = [(r.get(key) or [], len(r["correct"])) for r in records]
    return [value for values, n in lists for value in (values if len(values) == n else [None] * n)]


def _means(lengths: Sequence[float | None], entropies: Sequence[float | None]) -> dict[str, float]:
    """length over responses and entropy over tokens, of what is known of every response."""
    known = [n for n in lengths if n is not None]
    if not known or len(known) < len(lengths):
        return {}
    found = {"length": sum(known) / len(known)}
    pairs = [(n, h) for n, h in zip(known, entropies, strict=True) if h is not None]
    if len(pairs) == len(known) and sum(known) > 0:
        found["entropy"] = sum(n * h for n, h in pairs) / sum(known)
    return found
