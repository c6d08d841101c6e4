"""Advantages -> shaped advantages: weights by polarity, and by token within a polarity.

N responses, T padded length, s rollout step. A3PO (Eq. 2) multiplies the advantage of the lowest-probability fifth of
each positive response and of the highest-probability fifth of each negative one. Where the text is silent: exactly k
tokens by rank instead of a threshold (many tokens have probability 1.0 in float32, and `>=` would take them all),
ranked on log-probabilities (probabilities round to 1.0 and lose their order), candidates by mask (the authors' code
drops tokens whose entropy or probability is exactly 0). With two-sided token weights the mean weight is
1 + ratio * (w - 1) for both signs, so a group's advantages still sum to about zero; with one side only they do not.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from polarity.methods.inputs import given
from polarity.methods.part import Part
from polarity.methods.schedules import ClosedLoop, Schedule, State, weight_at
from polarity.methods.selection import extreme_of_all, floor_count, lowest, row_counts

# Elements ranked at a time: bounds the extra memory, and keeps the work in cache.
_CHUNK = 4194304


class TokenWeights(Part):
    """A weight on the advantage of a fraction of the tokens of one polarity."""

    end: Literal["low", "high"]
    """Which end of the ranking: the lowest or the highest values."""
    by: Literal["prob", "entropy"] = "prob"
    """What tokens are ranked by, under the old policy: probability of the sampled token, or entropy."""
    ratio: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Fraction of tokens, rounded down, at least one token; 0 shapes none."""
    scale: Schedule
    """Weight: a number (constant; below 1 damps), or a decay {start, per_step | until, floor} as in A3PO."""


class ProbabilityWeight(Part):
    """Advantage reweighting (AR, Yang et al. 2025): A * (alpha * p + 1 - alpha), p the old probability of the token.

    It damps rare tokens of both polarities: for positive samples the opposite of A3PO.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Strength: 0 changes nothing, 1 makes the weight the probability itself (authors: 0.2; 0.3 with Lopti)."""


class EntropyTerm(Part):
    """Entropy-shaped advantage (Cheng et al. 2025): A + min(alpha * H, |A| / kappa), H the old policy's entropy.

    The term raises uncertain tokens; with kappa > 1 it never turns the sign, and A = 0 stays 0.
    """

    alpha: NonNegativeFloat = 0.4
    """Advantage per nat of entropy."""
    kappa: Annotated[float, Field(gt=1)] = 2.0
    """The term is at most |A| / kappa."""


class Shaping(Part):
    """How positive and negative samples, and tokens within them, are weighted.

    Weights multiply; the entropy term is added last, bounded by the weighted advantage.
    """

    positive_weight: NonNegativeFloat = 1.0
    """Weight on the advantage of every positive sample."""
    negative_weight: NonNegativeFloat = 1.0
    """Weight on the advantage of every negative sample."""
    positive: TokenWeights | None = None
    """Weight on some tokens of positive samples."""
    negative: TokenWeights | None = None
    """Weight on some tokens of negative samples."""
    probability_weight: ProbabilityWeight | None = None
    """Weight on every token by its probability; null: none."""
    entropy_term: EntropyTerm | None = None
    """Added to the advantage of every token by its entropy; null: none."""
    polarity_by: Literal["advantage", "correctness"] = "advantage"
    """A sample is positive when A > 0 (Eq. 2), or when it is correct (the authors' code). A = 0 is never shaped."""
    scope: Literal["response", "batch"] = "response"
    """Tokens are ranked within their response, or over all samples of their polarity in the rollout step."""
    ties: Literal["exact", "inclusive"] = "exact"
    """Exactly k tokens, ties to the earlier position; or every token up to the k-th value (Eq. 2 read literally)."""

    @property
    def parts(self) -> tuple[tuple[str, TokenWeights], ...]:
        """The token weights that are set, with the polarity that each belongs to."""
        both = (("positive", self.positive), ("negative", self.negative))
        return tuple((polarity, part) for polarity, part in both if part is not None)

    @property
    def by_token(self) -> bool:
        """Whether tokens of one response may get different advantages."""
        return bool(self.parts) or self.probability_weight is not None or self.entropy_term is not None

    @property
    def needs_entropy(self) -> bool:
        """Whether the entropy of the old policy is read."""
        return self.entropy_term is not None or any(part.by == "entropy" for _, part in self.parts)

    def weights(self, step: int, state: State | None) -> dict[str, float]:
        """The weight in force on the chosen tokens of each polarity that has one."""
        return {name: weight_at(part.scale, step, state, scale_path(name)) for name, part in self.parts}

    @property
    def closed_loops(self) -> dict[str, ClosedLoop]:
        """Dotted path within the method -> each schedule that follows a measurement."""
        return {scale_path(name): part.scale for name, part in self.parts if isinstance(part.scale, ClosedLoop)}


