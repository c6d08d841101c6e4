"""New paths by strategy, the share by chance, and agreement of repeated verdicts: against brute force."""

import itertools
import random

import numpy as np
import pytest

from polarity.analysis.paths import agreement, majority, new_paths, share_of_problems
from polarity.analysis.statistics import bootstrap_interval

Responses = list[tuple[str | None, bool]]


def draw(rng: random.Random, n: int) -> Responses:
    return [(rng.choice(["a", "b", "c", "d", None]), rng.random() < 0.5) for _ in range(n)]


def split(table: dict[str, Responses]) -> tuple[dict[str, list[str | None]], dict[str, list[bool]]]:
    return {p: [s for s, _ in own] for p, own in table.items()}, {p: [c for _, c in own] for p, own in table.items()}


def compare(initial: dict[str, Responses], later: dict[str, Responses]):
    (a, a_correct), (b, b_correct) = split(initial), split(later)
    return new_paths(a, b, a_correct, b_correct)


def is_new(first: Responses, second: Responses) -> tuple[bool, bool]:
    known = {s for s, _ in first}
    fresh = [correct for s, correct in second if s is not None and s not in known]
    return bool(fresh), any(fresh)


def chances(first: Responses, second: Responses) -> np.ndarray:
    """Over every division of all responses into as many initial and later ones."""
    every = [*first, *second]
    found = []
    for chosen in itertools.combinations(range(len(every)), len(second)):
        rest = [every[i] for i in range(len(every)) if i not in chosen]
        found.append(is_new(rest, [every[i] for i in chosen]))
    return np.mean(found, axis=0)


def test_against_counting_everything():
    rng = random.Random(0)
    for _ in range(25):
        names = [f"p{i}" for i in range(rng.randint(1, 6))]
        initial = {p: draw(rng, rng.randint(1, 4)) for p in names if rng.random() < 0.9}
        later = {p: draw(rng, rng.randint(1, 5)) for p in names if rng.random() < 0.9}
        shared = [p for p in names if any(s for s, _ in initial.get(p, [])) and any(s for s, _ in later.get(p, []))]
        if not shared:
            with pytest.raises(ValueError, match="no problem has named strategies in both"):
                compare(initial, later)
            continue
        found = compare(initial, later)
        wanted = np.array([is_new(initial[p], later[p]) for p in shared], dtype=float)
        lucky = np.mean([chances(initial[p], later[p]) for p in shared], axis=0)
        for i, share in enumerate((found.any, found.correct)):
            assert share.problems == len(shared)
            assert share.share == pytest.approx(wanted[:, i].mean())
            assert [share.low, share.high] == bootstrap_interval(wanted[:, i]).tolist()
            assert share.chance == pytest.approx(lucky[i])
        assert found.left_out == len({*initial, *later}) - len(shared)
        assert set(found.found) == {p for p, (new, _) in zip(shared, wanted, strict=True) if new}
        for p, new in found.found.items():
            assert new == sorted({s for s, _ in later[p] if s} - {s for s, _ in initial[p]})


def test_what_counts_as_new():
    initial = {"p": [("a", False), (None, True)], "q": [("a", True), ("b", False)]}
    later = {"p": [("b", False), ("a", True)], "q": [("b", True), ("b", True)]}
    found = compare(initial, later)
    assert found.any.share == 0.5  # q's b was there at first, though wrong
    assert found.correct.share == 0.0  # p's b is wrong
    assert found.found == {"p": ["b"]}
    assert compare({"p": initial["p"]}, {"p": [("b", True)]}).correct.share == 1.0
    with pytest.raises(ValueError, match="zip"):
        new_paths({"p": ["a", "b"]}, {"p": ["a"]}, {"p": [True]}, {"p": [True]})


def test_shares_are_multiples_of_one_problem():
    """Table 1 of the paper: 60 problems, so each figure is a multiple of 1/60."""
    rng = random.Random(3)
    found = compare({f"p{i}": draw(rng, 8) for i in range(60)}, {f"p{i}": draw(rng, 8) for i in range(60)})
    assert 60 * found.any.share == pytest.approx(round(60 * found.any.share))
    assert found.correct.share <= found.any.share


