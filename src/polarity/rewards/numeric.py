"""Whether two formulas certainly differ, by evaluating them: a quick refutation, never a proof of equality."""

import cmath
import math
from collections.abc import Callable
from zlib import crc32

from polarity.rewards.effort import TooMuch, spend
from polarity.rewards.expressions import TRIGONOMETRIC, Tree


class NoValue(Exception):
    """Not defined at this point, not real where it must be, or too close to a step."""


def differ(left: Tree, right: Tree) -> bool:
    """Whether two formulas certainly differ: far more than rounding explains, at a point with whole coordinates.

    Whole, because an identity may hold for whole numbers only ((-1)^(2n) = 1). A value too large for a float is
    infinite here: it differs from one that is not.
    """
    for point in range(3):
        size = [1e-3]  # of the largest term met, to tell a difference from cancelled digits
        try:
            a, b = _value(left, point, size), _value(right, point, size)
        except (NoValue, TooMuch, ArithmeticError, ValueError, RecursionError):
            continue
        if cmath.isfinite(a) != cmath.isfinite(b):
            return True
        if cmath.isfinite(a) and abs(a - b) > max(1e-6 * max(abs(a), abs(b)), 1e-9 * max(size)):
            return True
    return False


_GROWING = frozenset(["factorial", "floor", "ceiling", "abs", "ln", "degrees"])
_CONSTANTS = {"\\pi": math.pi, "e": math.e, "i": 1j}
_CIRCULAR: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x), "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan,
}  # fmt: skip


def _value(tree: Tree, point: int, size: list[float]) -> complex:
    """The value at a point; real and infinite where it is too large. Raises NoValue."""
    spend(1)
    operation = tree[0]
    if operation == "number":
        return complex(_finite_or_huge(lambda: float(tree[1]), 1 if tree[1] > 0 else -1))
    if operation == "symbol":
        if tree[1] == "\\infty":
            raise NoValue
        return complex(_CONSTANTS.get(tree[1], 2 + (crc32(tree[1].encode()) + point * 7) % 11))
    parts = [_value(part, point, size) for part in tree[1 + (operation == "call") :] if isinstance(part, tuple)]
    if operation == "add":
        finite = [part for part in parts if cmath.isfinite(part)]
        if len(finite) < len(parts) - 1:
            raise NoValue  # they may cancel
        size.extend(abs(part) for part in finite)
        return next((part for part in parts if not cmath.isfinite(part)), sum(finite, 0j))
    if operation == "mul":
        return _product(parts)
    if operation == "pow":
        return _power(*parts)
    if operation != "call":
        raise NoValue
    if not all(map(cmath.isfinite, parts)):
        if tree[1] in _GROWING and parts[0].real > 0:
            return parts[0]
        raise NoValue
    return complex(_finite_or_huge(lambda: _function(tree[1], parts), 1))


def _finite_or_huge(compute: Callable[[], complex], sign: int) -> complex:
    try:
        value = compute()
    except OverflowError:
        return sign * math.inf
    if not cmath.isfinite(value):
        raise NoValue
    return value


def _product(parts: list[complex]) -> complex:
    finite = math.prod((part for part in parts if cmath.isfinite(part)), start=1 + 0j)
    huge = math.prod(part.real for part in parts if not cmath.isfinite(part))
    if huge == 1 and cmath.isfinite(finite):
        return finite
    if not cmath.isfinite(finite) or finite.imag or abs(finite.real) < 1e-200:
        raise NoValue
    return complex(math.copysign(math.inf, huge * finite.real))


def _power(base: complex, power: complex) -> complex:
    if base.imag or power.imag or base.real < 0:
        if power != round(power.real) if cmath.isfinite(power) else True:
            raise NoValue  # a root of what is not positive
        return complex(_finite_or_huge(lambda: base ** round(power.real), 1))
    if base.real in (0, 1) and not cmath.isfinite(power):
        raise NoValue
    return complex(_positive_power(base.real, power.real))


def _positive_power(base: float, power: float) -> float:
    try:
        return base**power  # inf ** -1 = 0
    except OverflowError:
        return math.inf


def _function(name: str, values: list[complex]) -> complex:
    x = values[0]
    if name in TRIGONOMETRIC:
        if abs(x) > 1e6:
            raise NoValue  # digits are lost
        return _CIRCULAR[name](x)
    if name == "degrees":
        return x * math.pi / 180
    if name == "abs":
        return complex(abs(x))
    if name == "ln" or (name == "log" and len(values) == 2):
        if any(value.imag or value.real <= 0 for value in values):
            raise NoValue
        return cmath.log(x) / (cmath.log(values[1]) if len(values) == 2 else 1)
    if name in ("f", "g"):  # what holds for every function holds for this one
        return (3 + ord(name) % 2) * x * x + sum(values) + 7
    if x.imag or 0 < abs(x.real - round(x.real)) < 1e-9:
        raise NoValue  # not real, or close to a step
    if name == "floor":
        return complex(math.floor(x.real))
    if name == "ceiling":
        return complex(math.ceil(x.real))
    if name == "factorial":
        return complex(math.gamma(x.real + 1))
    if name == "binomial" and all(value == int(value.real) for value in values):
        n, k = x.real, values[1].real
        return (
            complex(math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1))) if 0 <= k <= n else 0j
        )
    raise NoValue
