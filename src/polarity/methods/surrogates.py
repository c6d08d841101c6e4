"""Policy losses: one configuration and one function each, (n, T) tokens -> (n, T) losses.

n responses, T padded length, r the importance ratio, A the advantage. A new loss is a `PolicyLoss` with a `kind` and a
`token_loss`, and a place in `Surrogate`; masking, weights, aggregation and metrics are not its business. Losses are
linear in the advantage's size, so a weight on the advantage is a weight on the token's loss and gradient (for `bapo`
once its bounds are chosen).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor

from polarity.methods.inputs import LossInputs, given
from polarity.methods.part import Part, Unit

Positive = Annotated[float, Field(gt=0)]
AboveOne = Annotated[float, Field(gt=1)]


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """What a surrogate sees: float32 or better, 0 outside the mask (and ratio 1), so that garbage has no gradient.

    log_ratio: logp - logp_old clamped to +-20; ratio: its exponential. entropy: of the current policy, without
    gradient, only if the surrogate asks for it. bounds: what the surrogate chose for the whole mini-batch.
    """

    logp: Tensor
    logp_old: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    bounds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: LossInputs) -> "PolicyTokens":
        mask = inputs.mask
        logp = torch.where(mask, at_least_float32(inputs.logp), 0.0)
        logp_old = torch.where(mask, at_least_float32(inputs.logp_old).detach(), 0.0)
        advantages = torch.where(mask, at_least_float32(inputs.advantages).detach(), 0.0)
        log_ratio = (logp - logp_old).clamp(-20, 20)
        entropy = None if inputs.entropy is None else inputs.entropy.detach()
        bounds = {} if inputs.select is None else inputs.select.values
        return cls(logp, logp_old, log_ratio, log_ratio.exp(), advantages, mask, entropy, bounds)

    def mean(self, values: Tensor) -> Tensor:
        """(n, T) values, zero outside the mask -> (n, 1), the mean over each response's tokens."""
        return values.sum(1, keepdim=True) / self.mask.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """loss: (n, T) with gradient; clipped, dual_clipped: (n, T) bool, where the bound on the ratio is in force."""

    loss: Tensor
    clipped: Tensor
    dual_clipped: Tensor | None = None


class PolicyLoss(Part):
    """Base of the policy losses, with what the rest of a method may ask of one."""

    @property
    def label(self) -> str:
        """Kind and bounds (low / high / dual), for tables."""
        fields = type(self).model_fields
        names = [name for name in ("low", "high", "positive", "negative", "dual") if name in fields]
        bounds = [getattr(self, name) for name in names if name != "dual" or getattr(self, name)]
        kind = getattr(self, "kind", type(self).__name__.lower())
        return f"{kind} " + " / ".join("-" if bound is None else f"{bound:g}" for bound in bounds)

    @property
    def per_response(self) -> bool:
        """One loss for the whole response, which therefore needs one advantage for the whole response."""
        return False

    @property
    def asymmetric(self) -> bool:
        """Whether the loss itself treats positive and negative samples differently."""
        return False

    @property
    def needs_entropy(self) -> bool:
        """Whether the current policy's entropy is read."""
        return False

    @property
    def needs_bounds(self) -> bool:
        """Whether the loss looks at a whole mini-batch first."""
        return False

    def bounds(self, inputs: LossInputs) -> dict[str, float]:
        """Numbers for the losses of a mini-batch's micro-batches, from the whole mini-batch."""
        return {}

    def token_loss(self, tokens: PolicyTokens) -> TokenLoss:
        """(n, T) losses with gradient with respect to tokens.logp."""
        raise NotImplementedError


