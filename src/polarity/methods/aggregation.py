"""(n, T) token values -> one number, always with the denominators of the whole mini-batch.

Dividing by what the whole mini-batch holds makes the sum over micro-batches exact: averaging inside each one, as
several public codes do, is neither a token mean nor a sequence mean. Weights multiply the values and never enter a
denominator.
"""

from typing import Literal

import torch
from torch import Tensor

from polarity.methods.inputs import Denominators

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_const"]


def aggregate(values: Tensor, mask: Tensor, mode: Aggregation, denominators: Denominators) -> Tensor:
    """Scalar from (n, T) values over (n, T) bool mask.

    token_mean: sum / tokens (DAPO). seq_mean_token_mean: mean over responses of their token mean (GRPO).
    seq_mean_token_sum: mean over responses of their token sum. token_sum_const: sum / (sequences * max_length)
    (Dr. GRPO). A response without valid tokens adds 0.
    """
    values = torch.where(mask, values, 0.0)
    if mode == "token_mean":
        return values.sum() / _at_least_one(denominators.tokens)
    sequences = _at_least_one(denominators.sequences)
    if mode == "seq_mean_token_mean":
        return (values.sum(1) / mask.sum(1).clamp(min=1)).sum() / sequences
    if mode == "seq_mean_token_sum":
        return values.sum() / sequences
    longest = int(mask.sum(1).max()) if denominators.max_length is None and len(mask) else 1
    return values.sum() / (sequences * max(denominators.max_length or longest, 1))


def _at_least_one(count: float | Tensor) -> float | Tensor:
    """An empty mini-batch has loss 0, not 0/0."""
    return count.reshape(()).clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
