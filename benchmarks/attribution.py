"""The entropy attribution held against what really happened, on the default world.

    python benchmarks/attribution.py [--methods dapo,a3po,psr,nsr] [--seed 101] [--steps 50]

Each method trains from the base with every step attributed. Nothing of the attribution is fitted, and the seed was not
used while it was built. Reported over the steps: Pearson correlation of predicted and measured change of the mean
entropy, the same for the sum of its parts without `rest`, mean absolute rest over mean absolute predicted change, the
mean contribution of each cell, and the time of a step with the attribution over one without (the same steps again).
Writes results/attribution.json and .md.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from polarity.analysis.attribution import CELLS
from polarity.config import load_config
from polarity.engines.embedded import train
from polarity.rundir import RunReader

RESULTS = Path(__file__).parent / "results"


def rows_of(method: str, seed: int, steps: int, every: int) -> list[dict[str, float]]:
    settings = {"method": method, "seed": seed, "steps": steps, "evaluation.every": 0, "log.rollouts_every": 0}
    config = load_config(None, {**settings, "log.attribution_every": every, "decay_until": 0.667})
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", progress=False)
        return RunReader(Path(folder) / "run").metrics


def measure(method: str, seed: int, steps: int) -> dict[str, Any]:
    rows = rows_of(method, seed, steps, 1)
    plain = rows_of(method, seed, steps, 0)

    def column(name: str) -> np.ndarray:
        return np.array([row.get(f"attribution/{name}", 0.0) for row in rows])

    predicted, measured, rest = column("predicted"), column("measured"), column("rest")
    cells = {
        cell.removeprefix("attribution/"): float(column(cell.removeprefix("attribution/")).mean()) for cell in CELLS
    }
    others = {name: float(column(name).mean()) for name in ("regularizer", "momentum", "rest")}
    time = [row["time/step"] for row in rows], [row["time/step"] for row in plain]
    return {
        "steps": len(rows),
        "correlation": float(np.corrcoef(predicted, measured)[0, 1]),
        "correlation_without_rest": float(np.corrcoef(predicted - rest, measured)[0, 1]),
        "correlation_after_step_5": float(np.corrcoef(predicted[5:] - rest[5:], measured[5:])[0, 1]),
        "rest_share": float(np.abs(rest).mean() / np.abs(predicted).mean()),
        "predicted": float(predicted.mean()),
        "measured": float(measured.mean()),
        "cells": {**cells, **others},
        "time_ratio": statistics.median(time[0]) / statistics.median(time[1]),
    }


def markdown(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| method | steps | correlation | without rest | \\|rest\\| / \\|predicted\\| | step time, ratio |",
        "|---|---|---|---|---|---|",
    ]
    for method, row in found.items():
        numbers = f"{row['correlation']:.4f} | {row['correlation_without_rest']:.4f} | {row['rest_share']:.3f}"
        lines.append(f"| {method} | {row['steps']} | {numbers} | {row['time_ratio']:.2f} |")
    names = list(next(iter(found.values()))["cells"])
    lines += [
        "",
        "Mean change of the entropy per step, in units of 1e-4 nats:",
        "",
        "| part | " + " | ".join(found) + " |",
    ]
    lines.append("|---" * (len(found) + 1) + "|")
    for name in [*names, "predicted", "measured"]:
        values = [row["cells"].get(name, row.get(name)) for row in found.values()]
        lines.append(f"| {name} | " + " | ".join(f"{1e4 * value:+.2f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="dapo,a3po,psr,nsr")
    parser.add_argument("--seed", type=int, default=101)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    found = {}
    for method in given.methods.split(","):
        found[method] = measure(method, given.seed, given.steps)
        print(method, json.dumps(found[method]), flush=True)
    record = {"machine": platform.processor() or platform.machine(), "seed": given.seed, "results": found}
    (RESULTS / "attribution.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "attribution.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
