"""Logged rollouts, chosen, cut and packed for the page's microscope.

Legend: each response keeps `t`, numbers into the run's vocabulary of token strings, and per token, as integers, `p` =
-100 * log-probability under the old policy, `d` = that of the sampler less `p` (left out where it is 0 throughout), `e`
= 1000 * entropy in nats, `w` = 1000 * weight (left out where every weight is 1, and in rows that were not trained on)
and `a` = 1000 * advantage (where the method has one a token). What is cut from the middle of a response is in `gap`:
[tokens before it, tokens left out]. A response without tokens (other trainers' rollouts) is cut by characters,
and `t` are pieces of its text. Nothing is interpreted here, and the page shows it as text.

The page's budget is shared by the runs and by their steps, and groups are read only as far as they are shown: a run
of long responses shows fewer of them.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from polarity.errors import UserError
from polarity.report.figures import spread
from polarity.report.runs import Run

MOST_STEPS = 12  # of a run, evenly spaced, first and last among them
MOST_ROWS = 16  # responses of a group, both polarities as far as there are
MOST_TOKENS = 3000  # of a response: the first two thirds and the last third of them
LEAST_TOKENS = 600  # of a response, however many runs share the page
PAGE_TOKENS = 350_000  # of all responses of a page; about 2 MB of page
CHARACTERS = 20  # a token's worth of text without numbers
TOKEN_CHARACTERS = 400  # of one token: no real token is longer
PIECE = 400  # characters of a piece of a response without tokens
PROMPT_CHARACTERS = 20_000

Packed = dict[str, Any]


def pack_samples(runs: Sequence[Run]) -> list[Packed]:
    """For each run: its vocabulary, its steps with groups of responses, and a note on what was left out."""
    budget = PAGE_TOKENS // max(1, len(runs))
    return [_pack_run(run, budget) for run in runs]


def _pack_run(run: Run, budget: int) -> Packed:
    """Groups are taken in turns over the steps (each step's first, each step's second, ...) until `budget` tokens. The
    first of a step always fits: with as many rows as its share of the budget allows, one of each polarity at least."""
    logged = run.reader.rollout_steps
    steps = spread(logged, MOST_STEPS)
    share = budget // max(1, len(steps))
    most = min(MOST_TOKENS, max(LEAST_TOKENS, share // 2))
    vocabulary: dict[str, int] = {}
    packed: dict[int, list[Packed]] = {step: [] for step in steps}
    open_steps = {step: _groups(run, step) for step in steps}
    spent, whole = 0, True
    while open_steps and (spent < budget or not all(packed.values())):
        for step, groups in list(open_steps.items()):
            rows = next(groups, None)
            if rows is None:
                del open_steps[step]
                continue
            chosen = _affordable(rows, most, share if not packed[step] else budget - spent)
            if not packed[step] or len(chosen) == min(len(rows), MOST_ROWS):
                packed[step].append(_pack_group(chosen, len(rows), most, vocabulary))
                spent += sum(_cost(row, most) for row in chosen)
            else:
                whole = False
                del open_steps[step]
    groups_shown = sum(map(len, packed.values()))
    more = "" if whole and not open_steps and len(steps) == len(logged) else "; the run directory has more"
    return {
        "name": run.name,
        "note": f"{groups_shown} groups at {len(steps)} of {len(logged)} logged steps{more}" if steps else "",
        "steps": [{"step": step, "groups": groups} for step, groups in packed.items() if groups],
        "vocabulary": list(vocabulary),
    }


def _groups(run: Run, step: int) -> Iterator[list[Packed]]:
    """The groups of a step's file, in its order (those with both polarities come first), read as they are asked for.

    The rows of a group stand together in the file (docs/run_directory.md).
    """
    for _, group in groupby(_rows(run.path / "rollouts" / f"step_{step:06d}.jsonl"), key=lambda row: row["group"]):
        yield list(group)


def _rows(file: Path) -> Iterator[Packed]:
    with file.open(newline="\n", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise UserError(f"{file} line {number} is no JSON; take the line out") from error


def _affordable(rows: Sequence[Packed], most: int, budget: int) -> list[Packed]:
    """Rows in logged order, correct and wrong in turns as far as there are, MOST_ROWS and `budget` tokens at most; but
    one of each polarity at least."""
    sides = [[row for row in rows if bool(row["correct"]) is side] for side in (True, False)]
    turns = [row for i in range(len(rows)) for side in sides for row in side[i : i + 1]]
    chosen, spent = [], 0
    for i, row in enumerate(turns[:MOST_ROWS]):
        spent += _cost(row, most)
        if i >= sum(map(bool, sides)) and spent > budget:
            break
        chosen.append(row)
    return [row for side in sides for row in side if any(row is kept for kept in chosen)]


def _cost(row: Packed, most: int) -> int:
    tokens = row.get("tokens")
    if tokens:
        return min(len(tokens), most)
    return min(len(row["response"]) // CHARACTERS, most) + 1


def _pack_group(rows: Sequence[Packed], of: int, most: int, vocabulary: dict[str, int]) -> Packed:
    first = rows[0]
    packed: Packed = {
        "problem": _cut_text(str(first["problem_id"]), TOKEN_CHARACTERS),
        "prompt": _cut_text(str(first.get("prompt") or ""), PROMPT_CHARACTERS),
        "rows": [_pack_row(row, most, vocabulary) for row in rows],
        "of": of,
    }
    if first.get("gold") is not None:
        packed["gold"] = _cut_text(str(first["gold"]), PROMPT_CHARACTERS)
    return packed


def _pack_row(row: Packed, most: int, vocabulary: dict[str, int]) -> Packed:
    correct, tokens = bool(row["correct"]), row.get("tokens")
    packed: Packed = {
        "correct": correct,
        "status": str(row.get("status") or ("correct" if correct else "wrong")),
        "strategy": None if row.get("strategy") is None else _cut_text(str(row["strategy"]), TOKEN_CHARACTERS),
        "reward": _finite(row.get("reward")),
        "advantage": _finite(row.get("advantage")),
        "truncated": bool(row.get("truncated")),
        "kept": row.get("kept"),
    }
    if tokens:
        return packed | _pack_tokens(row, tokens, most, vocabulary)
    text, most = row["response"], most * CHARACTERS
    head = len(text) if len(text) <= most else 2 * most // 3
    tail = len(text) - (most - head) if head < len(text) else head
    starts = [range(0, head, PIECE), range(tail, len(text), PIECE)]
    pieces = [text[i : min(i + PIECE, end)] for part, end in zip(starts, (head, len(text)), strict=True) for i in part]
    packed |= {"characters": len(text), "t": [vocabulary.setdefault(piece, len(vocabulary)) for piece in pieces]}
    return packed | ({"gap": [len(starts[0]), tail - head]} if tail > head else {})


def _pack_tokens(row: Mapping[str, Any], tokens: Sequence[str], most: int, vocabulary: dict[str, int]) -> Packed:
    n = len(tokens)
    head = n if n <= most else 2 * most // 3
    shown = [*range(head), *range(max(head, n - (most - head)), n)] if head < n else range(n)
    texts = [_cut_text(tokens[i], TOKEN_CHARACTERS) for i in shown]
    packed: Packed = {"length": n, "t": [vocabulary.setdefault(text, len(vocabulary)) for text in texts]}
    if len(shown) < n:
        packed["gap"] = [head, n - len(shown)]
    columns = {"p": ("logp_old", -100.0), "d": ("logp_rollout", -100.0), "e": ("entropy", 1000.0)}
    columns |= {"a": ("advantage", 1000.0)} | ({} if row.get("kept") is False else {"w": ("weight", 1000.0)})
    for name, (key, scale) in columns.items():
        values = row.get(key)
        if isinstance(values, list) and len(values) == n:
            packed[name] = [None if _finite(values[i]) is None else round(scale * values[i]) for i in shown]
    if "d" in packed and "p" in packed:
        pairs = zip(packed["d"], packed["p"], strict=True)
        packed["d"] = [None if d is None or p is None else d - p for d, p in pairs]
    if "p" not in packed or not any(packed.get("d", ())):
        packed.pop("d", None)
    if all(w == 1000 for w in packed.get("w", ())):
        packed.pop("w", None)
    return packed


def _cut_text(text: str, most: int) -> str:
    """The text, or its beginning and its end with a word on what is missing between."""
    if len(text) <= most:
        return text
    head = 2 * most // 3
    tail = most - head
    return f"{text[:head]} ⟨{len(text) - most:,} characters left out⟩ {text[len(text) - tail :]}"


def _finite(value: Any) -> float | None:
    """A number as it is; None for what is no finite number (a run that blew up must still make a page)."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
