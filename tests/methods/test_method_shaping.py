"""Shaping against a slow reference that follows the equations one response at a time. N responses, T padded length."""

import math

import pytest
import torch

from polarity.errors import UserError
from polarity.methods import METHODS

FAMILIES = [
    f"token_{p}_{e}_{b}" for p in ("positive", "negative") for e in ("high", "low") for b in ("entropy", "prob")
]
GARBAGE = [float("nan"), float("inf"), -1e30, 7.0]


def reference(m, advantages, logp, entropy, mask, correct, step):
    """Eq. 2, the static variants, AR and the entropy term with Python lists: one response, one token at a time."""
    out = torch.zeros(mask.shape)
    for i, a in enumerate(advantages.tolist()):
        positions = [t for t in range(mask.shape[1]) if mask[i, t]]
        by_advantage = m.shaping.polarity_by == "advantage"
        positive = a > 0 if by_advantage else bool(correct[i])
        part = m.shaping.positive if positive else m.shaping.negative
        whole = m.shaping.positive_weight if positive else m.shaping.negative_weight
        for t in positions:
            out[i, t] = a * (whole if a != 0 else 1.0)
        if a != 0 and part is not None and positions and part.ratio > 0:
            k = max(1, math.floor(part.ratio * len(positions) + 1e-9))
            values = (entropy if part.by == "entropy" else logp)[i].tolist()
            ranked = sorted(positions, key=lambda t: (values[t] if part.end == "low" else -values[t], t))
            weight = part.scale if isinstance(part.scale, float) else part.scale.value(step)
            for t in ranked[:k]:
                out[i, t] *= weight
        by_probability, term = m.shaping.probability_weight, m.shaping.entropy_term
        for t in positions:
            if by_probability:
                out[i, t] *= by_probability.alpha * math.exp(logp[i, t]) + 1 - by_probability.alpha
            if term:
                out[i, t] += min(term.alpha * entropy[i, t].item(), abs(out[i, t].item()) / term.kappa)
    return out


