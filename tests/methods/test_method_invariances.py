"""Every method: gradients against finite differences, and what must not change a loss. n responses, T tokens."""

import math
from dataclasses import replace

import pytest
import torch
from minibatches import (
    AGGREGATIONS,
    NAMES,
    advantages,
    batch,
    example,
    gradients,
    method,
    prepared,
    rollout_step,
    rows,
    shaped,
    widened,
)

from polarity.methods import METHODS, Denominators, LossInputs, Method, TokenLoss

CORRECTIONS = [
    {"kind": "truncated", "level": "sequence", "cap": 1.1},
    {"kind": "masked", "level": "sequence", "low": 0.8, "high": 1.2},
    {"kind": "truncated"},
    {"kind": "masked"},
]
# Losses with weights that carry no gradient: their gradient is that of -w A log p with the weight held.
STRAIGHT_THROUGH = ["aspo", "aspo_archer", "cispo", "gspo_token"]


def corrections(m):
    return CORRECTIONS[:2] if m.surrogate.per_response else CORRECTIONS


def held_weights(name, inputs):
    """w of each token, from the definitions, one token at a time."""
    w = torch.zeros_like(inputs.logp)
    for i, length in enumerate(inputs.mask.sum(1).tolist()):
        ratios = (inputs.logp - inputs.logp_old)[i, :length].detach().exp()
        s = ratios.log().sum().div(max(length, 1)).exp().item()
        top = inputs.entropy[i, :length].detach().quantile(0.8).item() if length else 0.0
        for t, r in enumerate(ratios.tolist()):
            a, width = inputs.advantages[i, t].item(), 0.2
            if name == "aspo_archer" and inputs.entropy[i, t] > top:
                width = 0.4
            if name == "cispo":
                w[i, t] = min(r, 1.2)
            elif name == "gspo_token":
                w[i, t] = 0.0 if (a > 0 and s > 1 + 4e-4) or (a < 0 and s < 1 - 3e-4) else s
            elif a > 0:
                w[i, t] = 0.0 if r > 1 + width else min(1 / r, 3)
            elif a < 0:
                w[i, t] = 0.0 if r < 1 - width else min(r, 3)
    return w


def with_weights(m, weights):
    """The method with the token loss -w A log p."""

    class Held(Method):
        def token_loss(self, tokens):
            return TokenLoss(-weights * tokens.advantages * tokens.logp, torch.zeros_like(tokens.mask))

    return Held.build_on(m)


def same_gradients(found, expected, **tolerance):
    for g, h in zip(found, expected, strict=True):
        torch.testing.assert_close(g, h, **tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_gradcheck_in_double_precision(name, mode):
    m = method(name).vary({"aggregation": mode})
    inputs = prepared(m, example(m, 1, n=7, width=4))
    found = gradients(m.loss(inputs).loss, inputs)
    assert found[0].any()
    if name in STRAIGHT_THROUGH:
        m = with_weights(m, held_weights(name, inputs))
        same_gradients(found, gradients(m.loss(inputs).loss, inputs))
    read = ("logp", "entropy") if found[1].any() else ("logp",)
    assert torch.autograd.gradcheck(
        lambda *xs: m.loss(replace(inputs, **dict(zip(read, xs, strict=True)))).loss,
        [getattr(inputs, x) for x in read],
    )


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_gradcheck_with_a_correction(correction):
    m = METHODS["dapo"].vary({"correction": correction, "kl.coefficient": 0.1, "kl.estimator": "k1"})
    inputs = prepared(m, batch(2, n=7, width=4))
    assert torch.autograd.gradcheck(lambda logp: m.loss(replace(inputs, logp=logp)).loss, inputs.logp)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("split", [1, 3])
def test_micro_batches_add_up_to_the_mini_batch(name, mode, split):
    m = method(name)
    m = m.vary({"aggregation": mode, "correction": corrections(m)[split % len(corrections(m))]})
    inputs = prepared(m, example(m, 3))
    whole = m.loss(inputs)
    parts = [m.loss(rows(inputs, index)) for index in torch.arange(8).split(split)]
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-12)
    same_gradients(gradients(total, inputs), gradients(whole.loss, inputs), rtol=1e-12, atol=1e-12)
    for key, (value, count) in whole.metrics.items():
        assert sum(part.metrics[key][0] for part in parts) == pytest.approx(value)
        assert sum(part.metrics[key][1] for part in parts) == count


