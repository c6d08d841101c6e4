"""The clipped ratio, aggregation, penalties and corrections by hand. n responses, T tokens."""

import math
from dataclasses import replace

import pytest
import torch
from minibatches import batch, gradients, rows

from polarity.methods import METHODS, Denominators, LossInputs

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


# what is missing


def test_what_a_method_lacks_is_an_error():
    dapo, inputs = METHODS["dapo"], batch()
    for call in (lambda: dapo.select(inputs), lambda: dapo.logp_proxy(inputs.logp, inputs.mask)):
        with pytest.raises(NotImplementedError, match="'dapo'"):
            call()
    with pytest.raises(ValueError, match="needs logp_ref"):
        METHODS["grpo_zhu"].loss(replace(inputs, logp_ref=None))
    with pytest.raises(ValueError, match="needs entropy"):
        METHODS["psr"].loss(replace(inputs, entropy=None))
