"""Policy losses other than the clipped ratio: values and gradients by hand. n responses, T tokens, r = pi / pi_old."""

import math

import pytest
import torch

from polarity.methods import METHODS, Denominators, LossInputs, Selection
from polarity.methods.surrogates import BAPO


def tokens(ratios, advantages, logp_old=-1.0, lengths=None, entropy=None):
    """Rows of tokens with these ratios; advantages are one number a row, or one a token."""
    r = torch.tensor(ratios, dtype=torch.float64)
    a = torch.tensor(advantages, dtype=torch.float64)
    a = a[:, None].expand_as(r) if a.dim() == 1 else a
    mask = torch.ones_like(r, dtype=torch.bool)
    if lengths is not None:
        mask = torch.arange(r.shape[1]) < torch.tensor(lengths)[:, None]
    old = torch.full_like(r, logp_old)
    logp = (old + r.log()).requires_grad_()
    h = None if entropy is None else torch.tensor(entropy, dtype=torch.float64)
    return LossInputs(logp, old, a, mask, entropy=h, logp_ref=old)


def policy(name, changes=None):
    """The method's policy loss alone, added up over tokens: gradients are then those of single tokens."""
    return METHODS[name].vary({"kl.coefficient": 0.0, **(changes or {})})


def token_sum(m, inputs):
    """Sum of the token losses, and its gradient."""
    n = inputs.mask.sum()
    loss = m.vary({"aggregation": "token_mean"}).loss(inputs).loss * n
    return loss.item(), torch.autograd.grad(loss, inputs.logp)[0]


def close(tensor, expected):
    torch.testing.assert_close(tensor, torch.tensor(expected, dtype=tensor.dtype), atol=1e-9, rtol=1e-6)


# ASPO


@pytest.mark.parametrize(
    ("a", "r", "weight", "value"),
    [  # gradient = -weight on log p; value: -A / r, -A r, or -A * 3 * log p beyond the cap
        (1.0, 0.2, 3.0, -3 * (math.log(0.2) - 1)),
        (1.0, 0.5, 2.0, -2.0),
        (1.0, 0.9, 1 / 0.9, -1 / 0.9),
        (1.0, 1.1, 1 / 1.1, -1 / 1.1),
        (1.0, 1.3, 0.0, -1 / 1.2),
        (-1.0, 0.5, 0.0, 0.8),
        (-1.0, 0.9, -0.9, 0.9),
        (-1.0, 2.0, -2.0, 2.0),
        (-1.0, 5.0, -3.0, 3 * (math.log(5) - 1)),
        (0.0, 0.1, 0.0, 0.0),
    ],
)
def test_aspo_golden_weights_and_values(a, r, weight, value):
    loss, slope = token_sum(policy("aspo"), tokens([[r]], [a]))
    close(slope, [[-weight]])
    assert loss == pytest.approx(value)
    doubled, steeper = token_sum(policy("aspo"), tokens([[r]], [2 * a]))
    assert doubled == pytest.approx(2 * value)
    close(steeper, [[-2 * weight]])


def test_aspo_reports_hard_clips_and_soft_caps():
    inputs = tokens([[1.3, 0.2, 1.0], [0.5, 5.0, 1.0]], [1.0, -1.0])
    metrics = policy("aspo").loss(inputs).metrics
    assert metrics["positive/clip_fraction"] == (1, 3)
    assert metrics["negative/clip_fraction"] == (1, 3)
    assert metrics["dual_clip_fraction"] == (2, 6)


