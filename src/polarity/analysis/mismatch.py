"""Train-inference mismatch: how far the sampler's probabilities are from the trainer's, before any update.

N rows (responses), T padded length, M tokens of the mask. p and q are the probabilities that sampler and trainer give
the same token; rho = q / p is the importance weight of a token, and the product over its tokens that of a response.
Everything is float64.
"""

import math

import torch
from torch import Tensor

from polarity.analysis.checks import booleans

# log rho, of a token and of a whole response, is held within this before it is exponentiated, as verl does: a weight
# is then finite whatever goes in, and e^20 (or its inverse) says clearly enough that something is broken.
LARGEST_LOG_RATIO = 20.0
BY_POLARITY = ("mean", "max", "correlation", "k1", "k3", "chi_square")


def mismatch(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor, correct: Tensor | None = None) -> dict[str, float]:
    """mismatch/NAME over the tokens of mask (N,T) bool, and POLARITY/mismatch_NAME over those of correct (N,) bool.

    logp_rollout, logp_old (N,T): log-probs of the same tokens from sampler and trainer; what lies outside the mask is
    not read. Definitions and names as in docs/metrics.md; they are verl's (0.9.1, utils/debug/metrics.py and
    trainer/ppo/rollout_corr_helper.py) but for rows without a token, which are left out here and count as equal there.

    Every value is finite: log rho is held within LARGEST_LOG_RATIO where it is exponentiated (k3, chi_square,
    sequence_chi_square, ess, weight_max, weight_min); what is infinite or NaN all the same (k1 where one side says
    that a sampled token was impossible, a correlation of constants, std of one token) is left out, as is what would be
    taken over an empty set.
    """
    rollout, old = torch.as_tensor(logp_rollout).double(), torch.as_tensor(logp_old).double()
    (mask,) = booleans(mask=mask)
    tokens = _of_tokens(rollout[mask], old[mask])
    found = {f"mismatch/{name}": value for name, value in (tokens | _of_rows(rollout, old, mask)).items()}
    if correct is not None:
        (correct,) = booleans(correct=correct)
        for polarity, rows in (("positive", correct), ("negative", ~correct)):
            own = _of_tokens(rollout[rows][mask[rows]], old[rows][mask[rows]])
            found |= {f"{polarity}/mismatch_{name}": own[name] for name in BY_POLARITY if name in own}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _of_tokens(rollout: Tensor, old: Tensor) -> dict[str, float]:
    """What is a mean or an extreme over tokens; rollout, old (M,) float64."""
    if not len(rollout):
        return {}
    p, q = rollout.exp(), old.exp()
    distance = (p - q).abs()
    log_rho = _difference(old, rollout)
    held = log_rho.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    weights = held.exp()
    found = {
        "mean": distance.mean(),
        "max": distance.max(),
        "k1": -log_rho.mean(),
        "k3": (torch.expm1(held) - held).mean(),
        "chi_square": torch.expm1(2 * held).mean(),
        "ess": weights.sum().square() / (len(weights) * weights.square().sum()),
        "weight_max": weights.max(),
        "weight_min": weights.min(),
    }
    if len(rollout) > 1:
        found["std"] = distance.std()
    if p.max() > p.min() and q.max() > q.min():
        found["correlation"] = torch.corrcoef(torch.stack([p, q]))[0, 1]
    return {name: float(value) for name, value in found.items()}


def _of_rows(rollout: Tensor, old: Tensor, mask: Tensor) -> dict[str, float]:
    """What is a mean over responses with a token; rollout, old (N,T) float64."""
    rows = mask.any(1)
    if not rows.any():
        return {}
    log_rho = torch.where(mask, _difference(old, rollout), 0.0)[rows].sum(1)
    held = log_rho.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return {
        "sequence_chi_square": float(torch.expm1(2 * held).mean()),
        "log_ppl_difference": float(-(log_rho / mask[rows].sum(1)).mean()),
    }


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b, and 0 where both are the same infinity: two sides that agree have a ratio of one."""
    return torch.where(a == b, 0.0, a - b)
