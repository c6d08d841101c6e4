"""Advantages of tokens: GAE with a critic, its value loss, and REINFORCE++'s returns. N responses, T tokens."""

import math

import pytest
import torch

from polarity.methods import METHODS, Denominators

CRITIC = METHODS["dapo"].vary(
    {"name": "with_critic", "advantage": {"kind": "gae", "whiten": False, "reward_kl": 0.0, "gamma": 0.9, "lam": 0.5}}
)
MASK = torch.tensor([[True, True, True, False], [True, False, True, False], [False, False, False, False]])
VALUES = torch.tensor([[0.1, 0.2, 0.3, math.nan], [0.4, math.nan, 0.5, 9.0], [math.nan] * 4])
REWARDS = torch.tensor([1.0, -1.0, 5.0])


def run(m, **extra):
    return m.advantages(REWARDS, torch.arange(3), REWARDS > 0, MASK, VALUES, **extra)


def test_gae_by_hand_steps_over_masked_positions():
    d2 = 1.0 - 0.3
    d1 = 0.9 * 0.3 - 0.2
    d0 = 0.9 * 0.2 - 0.1
    first = [d0 + 0.45 * (d1 + 0.45 * d2), d1 + 0.45 * d2, d2, 0.0]
    e2 = -1.0 - 0.5
    second = [(0.9 * 0.5 - 0.4) + 0.45 * e2, 0.0, e2, 0.0]
    torch.testing.assert_close(run(CRITIC), torch.tensor([first, second, [0.0] * 4]))


def test_undiscounted_returns_are_the_reward_at_every_token_and_carry_the_kl_penalty():
    m = CRITIC.vary({"advantage.gamma": 1.0, "advantage.lam": 1.0})
    expected = torch.where(MASK, REWARDS[:, None], 0.0)
    torch.testing.assert_close(m.value_targets(REWARDS, MASK, VALUES), expected)
    penalised = m.vary({"advantage.reward_kl": 0.1})
    assert penalised.needs >= {"values", "logp_ref"}
    targets = penalised.value_targets(REWARDS, MASK, VALUES, torch.zeros(3, 4), -torch.ones(3, 4))
    torch.testing.assert_close(targets[0], torch.tensor([0.7, 0.8, 0.9, 0.0]))
    with pytest.raises(ValueError, match="logp_ref"):
        run(penalised)


def test_whitening_is_over_valid_tokens_with_bessels_correction():
    plain, white = run(CRITIC), run(CRITIC.vary({"advantage.whiten": True}))
    inside = plain[MASK]
    torch.testing.assert_close(white[MASK], (inside - inside.mean()) / (inside.var() + 1e-8).sqrt())
    assert (white[~MASK] == 0).all()


def test_value_loss_by_hand_and_over_micro_batches():
    values = torch.tensor([[1.0, 0.2, math.nan]], requires_grad=True)
    old, targets = torch.tensor([[0.0, 0.0, math.nan]]), torch.tensor([[2.0, 0.0, math.nan]])
    mask = torch.tensor([[True, True, False]])
    out = CRITIC.value_loss(values, old, targets, mask)
    assert out.loss.item() == pytest.approx(0.5 * ((0.5 - 2.0) ** 2 + 0.2**2) / 2)
    assert torch.autograd.grad(out.loss, values)[0].tolist() == [[0.0, pytest.approx(0.1), 0.0]]
    assert out.metrics["value/clip_fraction"] == (1, 2)
    part = CRITIC.value_loss(values, old, targets, mask, Denominators(tokens=8, sequences=3))
    assert part.loss.item() == pytest.approx(out.loss.item() / 4)


def test_methods_without_a_critic_say_so():
    with pytest.raises(NotImplementedError, match="'dapo' has no critic"):
        METHODS["dapo"].value_targets(REWARDS, MASK, VALUES)
    with pytest.raises(NotImplementedError, match="'dapo' has no critic"):
        METHODS["dapo"].value_loss(VALUES, VALUES, VALUES, MASK)


