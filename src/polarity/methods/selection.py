"""Which tokens: exactly k of each row, lowest or highest, ties to the earlier position.

N rows (responses), T padded length. Only positions inside the mask are candidates; what lies outside may be NaN.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from polarity.methods.inputs import LossInputs


def row_counts(mask: Tensor) -> Tensor:
    """True entries of each row, (N, T) bool -> (N,) int32; several times faster than the default int64 sum."""
    return mask.sum(1, dtype=torch.int32)


def floor_count(lengths: Tensor, ratio: float) -> Tensor:
    """max(1, floor(ratio * n)) of n candidates, as the A3PO authors' code counts; 0 where ratio or n is 0.

    (N,) int -> (N,) int64. The 1e-9 keeps 0.2 * 15 at 3.
    """
    if ratio == 0:
        return torch.zeros_like(lengths, dtype=torch.long)
    count = torch.floor(lengths.double() * ratio + 1e-9).long().clamp(min=1)
    return torch.minimum(count, lengths)


def ceil_count(lengths: Tensor, ratio: float) -> Tensor:
    """max(1, ceil(ratio * n)) of n candidates, as the Fork Tokens authors' code counts; 0 where n is 0."""
    count = torch.ceil(lengths.double() * ratio - 1e-9).long().clamp(min=1)
    return torch.minimum(count, lengths)


def lowest(values: Tensor, mask: Tensor, k: Tensor, inclusive: bool = False) -> Tensor:
    """The k[i] lowest values of each row i inside the mask: (N, T) float, (N, T) bool, (N,) int -> (N, T) bool.

    Exactly k by rank, ties to the earlier position; with `inclusive`, everything up to and including the k-th value.
    For the highest pass the negated values.
    """
    largest = int(k.max()) if k.numel() else 0
    if largest == 0:
        return torch.zeros_like(mask)
    filled = torch.where(mask, values, math.inf)
    # a partial sort: rows differ in k, so the largest k is sorted and each row reads its own threshold
    kth = filled.topk(largest, dim=1, largest=False).values.gather(1, (k - 1).clamp(min=0)[:, None])
    kth = torch.where(k[:, None] > 0, kth, math.nan)
    chosen = (filled <= kth) & mask
    if inclusive:
        return chosen
    count = row_counts(chosen)
    crowded = (count > k).nonzero()[:, 0]
    if crowded.numel():
        ties = chosen[crowded] & (filled[crowded] == kth[crowded])
        room = row_counts(ties) - (count - k)[crowded]
        chosen[crowded] &= ~ties | (ties.cumsum(1, dtype=torch.int32) <= room[:, None])
    return chosen


def extreme_of_all(
    values: Tensor, mask: Tensor, k: Tensor, end: Literal["low", "high"], inclusive: bool = False
) -> Tensor:
    """The k (0-dim int) lowest or highest inside the mask over all rows together, (N, T) -> (N, T) bool.

    Exactly k, ties to the earlier row, then position; with `inclusive`, everything up to and including the k-th value.
    """
    wanted = int(k)
    if wanted == 0:
        return torch.zeros_like(mask)
    candidates = values[mask]
    kth = candidates.kthvalue(wanted if end == "low" else len(candidates) - wanted + 1).values
    chosen = mask & (values <= kth if end == "low" else values >= kth)
    surplus = int(row_counts(chosen).sum()) - wanted
    if surplus and not inclusive:
        ties = (chosen & (values == kth)).flatten().nonzero()[:, 0]
        chosen = chosen.contiguous()
        chosen.view(-1)[ties[len(ties) - surplus :]] = False
    return chosen


def covariance(inputs: LossInputs) -> Tensor:
    """(A - mean A)(log p - mean log p) of each token, (n, T), 0 outside the mask, no gradient; means over all tokens.

    The entropy of a policy falls, to first order, by the mean of this times the step size (Cui et al. 2025).
    """
    n = inputs.mask.sum().clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        x = torch.where(inputs.mask, x.detach().double(), 0.0)
        return torch.where(inputs.mask, x - x.sum() / n, 0.0)

    return centred(inputs.advantages) * centred(inputs.logp)
