"""`polarity eval`: one model, or the last checkpoint of a run, on evaluation problems."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from polarity.config import load_config
from polarity.engines.embedded.evaluator import evaluate_policy
from polarity.engines.embedded.policy import load_policy
from polarity.engines.embedded.source import make_source
from polarity.errors import UserError
from polarity.rundir import RunReader


def evaluate_model(
    target: Path, overrides: Mapping[str, Any], *, samples: int, data: Path | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Sample `samples` responses to each evaluation problem and return {"results", "samples", "settings"}.

    target: a Hugging Face model directory, or a run directory, whose last checkpoint and configuration are used.
    data: a JSONL of problems instead of a world's splits; out: a JSON file that gets what is returned.
    Raises UserError when target is neither, or the configuration is wrong.
    """
    run = target / "config.yaml"
    model = _last_checkpoint(target) if run.exists() else target
    if not (model / "config.json").exists():
        raise UserError(f"{target} is neither a run nor a model directory (it has no config.yaml and no config.json)")
    tree: dict[str, Any] = {"model": str(model), "base": None}
    if not run.exists():
        tree["method"] = "grpo"  # evaluation uses no method; a configuration must name one
    if data is not None:
        tree |= {"world": None, "data.train": str(data), "data.evaluation": {data.stem: str(data)}}
    config = load_config(run if run.exists() else None, {**tree, **overrides})
    source = make_source(config)
    if not source.splits(config.evaluation.splits, 1):  # an unknown split is an error before the model is loaded
        raise UserError(f"{target} has no evaluation splits; give --data FILE.jsonl with the problems to evaluate on")
    if config.threads:
        torch.set_num_threads(config.threads)
    policy = load_policy(model, device=config.device, bfloat16=config.dtype == "bfloat16")
    found = evaluate_policy(policy, source, config, samples)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"model": str(model), **found}, indent=1), encoding="utf-8")
    return found


def _last_checkpoint(run: Path) -> Path:
    checkpoints = RunReader(run).checkpoints
    if not checkpoints:
        raise UserError(f"run {run} has no checkpoint yet; wait for its first, or evaluate a model directory")
    return checkpoints[max(checkpoints)]