def test_aspo_archer_widens_the_bounds_above_the_responses_own_quantile_of_current_entropy():
    # The 80 % quantile of 0, 1, 2, 3, 4 is 3.2 and of 10, 11, 12, 13, 14 it is 13.2: one wide token a row.
    entropy = [[4.0, 0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0, 14.0]]
    ratios = [[1.3, 1.3, 1.1, 1.5, 1.0], [0.7, 0.9, 0.7, 0.7, 0.7]]
    _, slope = token_sum(policy("aspo_archer"), tokens(ratios, [1.0, -1.0], entropy=entropy))
    close(slope, [[-1 / 1.3, 0, -1 / 1.1, 0, -1], [0, 0.9, 0, 0, 0.7]])
    _, narrow = token_sum(policy("aspo"), tokens(ratios, [1.0, -1.0], entropy=entropy))
    close(narrow, [[0, 0, -1 / 1.1, 0, -1], [0, 0.9, 0, 0, 0]])
    assert "entropy" in METHODS["aspo_archer"].needs
    assert "entropy" not in METHODS["aspo"].needs


def test_aspo_archer_takes_the_quantile_of_valid_tokens_only_and_bounds_wide_tokens_too():
    entropy = [[1.0, 2.0, 900.0], [5.0, 5.0, 5.0]]
    inputs = tokens([[1.3, 1.3, 1.0], [1.3, 1.1, 1.0]], [1.0, 1.0], lengths=[2, 3], entropy=entropy)
    close(token_sum(policy("aspo_archer"), inputs)[1], [[0, -1 / 1.3, 0], [0, -1 / 1.1, -1]])  # ties: none is above
    beyond = tokens([[1.0, 1.5], [1.0, 0.5]], [1.0, -1.0], entropy=[[0.0, 1.0], [0.0, 1.0]])
    close(token_sum(policy("aspo_archer"), beyond)[1], [[-1, 0], [1, 0]])


# GSPO


def test_gspo_by_hand():
    # s = geometric mean of the ratios: sqrt(1.1 * 0.9), 1.0001 (inside), empty
    ratios = [[1.1, 0.9, 1.0], [1.0002, 1.0, 1.0], [1.0, 1.0, 1.0]]
    inputs = tokens(ratios, [2.0, -1.0, 1.0], lengths=[2, 2, 0])
    s = [math.sqrt(0.99), math.sqrt(1.0002)]
    out = METHODS["gspo"].loss(inputs)
    assert out.loss.item() == pytest.approx((-2 * s[0] + s[1]) / 2)  # mean over the responses that have tokens
    slope = torch.autograd.grad(out.loss, inputs.logp)[0]
    close(slope, [[-2 * s[0] / 4] * 2 + [0], [s[1] / 4] * 2 + [0], [0, 0, 0]])
    assert out.metrics["clip_fraction"] == (0, 4)


@pytest.mark.parametrize(
    ("a", "s", "value", "weight"),
    [
        (1.0, 1.0003, -1.0003, 1.0003),
        (1.0, 1.001, -1.0004, 0.0),
        (1.0, 0.9, -0.9, 0.9),
        (-1.0, 0.9998, 0.9998, 0.9998),
        (-1.0, 0.9, 0.9997, 0.0),
        (-1.0, 1.2, 1.2, 1.2),
    ],
)
@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_gspo_clips_the_ratio_of_the_response(name, a, s, value, weight):
    inputs = tokens([[s * 1.5, s / 1.5]], [a])
    out = METHODS[name].loss(inputs)
    assert out.loss.item() == pytest.approx(value)
    close(torch.autograd.grad(out.loss, inputs.logp)[0], [[-a * weight / 2] * 2])
    assert out.metrics["clip_fraction"] == ((0, 2) if weight else (2, 2))


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_const"])
def test_both_forms_of_gspo_agree_where_advantages_are_of_the_response(mode):
    g = torch.Generator().manual_seed(0)
    ratios = (1 + 0.001 * torch.randn(4, 5, generator=g)).tolist()
    inputs = tokens(ratios, [1.0, -0.5, 2.0, -1.0], lengths=[5, 1, 3, 2])
    losses = [METHODS[name].vary({"aggregation": mode}).loss(inputs).loss for name in ("gspo", "gspo_token")]
    torch.testing.assert_close(*losses)
    slopes = [torch.autograd.grad(loss, inputs.logp)[0] for loss in losses]
    torch.testing.assert_close(*slopes)
    assert slopes[0].any()


