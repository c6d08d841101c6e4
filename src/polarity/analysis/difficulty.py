"""Numbers by how hard a prompt is for the policy that answers it: by the share of correct responses in its group.

P groups (prompts), N rows (responses), T padded length.
"""

import torch
from torch import Tensor

from polarity.analysis.checks import booleans
from polarity.analysis.pass_at_k import pass_at_k

Metrics = dict[str, float]


def group_counts(correct: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Responses and correct responses of each group, (P,) int64 both, and each row's place in them (N,) int64.

    correct (N,) bool; groups (N,) ints, any numbers in any order: rows with the same one answer the same prompt.
    """
    _, place, size = groups.unique(return_inverse=True, return_counts=True)
    return size, torch.zeros_like(size).index_add(0, place, correct.to(size.dtype)), place


def bands(size: Tensor, solved: Tensor) -> dict[str, Tensor]:
    """Band -> (P,) bool. By the share a of a group's responses that are correct; each group is in one band.

    Counts are compared, never quotients: 1 of 2 and 5 of 10 are the same band whatever a division rounds to.
    """
    return {
        "unsolved": solved == 0,
        "hard": (solved > 0) & (2 * solved < size),
        "easy": (2 * solved >= size) & (solved < size),
        "solved": solved == size,
    }


def difficulty_metrics(correct: Tensor, rewards: Tensor, groups: Tensor, entropy: Tensor, mask: Tensor) -> Metrics:
    """difficulty/BAND/{share,entropy,length,reward} and difficulty/BAND/POLARITY/{entropy,length}.

    Over all generated rows: correct (N,) bool, rewards (N,), groups (N,) ints, entropy (N,T), mask (N,T) bool. share
    is of prompts; entropy is a mean over tokens, length and reward over responses. A band without a prompt has a share
    of 0 and nothing else.
    """
    correct, mask = booleans(correct=correct, mask=mask)
    size, solved, place = group_counts(correct, groups)
    lengths = mask.sum(1).double()
    found: dict[str, Tensor] = {}
    for band, own in bands(size, solved).items():
        name, rows = f"difficulty/{band}", own[place]
        found[f"{name}/share"] = own.double().mean()
        if rows.any():
            found[f"{name}/reward"] = rewards[rows].double().mean()
        for part, chosen in ((name, rows), (f"{name}/positive", rows & correct), (f"{name}/negative", rows & ~correct)):
            tokens = mask & chosen[:, None]
            if tokens.any():
                found[f"{part}/entropy"] = entropy[tokens].double().mean()
            if chosen.any():
                found[f"{part}/length"] = lengths[chosen].mean()
    return {name: float(value) for name, value in found.items()}


def group_pass_at_k(correct: Tensor, groups: Tensor) -> Metrics:
    """accuracy/pass@K for K = 2, 4, 8 ... up to the smallest group: unbiased, mean over prompts.

    correct (N,) bool, groups (N,) ints. For K = 1 it is the mean accuracy of a prompt (`accuracy/mean` where all
    groups have the same size).
    """
    size, solved, _ = group_counts(correct, groups)
    kinds, prompts = torch.stack([size, solved]).unique(dim=1, return_counts=True)
    weights = [(int(n), int(c), int(p)) for (n, c), p in zip(kinds.T, prompts, strict=True)]
    found: Metrics = {}
    k = 2
    while k <= int(size.min()):
        found[f"accuracy/pass@{k}"] = sum(p * pass_at_k(n, c, k) for n, c, p in weights) / len(size)
        k *= 2
    return found
