"""What the methods cost: credit for a large step, and a learner's step on the default world's base.

N responses, T padded length, V vocabulary.

    python benchmarks/methods.py                # both parts, writes benchmarks/results/methods.json and .md
    python benchmarks/methods.py --part credit --device cuda

credit: `advantages` and `shape` for N = 4096 responses of T = 8192 tokens (group size 8, no padding, two tokens of five
with a probability of exactly 1), every method of the catalog, in a process of its own each. Seconds are wall-clock, the
median of a few calls after one that is not counted; the extra memory is the peak of the process's resident memory (of
the GPU's allocated memory) during a call, less what the inputs take, over the size of those inputs. Bars on two CPU
cores: 2 s, 4 times.

learner: everything that a step does after sampling (old log-probs, reference, critic and proxy where a method asks for
them, advantages, shaping, update) on the same rollouts of the default base, with the default world's recipe. Rollouts
come from as many prompts as it takes to have P groups with correct and wrong responses, so that no method has rows to
skip that another has to train on. Methods take turns, several rounds; a round's ratio is a method's CPU time over that
of grpo in the same round, and the median over rounds counts. Bar: 1.05 for methods that make a single pass; others
are reported with what they need.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BARS = {"seconds": 2.0, "extra_memory": 4.0, "learner_ratio": 1.05}


# credit


def measure_credit(name: str, device: str, rows: int, width: int, threads: int, rounds: int) -> dict[str, Any]:
    """One method's advantages + shape: median seconds, and peak extra memory over the inputs'."""
    import torch

    from polarity.methods import METHODS

    torch.set_num_threads(threads)
    method = METHODS[name].at(0)
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, width, dtype=torch.bool)
    groups = torch.arange(rows // 8).repeat_interleave(8)
    correct = torch.rand(rows, generator=g) < 0.5
    # as a trained policy's: two tokens of five have a probability that is exactly 1 in float32, so ranks are tied
    tensors = {"logp_old": (0.4 - torch.rand(rows, width, generator=g)).clamp_(max=0.0)}
    if "entropy_old" in method.needs:
        tensors["entropy_old"] = torch.rand(rows, width, generator=g)
    if "values" in method.needs:
        tensors["values"] = torch.rand(rows, width, generator=g)
    if "logp_ref" in method.needs and method.advantage.token_level:
        tensors["logp_ref"] = -torch.rand(rows, width, generator=g).square_()
    mask, groups, correct = mask.to(device), groups.to(device), correct.to(device)
    tensors = {key: value.to(device) for key, value in tensors.items()}
    size = mask.numel() + sum(t.numel() * t.element_size() for t in tensors.values())

    def once() -> float:
        started = time.perf_counter()
        advantages = method.advantages(
            correct.float(), groups, correct, mask=mask, values=tensors.get("values"),
            logp_old=tensors["logp_old"], logp_ref=tensors.get("logp_ref"),
        )  # fmt: skip
        method.shape(advantages, tensors["logp_old"], tensors.get("entropy_old"), mask, correct=correct, step=0)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once()
    extra = _peak_extra(once, device)
    return {"seconds": statistics.median(once() for _ in range(rounds)), "extra_memory": extra and extra / size}


def _peak_extra(call: Any, device: str) -> float | None:
    """Bytes that a call takes at its peak beyond what was there before; None where the system does not tell."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return float(torch.cuda.max_memory_allocated() - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    except OSError:
        return None
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return float(line.split()[1]) * 1024


def credit(device: str, rows: int, width: int, threads: int, rounds: int) -> dict[str, Any]:
    from polarity.methods import METHODS

    found = {}
    for name in METHODS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(measure_credit, (name, device, rows, width, threads, rounds))
        print(f"{name:24} {found[name]['seconds']:6.2f} s  {found[name]['extra_memory'] or float('nan'):5.2f} x memory")
    return {"rows": rows, "width": width, "device": device, "threads": threads, "methods": found}


# learner