def test_gspo_token_gives_each_token_its_own_advantage_and_the_other_form_averages_them():
    ratios, a = [[1.0001, 0.9999]], [[3.0, 1.0]]
    s = math.sqrt(1.0001 * 0.9999)
    inputs = tokens(ratios, a)
    own = torch.autograd.grad(METHODS["gspo_token"].loss(inputs).loss, inputs.logp)[0]
    averaged = torch.autograd.grad(METHODS["gspo"].loss(inputs).loss, inputs.logp)[0]
    close(own, [[-1.5 * s, -0.5 * s]])
    close(averaged, [[-s, -s]])


# CISPO


@pytest.mark.parametrize(
    ("a", "r", "weight"), [(1.0, 0.1, 0.1), (1.0, 1.1, 1.1), (1.0, 7.0, 1.2), (-1.0, 7.0, 1.2), (-2.0, 0.1, 0.1)]
)
def test_cispo_weighs_log_probabilities_and_never_drops_a_token(a, r, weight):
    inputs = tokens([[r]], [a])
    value, slope = token_sum(METHODS["cispo"], inputs)
    assert value == pytest.approx(-a * weight * inputs.logp.item())
    close(slope, [[-a * weight]])


def test_cispo_lower_bound_and_metrics():
    bounded = METHODS["cispo"].vary({"surrogate.low": 0.2})
    inputs = tokens([[0.1, 1.0, 2.0]], [-1.0])
    close(token_sum(bounded, inputs)[1], [[0.8, 1.0, 1.2]])
    assert bounded.loss(inputs).metrics["clip_fraction"] == (2, 3)
    assert METHODS["cispo"].loss(inputs).metrics["clip_fraction"] == (1, 3)


# GMPO


def test_gmpo_clips_log_ratios_by_the_sign_of_the_advantage_before_the_mean():
    e = math.exp
    ratios = [[e(0.6), e(-0.9), e(0.1)], [e(0.6), e(-0.9), e(0.1)], [1.0, 1.0, 1.0]]
    inputs = tokens(ratios, [2.0, -1.0, 5.0], lengths=[3, 3, 0])
    up = e((0.4 - 0.9 + 0.1) / 3)  # A > 0: 0.6 counts as 0.4
    down = e((0.6 - 0.4 + 0.1) / 3)  # A < 0: -0.9 counts as -0.4
    out = METHODS["gmpo"].loss(inputs)
    assert out.loss.item() == pytest.approx((-2 * up + down) / 2)
    slope = torch.autograd.grad(out.loss, inputs.logp)[0]
    close(slope, [[0, -up / 3, -up / 3], [down / 6, 0, down / 6], [0, 0, 0]])
    assert out.metrics["positive/clip_fraction"] == (1, 3)
    assert out.metrics["negative/clip_fraction"] == (1, 3)


def test_gmpo_bounds_are_separate_and_rows_of_zero_are_free():
    m = METHODS["gmpo"].vary({"surrogate.low": 0.1, "surrogate.high": 0.8})
    e = math.exp
    inputs = tokens([[e(0.6), e(-0.9)], [e(0.6), e(-0.9)], [e(3), e(-3)]], [1.0, -1.0, 0.0])
    out = m.loss(inputs)
    assert out.loss.item() == pytest.approx((-e(-0.15) + e(0.25)) / 3)
    assert out.metrics["clip_fraction"] == (1, 6)


# SAPO


