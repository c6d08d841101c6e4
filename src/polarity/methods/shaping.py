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

from polarity.methods.part import Part
from polarity.methods.schedules import Schedule, State, weight_at
from polarity.methods.selection import floor_count, lowest, lowest_of_all, row_counts

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


class Shaping(Part):
    """How positive and negative samples, and tokens within them, are weighted. Weights multiply."""

    positive_weight: NonNegativeFloat = 1.0
    """Weight on the advantage of every positive sample."""
    negative_weight: NonNegativeFloat = 1.0
    """Weight on the advantage of every negative sample."""
    positive: TokenWeights | None = None
    """Weight on some tokens of positive samples."""
    negative: TokenWeights | None = None
    """Weight on some tokens of negative samples."""
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
    for name, part in shaping.parts:
        weight = weight_at(part.scale, step, state)
        if weight == 1.0 or part.ratio == 0:
            continue
        ranked = entropy_old if part.by == "entropy" else logp_old
        if ranked is None:
            raise ValueError(f"shaping.{name}.by is entropy: shape() needs entropy_old (see Method.needs)")
        _weigh(shaped, sides[name], ranked, mask, part, weight, shaping)
    return torch.where(mask, shaped, 0.0) if advantages.dim() == 2 else shaped


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
        values = ranked if part.end == "low" else -ranked
        chosen = lowest_of_all(values, candidates, floor_count(candidates.sum(), part.ratio), inclusive)
        shaped.mul_(torch.where(chosen, weight, 1.0))
        return
    rows = side.any(1).nonzero()[:, 0]
    for chunk in rows.split(max(1, _CHUNK // max(1, mask.shape[1]))):
        values = ranked[chunk] if part.end == "low" else -ranked[chunk]
        inside = mask[chunk]
        chosen = lowest(values, inside, floor_count(row_counts(inside), part.ratio), inclusive) & side[chunk]
        shaped[chunk] = shaped[chunk] * torch.where(chosen, weight, 1.0)