class Clip(PolicyLoss):
    """PPO's clipped ratio with separate bounds (DAPO's clip-higher) and an optional bound for wrong responses."""

    kind: Literal["clip"] = "clip"
    """The clipped ratio of PPO."""
    low: Unit | None = 0.2
    """The ratio is clipped from below at 1 - low; null: not at all."""
    high: NonNegativeFloat | None = 0.2
    """The ratio is clipped from above at 1 + high; larger than low is DAPO's clip-higher; null: not at all."""
    dual: AboveOne | None = None
    """Dual clip: where A < 0 the loss is at most -A * dual, and a larger ratio has no gradient; null: off."""

    @property
    def asymmetric(self) -> bool:
        return self.low != self.high or self.dual is not None

    def token_loss(self, tokens: PolicyTokens) -> TokenLoss:
        """max(-A r, -A clip(r)), and where A < 0 at most -A * dual."""
        floor, ceiling = _edges(self.low, self.high)
        return _clipped(tokens, floor, ceiling, self.dual)


class EntropyWidths(Part):
    """Other clip widths for tokens of high entropy (the code of Archer and ASPO)."""

    quantile: Unit = 0.8
    """Tokens above this quantile of their response's entropies, under the current policy, have high entropy."""
    low: Unit = 0.4
    """Clip width below 1 for them."""
    high: NonNegativeFloat = 0.4
    """Clip width above 1 for them."""


