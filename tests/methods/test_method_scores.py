"""Continuous rewards: what a score of 0.3 or 0.8 does in each method. Responses are kept or dropped by correctness."""

import pytest
import torch
from minibatches import NAMES, rollout_step

from polarity.methods import METHODS

SIGNED = {"psr", "nsr", "w_reinforce", "reinforce"}
# Four responses to one prompt: scores, and the verifier's verdict.
SCORES = torch.tensor([0.8, 0.3, 0.6, 0.3])
CORRECT = torch.tensor([True, False, True, False])
GROUP = torch.zeros(4, dtype=torch.long)


def advantages(m, scores=SCORES, correct=CORRECT):
    """(4, 3) advantages of one group whose responses have three tokens each."""
    mask = torch.ones(4, 3, dtype=torch.bool)
    nothing = torch.zeros(4, 3)
    a = m.advantages(scores, GROUP, correct, mask, nothing, nothing, nothing)
    return a[:, None].expand(4, 3) if a.dim() == 1 else a


def close(tensor, expected):
    torch.testing.assert_close(tensor, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_score_enters_the_advantage_unless_it_goes_by_correctness(name):
    m = METHODS[name]
    a, higher = advantages(m), advantages(m, SCORES + torch.tensor([0.0, 0.0, 0.1, 0.0]))
    if name in SIGNED:
        assert torch.equal(a, higher)
    else:
        assert (higher[2] > a[2]).all()
        assert (a[0] > a[2]).all()
        assert (a[2] > a[1]).all()
        assert torch.equal(a[1], a[3])


@pytest.mark.parametrize("name", NAMES)
def test_a_score_never_decides_who_is_dropped(name):
    m = METHODS[name]
    scores = torch.tensor([0.8, 0.3, 0.6, 0.3])
    assert torch.equal(m.keep(scores, GROUP, CORRECT), m.keep(1 - scores, GROUP, CORRECT))


def test_scores_by_hand_in_each_kind_of_advantage():
    centred = torch.tensor([0.3, -0.2, 0.1, -0.2])  # mean 0.5, std sqrt(0.18 / 3)
    close(advantages(METHODS["dr_grpo"])[:, 0], centred.tolist())
    close(advantages(METHODS["grpo"])[:, 0], (centred / 0.06**0.5).tolist())
    close(advantages(METHODS["rloo"])[:, 0], (centred * 4 / 3).tolist())
    # whitened over twelve tokens, whose variance has the divisor 11
    close(advantages(METHODS["reinforce_pp"])[:, 0], (centred / (3 * 0.18 / 11) ** 0.5).tolist())
    close(advantages(METHODS["reinforce_pp_baseline"])[:, 0], (centred / (3 * 0.18 / 11) ** 0.5).tolist())
    close(advantages(METHODS["ppo"])[:, 0], (centred / (3 * 0.18 / 11) ** 0.5).tolist())  # a critic that says 0
    close(advantages(METHODS["w_reinforce"])[:, 0], [0.1, -1.0, 0.1, -1.0])


def test_a_wrong_answer_with_a_good_score_has_a_positive_advantage_and_is_still_wrong():
    scores, correct = torch.tensor([0.3, 0.8, 0.3, 0.8]), CORRECT
    assert (advantages(METHODS["grpo"], scores, correct)[:, 0] > 0).tolist() == [False, True, False, True]
    assert (advantages(METHODS["reinforce"], scores, correct)[:, 0] > 0).tolist() == correct.tolist()
    assert METHODS["psr_group"].keep(scores, GROUP, correct).tolist() == correct.tolist()


def test_dynamic_sampling_looks_at_correctness_and_not_at_scores():
    m, groups = METHODS["dapo"], torch.tensor([0, 0, 1, 1])
    scores, correct = torch.tensor([0.8, 0.9, 0.5, 0.5]), torch.tensor([True, True, True, False])
    assert m.keep(scores, groups, correct).tolist() == [False, False, True, True]
    assert m.advantages(scores, groups, correct)[2:].tolist() == [0.0, 0.0]  # kept, but nothing to compare


@pytest.mark.parametrize("name", sorted(SIGNED))
def test_graded_advantages_scale_with_the_score(name):
    m = METHODS[name].vary({"advantage.graded": True})
    size = METHODS[name].advantage.positive
    close(advantages(m)[:, 0], [0.8 * size, -0.7, 0.6 * size, -0.7])
    plain = METHODS[name].advantages(CORRECT.float(), GROUP, CORRECT)
    assert torch.equal(m.advantages(CORRECT.float(), GROUP, CORRECT), plain)  # scores of 1 and 0: the plain form
    for outside in (-0.1, 1.1):
        with pytest.raises(ValueError, match="scores between 0 and 1"):
            m.advantages(torch.full((4,), outside), GROUP, CORRECT)


def test_the_overlong_penalty_makes_rewards_continuous_and_correctness_stays():
    m = METHODS["dapo"].vary({"overlong": {"buffer": 2, "factor": 1.0}})
    step = rollout_step(1)
    rewards = m.rewards(step.rewards, step.mask.sum(1), step.mask.sum(1) == 6, max_length=6)
    assert rewards[5] == step.rewards[5] - 1.0
    assert torch.equal(m.keep(rewards, step.groups, step.correct), m.keep(step.rewards, step.groups, step.correct))
