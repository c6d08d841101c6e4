"""Sample responses to each problem of each split, verify them, count. Knows no engine: it is handed a sampler.

This is the short evaluation inside a training run. `polarity eval` goes through polarity.evaluation.run, which keeps
every response, reports intervals, and can be stopped and resumed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polarity.data import Row
from polarity.evaluation.metrics import Generation, Graded, base_values, level_of, mean_values, over_tokens, strategies
from polarity.rewards import Verifier, verify_all

PASS_AT = (1, 8, 64, 256)

# (problem rows, samples for each, name of the split) -> responses, `samples` in a row for each problem
Generate = Callable[[Sequence[Row], int, str], list[Generation]]


def evaluate(
    generate: Generate, splits: Mapping[str, Sequence[Row]], verifier: Verifier, samples: int
) -> dict[str, Any]:
    """{"results": {split: {metric: value}}, "samples": {split: [one record a problem]}}.

    Metrics: pass@k for each k of PASS_AT that `samples` allows (unbiased, mean over problems), mean entropy (over
    tokens), mean length, share truncated, mean number of distinct strategies among a problem's correct responses, and
    `strategies`: the share of responses for each strategy the verifier names.
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
        records[name] = [
            {
                "problem_id": problem.problem_id,
                "correct": problem.correct,
                "lengths": [g.length for g in problem.made],
                "first_response": problem.made[0].text,
            }
            for problem in problems
        ]
        means = mean_values([base_values(problem, PASS_AT) for problem in problems])
        results[name] = {**means, **over_tokens(problems), **strategies(problems)}
    return {"results": results, "samples": records}
