"""Token-level shaping on every method that allows it, and the combinations that are refused. n responses, T tokens."""

import re
from dataclasses import replace

import pytest
import torch
from minibatches import NAMES, advantages, example, gradients, method, prepared, rollout_step
from pydantic import ValidationError

from polarity.errors import UserError
from polarity.methods import METHODS, Method, build_method
from polarity.methods.part import merged

A3PO = METHODS["a3po"].model_dump()["shaping"]
ALLOWED = [name for name in NAMES if not METHODS[name].surrogate.per_response]


def with_a3po(m):
    """The method with A3PO's token weights, without those of a polarity that it drops."""
    sides = {side for side in ("positive", "negative") if side != m.filter.dropped}
    return m.vary({"shaping": {side: A3PO[side] for side in sides}})


def weighted_tokens(m, a, step):
    """(N, T) bool: the fifth of each response that A3PO weighs, by the token's own sign."""
    chosen = torch.zeros_like(step.mask)
    a = a[:, None].expand_as(step.mask) if a.dim() == 1 else a
    for i, length in enumerate(step.mask.sum(1).tolist()):
        k = min(length, max(1, length // 5))
        order = step.logp_old[i, :length].argsort()
        for side, ends in (("positive", order[:k]), ("negative", order[len(order) - k :])):
            if side != m.filter.dropped:
                chosen[i, ends] |= (a[i, ends] > 0) if side == "positive" else (a[i, ends] < 0)
    return chosen


@pytest.mark.parametrize("name", ALLOWED)
def test_token_weights_apply_to_the_advantages_of_every_method(name):
    plain = method(name).vary({"shaping": {"positive": None, "negative": None, "entropy_term": None}})
    m = with_a3po(plain)
    step = rollout_step(5)
    a = advantages(m, step)
    one = plain.shape(a, step.logp_old, step.entropy_old, step.mask, correct=step.correct)
    for s, weight in ((0, 2.0), (100, 1.5), (200, 1.0)):
        shaped = m.shape(a, step.logp_old, step.entropy_old, step.mask, correct=step.correct, step=s)
        chosen = weighted_tokens(m, a, step)
        assert chosen.any()
        torch.testing.assert_close(shaped, torch.where(chosen, weight * one, one))


@pytest.mark.parametrize("name", ALLOWED)
def test_a_weight_on_the_advantage_is_a_weight_on_the_tokens_loss_and_gradient(name):
    """Of the policy loss, with what was chosen for the mini-batch held; penalties are not weighted."""
    m = method(name).vary({"kl.coefficient": 0.0, "entropy_bonus": 0.0})
    inputs = prepared(m, example(m, 9))
    weights = torch.tensor([1.0, 2.0, 0.0, 0.2, 5.0, 1.5], dtype=torch.float64).expand(8, 6)
    weighted = replace(inputs, advantages=inputs.advantages * weights)
    idle = m.loss(replace(inputs, advantages=0 * inputs.advantages)).loss  # penalties alone
    base = gradients(m.loss(inputs).loss - idle, inputs)[0]
    found = gradients(m.loss(weighted).loss - idle, inputs)[0]
    torch.testing.assert_close(found, base * weights)
    assert base.any()
    loss = torch.tensor(0.0, dtype=torch.float64)
    for t in range(6):  # the loss is the sum of its columns, each weighted alone
        column = torch.zeros(6, dtype=torch.float64)
        column[t] = 1.0
        loss += weights[0, t] * (m.loss(replace(inputs, advantages=inputs.advantages * column)).loss - idle).detach()
    torch.testing.assert_close(m.loss(weighted).loss - idle, loss)


@pytest.mark.parametrize(("name", "kind"), [("gspo", "gspo"), ("gmpo", "gmpo")])
def test_losses_of_a_whole_response_refuse_token_weights(name, kind):
    with pytest.raises(UserError, match=f"surrogate {kind} has one loss for a whole response"):
        with_a3po(METHODS[name])


# refusals: (base, changes, what the message says, what makes it right)
TOKENS = {"shaping.positive": {"end": "low", "scale": 2.0}}
PER_RESPONSE = [
    (TOKENS, "shaping of tokens"),
    ({"shaping.negative": {"end": "high", "scale": 2.0}}, "shaping of tokens"),
    ({"shaping.probability_weight": {"alpha": 0.2}}, "shaping of tokens"),
    ({"shaping.entropy_term": {"alpha": 0.2}}, "shaping of tokens"),
    ({"advantage": {"kind": "gae"}}, "advantage.kind gae"),
    ({"advantage": {"kind": "returns"}}, "advantage.kind returns"),
    ({"token_mask": {"kind": "fork"}}, "token_mask"),
    ({"token_mask": {"kind": "clip_cov"}}, "token_mask"),
    ({"correction": {"kind": "truncated"}}, "correction.level token"),
    ({"correction": {"kind": "masked"}}, "correction.level token"),
]
REFUSED = [
    *(
        ("gspo", changes, f"so {part} would not act on tokens: set surrogate.form: token", {"surrogate.form": "token"})
        for changes, part in PER_RESPONSE
    ),
    *(
        ("gmpo", changes, f"so {part} would not act on tokens: use surrogate.kind clip or sapo", {"surrogate": fix})
        for changes, part in PER_RESPONSE
        for fix in ({"kind": "clip"}, {"kind": "sapo"})
    ),
    ("gmpo", {"correction": {"kind": "masked"}}, "correction.level token", {"correction.level": "sequence"}),
    (
        "gmpo",
        {"token_penalty": {"kind": "kl_cov"}},
        "token_penalty would not act on tokens: use surrogate.kind clip",
        {"surrogate": {"kind": "clip"}},
    ),
    *(
        ("kl_cov", {"token_mask": {"kind": mask}}, "set one of them to null", {"token_penalty": None})
        for mask in ("fork", "clip_cov")
    ),
    (
        "bapo",
        {"token_mask": {"kind": "fork", "scope": "microbatch"}},
        "set token_mask.scope: minibatch",
        {"token_mask.scope": "minibatch"},
    ),
    *(
        (base, {"surrogate": {"kind": kind}}, f"not {kind}: set surrogate: {{kind: clip}}", fix)
        for base in ("kl_cov", "lp_reg")
        for kind in ("sapo", "cispo", "aspo", "bapo")
        for fix in ({"surrogate": {"kind": "clip"}}, {"token_penalty": None})
    ),
    (
        "fork_tokens",
        {"token_mask.denominator": "kept", "aggregation": "seq_mean_token_mean"},
        "does not count: set aggregation: token_mean",
        {"aggregation": "token_mean"},
    ),
    ("grpo", {"shaping.scope": "batch"}, "shaping.scope has nothing to act on", TOKENS),
    ("ar", {"shaping.ties": "inclusive"}, "shaping.ties has nothing to act on", TOKENS),
    ("dapo", {"shaping.polarity_by": "correctness"}, "polarity_by has nothing", {"shaping.negative_weight": 2.0}),
    ("psr", {"advantage.negative": -3.0}, "advantage.negative needs the negative", {"filter.polarity": "all"}),
    ("nsr", {"advantage.positive": 3.0}, "advantage.positive needs the positive", {"advantage.positive": 1.0}),
    ("a3po", {"filter.polarity": "positive"}, "set shaping.negative: null", {"shaping.negative": None}),
    ("a3po", {"filter.polarity": "negative"}, "set shaping.positive: null", {"shaping.positive": None}),
    ("a3po", {"filter.polarity": "negative"}, "or filter.polarity: all", {"filter.polarity": "all"}),
    *(
        (
            base,
            {"filter.polarity": "positive", **changes},
            f"{part} needs the negative samples",
            {"filter.polarity": "all"},
        )
        for base, changes, part in (
            ("bapo", {}, "surrogate bapo, which balances the polarities,"),
            ("opsm", {}, "off_policy_mask"),
            ("lp_reg", {}, "token_penalty lp_reg"),
            ("grpo", {"shaping.negative_weight": 2.0}, "shaping.negative_weight"),
        )
    ),
    ("opsm", {"filter.polarity": "positive"}, "drops: leave it out", {"off_policy_mask": None}),
    ("lp_reg", {"filter.polarity": "positive"}, "drops: leave it out", {"token_penalty": None}),
    ("bapo", {"filter.polarity": "negative"}, "needs the positive samples", {"surrogate": {"kind": "clip"}}),
    ("psr", {"shaping.negative_weight": 0.5}, "or set filter.polarity: all", {"shaping.negative_weight": 1.0}),
    ("nsr", {"shaping.positive_weight": 0.5}, "needs the positive samples", {"filter.polarity": "all"}),
    ("grpo", {"kl.estimator": "k2"}, "has no effect while kl.coefficient is 0", {"kl.coefficient": 0.1}),
    *(
        (
            "grpo",
            {f"shaping.{side}": {"end": end, "scale": {"kind": "closed_loop", "low": 0.2, "high": 0.4}}},
            "would run away: use a decay, or the other end",
            {f"shaping.{side}": fix},
        )
        for side, end, other in (("positive", "high", "low"), ("negative", "low", "high"))
        for fix in ({"end": other}, {"scale": {"kind": "decay", "start": 2.0, "per_step": 0.1}}, {"by": "entropy"})
    ),
    *(
        ("reinforce", {"overlong": {"buffer": 10}, "advantage.graded": graded}, "set overlong: null", fix)
        for graded in (False, True)
        for fix in ({"overlong": None}, {"advantage": {"kind": "group"}})
    ),
]


@pytest.mark.parametrize(("base", "changes", "message", "fix"), REFUSED)
def test_what_does_not_go_together_is_refused_wherever_it_is_said_and_the_fix_works(base, changes, message, fix):
    data = merged(METHODS[base].model_dump(), changes)
    for make in (
        lambda: build_method({"base": base, **changes}),
        lambda: build_method(data),
        lambda: METHODS[base].vary(changes),
        lambda: Method.build_on(METHODS[base], **changes),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            make()
        assert "\n" not in str(error.value)
    with pytest.raises(ValidationError, match=re.escape(message)):
        Method(**data)
    assert Method(**merged(data, fix))


def test_a_phase_is_refused_for_the_same_reasons():
    spec = {"phases": [{"method": {"base": "gmpo", **TOKENS}, "steps": 3}, {"method": "grpo"}]}
    with pytest.raises(UserError, match=r"use surrogate\.kind clip or sapo"):
        build_method(spec)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("gspo", {"correction": {"kind": "truncated", "level": "sequence"}}),
        ("gmpo", {"shaping.positive_weight": 0.5, "off_policy_mask": {}, "kl.coefficient": 0.1}),
        ("bapo", {"token_mask": {"kind": "fork"}}),
        ("bapo", {"token_mask": {"kind": "clip_cov"}}),
        ("bapo", {"token_mask": {"kind": "fork", "scope": "step", "entropy_from": "old"}}),
        ("sapo", {"token_mask": {"kind": "clip_cov"}}),
        ("lp_reg", {"off_policy_mask": {}, "correction": {"kind": "masked"}, **TOKENS}),
        ("psr", {"shaping.positive": {"end": "low", "scale": 2.0}, "shaping.probability_weight": {}}),
        ("ppo", {"surrogate": {"kind": "gspo", "form": "token"}}),
    ],
)
def test_everything_else_goes_together(base, changes):
    m = METHODS[base].vary(changes)
    inputs = prepared(m, example(m, 10))
    assert gradients(m.loss(inputs).loss, inputs)[0].isfinite().all()
