"""Rewards -> advantages, and which rows are kept. Golden numbers computed independently of this code."""

import pytest
import torch

from polarity.methods import METHODS, Denominators, LossInputs

GROUP_METHODS = [name for name in METHODS if METHODS[name].advantage.kind == "group"]


def advantages(name, rewards, groups, correct=None):
    rewards = torch.tensor(rewards, dtype=torch.float32)
    groups = torch.tensor(groups)
    correct = rewards > 0.5 if correct is None else torch.tensor(correct)
    return METHODS[name].advantages(rewards, groups, correct)


@pytest.mark.parametrize(
    ("size", "right", "positive", "negative"),
    [
        (8, 1, 2.474867, -0.353552),
        (8, 2, 1.620182, -0.540061),
        (8, 4, 0.935413, -0.935413),
        (8, 7, 0.353552, -2.474867),
        (16, 1, 3.749985, -0.249999),
    ],
)
@pytest.mark.parametrize("name", GROUP_METHODS)
def test_group_advantage_golden_values(name, size, right, positive, negative):
    a = advantages(name, [1.0] * right + [0.0] * (size - right), [0] * size)
    assert a.dtype == torch.float32
    torch.testing.assert_close(a[:right], torch.full((right,), positive), atol=2e-6, rtol=0)
    torch.testing.assert_close(a[right:], torch.full((size - right,), negative), atol=2e-6, rtol=0)


def test_rewards_of_plus_and_minus_one_differ_by_the_eps_term_only():
    a = advantages("grpo", [1, 1, -1, -1, -1, -1, -1, -1], [0] * 8)
    torch.testing.assert_close(a, torch.tensor([1.620183] * 2 + [-0.540061] * 6), atol=1e-6, rtol=0)


@pytest.mark.parametrize("reward", [0.0, 1.0, -0.3, 0.1, 1e6 + 0.3])
@pytest.mark.parametrize("size", [1, 2, 5, 7])
@pytest.mark.parametrize("name", ["dapo", "dr_grpo", "rloo"])
def test_equal_rewards_and_groups_of_one_have_advantage_exactly_zero(name, reward, size):
    a = advantages(name, [reward] * size + [0.0, 1.0], [3] * size + [1, 1])
    assert a[:size].tolist() == [0.0] * size
    assert a[size:].tolist() != [0.0, 0.0]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_groups_may_be_unsorted_interleaved_and_of_different_sizes(name):
    rewards = [1.0, 0.0, 0.3, 1.0, 0.0, 0.0, 0.7]
    groups = [900, -4, 5, -4, 900, -4, 5]
    a = advantages(name, rewards, groups)
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        alone = advantages(name, [rewards[i] for i in members], [0] * len(members))
        torch.testing.assert_close(a[members], alone, atol=1e-7, rtol=1e-6)


def test_dr_grpo_takes_off_the_mean_and_does_not_divide():
    a = advantages("dr_grpo", [1.0, 0.0, 0.0, 0.5, 3.0], [0, 0, 0, 0, 1])
    torch.testing.assert_close(a, torch.tensor([0.625, -0.375, -0.375, 0.125, 0.0]))


def test_dr_grpo_divides_by_a_constant_length():
    m = METHODS["dr_grpo"]
    mask = torch.tensor([[True, True, True], [True, False, False]])
    a = torch.tensor([[1.0, 1.0, 1.0], [-5.0, 0.0, 0.0]])
    inputs = LossInputs(torch.zeros(2, 3), torch.zeros(2, 3), a, mask, denominators=Denominators.of(mask, 50))
    assert m.loss(inputs).loss.item() == pytest.approx((-3 + 5) / (2 * 50))


