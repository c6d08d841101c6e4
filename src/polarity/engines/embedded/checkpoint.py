"""Checkpoints that are complete or absent: written aside, flushed to disk, renamed.

A checkpoint is a model directory (loads with AutoModelForCausalLM and AutoTokenizer) plus `trainer.pt`: optimisers, the
number of completed steps, the cursor of the training stream, and the method's own state; `critic/` where the run has
one, and `ngrams/`, the history of sharpening and discovery. There is no random state to save: every seed is derived
from the run's seed and the step.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polarity.analysis import NGramMetrics
from polarity.engines.embedded.critic import Critic
from polarity.engines.embedded.policy import Policy
from polarity.errors import UserError

PARTIAL = "partial_"
CRITIC = "critic"
NGRAMS = "ngrams"


@dataclass(frozen=True)
class TrainerState:
    """steps completed; problems drawn from the training stream; `method.update_state`'s state; optimisers' states."""

    step: int
    cursor: int
    method: Any
    optimizer: dict[str, Any]
    critic_optimizer: dict[str, Any] | None = None


def save_checkpoint(
    path: Path, policy: Policy, critic: Critic | None, ngrams: NGramMetrics | None, state: TrainerState, keep: int
) -> None:
    """Write `path`, then remove all but the newest `keep` checkpoints beside it."""
    aside = path.with_name(PARTIAL + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    policy.model.save_pretrained(aside)
    policy.tokenizer.save_pretrained(aside)
    if critic is not None:
        critic.save(aside / CRITIC)
    if ngrams is not None:
        ngrams.save(aside / NGRAMS)
    torch.save(vars(state), aside / "trainer.pt")
    for file in aside.rglob("*"):  # the critic and a tokenizer's chat templates have folders of their own
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    aside.rename(path)
    for old in sorted(path.parent.glob("step_*"))[:-keep]:
        # renamed first: a checkpoint that is half removed must not look complete
        old.rename(old.with_name(PARTIAL + old.name))
    for stale in path.parent.glob(f"{PARTIAL}*"):  # with what a killed run has left here
        shutil.rmtree(stale)


def load_state(path: Path) -> TrainerState:
    """The trainer state of a checkpoint; its models are loaded from the same directory."""
    try:
        return TrainerState(**torch.load(path / "trainer.pt", weights_only=True, map_location="cpu"))
    except FileNotFoundError:
        raise UserError(f"{path} has no trainer.pt: it is a model, not a checkpoint to resume from") from None
