"""The rows of a step, read from verl's transfer queue, and the credit that the method gives their tokens.

N rows (responses) of a step in G-row groups, T padded response length. Everything here is on the driver's CPU, in the
functions that the embedded engine calls, so that both engines get the same numbers from the same tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transfer_queue as tq
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from polarity.engines.verl.data import row_of
from polarity.methods import Method

TENSORS = {
    "old_log_probs": "logp_old",
    "entropy": "entropy_old",
    "rollout_log_probs": "logp_rollout",
    "ref_log_prob": "logp_ref",
    "values": "values",
}


@dataclass(frozen=True)
class Rows:
    """scores, correct, truncated, groups (N,); tensors (N,T), zero past the end of a row; None: not computed."""

    keys: list[str]
    responses: list[list[int]]
    verdicts: list[dict[str, Any]]  # what reward.py said: status, strategy, ...
    problems: list[dict[str, Any]]  # the problem of each row, as data.py wrote it; other files may lack id and answer
    prompts: list[list[int]]
    scores: Tensor
    correct: Tensor
    truncated: Tensor
    groups: Tensor
    mask: Tensor
    logp_old: Tensor | None = None
    entropy_old: Tensor | None = None
    logp_rollout: Tensor | None = None
    logp_ref: Tensor | None = None
    values: Tensor | None = None


def read_rows(batch: KVBatchMeta, eos: Sequence[int], limit: int) -> Rows:
    """All rows of `batch` but verl's padding. eos: tokens that end a response; limit: the response limit in tokens."""
    keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
    wanted = ["uid", "prompts", "responses", "response_mask", "rm_scores", "extra_fields", "extra_info", *TENSORS]
    data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=wanted)
    responses = [row.tolist() for row in data["responses"].unbind()]
    names = [str(uid) for uid in tu.get(data, "uid")]
    numbers: dict[str, int] = {}
    groups = torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])
    verdicts = [fields.get("reward_extra_info", {}) for fields in tu.get(data, "extra_fields")]
    found = {ours: _padded(data[name]).float() for name, ours in TENSORS.items() if name in data}
    return Rows(
        keys=keys,
        responses=responses,
        verdicts=verdicts,
        problems=[row_of(info) for info in tu.get(data, "extra_info")],
        prompts=[row.tolist() for row in data["prompts"].unbind()],
        scores=torch.tensor([float(row.sum()) for row in data["rm_scores"].unbind()]),
        correct=torch.tensor([bool(verdict["correct"]) for verdict in verdicts]),
        truncated=torch.tensor([len(row) >= limit and row[-1] not in eos for row in responses]),
        groups=groups,
        mask=_padded(data["response_mask"]).bool(),
        **found,
    )


@dataclass(frozen=True)
class Credit:
    """rewards (N,) after penalties, keep (N,) bool, mask (N,T) bool of what may be trained on; advantages (N,) or (N,T)
    before shaping, shaped (N,T); returns (N,T) that a critic is fitted to, or None."""

    rewards: Tensor
    keep: Tensor
    mask: Tensor
    advantages: Tensor
    shaped: Tensor
    returns: Tensor | None


def kept(method: Method, rows: Rows, limit: int, prompts: int) -> tuple[Tensor, Tensor]:
    """Rewards (N,) and which rows are kept (N,) bool: at most `prompts` groups, the first ones."""
    rewards = method.rewards(rows.scores, rows.mask.sum(1), rows.truncated, max_length=limit)
    keep = method.keep(rewards, rows.groups, rows.correct)
    count = torch.zeros(int(rows.groups.max()) + 1, dtype=torch.long).index_add(0, rows.groups, keep.long())
    surplus = (count > 0) & ((count > 0).cumsum(0) > prompts)
    return rewards, keep & ~surplus[rows.groups]


def credit(method: Method, rows: Rows, limit: int, prompts: int, masked: bool, step: int, state: Any) -> Credit:
    """What each token is given at rollout step `step` (the first is 0). masked: truncated rows are not trained on."""
    assert rows.logp_old is not None
    assert rows.entropy_old is not None
    rewards, keep = kept(method, rows, limit, prompts)
    mask = rows.mask & ~rows.truncated[:, None] if masked else rows.mask
    advantages = method.advantages(
        rewards,
        rows.groups,
        rows.correct,
        mask=mask,
        values=rows.values,
        logp_old=rows.logp_old,
        logp_ref=rows.logp_ref,
    )
    shaped = method.shape(
        advantages, rows.logp_old, rows.entropy_old, mask & keep[:, None], correct=rows.correct, step=step, state=state
    )
    returns = None
    if "values" in method.needs:
        assert rows.values is not None
        returns = method.value_targets(rewards, mask, rows.values, rows.logp_old, rows.logp_ref)
    return Credit(rewards, keep, mask, advantages, shaped, returns)


def _padded(nested: Tensor) -> Tensor:
    return nested.to_padded_tensor(0) if nested.is_nested else nested
