"""What the n-gram history costs: n-grams a second, bytes a distinct n-gram, and a run of 2.4 billion within 16 GB.

    python benchmarks/analysis.py                     # throughput and bytes; writes benchmarks/results/analysis.json
    python benchmarks/analysis.py --long DIR          # 300 steps x 4096 rollouts x 2,000 tokens, spilling into DIR

A step is 4096 rollouts of 2,000 tokens, as A3PO's paper samples them, of one history (n = 4) that adds them and looks
them up in one pass, on two threads. Rollouts are made of phrases of 20 tokens:

    realistic   phrases follow each other as in training: most were seen before, 3 in 100 are new
    middle      a quarter of the phrases are new
    hard        every token is drawn by itself: nearly all n-grams are distinct

Making the rollouts is not timed. Bars: 10 million n-grams a second, 12 bytes a distinct n-gram, 16 GB.
"""

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polarity.analysis import NGramHistory
from polarity.analysis.hash_runs import merged_blocks
from polarity.engines.embedded.cpu import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "analysis.json"
VOCABULARY, PHRASE, SHARED, OWN, PROBLEMS = 150_000, 20, 100_000, 48, 8192
SHARES = {"realistic": (0.15, 0.03), "middle": (0.3, 0.25)}  # of phrases that are the problem's own, that are new


def phrases() -> np.ndarray:
    """(phrases, PHRASE) tokens: SHARED ones, then OWN of each problem."""
    generator = np.random.default_rng(1)
    return generator.integers(0, VOCABULARY, (SHARED + PROBLEMS * OWN, PHRASE), dtype=np.int32)


def rollouts(kind: str, step: int, known: np.ndarray, prompts: int = 512, group: int = 8, tokens: int = 2000) -> Any:
    """The (N,T) tokens of a step, seeded by its number."""
    generator, rows = np.random.default_rng([7, step]), prompts * group
    if kind == "hard":
        return generator.integers(0, VOCABULARY, (rows, tokens), dtype=np.int32)
    own, fresh = SHARES[kind]
    problems = generator.integers(0, PROBLEMS, prompts).repeat(group)
    chosen, current = np.empty((rows, tokens // PHRASE), np.int64), problems
    for j in range(chosen.shape[1]):
        turn = (6 * generator.random(rows) ** 2).astype(np.int64)
        following = (current * 6 + turn + 1) * 2654435761 % 2**40 % SHARED
        private = SHARED + problems * OWN + generator.integers(0, OWN, rows)
        current = chosen[:, j] = np.where(generator.random(rows) < own, private, following)
    made = known[chosen]
    new = generator.random(chosen.shape) < fresh
    made[new] = generator.integers(0, VOCABULARY, (int(new.sum()), PHRASE))
    return made.reshape(rows, tokens)


def feed(history: NGramHistory, kind: str, steps: int, lists: bool = False) -> dict[str, float]:
    """Add `steps` steps; n-grams, seconds (wall and CPU) and what the history takes at the end.

    lists: rollouts come as lists of ints, which have to be made arrays first, instead of arrays.
    """
    known, grams, wall, cpu, shares = phrases(), 0, 0.0, 0.0, (0.0, 1.0)
    for step in range(steps):
        made = rollouts(kind, step, known)
        rows = made.tolist() if lists else list(made)
        correct = np.random.default_rng(step).random(len(rows)) < 0.5
        started, used = time.perf_counter(), time.process_time()
        shares = tuple(float(np.mean(values)) for values in history.step(rows, correct))
        wall, cpu = wall + time.perf_counter() - started, cpu + time.process_time() - used
        grams += sum(len(row) - history.n + 1 for row in rows)
        if step % 25 == 24:
            print(f"{kind} step {step + 1}: {grams / wall / 1e6:.1f} M/s, peak {peak():.2f} GB", flush=True)
    memory, disk = history.runs.sizes()
    words = sum(run.count for run in history.runs.runs)
    block, offsets = merged_blocks([run.words for run in history.runs.runs])
    distinct = sum(len(block(i)) for i in range(len(offsets)))
    return {
        "steps": steps,
        "ngrams": grams,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "millions_a_second": grams / wall / 1e6,
        "millions_a_cpu_second": grams / cpu / 1e6,
        "sharpening_at_the_end": shares[0],
        "discovery_at_the_end": shares[1],
        "distinct_ngrams": distinct,
        "words": words,
        "bytes_a_distinct_ngram": (memory + disk) / distinct,
        "memory_bytes": memory,
        "disk_bytes": disk,
    }


def peak() -> float:
    """GB of memory this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", type=Path, metavar="DIR", help="the run of 2.4 billion n-grams, spilling into DIR")
    parser.add_argument("--kind", default="hard", choices=("realistic", "middle", "hard"), help="of the long run")
    parser.add_argument("--steps", type=int, help="default: 48, of the long run 300")
    given = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["machine"] = {"cpu": platform.processor() or platform.machine(), "threads": 2, "numpy": np.__version__}
    if given.long:
        history = NGramHistory(4, directory=given.long)
        measured = feed(history, given.kind, given.steps or 300)
        found[f"long, {given.kind}"] = {**measured, "peak_memory_gb": peak()}
    else:
        for kind in ("realistic", "middle", "hard"):
            found[kind] = feed(NGramHistory(4), kind, given.steps or 48)
            print(kind, json.dumps(found[kind]), flush=True)
        found["realistic, as lists"] = feed(NGramHistory(4), "realistic", given.steps or 48, lists=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
