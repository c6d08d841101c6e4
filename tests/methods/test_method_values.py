"""Critic parts: GAE, whitening, value loss. N responses, T tokens."""

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
