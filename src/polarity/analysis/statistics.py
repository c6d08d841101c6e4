"""How sure a mean over problems is, and whether two runs differ on the same problems.

P problems. The unit is the problem, never the response: the responses to one problem are alike, and counting them as
independent makes intervals far too narrow. Nothing here covers what another training seed would give.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

DRAWS = 10_000
# Sign flips are enumerated up to 2^EXACT of them, and drawn beyond.
EXACT = 16
# Bootstrap draws and sign flips are made in blocks of about this many numbers, to bound memory.
BLOCK = 4_000_000


def bootstrap_interval(values: np.ndarray, level: float = 0.95, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Percentile bootstrap interval of the mean over problems: (2,) low and high, or (2, M) for values (P, M).

    Problems are drawn with replacement, `draws` times, by a generator seeded with `seed`; M metrics share the draws.
    With one problem, or equal values, both ends are the mean. With few problems (30 of an AIME year) percentile
    intervals are somewhat too narrow.
    """
    problems = len(values)
    if problems == 0:
        raise ValueError("an interval needs one problem at least")
    table = np.asarray(values, dtype=np.float64).reshape(problems, -1)
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, draws, per_block := max(1, BLOCK // problems)):
        rows = min(per_block, draws - start)
        chosen = generator.integers(0, problems, (rows, problems)) + np.arange(rows)[:, None] * problems
        counts = np.bincount(chosen.ravel(), minlength=rows * problems).reshape(rows, problems)
        means.append(counts @ table / problems)
    tail = (1 - level) / 2
    ends = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return ends.reshape(2, *np.shape(values)[1:])


@dataclass(frozen=True)
class Paired:
    """a minus b over n problems: mean difference with its 95 % bootstrap interval, and two-sided p values.

    p_t: paired t test; None below two problems, or where all differ by the very same amount. p_permutation: sign-flip
    test. Neither is corrected for the number of comparisons.
    """

    n: int
    mean: float
    low: float
    high: float
    p_t: float | None
    p_permutation: float


def paired_tests(a: Sequence[float], b: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Paired:
    """Compare two runs, a[i] and b[i] being their values on problem i."""
    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired tests need the same problems in both, one at least; got {len(a)} and {len(b)}")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    low, high = bootstrap_interval(difference, draws=draws, seed=seed)
    p_t: float | None
    if len(difference) > 1 and float(np.ptp(difference)) > 1e-12:
        p_t = float(stats.ttest_1samp(difference, 0.0).pvalue)
    else:
        p_t = 1.0 if len(difference) > 1 and abs(difference[0]) < 1e-12 else None
    p = permutation_p(difference, draws, seed)
    return Paired(len(difference), float(difference.mean()), float(low), float(high), p_t, p)


def permutation_p(difference: np.ndarray, draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided p of the sign-flip test: how often flipping the signs at random gives a mean as far from 0.

    Exact where at most EXACT problems differ; else from `draws` seeded flips, the observed one counted among them, so
    that it never is 0 (Phipson and Smyth, 2010).
    """
    moved = difference[np.abs(difference) > 1e-12]
    if not len(moved):
        return 1.0
    observed = abs(moved.sum()) * (1 - 1e-9)  # equal sums in another order must not fall short
    if len(moved) <= EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
        return float((np.abs(signs @ moved) >= observed).mean())
    generator, reached = np.random.default_rng(seed), 0
    for start in range(0, draws, per_block := max(1, BLOCK // len(moved))):
        rows = min(per_block, draws - start)
        flips = 1 - 2 * generator.integers(0, 2, (rows, len(moved)))
        reached += int((np.abs(flips @ moved) >= observed).sum())
    return (reached + 1) / (draws + 1)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean over problems; None below two of them."""
    n = len(values)
    return float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
