"""Numbers from one step's rollouts, all of them and split by polarity. docs/metrics.md lists every name.

N rows (responses), T padded length. Polarity is `correct`, a boolean. Every mean over tokens uses the mask it is
handed; a metric whose set is empty is left out rather than reported as 0 or NaN.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from polarity.analysis.checks import booleans
from polarity.analysis.difficulty import difficulty_metrics, group_counts, group_pass_at_k

Metrics = dict[str, float]


def rollout_metrics(
    correct: Tensor, rewards: Tensor, groups: Tensor, truncated: Tensor, logp: Tensor, entropy: Tensor, mask: Tensor
) -> Metrics:
    """reward/*, accuracy/*, length/*, entropy/*, difficulty/* and POLARITY/{share,reward,entropy,length,probability}.

    Over all generated rows, before any is dropped: correct, truncated (N,) bool; rewards (N,); groups (N,) ints, the
    same for responses to one prompt, of any sizes; logp, entropy (N,T); mask (N,T) bool over what was generated.
    """
    correct, truncated, mask = booleans(correct=correct, truncated=truncated, mask=mask)
    lengths = mask.sum(1).double()
    size, solved, _ = group_counts(correct, groups)
    found = {
        "reward/mean": rewards.double().mean(),
        "accuracy/mean": correct.double().mean(),
        "accuracy/fully_solved": (solved == size).double().mean(),
        "accuracy/unsolved": (solved == 0).double().mean(),
        "length/mean": lengths.mean(),
        "length/max": lengths.max(),
        "length/truncated": truncated.double().mean(),
    }
    found |= _mean("entropy/mean", entropy, mask)
    for name, rows in (("positive", correct), ("negative", ~correct)):
        chosen = mask & rows[:, None]
        found[f"{name}/share"] = rows.double().mean()
        found |= _mean(f"{name}/entropy", entropy, chosen)
        found |= _mean(f"{name}/probability", logp.exp(), chosen)
        if rows.any():
            found[f"{name}/length"] = lengths[rows].mean()
            found[f"{name}/reward"] = rewards[rows].double().mean()
    metrics = {name: float(value) for name, value in found.items()}
    return metrics | group_pass_at_k(correct, groups) | difficulty_metrics(correct, rewards, groups, entropy, mask)


def credit_metrics(advantages: Tensor, shaped: Tensor, logp_old: Tensor, correct: Tensor, mask: Tensor) -> Metrics:
    """{positive,negative}/{shaped_share,gradient_share,shaped_gradient_share}, over the rows that are trained on.

    advantages (N,) or (N,T) before shaping, shaped (N,T), logp_old (N,T), correct (N,) bool, mask (N,T) bool.
    Gradient mass of a token is |shaped advantage| * (1 - p): the size of its pull on its own logit (on-policy).
    gradient_share: the polarity's part of the step's mass; shaped_gradient_share: the part of the polarity's own mass
    that lies on tokens whose advantage was changed.
    """
    correct, mask = booleans(correct=correct, mask=mask)
    before = advantages if advantages.dim() == 2 else advantages[:, None].expand_as(shaped)
    changed = (shaped != before) & mask
    mass = torch.where(mask, shaped.abs() * -torch.expm1(logp_old.clamp(max=0)), 0.0).double()
    total = float(mass.sum())
    found: Metrics = {}
    for name, rows in (("positive", correct), ("negative", ~correct)):
        chosen = mask & rows[:, None]
        found |= {k: float(v) for k, v in _mean(f"{name}/shaped_share", changed, chosen).items()}
        own = float(mass[chosen].sum())
        if total > 0:
            found[f"{name}/gradient_share"] = own / total
        if own > 0:
            found[f"{name}/shaped_gradient_share"] = float(mass[chosen & changed].sum()) / own
    return found


def _mean(name: str, values: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
    return {name: values[mask].double().mean()} if mask.any() else {}
