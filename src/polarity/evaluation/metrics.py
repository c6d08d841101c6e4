"""What is counted from verdicts: values of one problem, then means over problems with their intervals.

P problems, n responses to each. Every mean is over problems, each of which weighs the same; entropy alone is a mean
over tokens. What a generator does not tell (a server's entropies, say) is left out, never 0.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polarity.analysis.pass_at_k import LARGEST_VOTE, biased_best_at_k, maj_at_k, pass_at_k
from polarity.analysis.statistics import bootstrap_interval, standard_error
from polarity.rewards import Outcome

POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Generation:
    """One response as a generator hands it over; None is what it does not know.

    length in tokens: where a server tells only the total of a call for several responses, their mean; entropy in nats
    is the mean over the response's tokens.
    """

    text: str
    length: float | None
    entropy: float | None
    truncated: bool | None


@dataclass(frozen=True)
class Graded:
    """The n responses to one problem, without their texts, and the n verdicts on them. level: how hard, if known."""

    problem_id: str
    level: str | None
    made: Sequence[Generation]
    outcomes: Sequence[Outcome]

    @property
    def correct(self) -> list[bool]:
        return [o.correct for o in self.outcomes]


def level_of(row: Mapping[str, Any]) -> str | None:
    """The row's difficulty, from its column `level` (`Level 3` and 3 are both "3") or `difficulty`."""
    value = row.get("level", row.get("difficulty"))
    return None if value is None else re.sub(r"(?i)^level\s+", "", str(value))


def base_values(problem: Graded, ks: Sequence[int]) -> dict[str, float]:
    """pass@k for each k up to n; length and share truncated, where known; distinct strategies, where named."""
    n, c = len(problem.outcomes), sum(problem.correct)
    found = {f"pass@{k}": pass_at_k(n, c, k) for k in ks if k <= n}
    for name in ("length", "truncated"):
        column = [getattr(g, name) for g in problem.made]
        if None not in column:
            found[name] = sum(column) / n
    return found


def all_values(problem: Graded, ks: Sequence[int]) -> dict[str, float]:
    """avg@n, pass@k, maj@k and biased_best@k for each k up to n, and shares of what could not be judged.

    maj@k wants an extracted answer for each judged response, and is left out where the verifier names none; for k
    below 4 too, where a vote decides nothing. unparsed, timeout and error are shares of the n responses.
    """
    n, c = len(problem.outcomes), sum(problem.correct)
    ks = [k for k in ks if k <= n]
    found = {f"avg@{n}": c / n, **base_values(problem, ks)}
    judged = [o.status in ("correct", "wrong") for o in problem.outcomes]
    answers = [o.extracted if j else None for o, j in zip(problem.outcomes, judged, strict=True)]
    votes = [k for k in ks if k >= 4]
    if n <= LARGEST_VOTE and votes and all(a is not None for a, j in zip(answers, judged, strict=True) if j):
        found |= {f"maj@{k}": v for k, v in zip(votes, maj_at_k(answers, problem.correct, votes), strict=True)}
    found |= {f"biased_best@{k}": biased_best_at_k(n, c, k) for k in ks if k > 1}
    for status in ("unparsed", "timeout", "error"):
        found[status] = sum(o.status == status for o in problem.outcomes) / n
    return found


def over_tokens(problems: Sequence[Graded]) -> dict[str, float]:
    """{"entropy": mean over tokens, nats}; empty where a length or an entropy is unknown."""
    return _token_mean([g for problem in problems for g in problem.made])


def by_polarity(problems: Sequence[Graded]) -> dict[str, float]:
    """{positive,negative}/{entropy,length}: means over the tokens, and over the responses, of one polarity.

    Left out where there is no response (no token) of that polarity, and where a length or an entropy is unknown.
    """
    found: dict[str, float] = {}
    for name, polarity in (("positive", True), ("negative", False)):
        made = [g for p in problems for g, o in zip(p.made, p.outcomes, strict=True) if o.correct == polarity]
        lengths = [g.length for g in made if g.length is not None]
        if made and len(lengths) == len(made):
            found[f"{name}/length"] = sum(lengths) / len(lengths)
            if sum(lengths) > 0:
                found |= {f"{name}/{metric}": value for metric, value in _token_mean(made).items()}
    return found


