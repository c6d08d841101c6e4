"""Rollout steps and mini-batches for the tests of methods. N responses of a step, n of a mini-batch, T tokens."""

import math
from dataclasses import dataclass, fields, replace

import torch

from polarity.methods import METHODS, Denominators, LossInputs

NAMES = [*METHODS, "polarity_p0.5n1", "token_negative_high_prob", "token_positive_low_entropy"]
AGGREGATIONS = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_const"]

# Shares and bounds made for thousands of tokens, widened so that they choose some of a few dozen.
_WIDENED = {
    "lp_reg": {"token_penalty.ratio": 0.5},
    "kl_cov": {"token_penalty.ratio": 0.2},
    "clip_cov": {"token_mask.ratio": 0.3, "token_mask.lower": 0.0, "surrogate.high": 0.2},
    "opsm": {"off_policy_mask.delta": 0.1},
}


def method(name):
    """The method of the catalog, able to act on a small batch."""
    return METHODS[name].vary(_WIDENED.get(name, {}))


def batch(seed=0, n=8, width=6, dtype=torch.float64, garbage=0.0, whole=False):
    """A mini-batch: rows of length 0, 1 and T, both signs of A, a row of A = 0, ratios on both sides of every bound.

    whole: A is one number a response, for losses that have one loss a response; otherwise tokens have weights.
    garbage: what stands outside the mask.
    """
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, width + 1, (n,), generator=g)
    lengths[:3] = torch.tensor([0, 1, width])
    mask = torch.arange(width) < lengths[:, None]

    def random(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    def inside(x):
        return torch.where(mask, x, garbage).to(dtype)

    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 1.0, -1.0, -1.0], dtype=torch.float64)[torch.arange(n) % 8]
    advantages = (sign * (0.2 + random(n)))[:, None].expand(n, width)
    weights = torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, (n, width), generator=g)]
    logp_old = -0.05 - 2 * random(n, width)
    scale = torch.tensor([1e-3, 0.5, 1.5, 0.3, 0.5, 1e-3, 2.5, 0.3], dtype=torch.float64)[torch.arange(n) % 8]
    logp = -(logp_old + scale[:, None] * torch.randn(n, width, generator=g, dtype=torch.float64)).abs()
    return LossInputs(
        logp=inside(logp).requires_grad_(),
        logp_old=inside(logp_old),
        advantages=inside(advantages if whole else advantages * weights),
        mask=mask,
        entropy=inside(2 * random(n, width)).requires_grad_(),
        entropy_old=inside(2 * random(n, width)),
        correct=random(n) > 0.5,
        logp_ref=inside(logp_old + 0.3 - 0.6 * random(n, width)),
        logp_rollout=inside(logp_old + 0.5 - random(n, width)),
        logp_proxy=inside(torch.where(random(n, width) > 0.2, logp_old + 0.3 * random(n, width), -1e4)),
    )


def example(m, seed=0, **kind):
    """A mini-batch that the method's loss is defined for."""
    return batch(seed, whole=m.surrogate.per_response, **kind)


def rows(inputs, index):
    """Some rows of a mini-batch, in that order: a micro-batch of it."""
    names = [f.name for f in fields(LossInputs) if f.name not in ("select", "denominators")]
    cut = {name: None if getattr(inputs, name) is None else getattr(inputs, name)[index] for name in names}
    select = inputs.select
    if select is not None and select.tokens is not None:
        select = replace(select, tokens=select.tokens[index])
    return LossInputs(**cut, select=select, denominators=inputs.denominators)


def widened(inputs, by=3, value=math.nan):
    """The mini-batch with more padding, of this value; advantages outside the mask get it, too."""
    wide = {}
    for f in fields(LossInputs):
        x = getattr(inputs, f.name)
        padded = isinstance(x, torch.Tensor) and x.dim() == 2
        wide[f.name] = torch.nn.functional.pad(x, (0, by), value=value if x.is_floating_point() else 0) if padded else x
    wide["advantages"] = torch.where(wide["mask"], wide["advantages"], value)
    return LossInputs(**wide)


def prepared(m, inputs):
    """The mini-batch with what an engine adds: denominators, and the selection where the method asks for one."""
    inputs = replace(inputs, denominators=Denominators.of(inputs.mask, max_length=20))
    return replace(inputs, select=m.select(inputs)) if "select" in m.needs else inputs


def gradients(loss, inputs):
    """Of logp and entropy; 0 where the loss does not depend on one."""
    found = torch.autograd.grad(loss, (inputs.logp, inputs.entropy), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(inputs.logp) if g is None else g for g in found]


@dataclass(frozen=True)
class Step:
    """A scored rollout step: (N,) rewards, groups, correct; (N, T) mask, values, logp_old, logp_ref, entropy_old."""

    rewards: torch.Tensor
    groups: torch.Tensor
    correct: torch.Tensor
    mask: torch.Tensor
    values: torch.Tensor
    logp_old: torch.Tensor
    logp_ref: torch.Tensor
    entropy_old: torch.Tensor

    def rows(self, index):
        return Step(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def widened(self, by=3):
        pad = torch.nn.functional.pad
        wide = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, x in wide.items():
            if x.dim() == 2:
                wide[name] = pad(x, (0, by), value=math.nan if x.is_floating_point() else 0)
        return Step(**wide)


def rollout_step(seed=0, width=6, garbage=math.nan):
    """Two mixed groups of four and one of three right answers, interleaved; an empty response; rewards 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.tensor([7, 2, 7, 2, 5, 7, 2, 5, 7, 2, 5])
    correct = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 1]) > 0
    lengths = torch.randint(1, width + 1, (11,), generator=g)
    lengths[[3, 5]] = torch.tensor([0, width])
    mask = torch.arange(width) < lengths[:, None]

    def inside(x):
        return torch.where(mask, x, garbage)

    logp_old = -0.05 - 2 * torch.rand(11, width, generator=g)
    return Step(
        rewards=correct.float(),
        groups=groups,
        correct=correct,
        mask=mask,
        values=inside(torch.rand(11, width, generator=g)),
        logp_old=inside(logp_old),
        logp_ref=inside(logp_old + 0.3 - 0.6 * torch.rand(11, width, generator=g)),
        entropy_old=inside(2 * torch.rand(11, width, generator=g)),
    )


def advantages(m, step):
    return m.advantages(step.rewards, step.groups, step.correct, step.mask, step.values, step.logp_old, step.logp_ref)


def shaped(m, step, s=0):
    """(N, T) advantages as the losses get them, at rollout step s."""
    a = advantages(m, step)
    return m.shape(a, step.logp_old, step.entropy_old, step.mask, correct=step.correct, step=s)
