"""Sample responses to each problem of each split, verify them, count. Knows no engine: it is handed a sampler.

This is the short evaluation inside a training run. `polarity eval` goes through polarity.evaluation.run, which keeps
every response, reports intervals, and can be stopped and resumed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polarity.data import Row
from polarity.evaluation.metrics import (
    Generation,
    Graded,
    base_values,
    by_polarity,
    level_of,
    mean_score,
    mean_values,
    over_tokens,
    strategies,
)
from polarity.rewards import Verifier, verify_all

PASS_AT = (1, 8, 64, 256)
PLACES = 5  # of the floats in records

# (problem rows, samples for each, name of the split) -> responses, `samples` in a row for each problem
Generate = Callable[[Sequence[Row], int, str], list[Generation]]


def evaluate(
    generate: Generate, splits: Mapping[str, Sequence[Row]], verifier: Verifier, samples: int
) -> dict[str, Any]:
    """{"results": {split: {metric: value}}, "samples": {split: [one record a problem]}}.

    Metrics: pass@k for each k of PASS_AT that `samples` allows (unbiased, mean over problems), mean entropy (over
    tokens), mean length, share truncated, entropy and length of each polarity, `reward` (mean score), mean number of
    distinct strategies among a problem's correct responses, and `strategies`: the share of responses for each strategy
    the verifier names. Records: docs/run_directory.md.
    """
    results: dict[str, Any] = {}
    records: dict[str, Any] = {}
    for name, rows in splits.items():
        made = generate(rows, samples, name)
        outcomes = verify_all(verifier, [g.text for g in made], [row for row in rows for _ in range(samples)])
        problems = []
        for i, row in enumerate(rows):
            own = slice(i * samples, (i + 1) * samples)
            problems.append(Graded(row["id"], level_of(row), made[own], outcomes[own]))
        results[name], records[name] = of_split(problems)
    return {"results": results, "samples": records}


def of_split(problems: Sequence[Graded]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results of one split, and its records, one a problem, as `evaluate` has them."""
    means = mean_values([base_values(problem, PASS_AT) for problem in problems])
    of_responses = {**over_tokens(problems), **by_polarity(problems), **mean_score(problems)}
    named = any(o.strategy is not None for problem in problems for o in problem.outcomes)
    return {**means, **of_responses, **strategies(problems)}, [_record(problem, named) for problem in problems]


def _record(problem: Graded, named: bool) -> dict[str, Any]:
    """What is kept of one problem; `strategies` where the verifier names any in this split."""
    entropies = [g.entropy for g in problem.made]
    return {
        "problem_id": problem.problem_id,
        "level": problem.level,
        "correct": problem.correct,
        "lengths": [g.length for g in problem.made],
        "entropies": [None if entropy is None else round(entropy, PLACES) for entropy in entropies],
        **({"strategies": [o.strategy for o in problem.outcomes]} if named else {}),
        "scores": [round(o.score, PLACES) for o in problem.outcomes],
        "first_response": problem.made[0].text,
    }