@pytest.mark.parametrize("name", NAMES)
def test_own_denominators_are_those_of_the_whole_batch(name):
    m = method(name)
    inputs = example(m, 4)
    of_the_batch = replace(prepared(m, inputs), denominators=Denominators.of(inputs.mask))
    torch.testing.assert_close(m.loss(inputs).loss, m.loss(of_the_batch).loss)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_padding_order_and_empty_responses_do_not_matter_and_garbage_stays_outside(name, mode):
    m = method(name)
    m = m.vary({"aggregation": mode, "correction": corrections(m)[0]})
    clean, dirty = example(m, 5), widened(example(m, 5, garbage=math.nan))
    expected = m.loss(prepared(m, clean))
    slopes = gradients(expected.loss, clean)
    order = torch.tensor([3, 0, 7, 1, 6, 5, 2, 4])
    # Clip-Cov draws by position, so another order is another draw: there the selection moves with its rows.
    reordered = rows(prepared(m, clean), order) if name == "clip_cov" else prepared(m, rows(clean, order))
    for inputs in (prepared(m, dirty), reordered, prepared(m, rows(clean, torch.arange(1, 8)))):
        out = m.loss(inputs)
        torch.testing.assert_close(out.loss, expected.loss)
        assert out.metrics == {k: (pytest.approx(v), n) for k, (v, n) in expected.metrics.items()}
        found = gradients(out.loss, inputs if inputs.logp.shape[1] > 6 else clean)
        assert all((g[:, 6:] == 0).all() for g in found)
        same_gradients([g[:, :6] for g in found], slopes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_fully_masked_batch_has_loss_and_gradient_zero(name, mode):
    m = method(name).vary({"aggregation": mode})
    inputs = example(m, garbage=math.nan)
    inputs = prepared(m, replace(inputs, mask=torch.zeros_like(inputs.mask)))
    out = m.loss(inputs)
    assert out.loss.item() == 0.0
    assert all(g.abs().sum() == 0 for g in gradients(out.loss, inputs))
    assert all(total == count == 0 for total, count in out.metrics.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_at_all_has_loss_zero(name, shape):
    m, nothing = method(name), torch.zeros(shape)
    tensors = dict.fromkeys(("entropy", "entropy_old", "logp_ref", "logp_rollout", "logp_proxy"), nothing)
    inputs = LossInputs(nothing.clone().requires_grad_(), nothing, nothing, nothing > 0, **tensors)
    assert m.loss(inputs).loss.item() == 0.0


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].skips_zero_advantage])
def test_scaling_advantages_scales_the_loss_and_rows_of_zero_carry_no_gradient(name):
    m = method(name)
    inputs = prepared(m, example(m, 6))
    tripled = replace(inputs, advantages=3 * inputs.advantages)
    torch.testing.assert_close(m.loss(tripled).loss, 3 * m.loss(inputs).loss)
    assert all((g[4] == 0).all() for g in gradients(m.loss(inputs).loss, inputs))
    some = torch.tensor([0, 1, 2, 3, 5, 6, 7])  # the learner leaves row 4 out; the denominators still count it
    torch.testing.assert_close(m.loss(rows(inputs, some)).loss, m.loss(inputs).loss)
    same_gradients(gradients(m.loss(rows(inputs, some)).loss, inputs), gradients(m.loss(inputs).loss, inputs))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(name, dtype):
    m = method(name)
    low = example(m, 7, dtype=dtype)
    up = {k: getattr(low, k) for k in LossInputs.__dataclass_fields__}
    up = {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in up.items()}
    out = m.loss(low)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, m.loss(LossInputs(**up)).loss)


