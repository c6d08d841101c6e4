"""Logged rollouts, chosen and packed for the page's sample browser.

Legend: each response of T tokens keeps `t` token numbers into the run's vocabulary of token strings, and per token, as
integers, `p` = -100 * log-probability under the sampling policy, `e` = 1000 * entropy in nats, `w` = 1000 * weight
(left out where every weight is 1). Nothing is interpreted here, and the page shows it as text.
"""

import math
from collections.abc import Sequence
from typing import Any

from polarity.report.runs import Run

MOST_STEPS = 12  # of a run, evenly spaced, first and last among them
MOST_ROWS = 16  # responses of a group, both polarities as far as there are
MOST_TOKENS = 3000  # of a response
PAGE_TOKENS = 400_000  # of all responses of a page; about 2 MB of page

Packed = dict[str, Any]


def pack_samples(runs: Sequence[Run]) -> list[Packed]:
    """For each run: its vocabulary, its steps with groups of responses, and a note on what was left out."""
    budget = PAGE_TOKENS // max(1, len(runs))
    return [_pack_run(run, budget) for run in runs]


def _pack_run(run: Run, budget: int) -> Packed:
    """Groups are taken in turns over the steps (each step's first, each step's second, ...) until `budget` tokens."""
    logged = run.reader.rollout_steps
    steps = _spread(logged, MOST_STEPS)
    groups = {step: _groups(run.reader.rollouts(step)) for step in steps}
    total = sum(map(len, groups.values()))
    chosen: dict[int, list[list[Packed]]] = {step: [] for step in steps}
    spent = 0
    for turn in range(max(map(len, groups.values()), default=0)):
        for step in steps:
            if turn < len(groups[step]):
                rows = _both_polarities(groups[step][turn])
                cost = sum(min(len(row.get("tokens") or [row["response"]]), MOST_TOKENS) for row in rows)
                if spent + cost <= budget or spent == 0:
                    chosen[step].append(rows)
                    spent += cost
    vocabulary: dict[str, int] = {}
    packed = [
        {"step": step, "groups": [_pack_group(rows, vocabulary) for rows in chosen[step]]}
        for step in steps
        if chosen[step]
    ]
    shown = sum(len(rows) for rows in chosen.values())
    return {
        "name": run.name,
        "note": f"{shown} of the {total} groups at {len(packed)} of {len(logged)} logged steps",
        "steps": packed,
        "vocabulary": list(vocabulary),
    }


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _groups(rows: Sequence[Packed]) -> list[list[Packed]]:
    """Rows by group; groups in which both polarities occur first, else in logged order."""
    by_group: dict[Any, list[Packed]] = {}
    for row in rows:
        by_group.setdefault(row["group"], []).append(row)
    return sorted(by_group.values(), key=lambda group: len({bool(row["correct"]) for row in group}) < 2)


def _both_polarities(rows: Sequence[Packed]) -> list[Packed]:
    """At most MOST_ROWS rows, as even between correct and wrong as the group allows."""
    right, wrong = ([row for row in rows if bool(row["correct"]) is side] for side in (True, False))
    half = MOST_ROWS // 2
    take_right = min(len(right), max(half, MOST_ROWS - len(wrong)))
    return right[:take_right] + wrong[: MOST_ROWS - take_right]


def _pack_group(rows: Sequence[Packed], vocabulary: dict[str, int]) -> Packed:
    first = rows[0]
    return {
        "problem": str(first["problem_id"]),
        "prompt": first["prompt"],
        "gold": str(first["gold"]),
        "rows": [_pack_row(row, vocabulary) for row in rows],
    }


def _pack_row(row: Packed, vocabulary: dict[str, int]) -> Packed:
    tokens = row.get("tokens") or [row["response"]]
    shown = tokens[:MOST_TOKENS]
    packed: Packed = {
        "correct": bool(row["correct"]),
        "status": row["status"],
        "strategy": row.get("strategy"),
        "reward": _finite(row.get("reward")),
        "advantage": _finite(row.get("advantage")),
        "truncated": bool(row.get("truncated")),
        "length": len(tokens),
        "t": [vocabulary.setdefault(token, len(vocabulary)) for token in shown],
    }
    for short, name, scale in (("p", "logp_old", -100.0), ("e", "entropy", 1000.0), ("w", "weight", 1000.0)):
        values = row.get(name)
        if values and len(values) == len(tokens) and not (name == "weight" and all(v == 1.0 for v in values)):
            packed[short] = [None if _finite(v) is None else round(scale * v) for v in values[:MOST_TOKENS]]
    return packed


def _finite(value: Any) -> float | None:
    """A number as it is; None for what is no finite number (a run that blew up must still make a page)."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
