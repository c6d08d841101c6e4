"""Losses: values by hand, gradients by finite differences, and what must not change them. n responses, T tokens."""

import math
from dataclasses import replace

import pytest
import torch

from polarity.methods import METHODS, Denominators, LossInputs, Selection

NAMES = [*METHODS, "polarity_p0.5n1", "token_negative_high_prob"]
AGGREGATIONS = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_const"]
CORRECTIONS = [
    None,
    {"kind": "truncated"},
    {"kind": "truncated", "level": "sequence", "cap": 1.1},
    {"kind": "masked"},
    {"kind": "masked", "level": "sequence", "low": 0.8, "high": 1.2},
]


def batch(seed=0, n=8, width=7, dtype=torch.float64, garbage=0.0):
    """A mini-batch with rows of length 0, 1 and T, a row of A = 0, and ratios on both sides of every bound."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, width + 1, (n,), generator=g)
    lengths[:3] = torch.tensor([0, 1, width])
    mask = torch.arange(width) < lengths[:, None]
    advantages = torch.randn(n, 1, generator=g, dtype=dtype).expand(n, width).clone()
    advantages[4] = 0.0

    def random(scale):
        return torch.where(mask, -scale * torch.rand(n, width, generator=g, dtype=dtype), garbage)

    return LossInputs(
        logp=random(1.5).requires_grad_(),
        logp_old=random(1.5),
        advantages=torch.where(mask, advantages, 0.0),
        mask=mask,
        entropy=(-random(2.0)).detach().requires_grad_(),
        entropy_old=-random(2.0),
        correct=torch.rand(n, generator=g) > 0.5,
        logp_ref=random(1.5),
        logp_rollout=random(1.5),
    )


def rows(inputs, index):
    """Some rows of a mini-batch: a micro-batch of it."""
    names = [name for name in LossInputs.__dataclass_fields__ if name not in ("select", "denominators")]
    cut = {name: None if getattr(inputs, name) is None else getattr(inputs, name)[index] for name in names}
    select = inputs.select
    if select is not None and select.tokens is not None:
        select = replace(select, tokens=select.tokens[index])
    return LossInputs(**cut, select=select, denominators=inputs.denominators)


def prepared(m, inputs):
    """The mini-batch with what an engine adds: denominators, and the selection where the method asks for one."""
    inputs = replace(inputs, denominators=Denominators.of(inputs.mask, max_length=20))
    return replace(inputs, select=m.select(inputs)) if "select" in m.needs else inputs


def gradients(loss, inputs):
    found = torch.autograd.grad(loss, (inputs.logp, inputs.entropy), allow_unused=True)
    return [torch.zeros_like(inputs.logp) if g is None else g for g in found]


# the clipped ratio


@pytest.mark.parametrize(
    ("a", "r", "loss", "slope"),
    [
        (1.0, 1.0, -1.0, -1.0),
        (1.0, 1.27, -1.27, -1.27),
        (1.0, 1.5, -1.28, 0.0),  # above 1 + high: no more to gain
        (1.0, 0.5, -0.5, -0.5),  # the pessimistic branch keeps its gradient
        (-1.0, 0.5, 0.8, 0.0),  # below 1 - low
        (-1.0, 1.5, 1.5, 1.5),
        (-1.0, 9.0, 9.0, 9.0),
        (-1.0, 11.0, 10.0, 0.0),  # above the dual bound
        (2.0, 1.5, -2.56, 0.0),
    ],
)
def test_dapo_token_loss_by_hand(a, r, loss, slope):
    logp = torch.tensor([[math.log(r)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    out = METHODS["dapo"].loss(LossInputs(logp, torch.zeros(1, 1), torch.tensor([[a]]), one))
    assert out.loss.item() == pytest.approx(loss)
    assert torch.autograd.grad(out.loss, logp)[0].item() == pytest.approx(slope)  # d loss / d logp = slope


def test_grpo_has_no_dual_clip_and_clips_symmetrically():
    logp = torch.tensor([[math.log(50.0), math.log(1.5)]], dtype=torch.float64)
    out = METHODS["grpo"].loss(
        LossInputs(logp, torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool))
    )
    assert out.loss.item() == pytest.approx((50 - 1.2) / 2)


def test_log_ratio_is_clamped_at_twenty():
    logp = torch.tensor([[100.0]], dtype=torch.float64)
    out = METHODS["grpo"].loss(
        LossInputs(logp, torch.zeros(1, 1), -torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
    )
    assert out.loss.item() == pytest.approx(math.exp(20))


def test_metrics_by_hand():
    #                    clipped above, inside,     clipped below, dual
    ratio = torch.tensor([[1.5, 1.1, 99.0], [0.5, 1.0, 12.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    a = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
    metrics = METHODS["dapo"].loss(LossInputs(ratio.log(), torch.zeros(2, 3), a, mask)).metrics
    assert metrics["ratio"] == (pytest.approx(1.5 + 1.1 + 0.5 + 1.0 + 12.0), 5)
    assert metrics["clip_fraction"] == (2, 5)
    assert metrics["dual_clip_fraction"] == (1, 5)
    assert metrics["positive/clip_fraction"] == (1, 2)
    assert metrics["negative/clip_fraction"] == (1, 3)
    swapped = LossInputs(ratio.log(), torch.zeros(2, 3), a, mask, correct=torch.tensor([False, True]))
    assert METHODS["dapo"].loss(swapped).metrics["positive/clip_fraction"] == (1, 3)  # correctness, not the sign


# aggregation


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mean", 20 / 4),
        ("seq_mean_token_mean", (2 + 14) / 2),
        ("seq_mean_token_sum", 20 / 2),
        ("token_sum_const", 20 / (2 * 10)),
    ],
)
def test_aggregation_by_hand(mode, expected):
    a = -torch.tensor([[1.0, 2.0, 3.0], [14.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    m = METHODS["grpo"].vary({"aggregation": mode})
    inputs = LossInputs(
        torch.zeros(3, 3), torch.zeros(3, 3), a, mask, denominators=Denominators.of(mask, max_length=10)
    )
    assert m.loss(inputs).loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_fully_masked_batch_has_loss_and_gradient_zero(mode):
    m = METHODS["grpo_zhu"].vary({"aggregation": mode})
    inputs = batch(garbage=math.nan)
    inputs = replace(inputs, mask=torch.zeros_like(inputs.mask))
    out = m.loss(inputs)
    assert out.loss.item() == 0.0
    assert all(g.abs().sum() == 0 for g in gradients(out.loss, inputs))
    assert all(total == count == 0 for total, count in out.metrics.values())


# every method: gradients and invariances


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_gradcheck_in_double_precision(name, mode):
    m = METHODS[name].vary({"aggregation": mode})
    inputs = prepared(m, batch(1, n=5, width=4))
    assert torch.autograd.gradcheck(
        lambda logp, entropy: m.loss(replace(inputs, logp=logp, entropy=entropy)).loss, (inputs.logp, inputs.entropy)
    )


@pytest.mark.parametrize("correction", CORRECTIONS[1:])
def test_gradcheck_with_a_correction(correction):
    m = METHODS["dapo"].vary({"correction": correction, "kl.coefficient": 0.1, "kl.estimator": "k1"})
    inputs = prepared(m, batch(2, n=5, width=4))
    assert torch.autograd.gradcheck(lambda logp: m.loss(replace(inputs, logp=logp)).loss, inputs.logp)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("split", [1, 2, 3])
def test_micro_batches_add_up_to_the_mini_batch(name, mode, split):
    m = METHODS[name].vary({"aggregation": mode, "correction": CORRECTIONS[split]})
    inputs = prepared(m, batch(3))
    whole = m.loss(inputs)
    parts = [m.loss(rows(inputs, index)) for index in torch.arange(8).split(split)]
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-12)
    for g, h in zip(gradients(total, inputs), gradients(whole.loss, inputs), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-12, atol=1e-12)
    for key, (value, count) in whole.metrics.items():
        assert sum(part.metrics[key][0] for part in parts) == pytest.approx(value)
        assert sum(part.metrics[key][1] for part in parts) == count


@pytest.mark.parametrize("name", NAMES)
def test_own_denominators_are_those_of_the_whole_batch(name):
    m, inputs = METHODS[name], batch(4)
    torch.testing.assert_close(m.loss(inputs).loss, m.loss(prepared(m, inputs)).loss)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_padding_and_order_do_not_matter_and_garbage_stays_outside(name, mode):
    m = METHODS[name].vary({"aggregation": mode, "correction": {"kind": "truncated"}})
    clean, dirty = batch(5), batch(5, garbage=math.nan)
    order = torch.randperm(8)

    def widened(x, value):
        return torch.nn.functional.pad(x, (0, 3), value=value) if x is not None and x.dim() == 2 else x

    wide = {
        name: widened(getattr(dirty, name), False if name == "mask" else math.nan)
        for name in LossInputs.__dataclass_fields__
    }
    wide["advantages"] = torch.where(wide["mask"], wide["advantages"], math.nan)
    expected = m.loss(prepared(m, clean))
    for inputs in (LossInputs(**wide), rows(clean, order)):
        out = m.loss(prepared(m, inputs))
        torch.testing.assert_close(out.loss, expected.loss)
        assert out.metrics == {k: (pytest.approx(v), n) for k, (v, n) in expected.metrics.items()}
    for g, h in zip(
        gradients(m.loss(prepared(m, LossInputs(**wide))).loss, dirty), gradients(expected.loss, clean), strict=True
    ):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize("name", [n for n in NAMES if METHODS[n].skips_zero_advantage])
def test_scaling_advantages_scales_the_loss_and_rows_of_zero_carry_no_gradient(name):
    m = METHODS[name]
    inputs = prepared(m, batch(6))
    torch.testing.assert_close(m.loss(replace(inputs, advantages=3 * inputs.advantages)).loss, 3 * m.loss(inputs).loss)
    grad = gradients(m.loss(inputs).loss, inputs)
    assert all((g[4] == 0).all() for g in grad)
    some = torch.tensor([0, 1, 2, 3, 5, 6, 7])  # the learner leaves row 4 out; the denominators still count it
    torch.testing.assert_close(m.loss(rows(inputs, some)).loss, m.loss(inputs).loss)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(name, dtype):
    m = METHODS[name]
    low = batch(7, dtype=dtype)
    up = {k: getattr(low, k) for k in LossInputs.__dataclass_fields__}
    up = {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in up.items()}
    out = m.loss(low)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, m.loss(LossInputs(**up)).loss)


def test_psr_and_nsr_gradients_add_up_to_reinforce():
    inputs = batch(8)
    n = inputs.mask.sum()
    total = torch.zeros_like(inputs.logp)
    for name in ("psr", "nsr"):
        m = METHODS[name]
        keep = m.keep(inputs.correct.float(), torch.arange(8), inputs.correct)
        a = m.advantages(inputs.correct.float(), torch.arange(8), inputs.correct)
        shaped = m.shape(a, inputs.logp_old, None, inputs.mask)
        kept = rows(replace(inputs, advantages=shaped), keep)
        total += gradients(m.loss(kept).loss * kept.mask.sum(), inputs)[0]
    m = METHODS["reinforce"]
    a = m.advantages(inputs.correct.float(), torch.arange(8), inputs.correct)
    shaped = m.shape(a, inputs.logp_old, None, inputs.mask)
    torch.testing.assert_close(total, gradients(m.loss(replace(inputs, advantages=shaped)).loss * n, inputs)[0])


# regularizers


@pytest.mark.parametrize(
    ("estimator", "d", "value", "slope"),
    [  # d = logp_ref - logp; slope = d value / d logp
        ("k1", 0.5, -0.5, 1.0),
        ("k2", 0.5, 0.125, -0.5),
        ("k3", 0.5, 0.148721, 1 - math.exp(0.5)),
        ("k3", -0.5, 0.106531, 1 - math.exp(-0.5)),
        ("k3", 2.61, math.exp(2.61) - 3.61, 1 - math.exp(2.61)),
        ("k3", 2.62, 10.0, 0.0),
        ("k1+", 0.5, -0.5, -0.5),
        ("k3+", 0.5, 0.148721, -0.5),
        ("k3+", 2.62, 10.0, -2.62),
    ],
)
def test_kl_estimators_golden_values(estimator, d, value, slope):
    m = METHODS["grpo"].vary({"kl.coefficient": 2.0, "kl.estimator": estimator})
    logp = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    out = m.loss(LossInputs(logp, logp.detach(), torch.zeros(1, 1), one, logp_ref=logp.detach() + d))
    assert out.loss.item() == pytest.approx(2 * value, abs=2e-6)
    assert torch.autograd.grad(out.loss, logp)[0].item() == pytest.approx(2 * slope, abs=1e-6)
    assert out.metrics["kl"] == (pytest.approx(value, abs=1e-6), 1)


def test_entropy_bonus_is_subtracted():
    m = METHODS["psr"]
    inputs = batch(9)
    without = m.vary({"entropy_bonus": 0.0}).loss(inputs).loss
    mean = torch.where(inputs.mask, inputs.entropy, 0.0).sum() / inputs.mask.sum()
    torch.testing.assert_close(m.loss(inputs).loss, without - 1e-4 * mean)


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        ({"kind": "truncated", "cap": 2.0}, [[2.0, 0.5, 1.0], [0.1, 1.0, 1.0]]),
        ({"kind": "masked", "low": 0.5, "high": 2.0}, [[0.0, 0.5, 1.0], [0.0, 1.0, 1.0]]),
        ({"kind": "truncated", "level": "sequence", "cap": 2.0}, [[2.0] * 3, [0.1] * 3]),
        ({"kind": "masked", "level": "sequence", "low": 0.5, "high": 2.5}, [[2.0] * 3, [0.0] * 3]),
    ],
)
def test_corrections_by_hand(correction, weights):
    ratio = torch.tensor([[4.0, 0.5, 1.0], [0.1, 1.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    m = METHODS["dapo"].vary({"correction": correction})
    out = m.loss(LossInputs(logp, logp.detach(), torch.ones(2, 3), mask, logp_rollout=logp.detach() - ratio.log()))
    expected = -torch.tensor(weights) * mask / 5
    torch.testing.assert_close(torch.autograd.grad(out.loss, logp)[0], expected)
    assert "logp_rollout" in m.needs


# fork tokens

ENTROPY = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.3], [0.7, 0.6, 0.05, 0.04, 0.03]])


def fork(changes, entropy=ENTROPY, **inputs):
    """Gradient of -logp under fork_tokens with A = 1: 1 / denominator where a token is kept."""
    m = METHODS["fork_tokens"].vary({f"token_mask.{k}": v for k, v in changes.items()})
    logp = torch.full(entropy.shape, -1.0, requires_grad=True)
    mask = torch.ones_like(entropy, dtype=torch.bool)
    advantages = m.shape(torch.ones(len(entropy)), logp.detach(), entropy, mask)
    batch = LossInputs(logp, logp.detach(), advantages, mask, entropy=entropy, entropy_old=entropy, **inputs)
    return -torch.autograd.grad(m.loss(batch).loss, logp)[0]


@pytest.mark.parametrize("scope", ["minibatch", "microbatch", "step", "response"])
@pytest.mark.parametrize("denominator", ["all", "kept"])
def test_fork_tokens_by_hand(scope, denominator):
    changes = {"scope": scope, "denominator": denominator, "ratio": 0.4}
    if scope == "step":
        changes["entropy_from"] = "old"
    kept = [[1, 0, 1, 0, 0], [1, 1, 0, 0, 0]]
    torch.testing.assert_close(fork(changes), torch.tensor(kept) / (10 if denominator == "all" else 4))


def test_fork_tokens_scope_and_rounding():
    entropy = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.45], [0.1, 0.2, 0.3, 0.0, 0.0, 0.0]])
    assert (fork({}, entropy) > 0).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]  # ceil(0.2 * 12)
    assert (fork({"scope": "response"}, entropy) > 0).nonzero().tolist() == [[0, 0], [0, 1], [1, 1], [1, 2]]


def test_fork_tokens_selects_on_the_entropy_it_names():
    m = METHODS["fork_tokens"]
    inputs = replace(batch(10), entropy_old=None)
    n = int(inputs.mask.sum())
    assert m.needs == {"select", "entropy", "resample"}
    assert int(m.select(inputs).tokens.sum()) == math.ceil(0.2 * n)
    assert m.select(inputs).count is None
    old = m.vary({"token_mask.entropy_from": "old"})
    assert old.needs == {"select", "entropy_old", "resample"}
    with pytest.raises(ValueError, match="entropy_old"):
        old.select(inputs)
    with pytest.raises(ValueError, match="select="):
        m.loss(replace(inputs, denominators=Denominators.of(inputs.mask)))


def test_fork_tokens_of_one_microbatch_weigh_by_their_share_of_the_minibatch():
    m = METHODS["fork_tokens"].vary({"token_mask.scope": "microbatch", "token_mask.denominator": "kept"})
    assert "select" not in m.needs
    inputs = batch(11)
    whole = Denominators.of(inputs.mask)
    expected, total = 0.0, 0.0
    for index in torch.arange(8).split(4):
        part = rows(inputs, index)
        expected += m.loss(part).loss * part.mask.sum() / whole.tokens
        total += m.loss(replace(part, denominators=whole)).loss
    torch.testing.assert_close(total, expected)


def test_a_selection_handed_over_is_the_one_that_counts():
    inputs = batch(12)
    tokens = torch.zeros_like(inputs.mask)
    tokens[2, 3] = True
    out = METHODS["fork_tokens"].loss(replace(inputs, select=Selection(tokens)))
    assert (gradients(out.loss, inputs)[0] != 0).nonzero().tolist() in ([], [[2, 3]])
    assert out.metrics["ratio"][1] == 1


def test_what_a_method_lacks_is_an_error():
    dapo, inputs = METHODS["dapo"], batch()
    for call in (lambda: dapo.select(inputs), lambda: dapo.logp_proxy(inputs.logp, inputs.mask)):
        with pytest.raises(NotImplementedError, match="'dapo'"):
            call()
    with pytest.raises(ValueError, match="needs logp_ref"):
        METHODS["grpo_zhu"].loss(replace(inputs, logp_ref=None))
    with pytest.raises(ValueError, match="needs entropy"):
        METHODS["psr"].loss(replace(inputs, entropy=None))