@pytest.mark.parametrize("name", NAMES)
def test_correctness_that_disagrees_with_the_sign_of_the_advantage_splits_the_metrics_and_nothing_else(name):
    m = method(name)
    inputs = prepared(m, example(m, 8))
    by_sign = replace(inputs, correct=(inputs.advantages > 0).any(1))
    opposite = replace(by_sign, correct=~by_sign.correct)
    one, other = m.loss(by_sign), m.loss(opposite)
    assert one.loss == other.loss
    same_gradients(gradients(one.loss, inputs), gradients(other.loss, inputs), rtol=0, atol=0)
    assert one.metrics["positive/clip_fraction"] == other.metrics["negative/clip_fraction"]
    assert one.metrics["clip_fraction"] == other.metrics["clip_fraction"]


# a whole rollout step: rewards -> advantages -> shape


@pytest.mark.parametrize("name", NAMES)
def test_order_of_responses_and_padding_do_not_matter_to_shaped_advantages(name):
    m = method(name)
    step = rollout_step(1)
    expected = shaped(m, step, s=50)
    assert expected.isfinite().all()
    order = torch.tensor([10, 3, 0, 8, 1, 7, 2, 9, 5, 4, 6])
    torch.testing.assert_close(shaped(m, step.rows(order), s=50), expected[order])
    wide = shaped(m, step.widened(), s=50)
    torch.testing.assert_close(wide[:, :6], expected)
    assert (wide[:, 6:] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_rewards_of_01_and_pm1_train_alike(name):
    """Dr. GRPO and RLOO do not divide by a spread: there the advantages are twice as large.

    PPO: with the critic of the other scale, and without the KL penalty, whose size against the reward is a setting.
    """
    m = method(name)
    step = rollout_step(2)
    signs = replace(step, rewards=2 * step.rewards - 1)
    if name == "ppo":
        m, signs = m.vary({"advantage.reward_kl": 0.0}), replace(signs, values=2 * step.values - 1)
    factor = 2.0 if name in ("dr_grpo", "rloo") else 1.0
    assert torch.equal(
        m.keep(step.rewards, step.groups, step.correct), m.keep(signs.rewards, step.groups, step.correct)
    )
    torch.testing.assert_close(shaped(m, signs), factor * shaped(m, step), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].compares_group])
def test_equal_groups_and_groups_of_one_have_advantage_zero(name):
    m = method(name)
    step = rollout_step(3)
    equal = step.groups == 5
    a = advantages(m, step)
    assert a[~equal].any()
    if a.dim() == 1:
        assert (a[equal] == 0).all()
    else:  # reinforce_pp_baseline: 0 before it is whitened with the other groups, so one number for all its tokens
        assert a[equal][step.mask[equal]].unique().numel() == 1
    alone = replace(step, groups=torch.arange(11))
    assert (shaped(m, alone) == 0).all()
    alike = replace(step, rewards=torch.full((11,), -0.3))
    assert (shaped(m, alike) == 0).all()


@pytest.mark.parametrize("name", [name for name in NAMES if not METHODS[name].compares_group])
def test_methods_that_compare_no_group_do_not_read_it(name):
    m = method(name)
    step = rollout_step(4)
    assert torch.equal(shaped(m, step), shaped(m, replace(step, groups=torch.arange(11))))


def test_constant_length_without_a_limit_is_the_longest_response_not_the_padding():
    m = METHODS["dr_grpo"]
    mask = torch.tensor([[True, True, True], [True, False, False]])

    def loss(width, denominators=None):
        logp, wide = torch.zeros(2, width), torch.nn.functional.pad(mask, (0, width - 3))
        return m.loss(LossInputs(logp, logp, torch.ones(2, width), wide, denominators=denominators)).loss.item()

    assert loss(3) == loss(9) == pytest.approx(-4 / (2 * 3))
    assert loss(9, Denominators(tokens=torch.tensor([4]), sequences=torch.tensor([2]))) == pytest.approx(-4 / (2 * 3))


def test_a_loss_of_ones_own_gets_every_row():
    class Mine(Method):
        def token_loss(self, tokens):
            found = super().token_loss(tokens)
            return replace(found, loss=found.loss + 0.1 * tokens.logp**2)

    assert METHODS["dapo"].skips_zero_advantage
    assert not Mine.build_on(METHODS["dapo"], name="mine").skips_zero_advantage
