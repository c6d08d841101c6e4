"""What a report costs: seconds and bytes for a comparison of 12 runs of 300 steps.

    python benchmarks/report.py                 # writes benchmarks/results/report.json
    python benchmarks/report.py --keep DIR      # leaves the runs and the page in DIR, to look at

The runs are made up, in the shape of real ones: every metric of docs/metrics.md, evaluations of 5 splits x
32 problems x 16 samples at every 10th step, and rollouts of 4 groups x 8 responses x 140 tokens at 31 steps. Two grids:
4 methods x 3 seeds (curves have bands) and 12 methods x 1 seed (three times as many lines). A report is made in a
process of its own; its seconds hold the start of Python and all imports. Bars on two cores: 20 s, 5 MB.
"""

import argparse
import json
import math
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

RESULTS = Path(__file__).parent / "results"
BARS = {"seconds": 20.0, "bytes": 5_000_000}
SPLITS = {"id": 0.25, "long": 0.02, "xlong": 0.005, "ops": 0.12, "facts": 0.15}  # pass@1 before training
BANDS = {"unsolved": (0.0, 0.0), "hard": (0.0, 0.5), "easy": (0.5, 1.0), "solved": (1.0, 1.0)}
CELLS = [
    f"{s}/{p}_prob_{e}_entropy" for s in ("positive", "negative") for p in ("low", "high") for e in ("low", "high")
]
# How a method's entropy and length end, over their start, and how fast it learns: as in the ledger world.
STORIES = {"dapo": (0.27, 0.85, 1.0), "psr": (0.1, 0.65, 0.9), "nsr": (0.5, 1.0, 0.5), "a3po": (0.37, 0.9, 0.95)}


