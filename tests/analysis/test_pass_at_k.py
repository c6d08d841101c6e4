"""k tries out of n responses, against enumeration of every subset."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from polarity.analysis.pass_at_k import biased_best_at_k, maj_at_k, pass_at_k


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response():
    """Every n up to 12, every number of correct ones, every k: counted subset by subset."""
    for n in range(1, 13):
        for k in range(1, n + 1):
            subsets = np.array([sum(1 << i for i in s) for s in itertools.combinations(range(n), k)])
            for c in range(n + 1):
                hit = (subsets & ((1 << c) - 1)) > 0  # the first c responses are the correct ones
                assert pass_at_k(n, c, k) == pytest.approx(hit.mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [(32, 1, 8, 0.25), (256, 3, 64, 0.579782), (8, 2, 4, 0.785714), (5, 0, 5, 0), (5, 5, 1, 1)],
)
def test_golden_numbers(n: int, c: int, k: int, value: float):
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=5e-7)


def test_best_at_k_is_the_mean_over_draws_with_replacement_and_biased_low():
    for n, k in [(2, 2), (3, 2), (3, 4), (4, 3)]:
        for c in range(n + 1):
            draws = [any(i < c for i in draw) for draw in itertools.product(range(n), repeat=k)]
            assert biased_best_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws))
    assert biased_best_at_k(32, 1, 32) == pytest.approx(0.638, abs=5e-4)
    assert pass_at_k(32, 1, 32) == 1.0
    with pytest.raises(ValueError, match="best@k needs"):
        biased_best_at_k(4, 5, 1)


def by_enumeration(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Majority over every k-subset; a tie counts by the share of tied answers that are correct."""
    right = {a: c for a, c in zip(answers, correct, strict=True) if a is not None}
    total, subsets = 0.0, list(itertools.combinations(answers, k))
    for subset in subsets:
        votes = Counter(a for a in subset if a is not None)
        tied = [a for a, count in votes.items() if count == max(votes.values())]
        total += sum(right[a] for a in tied) / len(tied) if tied else 0.0
    return total / len(subsets)


def test_majority_vote_is_the_mean_over_all_subsets():
    rng = random.Random(0)
    for _ in range(60):
        n = rng.randint(1, 9)
        answers = [rng.choice([None, "1", "1", "2", "3", "4"][: rng.randint(2, 6)]) for _ in range(n)]
        right = rng.sample(["1", "2", "3"], rng.randint(0, 2))  # two answers may be correct
        correct = [a in right for a in answers]
        ks = list(range(1, n + 1))
        expected = [by_enumeration(answers, correct, k) for k in ks]
        assert maj_at_k(answers, correct, ks) == pytest.approx(expected, abs=1e-12)


def test_majority_vote_by_hand():
    assert maj_at_k(["7", "7", "8"], [True, True, False], [1, 2, 3]) == pytest.approx([2 / 3, 2 / 3, 1.0])
    assert maj_at_k(["7", "8"], [True, False], [2]) == [0.5]  # a tie, settled by a fair draw
    assert maj_at_k(["7", None, None], [True, False, False], [1, 3]) == pytest.approx([1 / 3, 1.0])  # no vote, no loss
    assert maj_at_k([None, None], [False, False], [1, 2]) == [0.0, 0.0]  # nobody votes: wrong
    assert maj_at_k(["7", "07", "8", "8"], [True, True, False, False], [4]) == [0.0]  # written apart, counted apart
    assert maj_at_k(["7", "7"], [True, False], [2]) == [0.5]  # a verifier of two minds


def test_majority_vote_of_many_samples():
    """256 responses: an answer of 40 % beats many of less, one of 30 % loses against one of 50 %."""
    ks = [1, 8, 64, 256]
    scattered = ["right"] * 102 + [str(i % 40) for i in range(154)]
    one, eight, sixty_four, all_of_them = maj_at_k(scattered, [a == "right" for a in scattered], ks)
    assert one == pytest.approx(102 / 256)
    assert one < eight < sixty_four <= all_of_them == 1.0
    rival = ["right"] * 77 + ["rival"] * 128 + [None] * 51
    assert maj_at_k(rival, [a == "right" for a in rival], ks)[-1] == 0.0
    everyone_alone = [str(i) for i in range(256)]
    assert maj_at_k(everyone_alone, [i == 0 for i in range(256)], ks) == pytest.approx([1 / 256] * 4)


@pytest.mark.parametrize(("answers", "k"), [(["1"], 2), (["1"], 0), (["1"] * 1001, 1)])
def test_majority_vote_refuses(answers: list[str], k: int):
    with pytest.raises(ValueError, match="maj@k needs"):
        maj_at_k(answers, [True] * len(answers), [k])
