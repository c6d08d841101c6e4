"""Core-seconds of one rollout step: the embedded engine against TRL's GRPOTrainer.

P prompts, G responses for each, N = P*G rows; a step is N responses sampled and trained on in U updates.

    python benchmarks/embedded_step.py            # both cases, writes benchmarks/results/embedded_step.json

What is the same on both sides: weights, prompts, G, response limit, temperature 1, U updates of N/U rows from one
generation, clip 0.2 / 0.28, token-mean loss, AdamW (fused) and its settings, no KL, float32, and rewards: one uniform
random number a response, so that no group is without variance and no row without advantage; nothing is skipped.
Lengths are not forced: both sides sample from the same weights until the end-of-sequence token or the limit (the
learning rate is too small to move the policy), so lengths vary and have one distribution; the tokens that each side
really produced are in the result.

What differs is what the engines do: TRL computes old log-probs in a second forward pass, as it must where one
generation feeds several updates; the embedded engine keeps those it sampled with, and sends large float32 products to
oneDNN (engines/embedded/cpu.py), where TRL runs PyTorch's default, MKL.

Every engine runs in a process of its own, and the processes take turns, step by step: one works while the others wait
on a pipe. A step's cost is the CPU time of the process, all threads, from first prompt to logged metrics. TRL is
tried with one and with two threads, waiting passively (spinning threads only add CPU time), and its best median
counts; the allocator settings that the embedded engine makes for itself, TRL's processes get through the environment.
The first step of each engine is not counted.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-6
PHASES = ("generate", "old log-probs", "forward", "backward", "rest")


@dataclass(frozen=True)
class Case:
    """`bar`: the largest ratio of the engine's core-seconds to TRL's that the project promises."""

    name: str
    prompts: int
    group: int
    updates: int
    max_new_tokens: int
    bar: float


CASES = (
    Case("qwen3-3.4M", prompts=64, group=8, updates=16, max_new_tokens=48, bar=0.65),
    Case("ledger-general", prompts=32, group=8, updates=16, max_new_tokens=140, bar=0.4),
)
ENGINES = {"embedded": 1, "trl, 1 thread": 1, "trl, 2 threads": 2}  # name -> threads
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def make_model(case: Case, folder: Path) -> Path:
    """The directory of the case's model: a world's base, or a freshly initialised Qwen3 saved under `folder`."""
    from polarity.worlds import WORLDS, symbol_tokenizer

    world, _, base = case.name.partition("-")
    if world in WORLDS:
        return WORLDS[world].base_path(base)
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    symbols = "0123456789+-*/=() abcdefghijklmnopqrstuvwxyz?.,:\n<>ABCDEFGHIJK"
    Qwen3ForCausalLM(config).save_pretrained(folder)
    symbol_tokenizer(list(symbols), ".").save_pretrained(folder)
    return folder


def make_prompts(case: Case, steps: int) -> list[str]:
    """P prompts for each step: a world's own problems, or short sums for the model that knows nothing anyway."""
    from polarity.worlds import WORLDS

    rng = random.Random(0)
    world = WORLDS.get(case.name.partition("-")[0])
    if world is None:
        return [f"what is {rng.randint(1, 99)}+{rng.randint(1, 99)}? " for _ in range(steps * case.prompts)]
    split = next(iter(world.splits))
    return [str(world.problem(split, rng)["problem"]) for _ in range(steps * case.prompts)]


class Stopwatch:
    """CPU time of this process in a step, in all and by phase; a step starts when the pipe says so."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def begin(self) -> None:
        self.pipe.recv()
        self.phases: dict[str, float] = defaultdict(float)
        self.tokens, self.longest = 0, 0
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def end(self) -> None:
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        phases = {**self.phases, "rest": cpu - sum(self.phases.values())}
        self.pipe.send({"cpu": cpu, "wall": wall, "tokens": self.tokens, "longest": self.longest, "phases": phases})

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its CPU time added to `phase`; a forward pass without gradient is one for old log-probs."""
        import torch

        def call(*args: Any, **kwargs: Any) -> Any:
            name = "old log-probs" if phase == "forward" and not torch.is_grad_enabled() else phase
            started = time.process_time()
            found = function(*args, **kwargs)
            self.phases[name] += time.process_time() - started
            return found

        return call

    def count(self, lengths: list[int]) -> None:
        self.tokens, self.longest = sum(lengths), max(lengths)


