"""Units of measurement: which words are units, and when two units measure the same thing.

A unit is a product of powers of base dimensions and an exact factor: `ft^2`, `square feet` and `sq ft` are the same,
an hour is 60 minutes, a mile is no kilometre but both are lengths. Words that are not here (`apples`, `units`, `ways`)
say nothing.
"""

from fractions import Fraction

Unit = tuple[tuple[tuple[str, int], ...], Fraction]  # ((dimension, power), ...) and the factor to the base unit

_BASES = {
    "length": {
        "m meter metre": "1", "cm centimeter centimetre": "1/100", "mm millimeter millimetre": "1/1000",
        "nm": "1/1000000000",
        "km kilometer kilometre": "1000", "in inch inche": "127/5000", "ft foot feet": "381/1250",
        "yd yard": "1143/1250",
        "mi mile": "201168/125",
    },
    "time": {
        "s sec second": "1", "ms": "1/1000", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800",
        "month": "2629746", "year yr": "31556952",
    },
    "mass": {"kg kilogram": "1", "g gm gram": "1/1000", "mg milligram": "1/1000000", "ton tonne": "1000",
             "lb pound": "45359237/100000000", "oz ounce": "45359237/1600000000"},
    "volume": {"l liter litre": "1", "ml milliliter": "1/1000", "gallon gal": "473176473/125000000", "cup": "1/4"},
    "dollar": {"$ dollar usd buck": "1", "cent ¢": "1/100"},
    "pound sterling": {"£ gbp": "1"}, "euro": {"€ euro eur": "1"}, "yen": {"¥ yen": "1"}, "rupee": {"rupee": "1"},
    "angle": {"deg degree": "1"}, "radian": {"rad radian": "1"}, "temperature": {"celsiu": "1"},
    "kelvin": {"k kelvin": "1"},
    "force": {"n newton": "1"}, "energy": {"j joule": "1", "kj": "1000", "cal": "523/125"}, "power": {"w watt": "1"},
    "voltage": {"v volt": "1"}, "current": {"a ampere amp": "1"}, "frequency": {"hz hertz": "1"}, "area": {"acre": "1"},
}  # fmt: skip
_UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, scale in _BASES.items()
    for names, factor in scale.items()
    for name in names.split()
}
_SPEEDS = {"mph": ("mile", "hour"), "kph": ("km", "hour"), "kmh": ("km", "hour"), "mps": ("m", "s")}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
CURRENCIES = {"\\$": "$", "\\pounds": "£", "\\euro": "€", "\\yen": "¥", "\\cents": "¢"}
_LABELS = frozenset("units unit percent pm am".split())


def _single(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") else word


def is_unit(word: str) -> bool:
    """Whether a run of letters after a number is a unit, a number word or a currency and not a product of variables."""
    lower = word.lower()
    if lower in MULTIPLIERS or lower in _SPEEDS or lower in _POWERS or lower in _LABELS:
        return True
    return len(word) > 1 and (lower in _UNITS or _single(lower) in _UNITS)


def read_unit(tokens: tuple[str, ...]) -> Unit | None:
    """The unit written by `tokens` (words, `^`, digits, `/`), or None where a word of it is not a known unit."""
    powers: dict[str, int] = {}
    factor, sign, pending = Fraction(1), 1, 1
    at = 0
    while at < len(tokens):
        word = tokens[at].lstrip('"')
        at += 1
        if word in ("/", "per"):
            sign = -1
        elif word in ("*", "(", ")", ".", "{", "}", "a"):
            continue
        elif word in ("square", "sq", "cubic", "cu"):
            pending = _POWERS[word]
        elif word in _SPEEDS:
            over, under = _SPEEDS[word]
            tokens = (*tokens[:at], over, "/", under, *tokens[at:])
        else:
            name = word if word in _UNITS else _single(word)
            if name not in _UNITS:
                return None
            power, at = _power(tokens, at)
            dimension, scale = _UNITS[name]
            dimension, times = ("length", 3) if dimension == "volume" else (dimension, 1)
            scale = scale / 1000 if times == 3 else scale
            power *= sign * pending
            powers[dimension] = powers.get(dimension, 0) + power * times
            factor *= scale**power
            pending = 1
    return tuple(sorted((name, power) for name, power in powers.items() if power)), factor


def _power(tokens: tuple[str, ...], at: int) -> tuple[int, int]:
    """The exponent that starts at `at` (1 where there is none) and the position after it."""
    rest = [token for token in tokens[at : at + 5] if token not in "{}"]
    if rest[:1] == ['"squared'] or rest[:1] == ['"cubed']:
        return _POWERS[rest[0][1:]], at + 1
    if rest[:1] != ["^"]:
        return 1, at
    digits = rest[1] if len(rest) > 1 else ""
    negative = digits == "-" and len(rest) > 2
    digits = rest[2] if negative else digits
    if digits not in ("1", "2", "3"):
        return 1, at
    return (-int(digits) if negative else int(digits)), tokens.index(digits, at) + 1
