r"""What an answer is: its structure, read from tokens.

An answer is a formula with or without a unit (Scalar), a list, set, tuple, interval or union of answers (Group), a
chain of relations (Relation), a matrix (Matrix), a numeral in some base (Based), a ratio or time of day (Ratio), or
words (Words). `read` never fails: what has no structure that is known here is a Scalar, whose tokens may or may not
parse.
"""

import itertools
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from polarity.rewards.expressions import NotRead, Tree, parse
from polarity.rewards.latex import CLOSING, OPENING, SHORT, Tokens, tokenize
from polarity.rewards.units import CURRENCIES, MULTIPLIERS, Unit, read_unit

RELATIONS = frozenset(["=", "<", ">", "\\leq", "\\geq", "\\neq", "\\in", "\\equiv"])
_LIST = frozenset([",", ";", '"and', '"or'])
_NAME = re.compile(r"[a-zA-Z]|\\(?!frac|sqrt|pm|mp|infty|pi\b)[a-zA-Z]+|\".*|[_'|]")
REAL_LINE = ("\\mathbbR",)
MINUS_INFINITY, INFINITY = ("-", "\\infty"), ("\\infty",)


@dataclass(frozen=True)
class Scalar:
    """A formula and the words after it. percent: a percent sign followed it."""

    tokens: Tokens
    unit_tokens: Tokens = ()
    percent: bool = False

    @cached_property
    def tree(self) -> Tree | None:
        try:
            return parse(self.tokens)
        except (NotRead, RecursionError):
            return None

    @cached_property
    def unit(self) -> Unit | None:
        return read_unit(self.unit_tokens) if self.unit_tokens else None


@dataclass(frozen=True)
class Group:
    r"""kind: "()", "[]", "(]", "[)" (tuple or interval), "{}" (set), ",", "and", "or" (list), "\\cup" (union)."""

    kind: str
    items: tuple["Answer", ...]


@dataclass(frozen=True)
class Relation:
    """sides[0] operators[0] sides[1] ..., each side as tokens."""

    sides: tuple[Tokens, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple["Answer", ...], ...]


@dataclass(frozen=True)
class Based:
    digits: str
    base: str


@dataclass(frozen=True)
class Ratio:
    parts: tuple[Scalar, ...]
    words: Tokens = ()


@dataclass(frozen=True)
class Words:
    tokens: Tokens


Answer = Scalar | Group | Relation | Matrix | Based | Ratio | Words


def read(text: str) -> Answer:
    """The structure of an answer."""
    return _read_short(text) if len(text) <= SHORT else structure(tokenize(text))


def structure(tokens: Tokens) -> Answer:
    tokens = _without_label(tokens)
    if tokens and all(token[0] == '"' for token in tokens):
        return _named(tokens) or Words(tokens)
    if "\\pm" in tokens or "\\mp" in tokens:
        choices = _signs(tokens)
        if len(choices) > 1:
            items = [item for choice in choices for item in _items(structure(choice))]
            braced = isinstance(structure(choices[0]), Group) and structure(choices[0]).kind == "{}"  # type: ignore[union-attr]
            return Group("{}" if braced else ",", tuple(items))
    parts, separators = split(tokens, _LIST)
    parts = [part for part in parts if part]
    if len(parts) > 1:
        kind = '"or' if '"or' in separators else '"and' if '"and' in separators else ","
        return Group(kind.lstrip('"'), tuple(structure(part) for part in parts))
    if separators and parts:
        tokens = parts[0]
    sides, operators = split(tokens, RELATIONS)
    if operators:
        return Relation(tuple(sides), tuple(operators))
    return _set_or_bracket(tokens) or _scalar(tokens)


_read_short = lru_cache(maxsize=8192)(lambda text: structure(tokenize(text)))


def _items(answer: Answer) -> tuple[Answer, ...]:
    return answer.items if isinstance(answer, Group) and answer.kind in (",", "and", "or", "{}") else (answer,)


def split(tokens: Tokens, separators: frozenset[str]) -> tuple[list[Tokens], list[str]]:
    """Cut at the separators outside of brackets: parts and the separators between them."""
    if separators.isdisjoint(tokens):
        return [tokens], []
    parts: list[Tokens] = []
    found: list[str] = []
    depth = start = 0
    for at, token in enumerate(tokens):
        if token in OPENING:
            depth += 1
        elif token in CLOSING:
            depth -= 1
        elif depth == 0 and token in separators:
            parts.append(tokens[start:at])
            found.append(token)
            start = at + 1
    parts.append(tokens[start:])
    return parts, found


