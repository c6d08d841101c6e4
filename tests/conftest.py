"""Fixtures that more than one room uses."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from polarity.rundir import RunWriter

SPLITS = ("id", "long")


def _rows(rng: random.Random, level: float) -> list[dict[str, Any]]:
    """Two logged groups of four responses in the run directory's format; the words are the tokens."""
    rows = []
    for group in range(2):
        for i in range(4):
            tokens = [rng.choice(["7", " *6", "=", "\n", "B5", " ?"]) for _ in range(rng.randint(6, 30))]
            n, correct = len(tokens), i % 2 == 0
            rows.append(
                {
                    "problem_id": f"id-0-{group}", "group": group, "prompt": "A7*6 B5-2 ?", "response": "".join(tokens),
                    "gold": "[3 4]", "correct": correct, "status": "correct" if correct else "wrong",
                    "strategy": "forward",
                    "reward": float(correct), "truncated": False, "token_ids": list(range(n)), "tokens": tokens,
                    "logp_old": [math.log(rng.uniform(0.05, 1)) for _ in tokens],
                    "entropy": [level * rng.random() for _ in tokens],
                    "advantage": 0.9 if correct else -0.9, "weight": [2.0 if k % 5 == 0 else 1.0 for k in range(n)],
                }
            )  # fmt: skip
    return rows


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """`make_run(path, method, seed, steps=20, pass1=.., rows=..)` writes a finished run by hand, all numbers seeded.

    pass1: {split: pass@1 at the end}, realised exactly by 4 problems x 10 samples; rows: the logged rollouts.
    """

    def make(
        path: Path, method: str = "dapo", seed: int = 0, *, steps: int = 20, done: int | None = None,
        pass1: dict[str, float] | None = None, entropy: float = 0.2, rows: list[dict[str, Any]] | None = None,
    ) -> Path:  # fmt: skip
        rng = random.Random(f"{method}{seed}")
        config = {
            "method": {"base": method, "name": method}, "world": "ledger", "base": "general", "seed": seed,
            "steps": steps, "rollout": {"prompts": 32, "group": 8}, "update": {"learning_rate": 5e-5},
        }  # fmt: skip
        writer = RunWriter.create(path, yaml.safe_dump(config), seed=seed)
        done = steps if done is None else done
        for step in [0, *range(1, done + 1)]:
            t = step / steps
            row = {"step": step}
            if step:
                row |= {
                    "reward/mean": 0.3 + 0.5 * t, "accuracy/mean": 0.3 + 0.5 * t + 0.02 * rng.random(),
                    "entropy/mean": entropy * (2 - t), "length/mean": 40 - 5 * t + rng.random(),
                    "length/truncated": 0.01,
                    "positive/entropy": entropy * (1.5 - t), "negative/entropy": entropy * (2.5 - t),
                    "positive/share": 0.5,
                    "positive/gradient_share": 0.5, "negative/gradient_share": 0.5, "update/grad_norm": 0.4,
                    "time/step": 1.5,
                }  # fmt: skip
            if step in (0, done):
                rates = {s: 0.3 if step == 0 else (pass1 or {"id": 0.8, "long": 0.5})[s] for s in SPLITS}
                samples = {s: [[j < round(10 * rate) for j in range(10)]] * 4 for s, rate in rates.items()}
                for split, rate in rates.items():
                    row |= {f"eval/{split}/pass@1": rate, f"eval/{split}/pass@8": min(1.0, 1.1 * rate)}
                verdicts = {
                    s: [{"problem_id": f"{s}-{i}", "correct": c} for i, c in enumerate(v)] for s, v in samples.items()
                }
                writer.evaluation(step, {"step": step, "results": {}, "samples": verdicts, "settings": {}})
            writer.metrics(row)
        for step in (1, max(1, done)):
            writer.rollouts(step, rows if rows is not None else _rows(rng, entropy))
        return path

    return make
