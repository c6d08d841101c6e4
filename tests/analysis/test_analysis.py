"""Numbers from rollouts, against values worked out by hand."""

import itertools

import pytest
import torch

from polarity.analysis import credit_metrics, pass_at_k, rollout_metrics


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [(32, 1, 8, 0.25), (256, 3, 64, 0.579782), (8, 2, 4, 0.785714), (5, 0, 5, 0), (5, 5, 1, 1)],
)
def test_pass_at_k(n: int, c: int, k: int, value: float):
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=5e-7)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response():
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(10**5, 10, 10**4) == pytest.approx(1 - 0.9**10, abs=1e-4)
    assert pass_at_k(10**5, 1, 1) == pytest.approx(1e-5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (0, 0, 1)])
def test_pass_at_k_refuses(n: int, c: int, k: int):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


# Two groups of two; lengths 2, 1, 3, 2; the first two responses and the third are correct.
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
CORRECT = torch.tensor([True, True, True, False])
LOGP = torch.log(torch.tensor([[0.5, 0.25, 9], [1.0, 9, 9], [0.2, 0.4, 0.6], [0.1, 0.3, 9]]))
ENTROPY = torch.tensor([[1.0, 2.0, 99], [3.0, 99, 99], [0.0, 1.0, 2.0], [4.0, 6.0, 99]])


def test_rollout_metrics():
    found = rollout_metrics(
        CORRECT,
        torch.tensor([1.0, 1.0, 1.0, -1.0]),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([False, False, True, False]),
        LOGP,
        ENTROPY,
        MASK,
    )
    assert found == pytest.approx(
        {
            "reward/mean": 0.5, "accuracy/mean": 0.75, "accuracy/fully_solved": 0.5, "accuracy/unsolved": 0.0,
            "length/mean": 2.0, "length/max": 3.0, "length/truncated": 0.25, "entropy/mean": 19 / 8,
            "positive/share": 0.75, "positive/entropy": 9 / 6, "positive/length": 2.0,
            "positive/probability": (0.5 + 0.25 + 1 + 0.2 + 0.4 + 0.6) / 6,
            "negative/share": 0.25, "negative/entropy": 5.0, "negative/length": 2.0, "negative/probability": 0.2,
            "positive/reward": 1.0, "negative/reward": -1.0, "accuracy/pass@2": 1.0,
            "difficulty/unsolved/share": 0.0, "difficulty/hard/share": 0.0,
            "difficulty/easy/share": 0.5, "difficulty/easy/reward": 0.0, "difficulty/easy/length": 2.5,
            "difficulty/easy/entropy": 13 / 5, "difficulty/easy/positive/entropy": 1.0,
            "difficulty/easy/positive/length": 3.0, "difficulty/easy/negative/entropy": 5.0,
            "difficulty/easy/negative/length": 2.0,
            "difficulty/solved/share": 0.5, "difficulty/solved/reward": 1.0, "difficulty/solved/length": 1.5,
            "difficulty/solved/entropy": 2.0, "difficulty/solved/positive/entropy": 2.0,
            "difficulty/solved/positive/length": 1.5,
        }
    )  # fmt: skip


def test_metrics_of_an_empty_set_are_left_out():
    found = rollout_metrics(
        torch.ones(2).bool(), torch.ones(2), torch.zeros(2, dtype=torch.long), torch.zeros(2).bool(),
        LOGP[:2], ENTROPY[:2], MASK[:2],
    )  # fmt: skip
    assert found["negative/share"] == 0
    assert not found.keys() & {"negative/entropy", "negative/length", "negative/probability", "negative/reward"}
    assert found["accuracy/fully_solved"] == 1
    nothing = torch.zeros(2, 0)
    empty = rollout_metrics(
        torch.ones(2).bool(), torch.ones(2), torch.zeros(2, dtype=torch.long), torch.zeros(2).bool(),
        nothing, nothing, nothing.bool(),
    )  # fmt: skip
    assert empty["length/mean"] == 0
    assert "entropy/mean" not in empty


def test_credit_metrics():
    """Gradient mass of a token: |shaped advantage| (1 - p)."""
    advantages = torch.tensor([1.0, 0.0, 0.5, -1.0])
    shaped = torch.where(MASK, advantages[:, None], 0.0)
    shaped[0, 1] *= 2  # p = .25
    shaped[3, 1] *= 2  # p = .3
    found = credit_metrics(advantages, shaped, LOGP, CORRECT, MASK)
    positive = 1 * 0.5 + 2 * 0.75 + 0.5 * (0.8 + 0.6 + 0.4)
    negative = 1 * 0.9 + 2 * 0.7
    assert found == pytest.approx(
        {
            "positive/shaped_share": 1 / 6, "positive/gradient_share": positive / (positive + negative),
            "positive/shaped_gradient_share": 1.5 / positive,
            "negative/shaped_share": 1 / 2, "negative/gradient_share": negative / (positive + negative),
            "negative/shaped_gradient_share": 1.4 / negative,
        }
    )  # fmt: skip
    assert credit_metrics(advantages[:, None].expand(4, 3), shaped, LOGP, CORRECT, MASK) == pytest.approx(found)


def test_credit_metrics_without_credit():
    zero = torch.zeros(4)
    found = credit_metrics(zero, torch.zeros(4, 3), LOGP, CORRECT, MASK)
    assert found == {"positive/shaped_share": 0.0, "negative/shaped_share": 0.0}