def shape(
    shaping: Shaping,
    advantages: Tensor,
    logp_old: Tensor,
    entropy_old: Tensor | None,
    mask: Tensor,
    correct: Tensor | None = None,
    step: int = 0,
    state: State | None = None,
) -> Tensor:
    """Shaped advantages (N, T) float32, zero outside the mask.

    advantages: (N,) or (N, T); logp_old, entropy_old: (N, T) float; mask: (N, T) bool; correct: (N,) bool. For token
    advantages a token is weighted when it is in the selected fraction of its response and its own sign fits.
    """
    shaped = spread(advantages, mask)
    positive, negative = _polarity(shaping, advantages, correct)
    sides = {"positive": positive, "negative": negative}
    if (shaping.positive_weight, shaping.negative_weight) != (1.0, 1.0):
        shaped.mul_(torch.where(positive, shaping.positive_weight, torch.where(negative, shaping.negative_weight, 1.0)))
    weights = shaping.weights(step, state)
    for name, part in shaping.parts:
        weight = weights[name]
        if weight == 1.0 or part.ratio == 0:
            continue
        ranked = given(entropy_old, "entropy_old") if part.by == "entropy" else logp_old
        _weigh(shaped, sides[name], ranked, mask, part, weight, shaping)
    _by_probability_and_entropy(shaping, shaped, logp_old, entropy_old, mask)
    return shaped


def spread(advantages: Tensor, mask: Tensor) -> Tensor:
    """(N,) or (N, T) advantages over (N, T) bool mask -> (N, T) float32, zero outside."""
    a = advantages.float()
    return torch.where(mask, a[:, None] if a.dim() == 1 else a, 0.0)


def _polarity(shaping: Shaping, advantages: Tensor, correct: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which samples, or tokens, are positive and which negative: two bool tensors, (N, 1) or (N, T)."""
    a = advantages[:, None] if advantages.dim() == 1 else advantages
    if shaping.polarity_by == "advantage":
        return a > 0, a < 0
    if correct is None:
        raise ValueError("shaping.polarity_by is correctness: shape() needs correct")
    return correct[:, None] & (a != 0), ~correct[:, None] & (a != 0)


def _weigh(
    shaped: Tensor, side: Tensor, ranked: Tensor, mask: Tensor, part: TokenWeights, weight: float, shaping: Shaping
) -> None:
    """Multiply `shaped` (N, T), in place, by `weight` at the selected tokens of one polarity."""
    inclusive = shaping.ties == "inclusive"
    if shaping.scope == "batch":
        candidates = mask & side
        count = floor_count(row_counts(candidates).sum(), part.ratio)
        chosen = extreme_of_all(ranked, candidates, count, part.end, inclusive)
        shaped.mul_(torch.where(chosen, weight, 1.0))
        return
    rows = side.any(1).nonzero()[:, 0]
    for chunk in rows.split(max(1, _CHUNK // max(1, mask.shape[1]))):
        values = ranked[chunk] if part.end == "low" else -ranked[chunk]
        inside = mask[chunk]
        chosen = lowest(values, inside, floor_count(row_counts(inside), part.ratio), inclusive) & side[chunk]
        shaped[chunk] = shaped[chunk] * torch.where(chosen, weight, 1.0)


def _by_probability_and_entropy(
    shaping: Shaping, shaped: Tensor, logp_old: Tensor, entropy_old: Tensor | None, mask: Tensor
) -> None:
    """Weigh `shaped` (N, T), in place, by each token's probability, then add the entropy term."""
    weight, term = shaping.probability_weight, shaping.entropy_term
    if weight is None and term is None:
        return
    rows = max(1, _CHUNK // max(1, mask.shape[1]))
    for start in range(0, mask.shape[0], rows):
        chunk = slice(start, start + rows)
        inside = mask[chunk]
        if weight is not None:
            p = torch.where(inside, logp_old[chunk].float(), 0.0).exp_()
            shaped[chunk] *= p.mul_(weight.alpha).add_(1 - weight.alpha)
        if term is not None:
            entropy = torch.where(inside, given(entropy_old, "entropy_old")[chunk].float(), 0.0)
            shaped[chunk] += torch.minimum(entropy.mul_(term.alpha), shaped[chunk].abs().div_(term.kappa))


def scale_path(name: str) -> str:
    """Where the schedule of a polarity's token weights stands in a method."""
    return f"shaping.{name}.scale"
