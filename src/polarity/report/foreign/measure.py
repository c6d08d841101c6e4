"""The numbers of a step's foreign rows. N rows (responses), T padded length; G of a group, all groups of any size."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polarity.analysis import mismatch, rollout_metrics
from polarity.analysis.difficulty import bands, group_counts
from polarity.evaluation.metrics import Generation, Graded, base_values, by_polarity, mean_score, mean_values
from polarity.report.foreign.jsonl import LISTS
from polarity.report.foreign.rows import Row
from polarity.rewards import Outcome

Metrics = dict[str, float]

PASS_AT = (1, 8, 64, 256)
VALUES = {"logp_old", "logp_rollout", "entropy"}


def length_of(row: Row, unit: str) -> int | None:
    """Words between white space, or tokens; None where the row has none."""
    if unit == "words":
        return len(row.response.split())
    return next((len(row.given[key]) for key in LISTS if isinstance(row.given.get(key), list)), None)


def step_metrics(rows: Sequence[Row], unit: str) -> Metrics:
    """Names and definitions of docs/metrics.md, Rollouts and By polarity; a number that not all rows have is absent."""
    correct = torch.tensor([row.correct for row in rows])
    numbers = {group: i for i, group in enumerate(dict.fromkeys(row.group for row in rows))}
    groups = torch.tensor([numbers[row.group] for row in rows])
    known = {key for key in (*VALUES, "truncated") if all(key in row.given for row in rows)}
    # Where no value is known a token, one token a row is enough: see _length_metrics.
    sizes = torch.tensor([length_of(row, "tokens") if known & VALUES else 1 for row in rows])
    mask = torch.arange(max(int(sizes.max()), 1)) < sizes[:, None]
    lists = {key: _padded(rows, key, mask) for key in known & VALUES}
    truncated = torch.tensor([row.given["truncated"] if "truncated" in known else False for row in rows])
    rewards = torch.tensor([row.reward or 0.0 for row in rows], dtype=torch.float64)
    nothing = torch.zeros(1, 1).expand(mask.shape)
    found = rollout_metrics(
        correct, rewards, groups, truncated, lists.get("logp_old", nothing), lists.get("entropy", nothing), mask
    )
    lacking = {"length"} | {"entropy"} - known | ({"probability"} if "logp_old" not in known else set())
    if any(row.reward is None for row in rows):
        lacking.add("reward")
    found = {name: value for name, value in found.items() if not lacking & set(name.split("/"))}
    if "truncated" in known:
        found["length/truncated"] = float(truncated.double().mean())
    if {"logp_old", "logp_rollout"} <= known:
        found |= mismatch(lists["logp_rollout"], lists["logp_old"], mask, correct)
    lengths = [length_of(row, unit) for row in rows]
    if None not in lengths:
        found |= _length_metrics(correct, groups, torch.tensor(lengths, dtype=torch.float64))
    return found | {"rollouts/generated": float(len(rows))}


def _length_metrics(correct: Tensor, groups: Tensor, lengths: Tensor) -> Metrics:
    """length/{mean,max} and NAME/length; correct (N,) bool, groups (N,) ints, lengths (N,) in any unit.

    rollout_metrics has the same of a mask (N,T). Rows without tokens have none: a mask as long as their words would be
    most of the work of a step.
    """
    size, solved, place = group_counts(correct, groups)
    chosen = {"positive": correct, "negative": ~correct}
    for band, own in bands(size, solved).items():
        rows, name = own[place], f"difficulty/{band}"
        chosen |= {name: rows, f"{name}/positive": rows & correct, f"{name}/negative": rows & ~correct}
    found = {f"{name}/length": float(lengths[rows].mean()) for name, rows in chosen.items() if rows.any()}
    return found | {"length/mean": float(lengths.mean()), "length/max": float(lengths.max())}


def _padded(rows: Sequence[Row], key: str, mask: Tensor) -> Tensor:
    """(N,T) float64, 0 outside the mask."""
    values = torch.zeros(mask.shape, dtype=torch.float64)
    values[mask] = torch.tensor([value for row in rows for value in row.given[key]], dtype=torch.float64)
    return values


def evaluation_metrics(rows: Sequence[Row], unit: str) -> tuple[Metrics, list[dict[str, Any]]]:
    """What docs/metrics.md has under eval/SPLIT/, and one record a problem as in evaluations/ of docs/run_directory.md.

    A group is a problem; where problems differ in their number of responses, k goes up to the smallest.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    problems = []
    for group in groups.values():
        made = [Generation(row.response, length_of(row, unit), None, None) for row in group]
        problems.append(Graded(group[0].problem, None, made, [_outcome(row) for row in group]))
    records = [
        {
            "problem_id": problem.problem_id, "level": None, "correct": problem.correct,
            "lengths": [g.length for g in problem.made], "entropies": [g.entropy for g in problem.made],
            "scores": [o.score for o in problem.outcomes], "first_response": problem.made[0].text,
        }
        for problem in problems
    ]  # fmt: skip
    means = mean_values([base_values(problem, PASS_AT) for problem in problems])
    return means | by_polarity(problems) | mean_score(problems), records


def _outcome(row: Row) -> Outcome:
    score = float(row.correct) if row.reward is None else row.reward
    return Outcome(row.correct, "correct" if row.correct else "wrong", score)