def _without_label(tokens: Tokens) -> Tokens:
    r"""Drop `The answer is`, `Answer:`, and what follows `\approx` (a rounded value of what stands before it)."""
    at = 0
    while at < len(tokens) and tokens[at][0] == '"':
        at += 1
    if 0 < at < len(tokens) and (tokens[at - 1] == '"is' or tokens[at] == ":"):
        tokens = tokens[at + (tokens[at] == ":") :]
    if "\\approx" in tokens:
        at = tokens.index("\\approx")
        if at == 0:
            return tokens[1:]
        tokens = (*tokens[:at], "=", *tokens[at + 1 :]) if is_name(tokens[:at]) else tokens[:at]
    return tokens


_SETS = {
    '"no"solution': ("\\emptyset",), '"no"solutions': ("\\emptyset",), '"no"real"solutions': ("\\emptyset",),
    '"empty"set': ("\\emptyset",), '"all"real"numbers': REAL_LINE, '"all"reals': REAL_LINE, '"infinity': INFINITY,
    '"real"numbers': REAL_LINE,
}  # fmt: skip
_CHANGING = frozenset(
    '"' + word for word in "not no less more than least most minus plus times half over only if".split()
)
_UNIT_MARKS = frozenset([*"^/*{}()-.$£€¥¢", "\\degree"])
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def _named(tokens: Tokens) -> Answer | None:
    """Words that stand for a set or a number."""
    known = _SETS.get("".join(tokens))
    if known:
        return structure(known)
    return Scalar((str(_NUMBERS.index(tokens[0][1:])),)) if len(tokens) == 1 and tokens[0][1:] in _NUMBERS else None


def _signs(tokens: Tokens) -> list[Tokens]:
    r"""The formulas that `\pm` stands for: signs are chosen together where there is a `\mp`, else one by one."""
    signs = [token for token in tokens if token in ("\\pm", "\\mp")]
    if len(signs) > 3:
        return [tokens]
    together = "\\mp" in signs
    choices = []
    for chosen in itertools.product("+-", repeat=1 if together else len(signs)):
        rest = iter(signs if together else chosen)
        flip = {"+": "-", "-": "+"}
        choices.append(
            tuple(
                token if token not in ("\\pm", "\\mp")
                else (chosen[0] if next(rest) == "\\pm" else flip[chosen[0]]) if together
                else next(rest)
                for token in tokens
            )
        )  # fmt: skip
    return choices


def _set_or_bracket(tokens: Tokens) -> Answer | None:
    if not tokens:
        return None
    if tokens == REAL_LINE:
        return interval(MINUS_INFINITY, INFINITY)
    if tokens == ("\\emptyset",):
        return Group("{}", ())
    parts, unions = split(tokens, frozenset(["\\cup"]))
    if unions and all(parts):
        return Group("\\cup", tuple(structure(part) for part in parts))
    parts, minus = split(tokens, frozenset(["\\setminus"]))
    if minus and len(parts) == 2 and parts[0] == REAL_LINE:
        return _without_points(structure(parts[1]))
    if tokens[0] == "\\begin":
        return _matrix(tokens)
    if tokens[0] in ("(", "[", "\\{", "\\langle", "{") and _closes(tokens) == len(tokens) - 1:
        return _bracket(tokens)
    return None


def _closes(tokens: Tokens) -> int:
    """Where the bracket that opens at 0 closes; -1: nowhere."""
    depth = 0
    for at, token in enumerate(tokens):
        depth += (token in OPENING) - (token in CLOSING)
        if depth == 0:
            return at
    return -1


def _bracket(tokens: Tokens) -> Answer | None:
    opening, inner, closing = tokens[0], tokens[1:-1], tokens[-1]
    kind = {"\\langle": "(", "\\{": "{"}.get(opening, opening) + {"\\rangle": ")", "\\}": "}"}.get(closing, closing)
    if opening == "{":
        return structure(inner) if inner and closing == "}" else None
    if opening == "\\{":
        if closing != "\\}" or "|" in inner or ":" in inner:
            return None
        return Group("{}", _items(structure(inner)) if inner else ())
    items, _ = split(inner, frozenset([",", ";"]))
    if len(items) > 1:
        if "\\pm" in inner:
            return None
        return Group(kind, tuple(structure(item) for item in items if item))
    return structure(inner) if kind in ("()", "[]") and inner else None


def interval(low: Tokens, high: Tokens, kind: str = "()") -> Group:
    return Group(kind, (Scalar(low), Scalar(high)))


