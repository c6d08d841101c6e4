"""What every engine writes into rollouts/step_*.jsonl (docs/run_directory.md): which rows, and their numbers a token.

N rows (responses) in groups, T padded response length.
"""

from typing import Any

import torch
from torch import Tensor


def logged_rows(groups: Tensor, correct: Tensor, most: int) -> list[int]:
    """Positions of the rows of at most `most` whole groups, those with both polarities first; groups (N,) int64 from 0
    without gaps, correct (N,) bool."""
    sizes = groups.bincount()
    solved = correct.double().new_zeros(len(sizes)).index_add(0, groups, correct.double()) / sizes
    order = sorted(range(len(sizes)), key=lambda g: (bool(solved[g] == 0 or solved[g] == 1), g))
    return [i for g in order[:most] for i in (groups == g).nonzero()[:, 0].tolist()]


def token_fields(
    i: int,
    length: int,
    *,
    logp_old: Tensor,
    logp_rollout: Tensor | None,
    entropy: Tensor,
    advantages: Tensor,
    shaped: Tensor,
    mask: Tensor,
) -> dict[str, Any]:
    """Row i's logp_old, logp_rollout, entropy, advantage and weight, as lists of `length`. Tensors are the step's.

    advantages (N,) or (N,T) before shaping, shaped and the others (N,T), mask (N,T) bool: what may be trained on.
    """
    before = advantages[i, :length] if advantages.dim() == 2 else advantages[i].expand(length)
    weight = torch.where(before != 0, shaped[i, :length] / before, 1.0) * mask[i, :length]
    fields: dict[str, Any] = {"logp_old": _rounded(logp_old[i, :length])}
    if logp_rollout is not None:
        fields["logp_rollout"] = _rounded(logp_rollout[i, :length])
    fields["entropy"] = _rounded(entropy[i, :length])
    fields["advantage"] = float(advantages[i]) if advantages.dim() == 1 else _rounded(before)
    fields["weight"] = _rounded(weight)
    return fields


def _rounded(values: Tensor) -> list[float]:
    return [round(v, 5) for v in values.tolist()]
