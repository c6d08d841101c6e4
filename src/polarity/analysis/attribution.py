"""Which tokens moved the policy's entropy: the cells of the attribution, and what is counted into each.

n rows (responses), T padded length. A cell is polarity x probability x entropy: eight of them. Low probability is the
lowest fifth of the step's trained tokens, high entropy their highest fifth, the share by which A3PO's paper chooses
tokens (section 4.2); the other four fifths are high probability and low entropy.
"""

from itertools import product

import torch
from torch import Tensor

RATIO = 0.2
CELLS = tuple(
    f"attribution/{polarity}/{probability}_prob_{entropy}_entropy"
    for polarity, probability, entropy in product(("negative", "positive"), ("high", "low"), ("low", "high"))
)


def cell_bounds(logp: Tensor, entropy: Tensor, mask: Tensor) -> tuple[float, float]:
    """The log-prob at or below which a token is of low probability, and the entropy at or above which it is of high.

    logp, entropy (n,T) under the old policy, mask (n,T) bool: the tokens that are trained on, one at least. Order
    statistics without interpolation, so that with n tokens exactly ceil(n / 5) are low (ties: all of them).
    """
    if not bool(mask.any()):
        raise ValueError("cells need one token at least")
    n = int(mask.sum())
    k = -(-n // round(1 / RATIO))
    return float(logp[mask].kthvalue(k).values), float(entropy[mask].kthvalue(n - k + 1).values)


def cells_of(logp: Tensor, entropy: Tensor, correct: Tensor, bounds: tuple[float, float]) -> Tensor:
    """(n,T) int64 index into CELLS of each token; logp, entropy (n,T), correct (n,) bool, bounds of `cell_bounds`."""
    low, high = bounds
    return 4 * correct[:, None].long() + 2 * (logp <= low).long() + (entropy >= high).long()


def cell_sums(contributions: Tensor, cells: Tensor, mask: Tensor) -> dict[str, float]:
    """Cell name -> sum of contributions (n,T) over mask (n,T) bool, in float64; cells without a token are left out."""
    chosen = cells[mask]
    sums = torch.zeros(len(CELLS), dtype=torch.float64).index_add(0, chosen, contributions[mask].double())
    return {CELLS[i]: float(sums[i]) for i in chosen.unique().tolist()}
