"""New reasoning paths: what a trained policy's responses do that none of the initial policy's did.

Table 1 of A3PO's paper: the share of problems with a reasoning path that none of the initial policy's rollouts of that
problem has (60 problems, 8 rollouts each). Here for responses whose strategy has a name, which is exact; for text a
judge says what is new (polarity.evaluation.judge), and `share_of_problems` counts its verdicts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

from polarity.analysis.statistics import bootstrap_interval

Strategies = Mapping[str, Sequence[str | None]]  # problem -> the strategy of each of its responses, None: not named
Verdicts = Mapping[str, Sequence[bool]]  # problem -> whether each of them is correct


@dataclass(frozen=True)
class Share:
    """A share of problems with its 95 % bootstrap interval over problems.

    chance: the share that a policy which did not change would have been expected to show; None where it is not known.
    """

    problems: int
    share: float
    low: float
    high: float
    chance: float | None = None


@dataclass(frozen=True)
class NewPaths:
    """any: problems with a new path; correct: problems with a new path in a correct response.

    found: problem to its new strategies, sorted, where there are any; left_out: problems in one of the two
    evaluations only, or without a named strategy in one of them.
    """

    any: Share
    correct: Share
    found: dict[str, list[str]]
    left_out: int


def new_paths(initial: Strategies, later: Strategies, initial_correct: Verdicts, later_correct: Verdicts) -> NewPaths:
    """New paths by strategy, over the problems in both evaluations that have a named strategy in each.

    A strategy is new to a problem when none of the initial responses to it, right or wrong, has it. Responses without
    a named strategy are not counted. More responses find more: compare evaluations with as many responses.

    `chance` asks what would be expected had the policy not changed: then the initial and the later responses to a
    problem are draws from one distribution, and any division of all of them into as many initial and later ones is as
    likely. Their mean is computed, not drawn (`_division_chance`). It is conditional on what both showed, so
    that a policy that did change raises it: it errs towards chance.

    Raises ValueError when a problem differs in its numbers of strategies and verdicts, or no problem is left.
    """
    problems = [p for p in initial if p in later and _named(initial[p]) and _named(later[p])]
    if not problems:
        raise ValueError("no problem has named strategies in both evaluations")
    found: dict[str, list[str]] = {}
    values = np.zeros((len(problems), 4))  # new, new and correct, and the chances of both
    for row, p in zip(values, problems, strict=True):
        first = list(zip(initial[p], initial_correct[p], strict=True))
        second = list(zip(later[p], later_correct[p], strict=True))
        known = _named(initial[p])
        new = _named(later[p]) - known
        right = {name for name, correct in second if correct and name in new}
        row[:] = bool(new), bool(right), *_division_chance(first, second)
        if new:
            found[p] = sorted(new)
    shares = [_share(values[:, i], float(values[:, i + 2].mean())) for i in (0, 1)]
    return NewPaths(shares[0], shares[1], found, len({*initial, *later}) - len(problems))


def share_of_problems(new: Sequence[bool]) -> Share:
    """The share of problems that are `new`, with its interval. Raises ValueError without problems."""
    return _share(np.asarray(new, dtype=np.float64), None)


@dataclass(frozen=True)
class Agreement:
    """How far repeated verdicts on the same items agree with each other. Nothing here says that they are right.

    items: those with two verdicts at least; percent: of the pairs of verdicts on one item that agree, mean over items;
    kappa: Fleiss' kappa, (agreement - chance) / (1 - chance), where chance is the agreement of verdicts that are drawn
    from all of them: 1 is perfect, 0 what chance gives, below 0 worse. None where all verdicts are the same, because
    then chance agrees as well.
    """

    items: int
    percent: float
    kappa: float | None


def agreement(verdicts: Sequence[Sequence[bool | None]]) -> Agreement | None:
    """Of repeated verdicts on each item, None being one that is missing; None where no item has two.

    Items may differ in their number of verdicts (Fleiss, 1971, Measuring nominal scale agreement among many raters,
    with each item's own number of pairs).
    """
    known = [[v for v in item if v is not None] for item in verdicts]
    known = [item for item in known if len(item) > 1]
    if not known:
        return None
    observed = float(np.mean([_agreeing(sum(item), len(item)) for item in known]))
    yes = sum(map(sum, known)) / sum(map(len, known))
    chance = yes**2 + (1 - yes) ** 2
    return Agreement(len(known), 100 * observed, None if yes in (0, 1) else (observed - chance) / (1 - chance))


def majority(verdicts: Sequence[bool | None]) -> bool | None:
    """What more than half of the known verdicts say; None on a tie, and where none is known."""
    yes, no = verdicts.count(True), verdicts.count(False)
    return None if yes == no else yes > no


def _agreeing(yes: int, n: int) -> float:
    return (math.comb(yes, 2) + math.comb(n - yes, 2)) / math.comb(n, 2)


def _named(strategies: Sequence[str | None]) -> set[str]:
    return {name for name in strategies if name is not None}


def _share(values: np.ndarray, chance: float | None) -> Share:
    low, high = bootstrap_interval(values).tolist()
    return Share(len(values), float(values.mean()), low, high, chance)


def _division_chance(
    first: Sequence[tuple[str | None, bool]], second: Sequence[tuple[str | None, bool]]
) -> tuple[float, float]:
    """Over all divisions of both lists' responses into len(first) and len(second): the share in which some strategy,
    and some strategy of a correct response, is in the second part only.

    Each response is put into the second part with probability q, and what follows is conditioned on their number. Of c
    responses, j are in it with the binomial probability of j; a strategy is in the second part only when all c are. So
    the distribution of the second part's size, without the divisions that are asked for, is the convolution of the
    strategies' binomials without their last terms; for the other number only strategies with a correct response lose
    theirs, since that response is then in the second part too.
    """
    sizes: dict[str, int] = {}
    right, unnamed = set(), 0
    for name, correct in (*first, *second):
        if name is None:
            unnamed += 1
            continue
        sizes[name] = sizes.get(name, 0) + 1
        if correct:
            right.add(name)
    later, total = len(second), len(first) + len(second)
    chances = []
    for able in (set(sizes), right):
        rest = _binomial(unnamed, later / total)
        for name, c in sizes.items():
            part = _binomial(c, later / total)
            rest = np.convolve(rest, np.append(part[:c], 0.0) if name in able else part)
        chances.append(max(0.0, 1 - float(rest[later] / _binomial(total, later / total)[later])))
    return chances[0], chances[1]


@cache
def _binomial(n: int, q: float) -> np.ndarray:
    """(n + 1,) float64: the probability of each number of successes in n."""
    return np.asarray(stats.binom.pmf(np.arange(n + 1), n, q))
