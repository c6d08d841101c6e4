"""Random mini-batches for the contract tests, and the comparison of two losses in value and gradient.

n responses (P groups of G), T padded length. Everything outside the mask is finite garbage.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from polarity.methods import Denominators, LossInputs, LossOutput, Method

P, G, T = 8, 4, 20

# Largest allowed difference, relative to the largest element (verl adds up to 1e-8 to what it divides by).
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}


@dataclass(frozen=True)
class Batch:
    """(n, T) tensors of one precision; mask bool; groups and rewards (n,)."""

    logp: Tensor
    logp_old: Tensor
    logp_ref: Tensor
    logp_rollout: Tensor
    entropy: Tensor
    advantages: Tensor
    mask: Tensor
    groups: Tensor
    rewards: Tensor

    def inputs(self, logp: Tensor | None = None, **more: object) -> LossInputs:
        """Polarity's view of the batch, with `logp` in place of its own."""
        names = {field.name for field in fields(LossInputs)} & {field.name for field in fields(self)}
        own = {name: getattr(self, name) for name in names}
        return LossInputs(**{**own, "logp": self.logp if logp is None else logp, **more})

    def rows(self, which: slice | Tensor) -> "Batch":
        """Some responses of the batch."""
        return Batch(**{field.name: getattr(self, field.name)[which] for field in fields(self)})


def random_batch(
    seed: int,
    dtype: torch.dtype = torch.float64,
    *,
    holes: bool = False,
    empty_row: bool = False,
    token_advantages: bool = False,
) -> Batch:
    """32 responses of 1 to T tokens whose ratios lie on both sides of every bound in use.

    Ratios differ by row, from one in a thousand (GSPO's bounds) to thirty (dual clip). holes: masks of multi-turn
    responses. empty_row: a response without tokens. token_advantages: A differs within a response, in sign too.
    """
    random = torch.Generator().manual_seed(seed)
    n = P * G

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    lengths = torch.randint(1, T + 1, (n,), generator=random)
    lengths[0], lengths[1] = 1, T
    mask = torch.arange(T) < lengths[:, None]
    if holes:
        mask &= (torch.rand((n, T), generator=random) > 0.3) | (torch.arange(T) == 0)
    if empty_row:
        mask[2] = False
    scale = torch.tensor([5e-4, 0.05, 0.3, 1.5], dtype=torch.float64)[torch.arange(n) % 4, None]
    logp_old = -normal(n, T).abs() - 0.01
    advantages = normal(n, T) if token_advantages else normal(n, 1).expand(n, T)
    groups = torch.arange(n) // G
    rewards = (torch.rand((n,), generator=random) > 0.5).double()
    values = {
        "logp": logp_old + scale * (normal(n, T) + 0.5 * normal(n, 1)), "logp_old": logp_old,
        "logp_ref": logp_old + 0.8 * normal(n, T), "logp_rollout": logp_old + 0.5 * normal(n, T),
        "entropy": normal(n, T).abs(), "advantages": torch.where(mask, advantages, 0.0), "rewards": rewards,
    }  # fmt: skip
    return Batch(**{name: value.to(dtype) for name, value in values.items()}, mask=mask, groups=groups)


def value_and_gradient(loss: Callable[[Tensor], Tensor], logp: Tensor) -> tuple[Tensor, Tensor]:
    """The loss at `logp` and its gradient there."""
    leaf = logp.detach().clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach(), leaf.grad


def assert_equal(ours: Tensor, theirs: Tensor, tolerance: float, what: str, scale: float = 0.0) -> None:
    """Equal up to `tolerance` times the largest element of `theirs`, or times `scale` where that is more."""
    assert theirs.isfinite().all(), f"{what}: the reference is not finite"
    difference = (ours.double() - theirs.double()).abs().max()
    scale = max(scale, float(theirs.abs().max()))
    assert difference <= tolerance * scale, f"{what}: differs by {difference:.3g} on a scale of {scale:.3g}"


def assert_same_loss(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], logp: Tensor) -> None:
    """Two losses of `logp` agree in value and in gradient, and the gradient is not zero.

    The tokens' losses nearly cancel in a value; the sum of the gradient's magnitudes says how large they are.
    """
    value, gradient = value_and_gradient(ours, logp)
    their_value, their_gradient = value_and_gradient(theirs, logp)
    tolerance = TOLERANCE[logp.dtype]
    assert their_gradient.any(), "the reference has no gradient at all: nothing is compared"
    assert_equal(value, their_value, tolerance, "value", scale=float(their_gradient.abs().sum()))
    assert_equal(gradient, their_gradient, tolerance, "gradient")


def polarity_loss(method: Method, batch: Batch, **more: object) -> Callable[[Tensor], Tensor]:
    """The method's loss as a function of logp; unless said otherwise with the padded length as the response limit."""

    def loss(logp: Tensor) -> Tensor:
        inputs = batch.inputs(logp, **more)
        if inputs.denominators is None:
            select = method.select(inputs) if "select" in method.needs and inputs.select is None else inputs.select
            inputs = replace(inputs, select=select, denominators=Denominators.of(batch.mask, T))
        return method.loss(inputs).loss

    return loss


def share(output: LossOutput, name: str) -> float:
    """A metric of a loss as the mean it stands for."""
    total, count = output.metrics[name]
    return total / count