def test_ppo_of_the_catalog():
    """GAE(1, 1): the return minus the value at every token, with k1 in the reward, whitened."""
    m = METHODS["ppo"]
    assert m.needs == {"values", "logp_ref", "entropy"}
    assert not m.compares_group
    logp_old, logp_ref = torch.full((3, 4), -1.0), torch.full((3, 4), -3.0)
    a = run(m, logp_old=logp_old, logp_ref=logp_ref)
    assert (a.shape, a.dtype) == ((3, 4), torch.float32)
    k = 1e-3 * 2.0  # the penalty of a token: coefficient * (logp_old - logp_ref)
    plain = torch.tensor([1 - 3 * k - 0.1, 1 - 2 * k - 0.2, 1 - k - 0.3, -1 - 2 * k - 0.4, -1 - k - 0.5])
    torch.testing.assert_close(a[MASK], (plain - plain.mean()) / plain.std())
    assert (a[~MASK] == 0).all()
    targets = m.value_targets(REWARDS, MASK, VALUES, logp_old, logp_ref)
    torch.testing.assert_close(targets[MASK], plain + VALUES[MASK])
    with pytest.raises(ValueError, match="needs values"):
        m.advantages(REWARDS, torch.arange(3), REWARDS > 0, MASK, None, logp_old, logp_ref)
    with pytest.raises(ValueError, match="needs mask"):
        m.advantages(REWARDS, torch.arange(3), REWARDS > 0)


# REINFORCE++

RETURNS = METHODS["reinforce_pp"]
TWO = torch.tensor([[True, True, True], [True, False, False]])


def returns(changes, rewards=(1.0, 0.0), groups=(0, 1), **extra):
    m = RETURNS.vary({f"advantage.{k}": v for k, v in changes.items()})
    rewards = torch.tensor(rewards)
    return m.advantages(rewards, torch.tensor(groups), rewards > 0.5, TWO, **extra)


def whitened(values):
    values = torch.tensor(values)
    out = torch.zeros(2, 3)
    out[TWO] = (values - values.mean()) / values.std()
    return out


def test_returns_are_whitened_over_tokens_so_long_responses_weigh_more():
    a = returns({})
    assert a.dtype == torch.float32
    torch.testing.assert_close(a, whitened([1.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(a[0, 0], torch.tensor(0.5))  # (1 - 3/4) / 0.5
    torch.testing.assert_close(a[1, 0], torch.tensor(-1.5))


def test_returns_are_discounted_back_from_the_last_token():
    torch.testing.assert_close(returns({"gamma": 0.5}), whitened([0.25, 0.5, 1.0, 0.0]))
    torch.testing.assert_close(returns({"gamma": 0.0}), whitened([0.0, 0.0, 1.0, 0.0]))


def test_returns_carry_the_kl_penalty_of_the_tokens_that_follow():
    logp_old = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, math.nan, math.nan]])
    logp_ref = torch.tensor([[-2.0, -2.0, -1.0], [-1.5, math.nan, math.nan]])
    a = returns({"reward_kl": 0.1, "gamma": 0.5}, logp_old=logp_old, logp_ref=logp_ref)
    last = 1.0 + 0.2  # minus 0.1 * (-3 + 1)
    torch.testing.assert_close(a, whitened([-0.1 + 0.25 * last, 0.5 * last, last, -0.05]))
    assert RETURNS.vary({"advantage.reward_kl": 0.1}).needs == {"logp_ref"}
    with pytest.raises(ValueError, match="logp_ref"):
        returns({"reward_kl": 0.1})


def test_the_baseline_variant_takes_the_groups_mean_off_first():
    m = METHODS["reinforce_pp_baseline"]
    assert m.compares_group
    assert not RETURNS.compares_group
    a = returns({"baseline": "group"}, rewards=(1.0, 0.0), groups=(0, 0))
    torch.testing.assert_close(a, whitened([0.5, 0.5, 0.5, -0.5]))
    assert torch.equal(m.advantages(torch.tensor([1.0, 0.0]), torch.zeros(2), torch.tensor([True, False]), TWO), a)
    alone = returns({"baseline": "group"}, rewards=(1.0, 0.3), groups=(0, 1))
    assert (alone == 0).all()


def test_fewer_than_two_tokens_are_not_whitened():
    one = torch.tensor([[False, False], [True, False]])
    a = RETURNS.advantages(torch.tensor([0.0, 0.7]), torch.arange(2), torch.tensor([False, True]), one)
    torch.testing.assert_close(a, torch.tensor([[0.0, 0.0], [0.7, 0.0]]))
    nothing = RETURNS.advantages(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0) > 0, torch.zeros(0, 4) > 0)
    assert nothing.shape == (0, 4)
