"""What advantages and losses are handed, and what losses hand back.

N responses of a rollout step, n of a (micro-)batch, T padded response length. Masks are bool; everything outside a mask
may be garbage.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Denominators:
    """What a loss divides by: counts of the whole mini-batch over all ranks, so that micro-batches add up.

    tokens: valid response tokens; sequences: responses with at least one valid token; max_length: the run's response
    limit, the constant of `token_sum_const` (None: the longest response at hand).
    """

    tokens: float | Tensor
    sequences: float | Tensor
    max_length: float | None = None

    @classmethod
    def of(cls, mask: Tensor, max_length: float | None = None) -> "Denominators":
        """The counts of a mini-batch from its mask (n, T), as tensors on its device; no max_length: its longest."""
        lengths = mask.sum(1)
        if max_length is None:
            max_length = float(lengths.max()) if lengths.numel() else 0.0
        return cls(lengths.sum(), (lengths > 0).sum(), max_length)


@dataclass(frozen=True, slots=True)
class Scored:
    """A rollout step, scored: rewards (N,) float, groups (N,) int, correct (N,) bool.

    For token advantages also mask (N, T) bool, values, logp_old, logp_ref (N, T).
    """

    rewards: Tensor
    groups: Tensor
    correct: Tensor
    mask: Tensor | None = None
    values: Tensor | None = None
    logp_old: Tensor | None = None
    logp_ref: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """What a method chose by looking at a whole mini-batch (`Method.select`), handed to the loss of each micro-batch.

    tokens: (n, T) bool, the tokens that the method's token mask keeps, or that its token penalty is on; engines slice
    it with the rows. values: numbers that hold for the whole mini-batch. count: if set, the token denominator of the
    policy loss.
    """

    tokens: Tensor | None = None
    values: dict[str, float] = field(default_factory=dict)
    count: float | None = None


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch (for `Method.select`: one mini-batch). All (n, T) float of any precision unless noted.

    logp: log-probability of each token under the current policy, with gradient; logp_old: under the policy that
    sampled it, from the training engine; advantages: shaped; mask: bool, the response's own tokens.
    entropy: of the current policy in nats, with gradient; entropy_old: of the old policy.
    correct: (n,) bool, splits the metrics by polarity (None: by the sign of the advantage).
    logp_ref, logp_rollout, logp_proxy: under the reference policy, the rollout engine, the proxy of Lp-Reg.
    select: the mini-batch's Selection, its rows sliced. denominators: of the whole mini-batch (None: of this batch).
    """

    logp: Tensor
    logp_old: Tensor
    advantages: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    entropy_old: Tensor | None = None
    correct: Tensor | None = None
    logp_ref: Tensor | None = None
    logp_rollout: Tensor | None = None
    logp_proxy: Tensor | None = None
    select: Selection | None = None
    denominators: Denominators | None = None


# name -> (sum, count): adding the pairs of micro-batches and dividing once gives the mini-batch's mean.
Metrics = dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class LossOutput:
    """loss: scalar with gradient. Summed over the micro-batches of a mini-batch it is the mini-batch's loss."""

    loss: Tensor
    metrics: Metrics


def given(tensor: Tensor | None, name: str) -> Tensor:
    """The tensor, or a ValueError that says which one the method needs."""
    if tensor is None:
        raise ValueError(f"this method needs {name} (see Method.needs)")
    return tensor