def random_step(seed, n=12, width=23, ties=True):
    """Rows of length 0, 1, T and in between, holes in some masks, tied values, garbage outside the mask."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, width + 1, (n,), generator=g)
    lengths[:3] = torch.tensor([0, 1, width])
    mask = torch.arange(width) < lengths[:, None]
    mask[5] &= torch.rand(width, generator=g) > 0.3  # as in multi-turn: observation tokens are masked out
    logp = -torch.rand(n, width, generator=g)
    entropy = torch.rand(n, width, generator=g)
    if ties:
        logp, entropy = (logp * 4).round() / 4 + 0.0, (entropy * 3).round() / 3
    noise = torch.tensor(GARBAGE)[torch.randint(0, 4, (n, width), generator=g)]
    advantages = torch.randn(n, generator=g)
    advantages[7] = 0.0
    correct = torch.rand(n, generator=g) > 0.5  # disagrees with the sign of A in about half the rows
    return advantages, torch.where(mask, logp, noise), torch.where(mask, entropy, noise), mask, correct


@pytest.mark.parametrize("polarity_by", ["advantage", "correctness"])
@pytest.mark.parametrize("name", [*METHODS, *FAMILIES, "polarity_p0.5n1", "polarity_p2n0"])
def test_shape_equals_the_reference(name, polarity_by):
    m = METHODS[name]
    if m.shaping.parts or name.startswith("polarity"):  # where nothing is weighed by polarity it is refused
        m = m.vary({"shaping.polarity_by": polarity_by})
    for seed in range(6):
        a, logp, entropy, mask, correct = random_step(seed, ties=seed % 2 == 0)
        for step in (0, 50, 250):
            shaped = m.shape(a, logp, entropy, mask, correct=correct, step=step)
            assert shaped.dtype == torch.float32
            torch.testing.assert_close(shaped, reference(m, a, logp, entropy, mask, correct, step), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.1, 0.3, 0.5, 1.0])
def test_any_ratio_and_both_polarities_at_once(ratio):
    m = METHODS["dapo"].vary(
        {
            "shaping.positive": {"end": "high", "by": "entropy", "ratio": ratio, "scale": 0.2},
            "shaping.negative": {"end": "low", "by": "prob", "ratio": 1 - ratio, "scale": 5.0},
            "shaping.positive_weight": 0.5,
        }
    )
    for seed in range(5):
        a, logp, entropy, mask, correct = random_step(seed, n=9, width=40)
        expected = reference(m, a, logp, entropy, mask, correct, 0)
        torch.testing.assert_close(m.shape(a, logp, entropy, mask), expected, rtol=0, atol=1e-6)


def test_a3po_weights_the_right_tokens_by_hand():
    logp = torch.tensor([[-0.1, -3.0, -0.2, -0.3, -0.4], [-0.1, -3.0, 0.0, -0.3, 0.0]])
    mask = torch.ones(2, 5, dtype=torch.bool)
    shaped = METHODS["a3po"].shape(torch.tensor([1.5, -0.5]), logp, None, mask, step=100)
    expected = torch.tensor([[1.5, 2.25, 1.5, 1.5, 1.5], [-0.5, -0.5, -0.75, -0.5, -0.5]])
    torch.testing.assert_close(shaped, expected)


@pytest.mark.parametrize(
    ("step", "weight"), [(0, 2.0), (1, 1.995), (100, 1.5), (199, 1.005), (200, 1.0), (201, 1.0), (10**6, 1.0)]
)
def test_a3po_factor_golden_values(step, weight):
    assert METHODS["a3po"].shaping.positive.scale.value(step) == pytest.approx(weight, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "k"), [*((n, 1) for n in range(1, 10)), *((n, 2) for n in range(10, 15)), (15, 3), (100, 20)]
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a3po_count_golden_values(n, k, sign):
    mask = torch.ones(1, n, dtype=torch.bool)
    shaped = METHODS["a3po"].shape(torch.tensor([sign]), torch.zeros(1, n), None, mask)
    assert (shaped == 2 * sign).sum() == k
    assert (shaped[0, :k] == 2 * sign).all()  # all values tied: the earliest positions


def test_ranking_is_on_log_probabilities_where_probabilities_have_rounded_to_one():
    logp = torch.tensor([[-3e-9, -1e-9, -2e-9, -4e-9, -5e-9]])
    assert torch.equal(logp.exp(), torch.ones(1, 5))
    shaped = METHODS["a3po"].shape(torch.tensor([-1.0]), logp, None, torch.ones(1, 5, dtype=torch.bool))
    assert shaped.tolist() == [[-1.0, -2.0, -1.0, -1.0, -1.0]]


def test_tokens_of_entropy_exactly_zero_are_candidates():
    entropy = torch.tensor([[0.5, 0.0, 0.0, 0.7, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8]])
    m = METHODS["token_positive_low_entropy"]
    shaped = m.shape(torch.tensor([1.0]), torch.zeros(1, 10), entropy, torch.ones(1, 10, dtype=torch.bool))
    assert (shaped == 5.0).nonzero()[:, 1].tolist() == [1, 2]


@pytest.mark.parametrize("step", [0, 3, 199])
def test_a3po_with_rho_one_is_dapo_bit_for_bit(step):
    a, logp, entropy, mask, correct = random_step(3)
    m = METHODS["a3po"].vary({"shaping.positive.scale.start": 1.0, "shaping.negative.scale.start": 1.0})
    dapo = METHODS["dapo"].shape(a, logp, entropy, mask, correct=correct, step=step)
    assert torch.equal(m.shape(a, logp, entropy, mask, correct=correct, step=step), dapo)
    assert not torch.equal(METHODS["a3po"].shape(a, logp, entropy, mask, correct=correct, step=step), dapo)


@pytest.mark.parametrize("step", [200, 201, 299])
def test_a3po_after_its_decay_is_dapo_bit_for_bit(step):
    a, logp, entropy, mask, correct = random_step(4)
    dapo = METHODS["dapo"].shape(a, logp, entropy, mask, correct=correct, step=step)
    assert torch.equal(METHODS["a3po"].shape(a, logp, entropy, mask, correct=correct, step=step), dapo)


def test_ablations_of_a3po():
    a, logp, entropy, mask, _ = random_step(5)
    full = METHODS["a3po"].shape(a, logp, entropy, mask)
    plain = METHODS["dapo"].shape(a, logp, entropy, mask)
    positive = (a > 0)[:, None]
    assert torch.equal(METHODS["a3po_no_nh"].shape(a, logp, entropy, mask), torch.where(positive, full, plain))
    assert torch.equal(METHODS["a3po_no_pl"].shape(a, logp, entropy, mask), torch.where(positive, plain, full))
    assert torch.equal(METHODS["a3po_no_adaptive"].shape(a, logp, entropy, mask, step=400), full)


@pytest.mark.parametrize("name", ["a3po", "token_negative_high_entropy", "polarity_p0.5n1", "ar", "entropy_advantage"])
def test_padding_width_and_order_of_responses_do_not_matter(name):
    a, logp, entropy, mask, correct = random_step(6)
    m = METHODS[name]
    shaped = m.shape(a, logp, entropy, mask, correct=correct)
    wide = [
        torch.nn.functional.pad(x, (0, 9), value=v) for x, v in ((logp, math.nan), (entropy, math.nan), (mask, False))
    ]
    assert torch.equal(m.shape(a, *wide, correct=correct)[:, : mask.shape[1]], shaped)
    order = torch.randperm(len(a))
    assert torch.equal(
        m.shape(a[order], logp[order], entropy[order], mask[order], correct=correct[order]), shaped[order]
    )


@pytest.mark.parametrize("name", ["a3po", "ar", "entropy_advantage"])
def test_large_batches_are_shaped_in_chunks_with_the_same_result(name, monkeypatch):
    a, logp, entropy, mask, _ = random_step(7, n=40)
    whole = METHODS[name].shape(a, logp, entropy, mask)
    monkeypatch.setattr("polarity.methods.shaping._CHUNK", 50)
    assert torch.equal(METHODS[name].shape(a, logp, entropy, mask), whole)


def test_scope_batch_ranks_over_all_samples_of_a_polarity():
    m = METHODS["a3po"].vary({"shaping.scope": "batch"})
    logp = torch.tensor(
        [[-5.0, -4.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0, -1.0], [-0.3, -0.1, -0.2, -9.0, -9.0]]
    )
    shaped = m.shape(torch.tensor([1.0, 1.0, -1.0]), logp, None, torch.ones(3, 5, dtype=torch.bool))
    assert (shaped.abs() == 2).nonzero().tolist() == [[0, 0], [0, 1], [2, 1]]  # 2 of 10 positive, 1 of 5 negative


def test_ties_inclusive_takes_everything_up_to_the_kth_value():
    m = METHODS["a3po"].vary({"shaping.ties": "inclusive"})
    logp = torch.tensor([[0.0, -1.0, 0.0, 0.0, -2.0]])
    shaped = m.shape(torch.tensor([-1.0]), logp, None, torch.ones(1, 5, dtype=torch.bool))
    assert shaped.tolist() == [[-2.0, -1.0, -2.0, -2.0, -1.0]]


def test_token_advantages_are_weighted_by_their_own_sign():
    logp = torch.tensor([[-9.0, -8.0, -0.3, -0.2, -0.1]])
    a = torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0]])
    m = METHODS["a3po"].vary({"shaping.positive.ratio": 0.4, "shaping.negative.ratio": 0.4})
    shaped = m.shape(a, logp, None, torch.ones(1, 5, dtype=torch.bool))
    assert shaped.tolist() == [[2.0, -1.0, 1.0, 1.0, -2.0]]


# advantage reweighting and the entropy term

ONE_ROW = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize("a", [1.0, -2.0, 0.0])
def test_advantage_reweighting_damps_rare_tokens_of_both_signs(a):
    logp = torch.tensor([[1.0, 0.5, 0.01]]).log()
    shaped = METHODS["ar"].shape(torch.tensor([a]), logp, None, ONE_ROW)
    torch.testing.assert_close(shaped, a * torch.tensor([[1.0, 0.9, 0.802]]))
    strong = METHODS["ar"].vary({"shaping.probability_weight.alpha": 1.0})
    torch.testing.assert_close(strong.shape(torch.tensor([a]), logp, None, ONE_ROW), a * logp.exp())
    none = METHODS["ar"].vary({"shaping.probability_weight.alpha": 0.0})
    torch.testing.assert_close(none.shape(torch.tensor([a]), logp, None, ONE_ROW), torch.full((1, 3), a))


@pytest.mark.parametrize(
    ("a", "expected"),
    [(1.0, [1.0, 1.2, 1.5]), (-1.0, [-1.0, -0.8, -0.5]), (-0.1, [-0.1, -0.05, -0.05]), (0.0, [0.0] * 3)],
)
def test_the_entropy_term_raises_uncertain_tokens_by_at_most_a_share_of_the_advantage(a, expected):
    entropy = torch.tensor([[0.0, 0.5, 3.0]])  # 0.4 H: 0, 0.2, 1.2; the bound is |A| / 2
    shaped = METHODS["entropy_advantage"].shape(torch.tensor([a]), torch.zeros(1, 3), entropy, ONE_ROW)
    torch.testing.assert_close(shaped, torch.tensor([expected]))
    assert METHODS["entropy_advantage"].needs == {"entropy_old"}


@pytest.mark.parametrize("kappa", [1.001, 2.0, 50.0])
def test_with_kappa_above_one_the_sign_never_flips(kappa):
    m = METHODS["entropy_advantage"].vary({"shaping.entropy_term": {"alpha": 1000.0, "kappa": kappa}})
    a, logp, entropy, mask, _ = random_step(8)
    shaped = m.shape(a, logp, entropy, mask)
    assert torch.equal(shaped.sign(), torch.where(mask, a[:, None].sign(), 0.0))
    for refused in (1.0, 0.5):
        with pytest.raises(UserError, match=r"shaping\.entropy_term\.kappa.*greater than 1"):
            m.vary({"shaping.entropy_term.kappa": refused})


def test_weights_multiply_and_the_entropy_term_comes_last():
    m = METHODS["a3po"].vary(
        {"shaping.positive_weight": 0.5, "shaping.probability_weight.alpha": 0.2, "shaping.entropy_term.alpha": 1.0}
    )
    logp, entropy = torch.tensor([[0.5, 1.0, 1.0]]).log(), torch.tensor([[9.0, 9.0, 0.1]])
    shaped = m.shape(torch.tensor([2.0]), logp, entropy, ONE_ROW)
    rare = 2 * 0.5 * 2.0 * 0.9  # advantage, positive weight, A3PO, probability
    torch.testing.assert_close(shaped, torch.tensor([[rare * 1.5, 1.5, 1.1]]))


@pytest.mark.parametrize("name", ["ar", "entropy_advantage"])
def test_token_advantages_are_reweighted_token_by_token(name):
    logp, entropy = torch.full((1, 3), -0.7), torch.full((1, 3), 0.1)
    own = METHODS[name].shape(torch.tensor([[1.0, -1.0, 0.0]]), logp, entropy, ONE_ROW)
    each = [METHODS[name].shape(torch.tensor([a]), logp, entropy, ONE_ROW)[0, 0].item() for a in (1.0, -1.0, 0.0)]
    assert own[0].tolist() == each


def test_missing_inputs_are_named():
    a, logp, _, mask, _ = random_step(0)
    with pytest.raises(ValueError, match="entropy_old"):
        METHODS["token_positive_low_entropy"].shape(a, logp, None, mask)
    with pytest.raises(ValueError, match="entropy_old"):
        METHODS["entropy_advantage"].shape(a, logp, None, mask)
    with pytest.raises(ValueError, match="needs correct"):
        METHODS["a3po"].vary({"shaping.polarity_by": "correctness"}).shape(a, logp, None, mask)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_to_shape(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    for name in ("a3po", "token_positive_low_entropy", "ar", "entropy_advantage"):
        assert METHODS[name].shape(torch.ones(shape[0]), torch.zeros(shape), torch.zeros(shape), mask).shape == shape