@pytest.mark.parametrize("r", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("a", "tau"), [(1.0, 1.0), (-1.0, 1.05), (-3.0, 1.05)])
def test_sapo_gate_by_hand(a, tau, r):
    sigmoid = 1 / (1 + math.exp(-tau * (r - 1)))
    value, slope = token_sum(METHODS["sapo"], tokens([[r]], [a]))
    assert value == pytest.approx(-a * 4 / tau * sigmoid)
    close(slope, [[-a * 4 * sigmoid * (1 - sigmoid) * r]])
    if r == 1.0:
        assert value == pytest.approx(-2 * a / tau)
        close(slope, [[-a]])  # on-policy it is the policy gradient, whatever the temperature


def test_sapo_golden_gate_values():
    values = [token_sum(METHODS["sapo"], tokens([[r]], [1.0]))[0] for r in (0.5, 1.0, 2.0)]
    assert values == pytest.approx([-1.5101627, -2.0, -2.9242343])
    assert METHODS["sapo"].loss(tokens([[9.0]], [1.0])).metrics["clip_fraction"] == (0, 1)


# BAPO: A >= 0 tokens count A min(r, ceiling), the others |A| max(r, floor)


@pytest.mark.parametrize(
    ("ratios", "advantages", "changes", "floor", "ceiling"),
    [
        ([[1.0, 1.0], [1.0, 1.0]], [1.0, -1.0], {}, 0.6, 1.2),  # 2 of 2: met at once
        ([[1.0, 1.0], [1.0, 1.0]], [1.0, -3.0], {}, 0.9, 3.0),  # out of reach: both bounds at their ends
        # Raising the floor never helps, so it is at its end before the ceiling moves: 2 min(1.6, c) >= 3 from c = 1.5
        ([[1.6, 1.6], [1.5, 1.5]], [1.0, -1.0], {}, 0.9, 1.5),
        # share 1/3 is a ratio of 0.5: 2 * 1.2 >= 0.5 * 3 at once
        ([[1.6, 1.6], [1.5, 1.5]], [1.0, -1.0], {"share": 1 / 3}, 0.6, 1.2),
        # share 0.6 is a ratio of 1.5: 2 c >= 1.5 * 2 * 0.95, c = 1.425 -> 1.45
        ([[9.0, 9.0], [0.95, 0.95]], [1.0, -1.0], {"share": 0.6}, 0.9, 1.45),
        # Steps end at the bound's end: 0.7 after 0.6 + 0.25, 1.5 after 1.2 + 0.25 + 0.25
        (
            [[2.0, 2.0], [2.0, 2.0]],
            [1.0, -1.0],
            {"step": 0.25, "floor_max": 0.7, "ceiling_max": 1.5},
            0.7,
            1.5,
        ),
        ([[1.0, 1.0], [0.1, 0.1]], [1.0, -1.6], {}, 0.6, 1.2),  # |A| max(r, floor): 2 >= 1.92 with the first floor
        ([[1.0, 1.0], [0.1, 0.1]], [1.0, -1.7], {}, 0.9, 3.0),  # 2 < 2.04, and a higher floor only raises that
        ([[1.0, 1.0]], [-1.0], {}, 0.9, 3.0),
        ([[1.0, 1.0]], [1.0], {}, 0.6, 1.2),
        ([[1.0, 1.0]], [0.0], {}, 0.6, 1.2),
    ],
)
def test_bapo_searches_its_bounds(ratios, advantages, changes, floor, ceiling):
    m = METHODS["bapo"].vary({f"surrogate.{k}": v for k, v in changes.items()})
    found = m.select(tokens(ratios, advantages)).values
    assert found == {"clip_floor": pytest.approx(floor), "clip_ceiling": pytest.approx(ceiling)}


def test_bapo_floor_moves_alone_where_it_ends_at_once():
    """With nothing to raise in the ceiling, the floor is all that moves."""
    m = METHODS["bapo"].vary({"surrogate.ceiling_max": 1.2})
    found = m.select(tokens([[1.0], [1.0]], [1.0, -3.0])).values
    assert found == pytest.approx({"clip_floor": 0.9, "clip_ceiling": 1.2})


