"""Every method of the catalog, and one of each family, trains on the default world, twice, with identical metrics.

    python benchmarks/every_method.py [--steps 20]     # writes benchmarks/results/every_method.md

The two runs of a method have the same seed and go on at the same time in processes of their own, a thread each.
Metrics are compared exactly, every name in every step but time/*. Exits with 1 if any differ.
"""

import argparse
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FAMILIES = ("polarity_p0.5n1", "token_negative_high_entropy", "nsr_10_then_a3po")
CLOSED_LOOP = {"kind": "closed_loop", "low": 0.2, "high": 0.3, "start": 1.5}
COLUMNS = ("accuracy/mean", "entropy/mean", "length/mean", "update/clip_fraction", "update/grad_norm")


def run(job: tuple[dict[str, Any], int, str]) -> list[dict[str, float]]:
    """Metrics of one run, without times."""
    method, steps, out = job
    from polarity.config import load_config
    from polarity.engines.embedded import train
    from polarity.rundir import RunReader

    config = load_config(
        None, {"method": method, "steps": steps, "threads": 1, "evaluation.every": 0, "log.rollouts_every": 0}
    )
    train(config, Path(out), progress=False)
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in RunReader(Path(out)).metrics]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    from polarity.methods import METHODS

    methods: dict[str, dict[str, Any]] = {name: {"base": name} for name in (*METHODS, *FAMILIES)}
    looped = {"positive": {"scale": CLOSED_LOOP}, "negative": {"scale": CLOSED_LOOP}}
    methods["a3po, closed loops"] = {"base": "a3po", "shaping": looped}
    lines = [
        "# Every method, twice",
        "",
        f"{given.steps} rollout steps on the default world, seed 0, one thread each; mean of the last 5 steps. "
        "`identical`: whether all metrics of all steps of the second run equal the first's to the last bit.",
        "",
        f"| method | identical | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    same = True
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for name, method in methods.items():
            with tempfile.TemporaryDirectory() as folder:
                jobs = [(method, given.steps, f"{folder}/{i}") for i in range(2)]
                first, second = pool.map(run, jobs, chunksize=1)
            same &= first == second
            found = [[row[column] for row in first[-5:] if column in row] for column in COLUMNS]
            cells = [f"{sum(values) / len(values):.3f}" if values else "" for values in found]
            lines.append(f"| {name} | {'yes' if first == second else 'NO'} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    (RESULTS / "every_method.md").write_text("\n".join(lines) + "\n")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
