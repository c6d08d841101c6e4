"""How each problem's accuracy develops over a run's evaluations: the five patterns of A3PO's paper, appendix F.

The paper's definitions overlap (a problem that goes from 0.92 to 1 is mastered and may have sharpened), so they are
tried in the order of PATTERNS and the first that holds is the problem's pattern. Accuracies are shares of few
responses, so much of what is seen is chance: docs/patterns.md has the figures.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

Pattern = Literal["mastery", "struggle", "sharpen", "degradation", "fluctuation"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

# Accuracies are quotients: 0.4 - 0.3 is a little more than 0.1, and 1 - 0.1 a little less than 0.9 may come out.
TOLERANCE = 1e-9


def accuracy_pattern(accuracies: Sequence[float], k: float = 10) -> Pattern:
    """The pattern of one problem: its accuracies in [0, 1] at the evaluations so far, the first before training.

    k: percentage points in [1, 50]. mastery: all at 1-k or above; struggle: all at k or below; sharpen: the last is
    more than k above the first; degradation: more than k below; else fluctuation. Borders are exact up to 1e-9. At one
    evaluation alone there is no change yet, so it is mastery, struggle or fluctuation.

    Raises ValueError without accuracies, for one outside [0, 1] (or NaN), and for k outside [1, 50].
    """
    if not 1 <= k <= 50:
        raise ValueError(f"k is a number of percentage points from 1 to 50 (10, not 0.1); got {k}")
    if not len(accuracies):
        raise ValueError("a pattern needs one accuracy at least")
    wrong = [a for a in accuracies if not 0 <= a <= 1]
    if wrong:
        raise ValueError(f"accuracies lie between 0 and 1; got {wrong[0]}")
    margin = k / 100
    if min(accuracies) >= 1 - margin - TOLERANCE:
        return "mastery"
    if max(accuracies) <= margin + TOLERANCE:
        return "struggle"
    change = accuracies[-1] - accuracies[0]
    if abs(change) <= margin + TOLERANCE:
        return "fluctuation"
    return "sharpen" if change > 0 else "degradation"


def pattern_flow(accuracies: Mapping[str, Sequence[float | None]], k: float = 10) -> dict[str, Any]:
    """The patterns of all problems as of each evaluation, and how problems move between them; plain JSON data.

    accuracies: problem to its accuracy at each of E evaluations, None where the problem was not in that evaluation. A
    problem that is missing anywhere is left out everywhere, so that every evaluation counts the same P problems.

    {"problems": P, "left_out": int,
     "counts": E dicts {pattern: problems}, all five patterns in each,
     "transitions": E - 1 lists of {"from": pattern, "to": pattern, "problems": n}, n > 0, in the order of PATTERNS,
     "patterns": {problem: its pattern as of each evaluation}}

    The counts at an evaluation are the sums of what flows in, and of what flows on. Raises ValueError where problems
    differ in their number of evaluations, and as `accuracy_pattern` does.
    """
    lengths = {len(values) for values in accuracies.values()}
    if len(lengths) > 1:
        raise ValueError(f"problems have between {min(lengths)} and {max(lengths)} evaluations; write None for a gap")
    evaluations = lengths.pop() if lengths else 0
    patterns: dict[str, list[Pattern]] = {}
    for problem, values in accuracies.items():
        known = [value for value in values if value is not None]
        if len(known) == evaluations:
            patterns[problem] = [accuracy_pattern(known[: e + 1], k) for e in range(evaluations)]
    counts = [Counter(found[e] for found in patterns.values()) for e in range(evaluations)]
    moves = [Counter((found[e], found[e + 1]) for found in patterns.values()) for e in range(evaluations - 1)]
    return {
        "problems": len(patterns),
        "left_out": len(accuracies) - len(patterns),
        "counts": [{pattern: count[pattern] for pattern in PATTERNS} for count in counts],
        "transitions": [
            [{"from": a, "to": b, "problems": move[a, b]} for a in PATTERNS for b in PATTERNS if move[a, b]]
            for move in moves
        ],
        "patterns": patterns,
    }
