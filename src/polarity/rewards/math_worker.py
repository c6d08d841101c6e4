"""The slow path of `polarity.rewards.math`, run in killable worker processes: formulas that exact algebra leaves open.

The structure of the answers, their units and brackets are compared as everywhere (`polarity.rewards.comparison`); only
two formulas at a time go to math-verify, with its own timeouts off (they need the main thread; the parent's clock is
the limit), and without its reader of plain text, which evaluates what it reads as Python. It accepts what agrees to
six decimals (1.6e-19 = 1.6e-20), so what it accepts as numbers is evaluated again to 30 digits.
"""

import logging
from collections.abc import Mapping
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from polarity.rewards.comparison import matches

_TOLERANCE = sympy.Float("1e-12", 30)  # relative; a decimal has 15 digits here
_CONFIG = (  # answers come as formulas: no boxes, and no letters taken for units
    LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
        ),
    ),
)
for _name in ("math_verify", "math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # it warns, once a process, that its timeouts are off


def grade(response: str, gold: str, row: Mapping[str, Any] | None = None) -> bool:
    """Whether `response`, an extracted answer and not a whole response, states the same as `gold`."""
    return bool(matches(gold, response, decide))


def decide(gold: str, answer: str) -> bool:
    """Whether two formulas in LaTeX are equal, by math-verify 0.9."""
    reference, parsed = (parse(f"${text}$", _CONFIG, "no_fallback", parsing_timeout=None) for text in (gold, answer))
    if not reference or not parsed or not verify(reference, parsed, timeout_seconds=None):
        return False
    left, right = reference[0], parsed[0]
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr) or left.free_symbols or right.free_symbols:
        return True
    left, right = (sympy.N(side.doit(), 30) for side in (left, right))
    if not (left.is_Number and right.is_Number):
        return True  # complex, or not evaluated: not compared by rounding
    size = max(abs(left), abs(right))
    return bool(abs(left - right) <= _TOLERANCE * size)
