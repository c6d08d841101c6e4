r"""Exact equality of two formulas: True, False, or None where that takes a computer algebra system.

A formula becomes a quotient of two sums. A sum maps monomials to rational coefficients; a monomial is a product of
powers of atoms: variables, \pi, e, i, and primes with an exponent strictly between 0 and 1, so that \sqrt{12} is 2 *
3^(1/2) and 1/\sqrt3 is 1/3 * 3^(1/2). Monomials of these atoms are linearly independent over the rationals (for e and
\pi together this is a conjecture), hence two formulas are equal exactly when a*d - b*c = 0 has no monomial left: no
rounding anywhere. What is not such a monomial (sin x, |x|, \sqrt{x+1}, 2^x) is an atom named after its argument. With
named atoms equality is still certain but difference is not; there two formulas differ if they differ at points with
whole-number coordinates.

Roots are read as over the positive numbers: \sqrt{xy} = \sqrt x \sqrt y, \sqrt{x^2} = |x|, \sqrt[3]{-8} = -2.
"""

import math
from fractions import Fraction
from functools import lru_cache

from polarity.rewards.effort import TooMuch, spend
from polarity.rewards.expressions import Tree
from polarity.rewards.numeric import differ

Power = int | Fraction
Monomial = tuple[tuple[str, Power], ...]
Sum = dict[Monomial, Fraction]
Quotient = tuple[Sum, Sum]

BITS = 40_000  # of the largest integer worked with
TERMS = 2_000  # of the largest sum
_ONE: Sum = {(): Fraction(1)}


class NotDecided(Exception):
    """Outside what is exact here."""


def equal(left: Tree, right: Tree) -> bool | None:
    """Whether two formulas have the same value; None: not decided."""
    try:
        (a, b), (c, d) = exact(left), exact(right)
        difference = _add(_times(a, d), _times(c, b), -1)
        if not difference:
            return True
        if not any(_named(monomial) for monomial in difference):
            return False
    except (NotDecided, TooMuch, RecursionError):
        pass
    return False if differ(left, right) else None


def multiples(left: Tree, right: Tree) -> bool | None:
    """Whether left = 0 and right = 0 say the same: one is a constant or a monomial times the other.

    None where they are of different degree, so that one may have factors the other lacks (y^2 = 0 and y = 0).
    """
    try:
        (a, b), (c, d) = exact(left), exact(right)
        over, under = _times(a, d), _times(c, b)
    except (NotDecided, TooMuch, RecursionError):
        return None
    if not over or not under:
        return not over and not under
    over, under = _without_monomial(over), _without_monomial(under)
    first = next(iter(over))
    if over.keys() == under.keys() and all(over[m] * under[first] == under[m] * over[first] for m in over):
        return True
    degrees = {max(sum(_size(power) for _, power in monomial) for monomial in side) for side in (over, under)}
    return False if len(degrees) == 1 and not any(_named(monomial) for monomial in (*over, *under)) else None


def _size(power: Power) -> Fraction:
    return Fraction(power if power >= 0 else -power)


def _without_monomial(value: Sum) -> Sum:
    """Divided by the variables that all its monomials share: 1 - 3/(xy) becomes xy - 3."""
    lowest: dict[str, Power] = {}
    powers = [dict(monomial) for monomial in value]
    for atom in {atom for monomial in powers for atom in monomial if not atom.isdigit() and atom != "i"}:
        lowest[atom] = min(monomial.get(atom, 0) for monomial in powers)
    return _times(value, {_monomial(tuple((atom, -power) for atom, power in lowest.items()))[1]: Fraction(1)})


def _named(monomial: Monomial) -> bool:
    """Whether an atom of the monomial is named after a formula, so that it may be related to other atoms."""
    return any("(" in atom for atom, _ in monomial)


def exact(tree: Tree) -> Quotient:
    """The quotient of sums that a formula is. Raises NotDecided."""
    spend(1)
    operation = tree[0]
    if operation == "number":
        return ({(): tree[1]} if tree[1] else {}), _ONE
    if operation == "symbol":
        return {((tree[1], 1),): Fraction(1)}, _ONE
    if operation == "add":
        return _total([exact(term) for term in tree[1:]])
    if operation == "mul":
        over, under = _ONE, _ONE
        for factor in tree[1:]:
            a, b = exact(factor)
            over, under = _times(over, a), _times(under, b)
        return over, under
    if operation == "pow":
        return _to_power(exact(tree[1]), exact(tree[2]))
    if operation == "mod":
        value, modulus = (_integer(exact(part)) for part in tree[1:])
        if not modulus:
            raise NotDecided("modulus 0")
        return _constant(Fraction(value % modulus))
    return _call(tree[1], [exact(argument) for argument in tree[2:]])