def test_bapo_clips_at_the_bounds_of_the_minibatch():
    inputs = tokens([[1.6, 2.5], [0.7, 5.0]], [1.0, -1.0])
    handed = Selection(values={"clip_floor": 0.8, "clip_ceiling": 2.0})
    m = METHODS["bapo"]
    out = m.loss(LossInputs(inputs.logp, inputs.logp_old, inputs.advantages, inputs.mask, select=handed))
    assert out.loss.item() == pytest.approx((-1.6 - 2.0 + 0.8 + 3.0) / 4)
    close(torch.autograd.grad(out.loss, inputs.logp)[0], [[-0.4, 0], [0, 0]])
    assert out.metrics["clip_floor"] == (4 * 0.8, 4)
    assert out.metrics["clip_ceiling"] == (4 * 2.0, 4)
    assert out.metrics["dual_clip_fraction"] == (1, 4)


def test_bapo_bounds_are_the_minibatchs_and_micro_batches_must_be_handed_them():
    inputs = tokens([[1.6, 1.6], [1.5, 1.5]], [1.0, -1.0])
    m = METHODS["bapo"]
    alone = m.select(tokens([[1.6, 1.6]], [1.0])).values["clip_ceiling"]
    assert (alone, m.select(inputs).values["clip_ceiling"]) == (1.2, pytest.approx(1.5))
    assert m.needs == {"select"}
    whole = Denominators.of(inputs.mask)
    with pytest.raises(ValueError, match="select="):
        m.loss(LossInputs(inputs.logp, inputs.logp_old, inputs.advantages, inputs.mask, denominators=whole))


def test_bapo_refuses_bounds_that_end_before_they_start():
    with pytest.raises(ValueError, match="floor must not be above floor_max"):
        BAPO(floor=0.95)


# the clipped ratio's other settings


def test_two_sided_is_the_dual_clip_at_four():
    inputs = tokens([[3.9, 4.1, 50.0, 0.5], [50.0, 0.5, 1.1, 1.3]], [-2.0, 1.0])
    value, slope = token_sum(METHODS["two_sided"], inputs)
    assert value == pytest.approx(2 * (3.9 + 4 + 4 + 0.8) - 1.2 - 0.5 - 1.1 - 1.2)
    close(slope, [[7.8, 0, 0, 0], [0, -0.5, -1.1, 0]])
    assert METHODS["two_sided"].vary({"name": "grpo", "source": "", "surrogate.dual": None}).surrogate == (
        METHODS["grpo"].surrogate
    )
    assert METHODS["two_sided"].loss(inputs).metrics["dual_clip_fraction"] == (2, 8)


def test_bounds_may_be_absent():
    free = METHODS["grpo"].vary({"surrogate.low": None, "surrogate.high": None})
    value, slope = token_sum(free, tokens([[9.0, 0.01], [9.0, 0.01]], [1.0, -1.0]))
    assert value == pytest.approx(0.0)
    close(slope, [[-9, -0.01], [9, 0.01]])


def test_lp_regs_bounds_are_practically_none():
    inputs = tokens([[9.9, 10.1, 0.001]], [1.0])
    lp_reg = METHODS["lp_reg"].vary({"token_penalty": None})
    close(token_sum(lp_reg, inputs)[1], [[-9.9, 0, -0.001]])


@pytest.mark.parametrize(
    "name", ["grpo", "aspo", "gspo_token", "gspo", "cispo", "gmpo", "sapo", "bapo", "kl_cov", "two_sided", "lp_reg"]
)
def test_on_policy_every_loss_has_the_policy_gradient(name):
    """At r = 1 all surrogates have the gradient -A; they differ in what follows."""
    m = policy(name, {"token_penalty": None})
    inputs = tokens([[1.0, 1.0], [1.0, 1.0]], [1.5, -1.5])
    close(token_sum(m, inputs)[1], [[-1.5, -1.5], [1.5, 1.5]])