def _without_points(points: Answer) -> Answer | None:
    """The real line without some numbers, as a union of intervals; None where the numbers cannot be put in order."""
    items = [item for item in _items(points) if isinstance(item, Scalar)]
    try:
        items.sort(key=lambda item: float("".join(item.tokens)))
    except ValueError:
        if len(items) != 1:
            return None
    bounds = [MINUS_INFINITY, *(item.tokens for item in items), INFINITY]
    return Group("\\cup", tuple(interval(low, high) for low, high in itertools.pairwise(bounds)))


def _matrix(tokens: Tokens) -> Answer | None:
    r"""`\begin{pmatrix} a & b \\ c & d \end{pmatrix}`, in any brackets; determinants are no matrices."""
    name = "".join(tokens[2 : tokens.index("}")]) if "}" in tokens else ""
    if name not in (
        "pmatrix",
        "bmatrix",
        "matrix",
        "smallmatrix",
        "array",
        '"pmatrix',
        '"bmatrix',
        '"matrix',
        '"array',
    ):
        return None
    if "\\end" not in tokens:
        return None
    start, stop = tokens.index("}") + 1, len(tokens) - 1 - tokens[::-1].index("\\end")
    if name.endswith("array") and tokens[start : start + 1] == ("{",):
        start = tokens.index("}", start) + 1
    rows = [row for row in split(tokens[start:stop], frozenset(["\\\\"]))[0] if row]
    return Matrix(tuple(tuple(structure(cell) for cell in split(row, frozenset(["&"]))[0]) for row in rows))


def _scalar(tokens: Tokens) -> Answer:
    parts, colons = split(tokens, frozenset([":"]))
    if colons and all(part and part[0][0].isdigit() for part in parts):
        words = tuple(token for token in parts[-1] if token[0] == '"')
        return Ratio(tuple(Scalar(tuple(t for t in part if t[0] != '"')) for part in parts), words)
    based = (
        re.fullmatch(r"\(?(-?(?=[A-F]*\d)[\dA-F]+(?:\.\d+)?)\)?_\{?\(?(\d+)\)?\}?", "".join(tokens))
        if "_" in tokens
        else None
    )
    if based:
        return Based(based[1], based[2])
    unit: Tokens = ()
    money = [token for token in tokens if token in CURRENCIES]
    if money:
        tokens = tuple(token for token in tokens if token not in CURRENCIES)
        unit = (CURRENCIES[money[0]],)
    if tokens[:1] in (('"usd',), ('"eur',), ('"gbp',)):
        tokens = (*tokens[1:], tokens[0])
    at = next((at for at, token in enumerate(tokens) if token[0] == '"'), len(tokens))
    while 0 < at < len(tokens) and tokens[at - 1] in ("^", "{", "(", "*", "/"):
        at -= 1
    if at == 0 and tokens:
        return Words(tokens)
    body, words = tokens[:at], tokens[at:]
    if not _is_unit_like(words):
        return Words(tokens)
    if words and words[0][1:] in MULTIPLIERS:
        body, words = ("(", *body, ")", "*", str(MULTIPLIERS[words[0][1:]])), words[1:]
    percent = body[-1:] == ("%",) or words[:1] in (('"percent',), ('"percentage',))
    if percent:
        body, words = (body[:-1] if body[-1:] == ("%",) else body), ()
    if body[-2:-1] == ("\\degree",) and body[-1] in ("C", "F"):
        body, words = body[:-2], ('"celsius' if body[-1] == "C" else '"fahrenheit',)
    elif body[-1:] == ("\\degree",) and not any(token in ("\\sin", "\\cos", "\\tan", "+", "*") for token in body):
        body, words = body[:-1], ('"degrees', *words)
    return Scalar(body, words or unit, percent)


def _is_unit_like(words: Tokens) -> bool:
    """Whether the words after a formula leave its value alone: not `5 feet 3 inches`, `5 cm + 3`, `5 or less`."""
    if not _CHANGING.isdisjoint(words):
        return False
    for before, token in itertools.pairwise(("", *words)):
        if token[0].isdigit() and before not in ("^", "{", "-"):
            return False
        if token[0] != '"' and not token[0].isdigit() and token not in _UNIT_MARKS and before != "/":
            return False
    return True


def is_name(tokens: Tokens) -> bool:
    r"""Whether tokens name something that has a value (x, f(x), x_1, |AB|, (p, q), Area)."""
    depth = 0
    outside = []
    for at, token in enumerate(tokens):
        if token in ("(", "{"):
            depth += 1
        elif token in (")", "}"):
            depth -= 1
        elif depth == 0 and not (at and tokens[at - 1] == "_"):
            outside.append(token)
    if not outside:
        return len(tokens) > 2 and all(token in "(),{}" or _NAME.fullmatch(token) for token in tokens)
    return all(_NAME.fullmatch(token) for token in outside)