def learner(rounds: int) -> dict[str, Any]:
    """CPU time of a step after sampling, for every method, over grpo's."""
    import torch

    from polarity.config import load_config
    from polarity.engines.embedded.rollout import collect
    from polarity.engines.embedded.trainer import learn, prepare
    from polarity.methods import METHODS

    torch.set_num_threads(1)
    runs = {
        name: prepare(load_config(None, {"method": name, "update.learning_rate": 1e-9, "rollout.max_rounds": 10}))
        for name in METHODS
    }
    some = runs["dapo"]
    rollouts, _ = collect(some.policy, some.source, some.method.at(0), some.config.rollout, cursor=0, seed=0)
    rollouts = _rows(rollouts, rollouts.keep.nonzero()[:, 0])
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        spent = {}
        for name, run in runs.items():
            method = run.method.at(0)
            keep = method.keep(rollouts.rewards, rollouts.groups, rollouts.correct)
            started = time.process_time()
            learn(run, method, dataclasses.replace(rollouts, keep=keep), seed=0)
            spent[name] = time.process_time() - started
        if turn:  # the first round warms up
            for name in runs:
                ratios[name].append(spent[name] / spent["grpo"])
        print(f"round {turn}: grpo {spent['grpo']:.2f} s", flush=True)
    found = {
        name: {"ratio": statistics.median(ratios[name]), "needs": sorted(run.method.at(0).needs - {"resample"})}
        for name, run in runs.items()
    }
    return {"rows": len(rollouts.responses), "rounds": rounds, "methods": found}


def _rows(rollouts: Any, index: Any) -> Any:
    """The rows of `index`, whole groups, of a step's rollouts."""
    group = len(rollouts.responses) // len(rollouts.problems)

    def take(value: Any) -> Any:
        if isinstance(value, list):
            return [value[i] for i in (index[::group] // group if len(value) == len(rollouts.problems) else index)]
        return value[index] if hasattr(value, "dim") else value

    samples = dataclasses.replace(rollouts.samples, **{k: take(v) for k, v in vars(rollouts.samples).items()})
    return dataclasses.replace(rollouts, **{k: take(v) for k, v in vars(rollouts).items()} | {"samples": samples})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("credit", "learner", "both"), default="both")
    parser.add_argument("--device", default="cpu", help="of the credit part: cpu or cuda")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2, help="of the credit part")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    path = RESULTS / "methods.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    about = {"torch": version("torch"), "machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if given.part in ("credit", "both"):
        measured = credit(given.device, given.rows, given.width, given.threads, min(given.rounds, 3))
        found["credit" if given.device == "cpu" else "credit_cuda"] = about | measured
    if given.part in ("learner", "both"):
        found["learner"] = about | learner(given.rounds)
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(found))
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """The results as a page."""
    credited, learned = found.get("credit", {}).get("methods", {}), found.get("learner", {}).get("methods", {})
    lines = ["# What the methods cost", ""]
    if credited:
        about = found["credit"]
        lines.append(
            f"Credit: advantages + shape for {about['rows']} responses of {about['width']} tokens, "
            f"{about['threads']} threads on {about['device']}; bars {BARS['seconds']:g} s and "
            f"{BARS['extra_memory']:g} times the inputs' memory."
        )
    if learned:
        lines.append(
            f"Learner: CPU time of a step after sampling over grpo's, the same {found['learner']['rows']} rollouts of "
            f"the default base; bar {BARS['learner_ratio']:g} for methods of a single pass."
        )
    lines += [
        "",
        "| method | credit, s | extra memory | learner, x grpo | beyond a single pass |",
        "|---|---|---|---|---|",
    ]
    for name in credited or learned:
        cost, step = credited.get(name, {}), learned.get(name, {})
        memory = f"{cost['extra_memory']:.1f} x" if cost.get("extra_memory") else ""
        passes = [need for need in step.get("needs", ()) if need not in ("entropy", "entropy_old", "logp_rollout")]
        lines.append(f"| {name} | {cost['seconds']:.2f} | {memory} | " if cost else f"| {name} | | | ")
        lines[-1] += f"{step['ratio']:.3f} | {', '.join(passes)} |" if step else " | |"
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