def test_chance_is_what_an_unchanged_policy_shows():
    """Two evaluations of one policy with rare paths: the share agrees with `chance` over many problems."""
    rng = random.Random(5)

    def respond(rate: float) -> tuple[str, bool]:
        name = rng.choices("abcde", (0.5, 0.3, 0.1, 0.06, 0.04))[0]
        return name, rng.random() < rate

    rates = {f"p{i}": rng.random() for i in range(3000)}
    initial, later = ({p: [respond(rate) for _ in range(8)] for p, rate in rates.items()} for _ in range(2))
    found = compare(initial, later)
    assert found.any.share > 0.4  # by luck alone
    for share in (found.any, found.correct):
        assert share.share == pytest.approx(share.chance, abs=0.03)


def test_many_responses_are_counted_exactly():
    initial = {"p": [("a", True)] * 200 + [("b", True)] * 56}
    assert compare(initial, {"p": [("a", True)] * 256}).any.chance == pytest.approx(0, abs=1e-9)
    one = compare({"p": [("a", True)] * 256}, {"p": [("a", True)] * 255 + [("b", False)]})
    assert one.any.chance == pytest.approx(0.5)  # b is as likely in either half
    assert one.correct.chance == pytest.approx(0, abs=1e-9)
    rare = compare({"p": [("a", True)] * 5000}, {"p": [("a", True)] * 7 + [("b", True)]})
    assert rare.any.chance == pytest.approx(8 / 5008)


def test_share_of_problems():
    share = share_of_problems([True, False, False, False])
    assert (share.problems, share.share, share.chance) == (4, 0.25, None)
    assert share.low <= 0.25 <= share.high
    with pytest.raises(ValueError, match="one problem at least"):
        share_of_problems([])


def test_agreement_against_pairs():
    rng = random.Random(7)
    for _ in range(50):
        verdicts = [[rng.choice([True, True, False, None]) for _ in range(rng.randint(1, 5))] for _ in range(9)]
        known = [[v for v in item if v is not None] for item in verdicts]
        known = [item for item in known if len(item) > 1]
        found = agreement(verdicts)
        pairs = [np.mean([a == b for a, b in itertools.combinations(item, 2)]) for item in known]
        pool = [v for item in known for v in item]
        by_chance = np.mean([a == b for a in pool for b in pool])
        assert found is not None
        assert found.items == len(known)
        assert found.percent == pytest.approx(100 * np.mean(pairs))
        if len(set(pool)) == 2:
            assert found.kappa == pytest.approx((np.mean(pairs) - by_chance) / (1 - by_chance))


def test_agreement_that_is_known():
    # Fleiss' kappa of 5 items by 3 raters, counts of yes 3, 3, 0, 1, 2: (11/15 - 0.52) / 0.48, by hand: p = 9/15
    items = [[True] * yes + [False] * (3 - yes) for yes in (3, 3, 0, 1, 2)]
    found = agreement(items)
    assert found is not None
    assert found.percent == pytest.approx(100 * (1 + 1 + 1 + 1 / 3 + 1 / 3) / 5)
    assert found.kappa == pytest.approx((11 / 15 - 0.52) / 0.48)
    perfect = agreement([[True, True], [False, False]])
    assert perfect is not None
    assert perfect.kappa == 1.0
    same = agreement([[True, True], [True, True]])
    assert same is not None
    assert (same.percent, same.kappa) == (100.0, None)
    assert agreement([[True], [None, False], []]) is None
    rng = random.Random(1)
    luck = agreement([[rng.random() < 0.8 for _ in range(3)] for _ in range(4000)])
    assert luck is not None
    assert luck.percent > 60
    assert abs(luck.kappa) < 0.05


def test_majority():
    assert majority([True, None, True, False]) is True
    assert majority([False, False, True]) is False
    assert majority([True, False]) is None
    assert majority([None, None]) is None
    assert majority([]) is None
