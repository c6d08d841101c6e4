"""How the kept rows of a step are laid out over mini-batches and ranks.

verl hands each rank one contiguous part of a batch. Mini-batches are pieces of a seeded shuffle of the kept rows, the
last may be short, as in the embedded engine; each is padded to a multiple of the ranks and shared out so that ranks
have about the same number of tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """order: positions of rows, rank by rank, None for padding; rows: of one rank in each mini-batch; counts: (tokens,
    sequences) of each mini-batch, over all ranks, padding not among them."""

    order: list[int | None]
    rows: list[int]
    counts: list[tuple[int, int]]


def lay_out(lengths: Tensor, per_update: int, ranks: int, seed: int) -> Layout:
    """lengths (n,): trained tokens of each row; per_update: rows of a mini-batch over all ranks."""
    generator = torch.Generator().manual_seed(seed)
    shares: list[list[list[int | None]]] = [[] for _ in range(ranks)]  # rank -> mini-batch -> rows
    rows, counts = [], []
    for index in torch.randperm(len(lengths), generator=generator).split(per_update):
        own = lengths[index]
        counts.append((int(own.sum()), int((own > 0).sum())))
        size = -(-len(index) // ranks)
        rows.append(size)
        # Longest first, forth and back over the ranks: equal numbers of rows, nearly equal numbers of tokens.
        longest = index[own.argsort(descending=True, stable=True)].tolist()
        padded: list[int | None] = longest + [None] * (size * ranks - len(longest))
        for rank in range(ranks):
            turns = range(size)
            shares[rank].append([padded[t * ranks + (rank if t % 2 == 0 else ranks - 1 - rank)] for t in turns])
    order = [row for share in shares for piece in share for row in piece]
    return Layout(order, rows, counts)
