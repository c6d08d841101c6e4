"""Which parts do not go together, and why: checked when a method is made, so when a configuration is read.

Everything else composes. Token weights (A3PO's and the others in `shaping`) scale a token's loss and gradient, which is
the same as scaling its advantage wherever a token has a loss of its own; where a response has one loss for all of its
tokens there is nothing to scale token by token.
"""

from typing import TYPE_CHECKING

from polarity.methods.advantages import SignedAdvantage
from polarity.methods.regularizers import KL
from polarity.methods.schedules import ClosedLoop
from polarity.methods.shaping import Shaping
from polarity.methods.surrogates import BAPO, GSPO, Clip
from polarity.methods.token_masks import ForkTokens
from polarity.methods.token_penalties import LpReg

if TYPE_CHECKING:
    from polarity.methods.method import Method


def conflict(method: "Method") -> str | None:
    """Why the method cannot be, with what to use instead; None if it can."""
    return next((reason for rule in _RULES if (reason := rule(method))), None)


def _one_loss_per_response(method: "Method") -> str | None:
    surrogate = method.surrogate
    if not surrogate.per_response:
        return None
    correction = method.correction
    by_token = {
        "shaping of tokens": method.shaping.by_token,
        f"advantage.kind {method.advantage.kind}": method.advantage.token_level,
        "token_mask": method.token_mask is not None,
        "token_penalty": method.token_penalty is not None,
        "correction.level token": correction is not None and correction.level == "token",
    }
    part = next((name for name, there in by_token.items() if there), None)
    if part is None:
        return None
    instead = "set surrogate.form: token" if isinstance(surrogate, GSPO) else "use surrogate.kind clip or sapo"
    return (
        f"surrogate {surrogate.kind} has one loss for a whole response and averages what differs between its tokens, "
        f"so {part} would not act on tokens: {instead}, or drop it"
    )


def _two_choosers(method: "Method") -> str | None:
    mask = method.token_mask
    if mask is not None and method.token_penalty is not None:
        return "token_mask and token_penalty each choose tokens of their own: set one of them to null"
    if mask is not None and mask.scope == "microbatch" and method.surrogate.needs_bounds:
        return (
            f"token_mask.scope microbatch and surrogate {method.surrogate.kind}, whose bounds are the mini-batch's, do "
            f"not go together: set token_mask.scope: minibatch"
        )
    return None


def _penalty_without_clip(method: "Method") -> str | None:
    if method.token_penalty is None or isinstance(method.surrogate, Clip):
        return None
    return (
        f"token_penalty leaves the chosen tokens' ratio unclipped, which is only defined for surrogate.kind clip, not "
        f"{method.surrogate.kind}: set surrogate: {{kind: clip}}, or token_penalty: null"
    )


def _dropped_polarity(method: "Method") -> str | None:
    dropped = method.filter.dropped
    if dropped is None:
        return None
    if getattr(method.shaping, dropped):
        return (
            f"filter.polarity {method.filter.polarity} drops the samples that shaping.{dropped} weights: "
            f"set shaping.{dropped}: null, or filter.polarity: all"
        )
    unused = {
        f"shaping.{dropped}_weight": getattr(method.shaping, f"{dropped}_weight") != 1,
        "surrogate bapo, which balances the polarities,": isinstance(method.surrogate, BAPO),
        "off_policy_mask": dropped == "negative" and method.off_policy_mask is not None,
        "token_penalty lp_reg": dropped == "negative" and isinstance(method.token_penalty, LpReg),
    }
    if isinstance(method.advantage, SignedAdvantage):
        default = SignedAdvantage.model_fields[dropped].default
        unused[f"advantage.{dropped}"] = getattr(method.advantage, dropped) != default
    part = next((name for name, there in unused.items() if there), None)
    if part is None:
        return None
    return (
        f"{part} needs the {dropped} samples that filter.polarity {method.filter.polarity} drops: leave it out, or set "
        f"filter.polarity: all"
    )


def _idle_estimator(method: "Method") -> str | None:
    if method.kl.coefficient or method.kl.estimator == KL.model_fields["estimator"].default:
        return None
    return f"kl.estimator {method.kl.estimator} has no effect while kl.coefficient is 0: set kl.coefficient, or drop it"


def _kept_denominator(method: "Method") -> str | None:
    mask = method.token_mask
    if not isinstance(mask, ForkTokens) or mask.denominator == "all" or method.aggregation == "token_mean":
        return None
    return (
        f"token_mask.denominator kept divides by the kept tokens, which aggregation {method.aggregation} does not "
        f"count: set aggregation: token_mean, or token_mask.denominator: all"
    )


def _idle_shaping(method: "Method") -> str | None:
    shaping, default = method.shaping, Shaping()
    by_polarity = bool(shaping.parts) or (shaping.positive_weight, shaping.negative_weight) != (1.0, 1.0)
    idle = {"scope": bool(shaping.parts), "ties": bool(shaping.parts), "polarity_by": by_polarity}
    for name, used in idle.items():
        if not used and getattr(shaping, name) != getattr(default, name):
            return f"shaping.{name} has nothing to act on: set shaping.positive or shaping.negative, or drop it"
    return None


def _runaway_loop(method: "Method") -> str | None:
    for name, part in method.shaping.parts:
        loop, end = part.scale, {"positive": "high", "negative": "low"}[name]
        if isinstance(loop, ClosedLoop) and loop.metric == "entropy" and part.by == "prob" and part.end == end:
            return (
                f"shaping.{name}.scale: more weight on {name} tokens of {end} probability lowers entropy, and a closed "
                f"loop that raises it when entropy is low would run away: use a decay, or the other end"
            )
    return None


def _unread_reward(method: "Method") -> str | None:
    if method.overlong is None or not isinstance(method.advantage, SignedAdvantage):
        return None
    return (
        "overlong changes rewards, which a signed advantage does not read (graded, it reads them as scores in [0, 1]): "
        "set overlong: null, or advantage: {kind: group}"
    )


_RULES = (
    _one_loss_per_response,
    _two_choosers,
    _penalty_without_clip,
    _dropped_polarity,
    _unread_reward,
    _idle_estimator,
    _kept_denominator,
    _idle_shaping,
    _runaway_loop,
)
