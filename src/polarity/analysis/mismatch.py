"""Train-inference mismatch: how far the sampler's probabilities are from the trainer's, before any update."""

import torch
from torch import Tensor


def mismatch(logp_rollout: Tensor, logp_old: Tensor, mask: Tensor) -> dict[str, float]:
    """mismatch/{mean,max,correlation,k1,k3} over the tokens of mask (N,T) bool; empty where mask is.

    logp_rollout, logp_old (N,T): log-probs of the same tokens from sampler and trainer. mean and max are of
    |p_rollout - p_old|, correlation is Pearson's of the two probabilities, k1 = mean(logp_rollout - logp_old), k3 its
    low-variance form; both estimate KL(rollout || trainer) in nats.
    """
    rollout, old = logp_rollout[mask].double(), logp_old[mask].double()
    if not len(rollout):
        return {}
    p, q = rollout.exp(), old.exp()
    ratio = old - rollout
    found = {
        "mismatch/mean": float((p - q).abs().mean()),
        "mismatch/max": float((p - q).abs().max()),
        "mismatch/k1": float(-ratio.mean()),
        "mismatch/k3": float((torch.expm1(ratio) - ratio).mean()),
    }
    if float(p.std(correction=0)) > 0 and float(q.std(correction=0)) > 0:
        found["mismatch/correlation"] = float(torch.corrcoef(torch.stack([p, q]))[0, 1])
    return found