def _constant(value: Fraction) -> Quotient:
    return ({(): value} if value else {}), _ONE


def _rational(value: Quotient) -> Fraction | None:
    over, under = value
    if under != _ONE or any(over and monomial for monomial in over):
        return None
    return over.get((), Fraction(0))


def _integer(value: Quotient) -> int:
    number = _rational(value)
    if number is None or number.denominator != 1:
        raise NotDecided("no integer")
    return number.numerator


def _total(parts: list[Quotient]) -> Quotient:
    over: Sum = {}
    under = _ONE
    for a, b in parts:
        if b == under:
            over = _add(over, a)
        else:
            over, under = _add(_times(over, b), _times(a, under)), _times(under, b)
    return over, under


def _weigh(value: Fraction) -> None:
    """Pay for a long number: what fractions cost is a common divisor."""
    bits = value.numerator.bit_length() + value.denominator.bit_length()
    if bits > 1000:
        if bits > 2 * BITS:
            raise TooMuch
        spend(bits // 50)


def _add(a: Sum, b: Sum, times: int = 1) -> Sum:
    total = dict(a)
    for monomial, coefficient in b.items():
        value = total.get(monomial, 0) + coefficient * times
        if value:
            total[monomial] = value
            _weigh(value)
        else:
            del total[monomial]
    if len(total) > TERMS:
        raise TooMuch
    return total


def _times(a: Sum, b: Sum) -> Sum:
    if a is _ONE or b is _ONE:
        return b if a is _ONE else a
    spend(len(a) * len(b))
    product: Sum = {}
    for left, x in a.items():
        for right, y in b.items():
            factor, monomial = _monomial((*left, *right))
            value = product.get(monomial, 0) + x * y * factor
            if value:
                product[monomial] = value
                _weigh(value)
            elif monomial in product:
                del product[monomial]
    return product


def _monomial(powers: tuple[tuple[str, Power], ...]) -> tuple[Fraction, Monomial]:
    """Collect the powers of each atom; whole powers of primes and of i leave as a rational factor."""
    if not powers:
        return Fraction(1), ()
    collected: dict[str, Power] = {}
    for atom, power in powers:
        collected[atom] = collected.get(atom, 0) + power
    factor = Fraction(1)
    for atom, power in list(collected.items()):
        if atom.isdigit():
            whole = math.floor(power)
            if abs(whole) * int(atom).bit_length() > BITS:
                raise TooMuch
            factor *= Fraction(int(atom)) ** whole
            collected[atom] = power - whole
        elif atom == "i":
            if power % 4 >= 2:
                factor = -factor
            collected[atom] = power % 2
        elif atom.startswith("-1^("):
            collected[atom] = power % 2
    kept = ((atom, int(power) if power == int(power) else power) for atom, power in collected.items() if power)
    return factor, tuple(sorted(kept))


def _single(value: Sum) -> tuple[Monomial, Fraction] | None:
    return next(iter(value.items())) if len(value) == 1 else None


def _to_power(base: Quotient, exponent: Quotient) -> Quotient:
    power = _rational(exponent)
    if power is None:
        return _symbolic_power(base, exponent)
    over, under = base
    if power < 0:
        if not over:
            raise NotDecided("division by zero")
        over, under, power = under, over, -power
    if power.denominator == 1:
        return _collapse(_whole_power(over, power.numerator), _whole_power(under, power.numerator))
    return _collapse(_root(over, power), _root(under, power))


def _collapse(over: Sum, under: Sum) -> Quotient:
    """Divide by a denominator that is a single monomial."""
    single = _single(under)
    if single is None or under == _ONE:
        return over, under
    monomial, coefficient = single
    factor, inverse = _monomial(tuple((atom, -power) for atom, power in monomial))
    return _times(over, {inverse: factor / coefficient}), _ONE


def _whole_power(value: Sum, power: int) -> Sum:
    single = _single(value)
    if single is not None:
        monomial, coefficient = single
        if (
            power * max(coefficient.numerator.bit_length(), coefficient.denominator.bit_length()) > BITS
            and abs(coefficient) != 1
        ):
            raise TooMuch
        factor, raised = _monomial(tuple((atom, exponent * power) for atom, exponent in monomial))
        return {raised: factor * coefficient ** (power if abs(coefficient) != 1 else power % 2 or 2)}
    if power and len(value) > 1 and math.comb(min(power, 10**6) + len(value) - 1, len(value) - 1) > TERMS:
        raise TooMuch
    result, square = _ONE, value
    while power:
        if power & 1:
            result = _times(result, square)
        power >>= 1
        square = _times(square, square) if power else square
    return result


def _root(value: Sum, power: Fraction) -> Sum:
    """A positive fractional power of a sum."""
    if not value:
        return {}
    content = _content(value)
    factor: Sum = _ONE
    single = _single(value)
    if single is None:
        primitive = {monomial: coefficient / content for monomial, coefficient in value.items()}
        atoms: list[tuple[str, Power]] = [(f"({_name(primitive)})", power)]
    else:
        content = single[1]
        atoms = []
        for atom, exponent in single[0]:
            if atom == "i":
                raise NotDecided("root of an imaginary number")
            even = power.denominator % 2 == 0 and isinstance(exponent, int) and exponent % 2 == 0
            if even and (exponent * power).denominator == 1 and (exponent * power) % 2 and not atom.isdigit():
                atom = f"abs({_name({((atom, 1),): Fraction(1)})})"
            atoms.append((atom, exponent * power))
    if content < 0:
        if power.denominator == 2:
            factor = _whole_power({(("i", 1),): Fraction(1)}, power.numerator % 4)
        elif power.denominator % 2 and single is not None:
            factor = {(): Fraction(-1) ** power.numerator}
        else:
            raise NotDecided("root of a negative number")
    for number, sign in ((abs(content.numerator), 1), (content.denominator, -1)):
        atoms += [(str(prime), times * sign * power) for prime, times in _factors(number).items()]
    scale, monomial = _monomial(tuple(atoms))
    return _times(factor, {monomial: scale})


def _content(value: Sum) -> Fraction:
    """The positive rational factor that leaves whole coefficients without a common divisor."""
    over = math.gcd(*(coefficient.numerator for coefficient in value.values()))
    under = math.lcm(*(coefficient.denominator for coefficient in value.values()))
    return Fraction(over, under)


def _factors(number: int) -> dict[int, int]:
    spend(3000 if number > 10**8 else 10)
    return _prime_factors(number)


@lru_cache(maxsize=4096)
def _prime_factors(number: int) -> dict[int, int]:
    """Prime factors by trial division. Raises NotDecided where a factor over 10^8 is left."""
    factors: dict[int, int] = {}
    prime = 2
    while prime * prime <= number and prime < 10_000:
        while number % prime == 0:
            factors[prime] = factors.get(prime, 0) + 1
            number //= prime
        prime += 1 + (prime > 2)
    if number >= 10**8:
        root = math.isqrt(number)
        if root * root != number or root >= 10**8:
            raise NotDecided("large factor")
        return factors | {root: 2}
    return factors | ({number: factors.get(number, 0) + 1} if number > 1 else {})


def _symbolic_power(base: Quotient, exponent: Quotient) -> Quotient:
    """2^(x+1) = 2 * 2^x: an atom for each term of the exponent and each factor of the base."""
    terms, under = exponent
    single, divisor = _single(base[0]), _single(base[1])
    if under != _ONE or single is None or divisor is None:
        raise NotDecided("exponent")
    value = _collapse(*base)[0]
    monomial, coefficient = next(iter(value.items()))
    factors: list[tuple[str, Power]] = [("-1", 1)] if coefficient < 0 else []
    for number, sign in ((abs(coefficient.numerator), 1), (coefficient.denominator, -1)):
        factors += [(str(prime), times * sign) for prime, times in _factors(number).items()]
    factors += monomial
    if any(atom == "i" for atom, _ in factors):
        raise NotDecided("power of i")
    result: Quotient = (_ONE, _ONE)
    for term, times in terms.items():
        circle = _circle(times * 180) if factors == [("e", 1)] and term == (("\\pi", 1), ("i", 1)) else None
        if not term:
            part = _to_power(base, _constant(times))
        elif circle is not None:  # e^(i pi) = -1
            part = _total([circle[1], (_times(circle[0][0], {(("i", 1),): Fraction(1)}), _ONE)])
        else:
            _, powers = _monomial(
                tuple((f"{atom}^({_name({term: Fraction(1)})})", power * times) for atom, power in factors)
            )
            part = ({powers: Fraction(1)}, _ONE)
        result = _times(result[0], part[0]), _times(result[1], part[1])
    return result


def _name(value: Sum) -> str:
    """A name for a sum that is the same for equal sums."""
    return "+".join(
        f"{value[monomial]}*{'*'.join(f'{a}^{p}' for a, p in monomial)}" for monomial in sorted(value, key=str)
    )


# sin of k * 15 degrees, k = 0..6: (coefficient, radicand) terms over 4
_SINES = ((), ((1, 6), (-1, 2)), ((2, 1),), ((2, 2),), ((2, 3),), ((1, 6), (1, 2)), ((4, 1),))


def _circle(degrees: Fraction) -> tuple[Quotient, Quotient] | None:
    """sin and cos of a multiple of 15 degrees, else None."""
    return None if degrees % 15 else (_sine(int(degrees)), _sine(int(degrees) + 90))


def _sine(degrees: int) -> Quotient:
    turn = degrees % 360
    sign = 1 if turn < 180 else -1
    turn %= 180
    terms = _SINES[(turn if turn <= 90 else 180 - turn) // 15]
    parts = [_times({(): Fraction(sign * times, 4)}, _root({(): Fraction(of)}, Fraction(1, 2))) for times, of in terms]
    return _total([(part, _ONE) for part in parts])


def _call(name: str, arguments: list[Quotient]) -> Quotient:
    argument = arguments[0]
    number = _rational(argument)
    if name == "degrees":
        return _times(argument[0], {(("\\pi", 1),): Fraction(1, 180)}), argument[1]
    if name in ("factorial", "binomial"):
        return _combinatorial(name, arguments)
    if name in ("floor", "ceiling") and number is not None:
        return _constant(Fraction(math.floor(number) if name == "floor" else math.ceil(number)))
    if name == "abs" and number is not None:
        return _constant(abs(number))
    if name in ("log", "ln"):
        return _logarithm(name, arguments)
    if name in ("sin", "cos", "tan") and argument[1] == _ONE:
        angle = _degrees(argument[0])
        circle = None if angle is None else _circle(angle)
        if circle is not None:
            return {"sin": circle[0], "cos": circle[1]}.get(name) or _divide(*circle)
    if argument[1] != _ONE:
        raise NotDecided("argument with a denominator")
    leading = argument[0][min(argument[0], key=str)] if argument[0] else 0
    flipped = leading < 0 and name in ("sin", "cos", "tan", "abs")
    inner = {monomial: -coefficient for monomial, coefficient in argument[0].items()} if flipped else argument[0]
    rest = "".join(f",{_name(more[0])}/{_name(more[1])}" for more in arguments[1:])
    sign = Fraction(-1 if flipped and name in ("sin", "tan") else 1)
    return {((f"{name}({_name(inner)}{rest})", 1),): sign}, _ONE


def _degrees(value: Sum) -> Fraction | None:
    """The angle in degrees where the value is a rational multiple of pi."""
    if not value:
        return Fraction(0)
    multiple = value.get((("\\pi", 1),))
    return multiple * 180 if multiple is not None and len(value) == 1 else None


def _divide(over: Quotient, under: Quotient) -> Quotient:
    return _times(over[0], _to_power(under, _constant(Fraction(-1)))[0]), _to_power(under, _constant(Fraction(-1)))[1]


def _combinatorial(name: str, arguments: list[Quotient]) -> Quotient:
    values = [_rational(argument) for argument in arguments]
    if any(value is None for value in values):
        return {((f"{name}({';'.join(_name(argument[0]) for argument in arguments)})", 1),): Fraction(1)}, _ONE
    numbers = [_integer(argument) for argument in arguments]
    if any(number < 0 for number in numbers):
        raise NotDecided(name)
    if numbers[0] > 3000:
        raise TooMuch
    spend(numbers[0])
    return _constant(Fraction(math.factorial(numbers[0]) if name == "factorial" else math.comb(*numbers)))


def _logarithm(name: str, arguments: list[Quotient]) -> Quotient:
    """ln of a positive rational number over those of its primes; log_b of powers of one number as a rational."""
    number = _rational(arguments[0])
    if number is None or number <= 0:
        raise NotDecided(name)
    if len(arguments) == 1:
        if number == 1:
            return {}, _ONE
        return _log_of_primes(name, number), _ONE  # the base of `log` is unknown: a name of its own
    base = _rational(arguments[1])
    if base is None or base <= 0 or base == 1:
        raise NotDecided(name)
    return _divide((_log_of_primes("ln", number), _ONE), (_log_of_primes("ln", base), _ONE))


def _log_of_primes(name: str, number: Fraction) -> Sum:
    over: Sum = {((f"{name}({prime})", 1),): Fraction(times) for prime, times in _factors(number.numerator).items()}
    return over | {
        ((f"{name}({prime})", 1),): Fraction(-times) for prime, times in _factors(number.denominator).items()
    }