def run_embedded(case: Case, model: Path, prompts: list[str], steps: int, pipe: Connection) -> None:
    """The engine's own step function on given prompts, with a metrics row written, as in a training run."""
    import torch

    from polarity.config import load_config
    from polarity.engines.embedded import learner, prepare, rollout, train_step
    from polarity.engines.embedded.source import Source
    from polarity.rundir import RunWriter

    watch, rng = Stopwatch(pipe), random.Random(0)

    class Prompts(Source):
        def train(self, start: int, count: int) -> list[dict[str, Any]]:
            return [{"id": str(i), "problem": prompts[i], "answer": ""} for i in range(start, start + count)]

    overrides = {
        "method": "dapo", "method.filter.dynamic_sampling": False, "method.surrogate.dual": None, "model": str(model),
        "rollout.prompts": case.prompts, "rollout.group": case.group, "rollout.max_new_tokens": case.max_new_tokens,
        "update.mini_batch_prompts": case.prompts // case.updates, "update.learning_rate": LEARNING_RATE,
        "update.beta2": 0.999,
    }  # fmt: skip
    run = prepare(load_config(None, overrides))
    run.source = Prompts()
    run.source.verifier = lambda response, gold, row=None: rng.random()
    rollout.sample = watch.timed("generate", rollout.sample)
    learner.token_logp = watch.timed("forward", learner.token_logp)
    torch.Tensor.backward = watch.timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        writer = RunWriter(Path(folder))
        for _ in range(steps):
            watch.begin()
            rollouts, _, row = train_step(run)
            writer.metrics(row)
            assert bool(rollouts.keep.all())
            assert row["update/count"] == case.updates
            watch.count([len(r) for r in rollouts.responses])
            watch.end()


def run_trl(case: Case, model: Path, prompts: list[str], steps: int, pipe: Connection) -> None:
    """GRPOTrainer as it is; a callback before an optimiser step that begins a rollout step hands the turn over."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % case.updates == 0:
                if state.global_step:
                    watch.end()
                watch.begin()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert state.global_step == steps * case.updates
            watch.end()

    watch, rng = Stopwatch(pipe), random.Random(0)

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        watch.count([len(ids) for ids in completion_ids])
        return [rng.random() for _ in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=case.prompts * case.group // case.updates,
            gradient_accumulation_steps=1, steps_per_generation=case.updates, num_generations=case.group,
            max_completion_length=case.max_new_tokens, max_steps=steps * case.updates, shuffle_dataset=False,
            temperature=1.0, loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.0,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=1.0,
            use_cpu=True, bf16=False, gradient_checkpointing=False,
            logging_steps=case.updates, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), reward_funcs=reward, args=config,
            train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]),
            processing_class=AutoTokenizer.from_pretrained(model), callbacks=[Turns()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        for phase, name in (("generate", "_generate_single_turn"), ("forward", "_get_per_token_logps_and_entropies")):
            setattr(trainer, name, watch.timed(phase, getattr(trainer, name)))
        torch.Tensor.backward = watch.timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]
        trainer.train()


def measure(case: Case, steps: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Engine -> one sample a step, after one step that is not counted. The engines work one at a time, in turns."""
    model, prompts = make_model(case, folder), make_prompts(case, steps + 1)
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for engine, threads in ENGINES.items():
        os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(threads))
        pipes[engine], theirs = context.Pipe()
        run = run_embedded if engine == "embedded" else run_trl
        processes.append(context.Process(target=run, args=(case, model, prompts, steps + 1, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    samples: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for step in range(steps + 1):
        for engine, pipe in pipes.items():
            pipe.send("go")
            sample = pipe.recv()
            if step:
                samples[engine].append(sample)
    for process in processes:
        process.join()
    return samples


def summarise(case: Case, samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of every engine, and the ratio to TRL's best."""
    medians = {}
    for engine, rows in samples.items():
        phases = {p: statistics.median(row["phases"].get(p, 0.0) for row in rows) for p in PHASES}
        totals = {key: statistics.median(row[key] for row in rows) for key in ("cpu", "wall", "tokens", "longest")}
        medians[engine] = {**totals, "phases": phases}
    best = min((engine for engine in medians if engine != "embedded"), key=lambda engine: medians[engine]["cpu"])
    ratio = medians["embedded"]["cpu"] / medians[best]["cpu"]
    return {"case": asdict(case), "ratio": ratio, "trl_best": best, "medians": medians, "samples": samples}


def table(result: dict[str, Any]) -> str:
    case = result["case"]
    lines = [
        f"{case['name']}: {case['prompts']} prompts x {case['group']}, {case['updates']} updates; "
        f"median core-seconds a step, ratio {result['ratio']:.3f} (bar {case['bar']})",
        f"{'':16}{'total':>8}" + "".join(f"{p:>15}" for p in PHASES) + f"{'tokens':>9}",
    ]
    for engine, m in result["medians"].items():
        phases = "".join(f"{m['phases'][p]:15.2f}" for p in PHASES)
        lines.append(f"{engine:16}{m['cpu']:8.2f}{phases}{m['tokens']:9.0f}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    found = {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "os": platform.system()}
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    return {**found, "python": platform.python_version(), **versions, "load_average_at_start": os.getloadavg()}


def main() -> None:
    parser = argparse.ArgumentParser(description="core-seconds per rollout step: embedded engine against TRL")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each engine")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="only this case; nothing is written")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "threads": ENGINES, "environment": ENVIRONMENT, "cases": []}
    for case in CASES:
        if args.case in (None, case.name):
            with tempfile.TemporaryDirectory() as folder:
                result["cases"].append(summarise(case, measure(case, args.steps, Path(folder))))
            print(table(result["cases"][-1]))
    if args.case is None:
        path = Path(__file__).parent / "results" / "embedded_step.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
