"""Parts that choose tokens: Fork Tokens, Clip-Cov, KL-Cov, Lp-Reg; and the mask on responses that have drifted.

n responses, T tokens, V vocabulary.
"""

import math
from dataclasses import replace

import pytest
import torch
from minibatches import batch, example, gradients, method, rows

from polarity.methods import METHODS, Denominators, LossInputs, Selection


def tokens(advantages, logp, logp_old=None, lengths=None, **more):
    """Rows of tokens; advantages are one number a row, or one a token."""
    logp = torch.tensor(logp, dtype=torch.float64)
    a = torch.tensor(advantages, dtype=torch.float64)
    a = a[:, None].expand_as(logp) if a.dim() == 1 else a
    mask = torch.ones_like(logp, dtype=torch.bool)
    if lengths is not None:
        mask = torch.arange(logp.shape[1]) < torch.tensor(lengths)[:, None]
    old = logp.clone() if logp_old is None else torch.tensor(logp_old, dtype=torch.float64)
    more = {k: torch.tensor(v, dtype=torch.float64) for k, v in more.items()}
    return LossInputs(logp.requires_grad_(), old, a, mask, **more)


def token_sum(m, inputs):
    """Sum of the token losses, and its gradient."""
    n = inputs.mask.sum()
    loss = m.vary({"aggregation": "token_mean"}).loss(inputs).loss * n
    return loss.item(), torch.autograd.grad(loss, inputs.logp)[0]


def close(tensor, expected):
    torch.testing.assert_close(tensor, torch.tensor(expected, dtype=tensor.dtype), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("fork_tokens", "token_mask"),
        ("clip_cov", "token_mask"),
        ("kl_cov", "token_penalty"),
        ("lp_reg", "token_penalty"),
        ("opsm", "off_policy_mask"),
    ],
)
def test_the_part_acts(name, part):
    m = method(name)
    inputs = example(m, 3)
    without = m.vary({part: None}).loss(inputs).loss
    assert (m.loss(inputs).loss - without).abs() > 1e-3


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


# Clip-Cov and KL-Cov: covariance (A - mean A)(log p - mean log p) over the mini-batch's tokens

# Four tokens with means A = 0 and log p = -2: covariances 2, -2, 6, -2. The others are outside the mask.
COVARIED = {"advantages": [[2.0, 2.0, math.nan], [-3.0, -1.0, math.nan]], "logp": [[-1.0, -3.0, 5.0], [-4.0, 0.0, 5.0]]}


def covaried(ratio=1.0, **more):
    logp = [[x - math.log(ratio) for x in row] for row in COVARIED["logp"]]
    return tokens(**COVARIED, logp_old=logp, lengths=[2, 2], **more)


def clip_cov(**changes):
    return METHODS["clip_cov"].vary({f"token_mask.{k}": v for k, v in changes.items()})