def make_run(path: Path, method: str, seed: int, steps: int, *, story: str | None = None) -> Path:
    """Write a run of `steps` steps to `path`: made-up numbers, seeded, every metric of docs/metrics.md."""
    rng = np.random.default_rng([seed, *method.encode()])
    entropy_end, length_end, speed = STORIES[story or method]
    path.mkdir(parents=True)
    config = {
        "method": {"base": method, "name": method}, "world": "ledger", "base": "general", "seed": seed, "steps": steps,
        "rollout": {"prompts": 32, "group": 8, "max_rounds": 10, "temperature": 1.0, "max_new_tokens": 140},
        "update": {"learning_rate": 5e-5, "mini_batch_prompts": 4, "epochs": 1},
        "evaluation": {"problems": 32, "samples": 16, "final_samples": 16, "temperature": 1.0},
    }  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rows = []
    for step in range(steps + 1):
        t = step / steps
        solved = 0.22 + 0.75 * (1 - math.exp(-4 * speed * t)) / (1 - math.exp(-4))
        now = {
            "accuracy": solved,
            "entropy": 0.33 * entropy_end ** min(1.0, 1.3 * t),
            "length": 44 * length_end**t + 6 * math.sin(math.pi * t),
        }
        row: dict[str, float] = {"step": step}
        if step:
            row |= _training_row(rng, now, t)
        if step % 10 == 0:
            row |= _evaluation(path, rng, step, now, t)
        rows.append(row)
        if step == 1 or (step % 10 == 0 and step):
            lines = [json.dumps(line, ensure_ascii=False) for line in _rollouts(rng, step, now)]
            _write(path / "rollouts" / f"step_{step:06d}.jsonl", "\n".join(lines) + "\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _training_row(rng: Any, now: dict[str, float], t: float) -> dict[str, float]:
    def near(value: float, noise: float = 0.05) -> float:
        return float(value * (1 + noise * rng.standard_normal()))

    accuracy = float(np.clip(now["accuracy"] + 0.03 * rng.standard_normal(), 0.01, 0.99))
    entropy, length, new = near(now["entropy"]), near(now["length"]), 0.5 * math.exp(-6 * t) + 0.02
    row = {
        "reward/mean": accuracy, "accuracy/mean": accuracy, "accuracy/fully_solved": accuracy**8,
        "accuracy/unsolved": (1 - accuracy) ** 8, "length/mean": length, "length/max": 140.0,
        "length/truncated": near(0.01, 0.5), "entropy/mean": entropy, "verifier/unparsed": near(0.02, 0.3),
        "verifier/timeout": 0.0, "verifier/error": 0.0, "rollouts/generated": 512.0, "rollouts/kept": 256.0,
        "rollouts/rounds": 2.0, "update/count": 8.0, "update/learning_rate": 5e-5, "update/loss": near(-0.03),
        "update/grad_norm": near(0.4, 0.2), "update/ratio": near(1.0, 0.001), "update/clip_fraction": near(0.002, 0.4),
        "update/dual_clip_fraction": near(0.0002, 0.5), "update/entropy": entropy, "update/kl": near(0.02 * t + 0.001),
        "time/rollout": 1.5, "time/update": 0.8, "time/step": 2.3,
    }  # fmt: skip
    row |= {
        "update/penalty": near(0.001), "update/penalised_share": near(0.01), "update/off_policy_share": near(0.01),
        "update/clip_floor": near(0.8, 0.01), "update/clip_ceiling": near(1.2, 0.01), "value/mean": accuracy,
        "value/explained_variance": 0.5 * t, "value/error": near(0.1), "value/clip_fraction": near(0.01),
        "update/critic_grad_norm": near(0.3),
    }  # fmt: skip
    row |= {f"accuracy/pass@{k}": 1 - (1 - accuracy) ** k for k in (2, 4, 8)}
    for i, side in enumerate(("positive", "negative")):
        row |= {
            f"{side}/share": accuracy if i == 0 else 1 - accuracy, f"{side}/length": near(length * (0.95 + 0.1 * i)),
            f"{side}/entropy": near(entropy * (0.9 + 0.3 * i)), f"{side}/probability": near(0.9 - 0.05 * i, 0.01),
            f"{side}/reward": 1.0 - i, f"{side}/weight": 2 - t - 0.4 * i, f"{side}/shaped_share": near(0.2),
            f"{side}/gradient_share": near(0.5), f"{side}/shaped_gradient_share": near(0.4),
            f"{side}/clip_fraction": near(0.002, 0.4),
        }  # fmt: skip
        for n in (3, 4):
            row |= {f"{side}/sharpening_n{n}": near(0.97 - new - 0.05 * i, 0.01)}
            row |= {f"{side}/discovery_n{n}": near(new * (0.6 + 0.4 * i) * n / 3)}
        names = ("mean", "max", "correlation", "k1", "k3", "chi_square")
        for name, value in zip(names, (0.004, 0.2, 0.998, 1e-4, 3e-4, 7e-4), strict=True):
            row[f"{side}/mismatch_{name}"] = near(value * (1 + 0.2 * i))
    for n in (3, 4):
        row |= {f"sharpening/n{n}": near(0.95 - new, 0.01), f"discovery/n{n}": near(new * n / 3)}
    mismatch = {
        "mean": 0.004, "max": 0.2, "std": 0.01, "correlation": 0.998, "k1": 1e-4, "k3": 3e-4, "chi_square": 7e-4,
        "sequence_chi_square": 0.04, "ess": 0.97, "weight_max": 1.6, "weight_min": 0.6, "log_ppl_difference": 1e-4,
    }  # fmt: skip
    row |= {f"mismatch/{name}": near(value, 0.1) for name, value in mismatch.items()}
    return row | _bands(near, accuracy, entropy, length) | _attribution(rng, entropy, t)


def _bands(near: Any, accuracy: float, entropy: float, length: float) -> dict[str, float]:
    shares = {"unsolved": (1 - accuracy) ** 8, "solved": accuracy**8}
    shares |= {"hard": (1 - sum(shares.values())) * (1 - accuracy), "easy": (1 - sum(shares.values())) * accuracy}
    row = {}
    for band, (low, high) in BANDS.items():
        hardness = 1.3 - 0.5 * (low + high) / 2
        row |= {f"difficulty/{band}/share": shares[band], f"difficulty/{band}/reward": near((low + high) / 2, 0.03)}
        row |= {f"difficulty/{band}/entropy": near(entropy * hardness), f"difficulty/{band}/length": near(length)}
        for side in ("positive", "negative"):
            if (side, band) not in (("positive", "unsolved"), ("negative", "solved")):
                row[f"difficulty/{band}/{side}/entropy"] = near(entropy * hardness * (1.2 if side == "negative" else 1))
                row[f"difficulty/{band}/{side}/length"] = near(length * hardness)
    return row


def _attribution(rng: Any, entropy: float, t: float) -> dict[str, float]:
    scale = 0.02 * entropy
    means = dict(zip(CELLS, (0.4, 0.9, -1.6, -0.7, -0.3, -0.5, 0.5, 0.3), strict=True))
    parts = {f"attribution/{cell}": float(scale * (mean + 0.3 * rng.standard_normal())) for cell, mean in means.items()}
    parts |= {f"attribution/{name}": float(scale * 0.2 * rng.standard_normal()) for name in ("regularizer", "rest")}
    parts["attribution/momentum"] = float(-0.3 * scale + 0.2 * scale * rng.standard_normal())
    predicted = sum(parts.values())
    measured = predicted + float(0.4 * scale * rng.standard_normal())
    return parts | {"attribution/predicted": predicted, "attribution/measured": measured}


def _evaluation(path: Path, rng: Any, step: int, now: dict[str, float], t: float) -> dict[str, float]:
    gained = (now["accuracy"] - 0.22) / 0.75
    row, samples = {}, {}
    for split, base in SPLITS.items():
        rate = base + (0.97 - base) * gained * (1.0 if split == "id" else 0.4)
        own = np.random.default_rng(list(split.encode())).normal(0, 1.2, 32)  # a problem's own difficulty stays
        chances = 1 / (1 + np.exp(-(math.log(rate / (1 - rate)) + own)))
        correct = rng.random((32, 16)) < chances[:, None]
        row |= {f"eval/{split}/pass@1": float(correct.mean()), f"eval/{split}/reward": float(correct.mean())}
        row |= {f"eval/{split}/pass@8": float((1 - (1 - correct.mean(1)) ** 8).mean())}
        row |= {f"eval/{split}/pass@16": float(correct.any(1).mean()), f"eval/{split}/entropy": now["entropy"]}
        row |= {f"eval/{split}/length": now["length"], f"eval/{split}/truncated": 0.01}
        row |= {f"eval/{split}/distinct_strategies": 3.0 - t}
        for i, side in enumerate(("positive", "negative")):
            row |= {f"eval/{split}/{side}/entropy": now["entropy"] * (0.9 + 0.3 * i)}
            row |= {f"eval/{split}/{side}/length": now["length"] * (0.95 + 0.1 * i)}
        samples[split] = [
            {
                "problem_id": f"{split}-0-{i}", "correct": c.tolist(), "lengths": rng.integers(20, 80, 16).tolist(),
                "first_response": " A=445 B=045 C=269 F=069 D=433[33]", "level": None,
                "entropies": rng.random(16).round(5).tolist(), "scores": c.astype(float).tolist(),
                "strategies": rng.choice(["forward", "backward", "garbled"], 16).tolist(),
            }
            for i, c in enumerate(correct)
        ]  # fmt: skip
    record = {"step": step, "results": {}, "samples": samples, "settings": {}}
    _write(path / "evaluations" / f"step_{step:06d}.json", json.dumps(record))
    return row | {"time/evaluation": 12.0}


WORDS = [*"0123456789=[]X+-*", " A", " B", " C", " D", " E", " F", " G", " so", " then", " check", "\n", " ?"]


def _rollouts(rng: Any, step: int, now: dict[str, float], groups: int = 4, group: int = 8, tokens: int = 140) -> Any:
    for g in range(groups):
        for i in range(group):
            n = int(rng.integers(tokens - 20, tokens + 1))
            ids, correct = rng.integers(0, len(WORDS), n), i < group * now["accuracy"] or i == 0
            logp = -rng.exponential(0.3, n)
            yield {
                "step": step, "problem_id": f"train-{step}-{g}", "group": g, "prompt": " A6-9 B7*0 C2+2 D5-1 E7-3?",
                "response": "".join(WORDS[k] for k in ids), "gold": "[92]", "correct": bool(correct),
                "status": "correct" if correct else random.choice(["wrong", "unparsed"]),
                "strategy": ["forward", "backward", "garbled"][int(rng.integers(3))], "reward": float(correct),
                "truncated": False, "kept": g < 3, "token_ids": ids.tolist(), "tokens": [WORDS[k] for k in ids],
                "logp_old": logp.round(5).tolist(), "logp_rollout": (logp + rng.normal(0, 1e-3, n)).round(5).tolist(),
                "entropy": rng.exponential(now["entropy"], n).round(5).tolist(), "advantage": 0.7 if correct else -0.9,
                "weight": np.where(rng.random(n) < 0.2, 1.8, 1.0).tolist() if g < 3 else [0.0] * n,
            }  # fmt: skip


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def make_grid(folder: Path, methods: int, seeds: int, steps: int) -> Path:
    """methods x seeds runs at `folder`."""
    stories = list(STORIES)
    names = stories if methods == len(stories) else [f"method_{i:02d}" for i in range(methods)]
    for i, name in enumerate(names):
        for seed in range(seeds):
            make_run(folder / name / f"seed_{seed}", name, seed, steps, story=stories[i % len(stories)])
    return folder


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Median over `rounds` of one report's wall and CPU seconds, a process each; its bytes and its peak memory."""
    page = folder / "report.html"
    wall, cpu = [], []
    for _ in range(rounds):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-m", "polarity", "report", str(folder), "--out", str(page)], check=True)
        wall.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    read = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file != page)
    return {
        "runs": len(list(folder.rglob("config.yaml"))), "wall_seconds": round(sorted(wall)[rounds // 2], 2),
        "cpu_seconds": round(sorted(cpu)[rounds // 2], 2), "bytes": page.stat().st_size,
        "bytes_of_the_runs": read, "peak_memory_mb": round(after.ru_maxrss / 1024),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder for the runs; default: one that is removed")
    given = parser.parse_args()
    found: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "load_average_at_start": os.getloadavg()[0], "bokeh": version("bokeh")},
        "steps": given.steps, "rounds": given.rounds, "bars": BARS,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        for name, methods, seeds in (("4_methods_3_seeds", 4, 3), ("12_methods_1_seed", 12, 1)):
            if not (folder / name).exists():
                make_grid(folder / name, methods, seeds, given.steps)
            found[name] = measure(folder / name, given.rounds)
            print(name, json.dumps(found[name]), flush=True)
    if given.steps == 300:
        (RESULTS / "report.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