def test_rloo_takes_off_the_mean_of_the_others():
    rewards = [1.0, 0.0, 0.0, 0.5, 3.0, 0.2, 0.4]
    others = [1 - 0.5 / 3, -1.5 / 3, -1.5 / 3, 0.5 - 1 / 3, 0.0, -0.2, 0.2]
    a = advantages("rloo", rewards, [0, 0, 0, 0, 1, 2, 2])
    torch.testing.assert_close(a, torch.tensor(others))
    centred = advantages("dr_grpo", rewards, [0, 0, 0, 0, 1, 2, 2])
    torch.testing.assert_close(a[:4], centred[:4] * 4 / 3)


@pytest.mark.parametrize(
    ("name", "positive", "negative"), [("psr", 1, -1), ("nsr", 1, -1), ("reinforce", 1, -1), ("w_reinforce", 0.1, -1)]
)
def test_signed_advantages_follow_correctness_and_not_the_reward(name, positive, negative):
    a = advantages(name, [0.2, 0.9, -5.0], [0, 0, 1], correct=[True, False, True])
    torch.testing.assert_close(a, torch.tensor([positive, negative, positive], dtype=torch.float32))


def test_w_reinforce_with_lambda_one_is_reinforce():
    correct = torch.tensor([True, False, True])
    a = METHODS["w_reinforce"].vary({"advantage.positive": 1.0}).advantages(correct.float(), torch.arange(3), correct)
    assert torch.equal(a, METHODS["reinforce"].advantages(correct.float(), torch.arange(3), correct))


def test_keep_is_by_correctness_even_where_rewards_disagree():
    correct = torch.tensor([True, False, True, False])
    rewards = torch.tensor([-1.0, 2.0, 0.0, 0.0])
    groups = torch.zeros(4, dtype=torch.long)
    for name, kept in {"psr": correct, "psr_group": correct, "nsr": ~correct, "nsr_group": ~correct}.items():
        assert torch.equal(METHODS[name].keep(rewards, groups, correct), kept)
    assert METHODS["grpo"].keep(rewards, groups, correct).all()


def test_psr_group_normalises_over_the_full_group_before_the_drop():
    rewards = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert advantages("psr_group", rewards, [0] * 8)[0] == pytest.approx(1.620182, abs=2e-6)


def test_dynamic_sampling_keeps_mixed_groups_and_groups_of_one():
    #                      mixed        all right    all wrong     one
    correct = torch.tensor([True, False, True, True, False, False, True])
    groups = torch.tensor([7, 7, 2, 2, 5, 5, 9])
    rewards = torch.rand(7)  # equal correctness with different rewards (a length penalty) is still dropped
    m = METHODS["dapo"]
    assert m.keep(rewards, groups, correct).tolist() == [True, True, False, False, False, False, True]
    assert m.vary({"filter.dynamic_sampling": False}).keep(rewards, groups, correct).all()


def test_overlong_penalty_golden_values():
    m = METHODS["dapo"].vary({"overlong": {"buffer": 4096, "factor": 1.0}})
    lengths = torch.tensor([100, 16384, 18432, 20480])
    r = m.rewards(torch.ones(4), lengths, lengths == 20480, max_length=20480)
    assert r.tolist() == [1.0, 1.0, 0.5, 0.0]
    assert METHODS["dapo"].rewards(torch.ones(4), lengths, lengths == 20480).tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="max_length"):
        m.rewards(torch.ones(4), lengths, lengths == 20480)
    with pytest.raises(ValueError, match=r"set overlong\.buffer"):
        m.rewards(torch.ones(4), lengths, lengths == 20480, max_length=140)


def test_empty_step():
    none = torch.zeros(0)
    m = METHODS["dapo"]
    assert m.advantages(none, none.long(), none.bool()).shape == (0,)
    assert m.keep(none, none.long(), none.bool()).shape == (0,)


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].advantage.token_level])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.float16])
def test_rewards_of_any_type(name, dtype):
    correct = torch.tensor([True, False, True, False])
    groups = torch.zeros(4, dtype=torch.long)
    found = METHODS[name].advantages(correct.to(dtype), groups, correct)
    assert found.dtype == torch.float32
    assert torch.equal(found, METHODS[name].advantages(correct.float(), groups, correct))