def dropped(m, inputs, seed=None):
    """Positions that lose their loss."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    kept = m.select(inputs, generator).tokens
    assert not (kept & ~inputs.mask).any()
    return (inputs.mask & ~kept).nonzero().tolist()


@pytest.mark.parametrize(
    ("lower", "upper", "candidates"),
    [
        (1.0, 5.0, [[0, 0]]),  # covariance 2; the bounds themselves are outside
        (1.0, 7.0, [[0, 0], [1, 0]]),
        (-3.0, 2.0, [[0, 1], [1, 1]]),
        (6.0, 9.0, []),
    ],
)
def test_clip_cov_candidates_are_inside_the_bounds(lower, upper, candidates):
    drawn = dropped(clip_cov(lower=lower, upper=upper, ratio=1.0), covaried())
    assert drawn == candidates


def test_clip_cov_draws_its_share_of_all_tokens_and_at_least_one():
    wide = {"lower": -9.0, "upper": 9.0}
    for ratio, count in ((1e-4, 1), (0.49, 1), (0.5, 2), (0.75, 3), (1.0, 4)):
        assert len(dropped(clip_cov(ratio=ratio, **wide), covaried())) == count


def test_clip_covs_draw_is_the_generators():
    m = method("clip_cov").vary({"token_mask.ratio": 0.3, "token_mask.lower": -9.0})
    inputs = example(m, 1, n=24)
    draws = [dropped(m, inputs, seed) for seed in range(8)]
    assert all(len(draw) == int(0.3 * int(inputs.mask.sum())) for draw in draws)
    assert draws[3] == dropped(m, inputs, 3)
    assert len({str(draw) for draw in draws}) == 8
    assert dropped(m, inputs) == dropped(m, inputs) == draws[0]  # without one: the same at every call


def test_clip_cov_never_draws_a_token_that_the_surrogate_clips():
    wide = {"lower": -9.0, "upper": 9.0, "ratio": 1.0}
    # r = 2.5 with bounds 0 and 2: clipped where A > 0, not where A < 0
    assert dropped(clip_cov(**wide), covaried(ratio=2.5)) == [[1, 0], [1, 1]]
    assert len(dropped(clip_cov(**wide), covaried(ratio=1.9))) == 4


def test_clip_cov_leaves_denominators_and_the_other_tokens_alone():
    m = clip_cov()
    inputs = covaried()
    value, slope = token_sum(m, inputs)
    close(slope, [[0, -2, 0], [3, 1, 0]])
    assert value == pytest.approx(-2 + 3 + 1)  # token_sum multiplies by all four tokens
    assert m.select(inputs).count is None
    assert m.loss(inputs).metrics["ratio"] == (3.0, 3)


@pytest.mark.parametrize(("ratio", "count"), [(2e-3, 1), (0.25, 1), (0.5, 2), (0.99, 3)])
def test_kl_cov_takes_the_tokens_of_highest_covariance(ratio, count):
    by_covariance = [[1, 0], [0, 0], [0, 1]]  # 6, 2, and of the two with -2 the earlier
    chosen = METHODS["kl_cov"].vary({"token_penalty.ratio": ratio}).select(covaried()).tokens
    assert sorted(chosen.nonzero().tolist()) == sorted(by_covariance[:count])


@pytest.mark.parametrize("ratio", [3.0, 0.2])
def test_kl_cov_penalises_the_distance_and_clips_nothing(ratio):
    m = METHODS["kl_cov"].vary({"token_penalty.coefficient": 0.5})
    value, slope = token_sum(m, covaried(ratio=ratio))
    distance, pull = abs(math.log(ratio)), math.copysign(1.0, ratio - 1)
    assert value == pytest.approx(ratio * (-2 - 2 + 3 + 1) + 0.5 * distance)
    close(slope, [[-2 * ratio, -2 * ratio, 0], [3 * ratio + 0.5 * pull, ratio, 0]])
    metrics = m.loss(covaried(ratio=ratio)).metrics
    assert metrics["penalty"] == (pytest.approx(0.5 * distance), 4)
    assert metrics["penalised_share"] == (1, 4)
    assert metrics["ratio"] == (pytest.approx(4 * ratio), 4)


def test_kl_cov_on_a_clipping_surrogate_unclips_the_chosen_tokens_only():
    m = METHODS["kl_cov"].vary({"surrogate": {"kind": "clip", "low": 0.2, "high": 0.2}})
    inputs = tokens([[1.0, 1.0, -2.0]], [[-1.0, -2.0, -2.0]], [[-1 - math.log(2), -2 - math.log(2), -2.0]])
    handed = replace(inputs, select=Selection(torch.tensor([[True, False, False]])))
    value, slope = token_sum(m, handed)
    assert value == pytest.approx(-2 + math.log(2) - 1.2 + 2)
    close(slope, [[-2 + 1, 0, 2]])
    assert m.loss(handed).metrics["clip_fraction"] == (1, 3)


def test_a_correction_weighs_the_policy_loss_of_chosen_tokens_and_not_their_penalty():
    m = METHODS["kl_cov"].vary({"correction": {"kind": "truncated"}})
    inputs = tokens([[1.0]], [[-1.0]], [[-1 - math.log(3)]], logp_rollout=[[-1 - math.log(3) - math.log(0.5)]])
    assert token_sum(m, inputs)[0] == pytest.approx(-3 * 0.5 + math.log(3))
    assert m.select(inputs).tokens.all()


# Lp-Reg


def test_the_proxy_is_a_min_p_filter_of_the_old_policy():
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 30, generator=g, dtype=torch.float64)
    sampled = torch.randint(0, 30, (64,), generator=g)
    filtered = 0
    found = METHODS["lp_reg"].logp_proxy(logits, sampled)
    assert found.dtype == torch.float32
    for row, token, ours in zip(logits, sampled.tolist(), found.tolist(), strict=True):
        p = row.softmax(0)
        kept = p >= 0.02 * p.max()
        if kept[token]:
            assert ours == pytest.approx((p[token] / p[kept].sum()).log().item(), abs=1e-5)
        else:
            assert ours == pytest.approx(-1e4, rel=0.01)
            filtered += 1
    assert 10 < filtered < 54


def test_the_proxy_takes_half_precision_and_any_kappa():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).half()
    p = torch.tensor([2.0, 1.0, 0.0]).softmax(0)
    m = METHODS["lp_reg"].vary({"token_penalty.kappa": 0.3})
    kept = m.logp_proxy(logits, torch.tensor([1])).item()
    assert kept == pytest.approx((p[1] / (p[0] + p[1])).log().item(), abs=1e-6)
    assert m.logp_proxy(logits, torch.tensor([2])).item() < -9000
    loose = METHODS["lp_reg"].logp_proxy(logits, torch.tensor([2])).item()
    assert loose == pytest.approx(p[2].log().item(), abs=1e-6)


# Rarest tokens with A < 0 first: (1, 0), (1, 1), (0, 1); the positive row has a rarer one.
RARE = {
    "advantages": [[-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0], [1.0, 1.0, 1.0]],
    "logp": [[-0.1, -5.0, -0.2], [-9.0, -7.0, -0.3], [-20.0, -0.1, -0.1]],
}


def rare(proxy=None, **more):
    proxy = [[0.0] * 3] * 3 if proxy is None else proxy
    return tokens(**RARE, logp_proxy=proxy, **more)


def lp_reg(ratio, **changes):
    return METHODS["lp_reg"].vary({"token_penalty.ratio": ratio, **changes})


@pytest.mark.parametrize(
    ("ratio", "chosen"),
    [
        (0.01, []),  # floor(0.06), at least 1: a single token counts as none
        (0.3, []),  # floor(1.8)
        (1 / 3, [[1, 0], [1, 1]]),
        (0.5, [[0, 1], [1, 0], [1, 1]]),
    ],
)
def test_lp_reg_takes_a_share_of_the_tokens_of_negative_advantage(ratio, chosen):
    assert lp_reg(ratio).select(rare()).tokens.nonzero().tolist() == chosen


def test_lp_reg_leaves_tokens_at_or_above_the_proxy_and_noise_alone():
    proxy = [[0.0, -5.0, 0.0], [-1e4, -6.9, 0.0], [0.0, 0.0, 0.0]]  # equal; filtered; below the proxy
    assert lp_reg(0.5).select(rare(proxy)).tokens.nonzero().tolist() == [[1, 1]]


def test_lp_reg_replaces_the_clipped_loss_by_an_unclipped_one_with_a_pull_to_the_proxy():
    #                           d: 0.5 and 3, beyond the clamp at 2.61; both ratios are 20, above the bound of 10
    proxy = [[0.0] * 3, [-8.5, -4.0, 0.0], [0.0] * 3]
    old = [RARE["logp"][0], [x - math.log(20) for x in RARE["logp"][1][:2]] + [-0.3], RARE["logp"][2]]
    inputs = rare(proxy, logp_old=old)
    m = lp_reg(1 / 3, **{"token_penalty.coefficient": 0.5})
    value, slope = token_sum(m, inputs)
    k3 = math.exp(0.5) - 0.5 - 1
    assert value == pytest.approx(3 + 2 * 20 + 2 * 20 + 2 - 3 + 0.5 * (k3 + 10))
    close(slope, [[1, 1, 1], [40 + 0.5 * (1 - math.exp(0.5)), 40, 2], [-1, -1, -1]])
    assert m.loss(inputs).metrics["penalty"] == (pytest.approx(0.5 * (k3 + 10)), 9)
    assert m.loss(inputs).metrics["penalised_share"] == (2, 9)


def test_lp_regs_positive_tokens_stay_clipped_and_negative_ones_are_not_where_chosen():
    inputs = tokens(
        [[1.0, 1.0], [-1.0, -1.0]],
        [[-1.0, -1.0], [-6.0, -6.0]],
        [[-1 - math.log(20), -1.0], [-6 + math.log(20), -6.0]],
        logp_proxy=[[0.0, 0.0], [-6.0, -5.9]],
    )
    m = lp_reg(1.0)
    value, slope = token_sum(m, inputs)
    assert value == pytest.approx(-10 - 1 + 1 / 20 + 1 + math.exp(0.1) - 1.1)
    close(slope, [[0, -1], [1 / 20, 1 + 1 - math.exp(0.1)]])


def test_lp_reg_needs_the_proxy_and_a_selection_of_the_minibatch():
    m = METHODS["lp_reg"]
    assert m.needs == {"select", "logp_proxy"}
    inputs = batch(1)
    with pytest.raises(ValueError, match="needs logp_proxy"):
        m.select(replace(inputs, logp_proxy=None))
    with pytest.raises(ValueError, match="select="):
        m.loss(replace(inputs, denominators=Denominators.of(inputs.mask)))


# off-policy sequence mask


def test_opsm_drops_negative_responses_whose_mean_drift_is_above_delta():
    logp = [[-1.0, -1.0, -1.0]] * 5
    #       mean 0.5: kept     mean 0.6         positive: kept   drift the other way  two tokens: mean 0.75
    drift = [[0.0, 0.5, 1.0], [0.6, 0.6, 0.6], [3.0, 3.0, 3.0], [-3.0, -3.0, -3.0], [0.5, 1.0, -9.0]]
    rollout = [[x + d for x, d in zip(row, by, strict=True)] for row, by in zip(logp, drift, strict=True)]
    inputs = tokens([-1.0, -1.0, 1.0, -1.0, -1.0], logp, lengths=[3, 3, 3, 3, 2], logp_rollout=rollout)
    m = METHODS["opsm"].vary({"aggregation": "token_mean"})
    out = m.loss(inputs)
    assert out.loss.item() == pytest.approx((3 - 3 + 3) / 14)  # dropped responses stay in the denominator
    close(torch.autograd.grad(out.loss, inputs.logp)[0] * 14, [[1] * 3, [0] * 3, [-1] * 3, [1] * 3, [0] * 3])
    assert out.metrics["off_policy_share"] == (5, 14)
    sequences = METHODS["opsm"].loss(inputs).loss.item()
    assert sequences == pytest.approx((1 - 1 + 1) / 5)
    assert METHODS["opsm"].needs == {"logp_rollout"}


def test_opsm_measures_drift_of_the_current_policy_and_spares_the_other_terms():
    m = METHODS["opsm"].vary({"kl.coefficient": 1.0, "kl.estimator": "k1"})
    inputs = tokens([-1.0], [[-2.0, -2.0]], [[-1.0, -1.0]], logp_rollout=[[-1.0, -1.0]], logp_ref=[[-1.0, -1.0]])
    close(token_sum(m, inputs)[1], [[1.0, 1.0]])  # the policy loss is gone, the KL penalty is not
    with pytest.raises(ValueError, match="needs logp_rollout"):
        METHODS["opsm"].loss(replace(inputs, logp_rollout=None))


def test_opsm_looks_at_each_tokens_own_sign_where_advantages_are_of_tokens():
    inputs = tokens([[-1.0, 2.0, 0.0]], [[-2.0] * 3], logp_rollout=[[0.0] * 3])
    close(token_sum(METHODS["opsm"], inputs)[1], [[0, -2, 0]])


def test_selection_takes_tensors_in_any_layout_and_ties():
    m = METHODS["fork_tokens"]
    entropy = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.1]]).t()
    mask = torch.ones(3, 2, dtype=torch.bool).t()
    logp = torch.zeros(3, 2).t()
    found = m.select(LossInputs(logp, logp, torch.ones(2, 3), mask, entropy=entropy))
    assert found.tokens.nonzero().tolist() == [[0, 0], [0, 1]]


def test_proxy_of_a_chunk_of_rows_is_that_of_its_tokens():
    m = METHODS["lp_reg"]
    logits, tokens = torch.randn(2, 5, 9), torch.randint(9, (2, 5))
    torch.testing.assert_close(
        m.logp_proxy(logits, tokens).flatten(), m.logp_proxy(logits.view(10, 9), tokens.view(10))
    )
