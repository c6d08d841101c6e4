"""Rollouts as other trainers write them, and their metrics in plain loops.

verl's files are written as verl 0.9.1 writes them: `_write_generations` of verl/trainer/ppo/ray_trainer.py (values that
JSON does not know become text) and of verl/trainer/ppo/v1/trainer_base.py (they become numbers; rows have a uid,
PROMPT_SESSION_OUTPUT, and training dumps nothing else beside the five keys).
"""

import base64
import gzip
import json
import re
from statistics import fmean

import pytest

from polarity.analysis import pass_at_k
from polarity.rundir import RunReader


def dump(folder, step, rows):
    """A file of verl's: `default=str` is what its older trainer falls back to."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**row, "step": step}, ensure_ascii=False, default=str) + "\n" for row in rows]
    (folder / f"{step}.jsonl").write_text("".join(lines), encoding="utf-8")


def words(rng, most=30):
    return " ".join(rng.choice("uvwxyz") for _ in range(rng.randint(0, most)))


def verl_rows(rng, prompts=5, most=6, scores=(-1.0, 1.0)):
    """Rows of groups of 1 to `most` responses, in any order: verl balances a batch over its workers."""
    rows = [
        {"input": f"user\nproblem {p}", "output": words(rng), "gts": str(p), "score": rng.choice(scores)}
        for p in range(prompts)
        for _ in range(rng.randint(1, most))
    ]
    rng.shuffle(rows)
    return rows


def brute_force(steps, *, prompt="input", response="output", correct=lambda row: row["score"] > 0, reward="score"):
    """Step -> metrics of docs/metrics.md, in plain loops. steps: step -> rows."""
    found, seen, seen_correct = {}, {3: set(), 4: set()}, {3: set(), 4: set()}
    for step, rows in sorted(steps.items()):
        groups = {}
        for row in rows:
            groups.setdefault(row[prompt], []).append(row)
        counts = [(len(g), sum(map(correct, g))) for g in groups.values()]
        own = {
            "rollouts/generated": len(rows),
            "accuracy/mean": fmean(correct(r) for r in rows),
            "reward/mean": fmean(r[reward] for r in rows),
            "accuracy/fully_solved": fmean(c == n for n, c in counts),
            "accuracy/unsolved": fmean(c == 0 for _, c in counts),
            "length/mean": fmean(len(r[response].split()) for r in rows),
            "length/max": max(len(r[response].split()) for r in rows),
        }
        k = 2
        while k <= min(n for n, _ in counts):
            own[f"accuracy/pass@{k}"] = fmean(pass_at_k(n, c, k) for n, c in counts)
            k *= 2
        bands = {
            "unsolved": lambda a: a == 0,
            "hard": lambda a: 0 < a < 0.5,
            "easy": lambda a: 0.5 <= a < 1,
            "solved": lambda a: a == 1,
        }
        sets = {"positive": [r for r in rows if correct(r)], "negative": [r for r in rows if not correct(r)]}
        for polarity, chosen in list(sets.items()):
            own[f"{polarity}/share"] = len(chosen) / len(rows)
        for band, belongs in bands.items():
            inside = [g for g in groups.values() if belongs(fmean(map(correct, g)))]
            own[f"difficulty/{band}/share"] = len(inside) / len(groups)
            sets[f"difficulty/{band}"] = [r for g in inside for r in g]
            for polarity in ("positive", "negative"):
                side = [r for g in inside for r in g if correct(r) == (polarity == "positive")]
                sets[f"difficulty/{band}/{polarity}"] = side
        for name, chosen in sets.items():
            if chosen:
                own[f"{name}/length"] = fmean(len(r[response].split()) for r in chosen)
                if name.count("/") < 2:
                    own[f"{name}/reward"] = fmean(r[reward] for r in chosen)
        for n in (3, 4):
            grams = [
                {tuple(r[response].split()[i : i + n]) for i in range(len(r[response].split()) - n + 1)} for r in rows
            ]
            for name, share in (
                ("sharpening", lambda g, n=n: len(g & seen_correct[n]) / len(g)),
                ("discovery", lambda g, n=n: len(g - seen[n]) / len(g)),
            ):
                values = [(share(g), correct(r)) for g, r in zip(grams, rows, strict=True) if g]
                for metric, chosen in (
                    (f"{name}/n{n}", [v for v, _ in values]),
                    (f"positive/{name}_n{n}", [v for v, c in values if c]),
                    (f"negative/{name}_n{n}", [v for v, c in values if not c]),
                ):
                    if chosen:
                        own[metric] = fmean(chosen)
            for g, r in zip(grams, rows, strict=True):
                seen[n] |= g
                seen_correct[n] |= g if correct(r) else set()
        found[step] = own
    return found


def assert_metrics(run, expected):
    """The rows of metrics.jsonl are these steps, with these names and values."""
    rows = {row.pop("step"): row for row in RunReader(run).metrics}
    assert rows.keys() == expected.keys()
    for step, row in rows.items():
        assert row.keys() == expected[step].keys(), step
        for name, value in row.items():
            assert value == pytest.approx(expected[step][name], abs=1e-9), (step, name)


def notes_of(run):
    return RunReader(run).config["notes"]


def samples_of(page):
    """What the page's sample browser holds, all runs."""
    blocks = re.findall(r'<script type="application/octet-stream" id="samples-\d+">([^<]*)</script>', page)
    return [json.loads(gzip.decompress(base64.b64decode(block))) for block in blocks]


def files_below(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