def strategies(problems: Sequence[Graded]) -> dict[str, Any]:
    """distinct_strategies among a problem's correct responses, mean over problems, and the share of each strategy
    among all responses; empty where the verifier names none."""
    outcomes = [o for problem in problems for o in problem.outcomes]
    named = Counter(o.strategy for o in outcomes if o.strategy is not None)
    if not named:
        return {}
    distinct = [len({o.strategy for o in p.outcomes if o.correct and o.strategy}) for p in problems]
    return {
        "distinct_strategies": sum(distinct) / len(distinct),
        "strategies": {name: n / len(outcomes) for name, n in named.most_common()},
    }


def mean_score(problems: Sequence[Graded]) -> dict[str, float]:
    """{"reward": the mean score of all responses}, as the verifier gave it."""
    scores = [o.score for problem in problems for o in problem.outcomes]
    return {"reward": sum(scores) / len(scores)}


def mean_values(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over problems of what every one of them has."""
    common = [name for name in values[0] if all(name in v for v in values)]
    return {name: sum(v[name] for v in values) / len(values) for name in common}


def measure(problems: Sequence[Graded], ks: Sequence[int] = POWERS) -> dict[str, Any]:
    """Everything about one task: {"means", "stderr", "intervals", "levels", "problems", "samples"}, plain JSON data.

    means: metric to value, as in docs/evaluation.md; stderr: sample standard deviation over the root of P; intervals:
    metric to [low, high], percentile bootstrap over problems, 95 %, seed 0; levels: difficulty to its number of
    problems, accuracy and interval. Where problems differ in n, k goes as far as the smallest n, which also names
    avg@n. Raises ValueError without problems.
    """
    if not problems:
        raise ValueError("there is no problem to measure")
    samples = [len(problem.outcomes) for problem in problems]
    fewest = min(samples)
    values = [all_values(problem, [k for k in ks if k <= fewest]) for problem in problems]
    values = [{f"avg@{fewest}": v.pop(f"avg@{n}"), **v} for v, n in zip(values, samples, strict=True)]
    means = mean_values(values)
    ends = bootstrap_interval(np.array([[v[name] for name in means] for v in values]))
    return {
        "problems": len(problems),
        "samples": fewest if fewest == max(samples) else [fewest, max(samples)],
        "means": {**means, **over_tokens(problems), **strategies(problems)},
        "stderr": {name: standard_error([v[name] for v in values]) for name in means},
        "intervals": {name: ends[:, i].tolist() for i, name in enumerate(means)},
        "levels": _levels(problems, [v[f"avg@{fewest}"] for v in values]),
    }


def _token_mean(made: Sequence[Generation]) -> dict[str, float]:
    known = [(g.length, g.entropy) for g in made if g.length is not None and g.entropy is not None]
    if len(known) < len(made):
        return {}
    tokens = sum(length for length, _ in known)
    return {"entropy": sum(length * entropy for length, entropy in known) / max(tokens, 1)}


def _levels(problems: Sequence[Graded], accuracy: Sequence[float]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[float]] = {}
    for problem, value in zip(problems, accuracy, strict=True):
        if problem.level is not None:
            groups.setdefault(problem.level, []).append(value)
    found = {}
    for level in sorted(groups, key=lambda text: (not text.isdigit(), int(text) if text.isdigit() else 0, text)):
        low, high = bootstrap_interval(np.array(groups[level])).tolist()
        accuracies = groups[level]
        mean = sum(accuracies) / len(accuracies)
        found[level] = {"problems": len(accuracies), "accuracy": mean, "low": low, "high": high}
    return found