class ASPO(PolicyLoss):
    """Asymmetric importance sampling: the ratio turned over for positive samples, so that rare tokens learn fast.

    The gradient is that of -A * w * log p with w = 1/r where A > 0 (none where r > 1 + high) and w = r where A < 0
    (none where r < 1 - low), both at most `cap`; the loss's value cannot be compared with PPO's.
    """

    kind: Literal["aspo"] = "aspo"
    """The ratio of positive samples is inverted."""
    low: Unit = 0.2
    """Where A < 0 a ratio below 1 - low has no gradient."""
    high: NonNegativeFloat = 0.2
    """Where A > 0 a ratio above 1 + high has no gradient."""
    cap: AboveOne = 3.0
    """Largest weight; beyond it the gradient keeps this weight (soft dual clip)."""
    high_entropy: EntropyWidths | None = None
    """Wider bounds for tokens of high entropy; null: the same for all."""

    @property
    def label(self) -> str:
        wide = self.high_entropy
        return super().label + (f", {wide.low:g} / {wide.high:g}" if wide else "")

    @property
    def asymmetric(self) -> bool:
        return True

    @property
    def needs_entropy(self) -> bool:
        return self.high_entropy is not None

    def token_loss(self, tokens: PolicyTokens) -> TokenLoss:
        """A > 0: -A / r's gradient weight by a straight-through ratio; A < 0: -A r; both capped softly."""
        a, r = tokens.advantages, tokens.ratio
        floor, ceiling = self._widths(tokens)
        positive = a > 0
        inside = torch.where(positive, torch.minimum(r, ceiling), torch.maximum(r, floor))
        fixed = inside.detach()
        weight = torch.where(positive, 1 / fixed, fixed)
        capped = (weight > self.cap) & (a != 0)
        loss = torch.where(positive, -a * inside / (fixed * fixed), -a * inside)
        loss = torch.where(capped, -a * self.cap * tokens.logp, loss)
        clipped = torch.where(positive, r > ceiling, (r < floor) & (a < 0))
        return TokenLoss(loss, clipped, capped)

    def _widths(self, tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
        r = tokens.ratio
        wide = self.high_entropy
        if wide is None or not r.numel():
            return r.new_tensor(1 - self.low), r.new_tensor(1 + self.high)
        entropy = torch.where(tokens.mask, at_least_float32(given(tokens.entropy, "entropy")), torch.nan)
        high = entropy > entropy.nanquantile(wide.quantile, dim=1, keepdim=True)
        return _either(high, 1 - wide.low, 1 - self.low, r), _either(high, 1 + wide.high, 1 + self.high, r)


class GSPO(PolicyLoss):
    """Sequence-level ratio: the geometric mean of the tokens' ratios, clipped once for the whole response."""

    kind: Literal["gspo"] = "gspo"
    """One ratio for the whole response."""
    low: Unit = 3e-4
    """The ratio is clipped from below at 1 - low."""
    high: NonNegativeFloat = 4e-4
    """The ratio is clipped from above at 1 + high."""
    form: Literal["sequence", "token"] = "sequence"
    """sequence: one loss a response. token: its value, with each token's own gradient and advantage (GSPO-token)."""

    @property
    def per_response(self) -> bool:
        return self.form == "sequence"

    @property
    def asymmetric(self) -> bool:
        return self.low != self.high

    def token_loss(self, tokens: PolicyTokens) -> TokenLoss:
        """max(-A s, -A clip(s)) at every token; where A is one number a response both forms have the same gradient."""
        log_ratio = tokens.mean(tokens.log_ratio)
        if self.form == "token":
            log_ratio = log_ratio.detach() + tokens.logp - tokens.logp.detach()
        ratio = log_ratio.expand_as(tokens.logp).exp()
        return _clipped(tokens, 1 - self.low, 1 + self.high, None, ratio)


class CISPO(PolicyLoss):
    """Clipped importance weights on log-probabilities: no token ever loses its gradient."""

    kind: Literal["cispo"] = "cispo"
    """The ratio is a clipped weight without gradient."""
    low: Unit | None = None
    """The weight is at least 1 - low; null: no bound (verl's low = 10)."""
    high: NonNegativeFloat = 0.2
    """The weight is at most 1 + high (TRL's epsilon_high is the bound itself: 5 there is 4 here)."""

    def token_loss(self, tokens: PolicyTokens) -> TokenLoss:
        """-A clip(r) log p, the weight without gradient; the bounds do not look at the sign of A."""
        r = tokens.ratio.detach()
        weight = r.clamp(*_edges(self.low, self.high))
        return TokenLoss(-weight * tokens.advantages * tokens.logp, weight != r)


class GMPO(PolicyLoss):
    """Geometric-mean ratio of a response, each token's log-ratio clipped before the mean."""

    kind: Literal["gmpo"] = "gmpo"
    """Geometric mean of clipped ratios."""
    low: NonNegativeFloat = 0.4
    """Where A < 0 a token's log-ratio is at least -low."""
    high: NonNegativeFloat = 0.4
    """Where A > 0 a token's log-ratio is at most high."""

    @property
    def per_response(self) -> bool:
        return True

    @property
    def asymmetric(self) -> bool:
        return self.low != self.high

    def token_loss(self, tokens: PolicyTokens) -> TokenLoss:
        """-A exp(mean of clipped log-ratios), the same at every token of a response."""
        a, log_ratio = tokens.advantages, tokens.log_ratio
        clipped = ((a > 0) & (log_ratio > self.high)) | ((a < 0) & (log_ratio < -self.low))
        near = torch.where(clipped, log_ratio.detach().clamp(-self.low, self.high), log_ratio)
        near = torch.where(a == 0, 0.0, near)
        loss = -tokens.mean(a) * tokens.mean(near).exp()
        return TokenLoss(loss.expand_as(a), clipped)


class SAPO(PolicyLoss):
    """A smooth gate on the ratio instead of a clip, a little steeper for negative samples."""

    kind: Literal["sapo"] = "sapo"
    """A sigmoid gate on the ratio."""
    positive: Positive = 1.0
    """Temperature of the gate where A > 0; larger closes it sooner."""
    negative: Positive = 1.05
    """Temperature of the gate elsewhere."""

    @property
    def asymmetric(self) -> bool:
        return self.positive != self.negative

    def token_loss(self, tokens: PolicyTokens) -> TokenLoss:
        """-A (4 / tau) sigmoid(tau (r - 1)): gradient weight 1 at r = 1, falling to 0 on both sides."""
        tau = _either(tokens.advantages > 0, self.positive, self.negative, tokens.ratio)
        gate = 4 / tau * torch.sigmoid(tau * (tokens.ratio - 1))
        return TokenLoss(-tokens.advantages * gate, torch.zeros_like(tokens.mask))


class BAPO(PolicyLoss):
    """Clip bounds searched anew for each mini-batch, until positive samples have their share of the loss.

    The bounds are ratios, not distances from 1. The share is counted as in the authors' code: tokens with A >= 0 count
    A min(r, ceiling), the others |A| max(r, floor), clipped or not; so raising the floor, which the search does first,
    takes gradient from negative tokens but never raises the share. Text and code also disagree in the target: the text
    has the share of the whole, the code positive over negative, share / (1 - share).
    """

    kind: Literal["bapo"] = "bapo"
    """Clip bounds that balance the polarities."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Target share of positive samples in the loss (0.5: the ratio 1 of the authors' YAML; their ratio 0.5 is 1/3)."""
    floor: Unit = 0.6
    """Where the search for the lower bound of the ratio starts."""
    floor_max: Unit = 0.9
    """Where it ends."""
    ceiling: Annotated[float, Field(ge=1)] = 1.2
    """Where the search for the upper bound of the ratio starts."""
    ceiling_max: Annotated[float, Field(ge=1)] = 3.0
    """Where it ends."""
    step: Positive = 0.05
    """How far a bound moves at a time."""
    dual: AboveOne | None = 3.0
    """Dual clip, as in `clip`; null: off."""

    @model_validator(mode="after")
    def _check(self) -> "BAPO":
        if self.floor > self.floor_max or self.ceiling > self.ceiling_max:
            raise ValueError("floor must not be above floor_max, nor ceiling above ceiling_max")
        return self

    @property
    def label(self) -> str:
        dual = f" / {self.dual:g}" if self.dual else ""
        return f"bapo {self.floor:g}-{self.floor_max:g} / {self.ceiling:g}-{self.ceiling_max:g}{dual}"

    @property
    def asymmetric(self) -> bool:
        return True

    @property
    def needs_bounds(self) -> bool:
        return True

    @torch.no_grad()
    def bounds(self, inputs: LossInputs) -> dict[str, float]:
        """clip_floor and clip_ceiling, searched: first the floor is raised, then the ceiling."""
        tokens = PolicyTokens.of(inputs)
        a, r = tokens.advantages.double(), tokens.ratio.double()
        gain, ratio_gain = a[a > 0], r[a > 0]
        pain, ratio_pain = -a[a < 0], r[a < 0]
        target = self.share / (1 - self.share)

        def short(floor: float, ceiling: float) -> bool:
            positive = (gain * ratio_gain.clamp(max=ceiling)).sum()
            return bool(positive < target * (pain * ratio_pain.clamp(min=floor)).sum())

        floor, ceiling = self.floor, self.ceiling
        while short(floor, ceiling) and floor < self.floor_max:
            floor = min(floor + self.step, self.floor_max)
        while short(floor, ceiling) and ceiling < self.ceiling_max:
            ceiling = min(ceiling + self.step, self.ceiling_max)
        return {"clip_floor": floor, "clip_ceiling": ceiling}

    def token_loss(self, tokens: PolicyTokens) -> TokenLoss:
        """The clipped loss with the mini-batch's bounds."""
        return _clipped(tokens, tokens.bounds["clip_floor"], tokens.bounds["clip_ceiling"], self.dual)


AnySurrogate = Clip | ASPO | GSPO | CISPO | GMPO | SAPO | BAPO
Surrogate = Annotated[AnySurrogate, Field(discriminator="kind")]


def _clipped(
    tokens: PolicyTokens, floor: float, ceiling: float, dual: float | None, ratio: Tensor | None = None
) -> TokenLoss:
    """max(-A r, -A clip(r, floor, ceiling)), and where A < 0 at most -A * dual."""
    ratio = tokens.ratio if ratio is None else ratio
    negated = -tokens.advantages
    free = negated * ratio
    bounded = negated * ratio.clamp(floor, ceiling)
    loss = torch.maximum(free, bounded)
    clipped = bounded > free
    if dual is None:
        return TokenLoss(loss, clipped)
    most = negated * dual
    dual_clipped = (loss > most) & (negated > 0)
    return TokenLoss(torch.where(dual_clipped, most, loss), clipped, dual_clipped)


def _edges(low: float | None, high: float | None) -> tuple[float, float]:
    """Bounds on a ratio from distances to 1; without one, 0 or infinity."""
    return 0.0 if low is None else 1 - low, float("inf") if high is None else 1 + high


def _either(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """`yes` where the condition holds, `no` elsewhere, in the precision of `like`."""
    return torch.where(condition, like.new_tensor(yes), like.new_tensor(no))


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
