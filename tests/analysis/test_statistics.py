"""Intervals and paired tests, against exact values, scipy and simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from polarity.analysis.statistics import bootstrap_interval, paired_tests, permutation_p, standard_error


def test_the_interval_is_the_percentile_bootstrap_of_the_mean():
    values = np.random.default_rng(1).random(60)
    ours = bootstrap_interval(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=2).confidence_interval
    assert ours == pytest.approx(np.array([theirs.low, theirs.high]), abs=4e-3)
    assert np.array_equal(ours, bootstrap_interval(values))  # seeded
    assert not np.array_equal(ours, bootstrap_interval(values, seed=1))
    narrow = bootstrap_interval(values, level=0.5)
    assert ours[0] < narrow[0] < values.mean() < narrow[1] < ours[1]


def test_metrics_share_the_draws_and_may_stand_side_by_side():
    values = np.random.default_rng(0).random((40, 3))
    together = bootstrap_interval(values)
    assert together.shape == (2, 3)
    assert np.allclose(together[:, 1], bootstrap_interval(values[:, 1]))


def test_intervals_without_spread():
    assert bootstrap_interval(np.array([0.25])).tolist() == [0.25, 0.25]
    assert bootstrap_interval(np.full(9, 0.5)).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="one problem at least"):
        bootstrap_interval(np.array([]))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    samples = generator.beta(0.5, 0.5, (300, 60))  # pass rates: many near 0 and 1; mean 0.5
    ends = np.array([bootstrap_interval(sample, draws=1000, seed=i) for i, sample in enumerate(samples)])
    assert 0.90 < ((ends[:, 0] < 0.5) & (ends[:, 1] > 0.5)).mean() < 0.99


def test_the_permutation_test_is_exact_for_few_problems():
    for n in (1, 4, 9):
        difference = np.random.default_rng(n).normal(0.5, 1, n)
        flipped = [abs(np.dot(signs, difference)) for signs in itertools.product([1, -1], repeat=n)]
        expected = np.mean([value >= abs(difference.sum()) - 1e-9 for value in flipped])
        assert permutation_p(difference) == expected


def test_drawn_and_enumerated_permutations_agree():
    difference = np.random.default_rng(3).normal(0.25, 1, 40)
    theirs = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=20_000, rng=0)
    assert permutation_p(difference, draws=20_000) == pytest.approx(theirs.pvalue, abs=0.01)
    assert permutation_p(np.full(50, 1.0)) == 1 / 10_001  # never 0


def test_problems_that_agree_say_nothing():
    few = np.array([0.5, 0.25, -0.125])
    assert permutation_p(np.concatenate([few, np.zeros(500)])) == permutation_p(few)


def test_paired_tests():
    generator = np.random.default_rng(0)
    b = generator.random(200)
    a = b + generator.normal(0.05, 0.1, 200)
    found = paired_tests(a.tolist(), b.tolist())
    assert found.n == 200
    assert found.mean == pytest.approx(float((a - b).mean()))
    assert found.low < found.mean < found.high
    assert found.p_t == pytest.approx(float(stats.ttest_rel(a, b).pvalue))
    assert found.p_permutation < 0.001
    back = paired_tests(b.tolist(), a.tolist())
    assert back.mean == pytest.approx(-found.mean)
    assert (back.p_t, back.p_permutation) == pytest.approx((found.p_t, found.p_permutation))


def test_paired_tests_without_spread():
    assert (paired_tests([1, 0], [1, 0]).p_t, paired_tests([1, 0], [1, 0]).p_permutation) == (1.0, 1.0)
    assert paired_tests([1, 1], [0, 0]).p_t is None
    assert paired_tests([1.0], [0.5]).p_t is None
    assert paired_tests([1.0], [0.5]).p_permutation == 1.0  # one problem: both signs are as far
    with pytest.raises(ValueError, match="same problems"):
        paired_tests([1.0], [])


def test_p_values_are_uniform_where_nothing_differs():
    generator = np.random.default_rng(5)
    ps = [permutation_p(generator.normal(0, 1, 30), draws=400, seed=i) for i in range(400)]
    assert stats.kstest(ps, "uniform").pvalue > 0.01


def test_standard_error():
    assert standard_error([0.0, 1.0]) == pytest.approx(0.5)
    assert standard_error([1.0]) is None
