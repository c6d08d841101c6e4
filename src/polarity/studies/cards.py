"""The card of a base model: how it was pretrained, and what it can do before any reinforcement learning."""

import json
from pathlib import Path
from typing import Any

from polarity.config import load_config
from polarity.engines.embedded.evaluator import evaluate_policy
from polarity.engines.embedded.policy import load_policy
from polarity.engines.embedded.source import WorldSource
from polarity.worlds import World

PROBLEMS, SAMPLES = 64, 64


def write_card(world: World, base: str, directory: Path) -> dict[str, Any]:
    """Measure the base in `directory` on every split of its world and write README.md there; returns the results.

    64 problems a split, 64 responses each, temperature 1, the response limit of evaluations in the base's runs, seed 0.
    """
    recipe = {**world.recipe, **world.bases[base].recipe}
    settings = {"method": "grpo", **recipe, "evaluation.problems": PROBLEMS, "seed": 0}
    config = load_config(None, settings)
    found = evaluate_policy(load_policy(directory), WorldSource(world, seed=0), config, SAMPLES)
    made = json.loads((directory / "pretraining.json").read_text())
    (directory / "README.md").write_text(_card(world, base, made, found, config.evaluation_tokens))
    results: dict[str, Any] = found["results"]
    return results


def _card(world: World, base: str, made: dict[str, Any], found: dict[str, Any], limit: int) -> str:
    spec = world.bases[base]
    rows = [
        f"| {split} | {world.splits[split]} | {r['pass@1']:.3f} | {r['pass@8']:.3f} | {r['pass@64']:.3f} "
        f"| {r['length']:.0f} | {_range(found['samples'][split])} | {r['entropy']:.3f} | {r['truncated']:.3f} |"
        for split, r in found["results"].items()
    ]
    first = next(iter(found["results"].values()))
    strategies = ", ".join(f"{name} {share:.2f}" for name, share in list(first.get("strategies", {}).items())[:8])
    return "\n".join(
        [
            f"# {world.name}-{base}",
            "",
            f"{spec.summary[0].upper() + spec.summary[1:]}. World: {world.summary}.",
            "",
            f"Made by `polarity worlds build {world.name} --base {base}`: Qwen3 architecture, {made['parameters']:,} "
            f"parameters ({spec.layers} layers, {spec.hidden} wide, {spec.heads} heads, MLP {spec.mlp}, tied "
            f"embeddings), pretrained from scratch on {made['documents']:,} procedural documents of the mixture "
            f"`{spec.mixture}` ({made['response_tokens']:,} response tokens, {made['steps']:,} steps, seed "
            f"{made['seed']}); final loss {made['final_loss']} nats a token.",
            "",
            f"Before reinforcement learning: {PROBLEMS} problems a split, {SAMPLES} responses each, temperature 1, at "
            f"most {limit} new tokens, seed 0.",
            "",
            "| split | what it holds | pass@1 | pass@8 | pass@64 | length | shortest-longest | entropy | truncated |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Strategies on `{next(iter(found['results']))}` (share of responses): {strategies}.",
            "",
            "Licence: Apache-2.0. No data but the world's own generator went into it.",
            "",
        ]
    )


def _range(samples: list[dict[str, Any]]) -> str:
    lengths = [n for sample in samples for n in sample["lengths"]]
    return f"{min(lengths)}-{max(lengths)}"
