"""docs/metrics.md and what runs write, held against each other."""

import re
from collections.abc import Callable
from pathlib import Path

from polarity.config import RunConfig
from polarity.engines.embedded import train
from polarity.rundir import RunReader

ROOT = Path(__file__).parents[2]
# Runs that together write every metric there is.
RUNS = [
    ("a3po", {"evaluation__every": 2, "log__attribution_every": 1}),
    ("grpo_zhu", {"rollout__logp_old": "recomputed"}),
    ("fork_tokens", {}),
    ("ppo", {}),
    ("kl_cov", {}),
    ("opsm", {}),
    ("bapo", {}),
    ("psr", {"log__attribution_every": 1}),
    ("nsr_group", {}),
    ("w_reinforce", {"rollout__truncated": "masked"}),
]


def documented() -> set[str]:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(names) == len(set(names))
    return {n.replace("POLARITY", polarity) for n in names for polarity in ("positive", "negative")}


def general(name: str) -> str:
    """A name as the document has it: any split, any K, any band of difficulty."""
    name = re.sub(r"^difficulty/(unsolved|hard|easy|solved)/", "difficulty/BAND/", name)
    return re.sub(r"pass@\d+", "pass@K", re.sub(r"^eval/[^/]+/", "eval/SPLIT/", name))


def test_metrics_are_documented_and_documented_metrics_exist(small_run: Callable[..., RunConfig], tmp_path: Path):
    written = set()
    for method, settings in RUNS:
        train(small_run(method, steps=2, **settings), tmp_path / method, progress=False)
        for row in RunReader(tmp_path / method).metrics:
            assert all(isinstance(value, float) for key, value in row.items() if key != "step")
            assert all(abs(value) < float("inf") for value in row.values())
            written |= {general(name) for name in row if name != "step"}
    assert written - documented() == set()
    assert documented() - written == set()


def test_rollout_rows_are_documented(small_run: Callable[..., RunConfig], tmp_path: Path):
    train(small_run(steps=1), tmp_path / "run", progress=False)
    text = (ROOT / "docs" / "run_directory.md").read_text(encoding="utf-8")
    section = text.split("## rollouts/")[1].split("\n## ")[0]
    keys = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert list(RunReader(tmp_path / "run").rollouts(1)[0]) == keys
