"""Accuracy patterns against exact fractions, and the flow between them against counting by hand."""

import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from scipy.stats import binom

from polarity.analysis.patterns import PATTERNS, accuracy_pattern, pattern_flow

DOCS = Path(__file__).parents[2] / "docs" / "patterns.md"


def exact_pattern(accuracies: list[Fraction], k: int) -> str:
    """The definitions, in exact arithmetic."""
    margin, change = Fraction(k, 100), accuracies[-1] - accuracies[0]
    holds = {
        "mastery": all(a >= 1 - margin for a in accuracies),
        "struggle": all(a <= margin for a in accuracies),
        "sharpen": change > margin,
        "degradation": -change > margin,
        "fluctuation": True,
    }
    return next(pattern for pattern in PATTERNS if holds[pattern])


def test_two_evaluations_of_any_number_of_samples():
    for n in (1, 2, 8, 10, 20, 30, 40):
        for k in (5, 10, 20, 30, 50):
            for i in range(n + 1):
                for j in range(n + 1):
                    wanted = exact_pattern([Fraction(i, n), Fraction(j, n)], k)
                    assert accuracy_pattern([i / n, j / n], k) == wanted, (i, j, n, k)


def test_long_histories():
    rng = random.Random(0)
    seen = Counter()
    for _ in range(3000):
        n, low = rng.choice([8, 10, 32]), rng.choice([0, 0, 0.8])
        counts = [round(n * min(1, low + rng.random() * rng.choice([0.2, 1]))) for _ in range(rng.randint(1, 6))]
        pattern = accuracy_pattern([c / n for c in counts])
        assert pattern == exact_pattern([Fraction(c, n) for c in counts], 10)
        seen[pattern] += 1
    assert set(seen) == set(PATTERNS)


def test_borders_and_precedence():
    assert 0.4 - 0.3 > 0.1  # the trap
    assert accuracy_pattern([0.3, 0.4]) == "fluctuation"
    assert accuracy_pattern([0.4, 0.3]) == "fluctuation"
    assert accuracy_pattern([0.3, 0.41]) == "sharpen"
    assert accuracy_pattern([0.9, 1.0, 0.9]) == "mastery"
    assert accuracy_pattern([0.1, 0.0, 0.1]) == "struggle"
    assert accuracy_pattern([0.8, 1.0]) == "sharpen"  # not mastery: it was below
    assert accuracy_pattern([0.95, 0.5, 0.95]) == "fluctuation"  # first and last count; mastery needs all
    assert accuracy_pattern([0.7, 0.7], k=30) == "mastery"
    assert accuracy_pattern([0.5, 0.5], k=50) == "mastery"  # struggle as well: mastery is first
    assert accuracy_pattern([0.89, 0.5]) == "degradation"
    assert [accuracy_pattern([a]) for a in (1.0, 0.0, 0.5)] == ["mastery", "struggle", "fluctuation"]


@pytest.mark.parametrize("accuracies", [[], [0.5, 1.1], [-0.1], [float("nan")], [0.5, float("nan")]])
def test_what_is_no_accuracy(accuracies: list[float]):
    with pytest.raises(ValueError, match=r"one accuracy at least|between 0 and 1"):
        accuracy_pattern(accuracies)


@pytest.mark.parametrize("k", [0, -1, 50.1, float("nan")])
def test_what_is_no_k(k: float):
    with pytest.raises(ValueError, match="percentage points"):
        accuracy_pattern([0.5], k)


def test_the_flow_is_the_patterns_counted():
    rng = random.Random(1)
    for _ in range(30):
        evaluations = rng.randint(1, 6)
        table: dict[str, list[float | None]] = {
            f"p{i}": [rng.choice([0.0, 0.1, 0.5, 0.9, 1.0, rng.random()]) for _ in range(evaluations)]
            for i in range(rng.randint(1, 12))
        }
        for i in range(rng.randint(0, 3)):
            table[f"gap{i}"] = [0.5] * evaluations
            table[f"gap{i}"][rng.randrange(evaluations)] = None
        whole = {p: values for p, values in table.items() if None not in values}
        flow = pattern_flow(table)
        assert (flow["problems"], flow["left_out"]) == (len(whole), len(table) - len(whole))
        assert len(flow["counts"]) == evaluations
        assert len(flow["transitions"]) == evaluations - 1
        for e in range(evaluations):
            now = {p: accuracy_pattern(values[: e + 1]) for p, values in whole.items()}
            assert flow["counts"][e] == {pattern: list(now.values()).count(pattern) for pattern in PATTERNS}
            assert {p: found[e] for p, found in flow["patterns"].items()} == now
        for e, moves in enumerate(flow["transitions"]):
            assert all(move["problems"] > 0 for move in moves)
            for pattern in PATTERNS:
                out = sum(move["problems"] for move in moves if move["from"] == pattern)
                came = sum(move["problems"] for move in moves if move["to"] == pattern)
                assert (out, came) == (flow["counts"][e][pattern], flow["counts"][e + 1][pattern])
            pairs = [(move["from"], move["to"]) for move in moves]
            assert pairs == sorted(set(pairs), key=lambda pair: [PATTERNS.index(name) for name in pair])


def test_flows_of_little():
    assert pattern_flow({}) == {"problems": 0, "left_out": 0, "counts": [], "transitions": [], "patterns": {}}
    flow = pattern_flow({"p": [0.2, 0.9], "q": [None, 1.0]}, k=5)
    assert flow["transitions"] == [[{"from": "fluctuation", "to": "sharpen", "problems": 1}]]
    with pytest.raises(ValueError, match="between 1 and 2 evaluations; write None"):
        pattern_flow({"p": [0.5], "q": [0.5, 0.5]})
    with pytest.raises(ValueError, match="between 0 and 1"):
        pattern_flow({"p": [2.0]})


def test_the_documented_chances_of_patterns_by_luck():
    """docs/patterns.md: a problem that does not change, evaluated twice with n samples."""
    section = DOCS.read_text(encoding="utf-8").split("## Patterns by luck")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| (\d+) % \| (\d+) % \| (\d+) % \| (\d+) % \|$", section, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [8, 16, 32, 64, 256]
    for samples, error, *shares in rows:
        n = int(samples)
        assert float(error) == round(100 * (0.25 / n) ** 0.5, 1)
        for rate, share in zip((0.5, 0.3, 0.2, 0.1), shares, strict=True):
            weights = binom.pmf(range(n + 1), n, rate)
            changed = sum(
                weights[i] * weights[j]
                for i in range(n + 1)
                for j in range(n + 1)
                if accuracy_pattern([i / n, j / n]) in ("sharpen", "degradation")
            )
            assert int(share) == round(100 * changed)
