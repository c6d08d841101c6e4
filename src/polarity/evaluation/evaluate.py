"""Sample responses to each problem of each split, verify them, count. Knows no engine: it is handed a sampler."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polarity.analysis import pass_at_k
from polarity.data import Row
from polarity.rewards import Outcome, Verifier, verify_all

PASS_AT = (1, 8, 64, 256)


@dataclass(frozen=True)
class Generation:
    """One response as a sampler hands it over; entropy in nats is the mean over its tokens."""

    text: str
    length: int
    entropy: float
    truncated: bool


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
        records[name] = [
            {
                "problem_id": row["id"],
                "correct": [o.correct for o in outcomes[i * samples : (i + 1) * samples]],
                "lengths": [g.length for g in made[i * samples : (i + 1) * samples]],
                "first_response": made[i * samples].text,
            }
            for i, row in enumerate(rows)
        ]
        results[name] = _summary(made, outcomes, samples)
    return {"results": results, "samples": records}


def _summary(made: Sequence[Generation], outcomes: Sequence[Outcome], samples: int) -> dict[str, Any]:
    problems = [outcomes[i : i + samples] for i in range(0, len(outcomes), samples)]
    counts = [sum(o.correct for o in problem) for problem in problems]
    tokens = sum(g.length for g in made)
    summary: dict[str, Any] = {
        f"pass@{k}": sum(pass_at_k(samples, c, k) for c in counts) / len(counts) for k in PASS_AT if k <= samples
    }
    summary["entropy"] = sum(g.entropy * g.length for g in made) / max(tokens, 1)
    summary["length"] = tokens / len(made)
    summary["truncated"] = sum(g.truncated for g in made) / len(made)
    named = Counter(o.strategy for o in outcomes if o.strategy is not None)
    if named:
        distinct = [len({o.strategy for o in problem if o.correct and o.strategy}) for problem in problems]
        summary["distinct_strategies"] = sum(distinct) / len(distinct)
        summary["strategies"] = {name: n / len(outcomes) for name, n in named.most_common()}
    return summary
