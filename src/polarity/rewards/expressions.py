r"""Tokens of a formula -> expression tree, by recursive descent.

A tree is a tuple `(operation, *arguments)`: ("number", Fraction), ("symbol", name), ("add" | "mul", tree, ...),
("pow" | "mod", tree, tree), ("call", function, tree, ...). Division is a power of -1. Covered: + - * / ^ ! %, implicit
products, mixed numbers (2\frac34, 2 3/4), \frac \sqrt[n] \binom, logarithms with their base, trigonometric functions
with and without brackets, |x|, floor and ceiling, degrees, subscripts, primes. Anything else (sums, integrals, limits,
matrices) raises NotRead: it is for a computer algebra system.
"""

from fractions import Fraction
from typing import Any

from polarity.rewards.latex import Tokens

Tree = tuple[Any, ...]

DEPTH = 100  # nested brackets, fractions and roots; a deeper formula is no answer
EXPONENT = 5000  # of a number in scientific notation
TRIGONOMETRIC = frozenset("sin cos tan cot sec csc arcsin arccos arctan".split())
_FUNCTIONS = frozenset("\\" + name for name in (*TRIGONOMETRIC, "log", "ln", "exp"))
_GREEK = frozenset(
    "\\" + name
    for name in (
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
        "omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega infty ell"
    ).split()
)
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "\\{": "\\}"}
_OPERATORS = frozenset("+ - * / ) ] } , = < > \\} \\rfloor \\rceil \\bmod \\choose \\pm \\mp".split())
_ELSEWHERE = frozenset(  # commands that a computer algebra system reads
    "\\sum \\prod \\int \\iint \\lim \\det \\gcd \\lcm \\max \\min \\sinh \\cosh \\tanh \\coth \\Re \\Im \\arg \\bmod "
    "\\pmod \\begin \\mathbbR \\mathbbZ \\mathbbN \\cap \\cup \\setminus \\bar \\overline \\arcsinh \\arccosh "
    "\\partial".split()
)
MINUS_ONE = ("number", Fraction(-1))


class NotRead(Exception):
    """The notation is not covered here."""


def parse(tokens: Tokens) -> Tree:
    """The tree of a formula. Raises NotRead."""
    parser = _Parser(tokens)
    tree = parser.sum()
    if parser.at != len(parser.tokens):
        raise NotRead(f"unexpected {parser.peek()!r}")
    return tree


def is_readable_elsewhere(tokens: Tokens) -> bool:
    """Whether a formula that was not read here is worth a computer algebra system; malformed ones are not."""
    brackets = [token for token in tokens if token in "(){}"]
    level = [1 if token in "({" else -1 for token in brackets]
    return sum(level) == 0 and not _ELSEWHERE.isdisjoint(tokens)


def quotient(over: Tree, under: Tree) -> Tree:
    return ("mul", over, ("pow", under, MINUS_ONE))


class _Parser:
    def __init__(self, tokens: Tokens) -> None:
        self.tokens, self.at, self.depth = list(tokens), 0, 0
        self.bars = 0  # open | |, so that the closing bar is not read as an opening one

    def peek(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            raise NotRead(f"expected {expected!r}, found {token!r}")
        self.at += 1
        return token

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > DEPTH:
            raise NotRead("nested too deep")
        terms: list[Tree] = []
        while True:
            negative = False
            while self.peek() in ("+", "-"):
                negative ^= self.take() == "-"
            term = self.product()
            terms.append(("mul", MINUS_ONE, term) if negative else term)
            if self.peek() not in ("+", "-"):
                break
        self.depth -= 1
        total = terms[0] if len(terms) == 1 else ("add", *terms)
        if self.peek() == "\\bmod":
            self.take()
            return ("mod", total, self.product())
        if self.peek() == "\\choose":
            self.take()
            return ("call", "binomial", total, self.sum())
        return total

    def product(self) -> Tree:
        factors = [self.factor()]
        while True:
            token = self.peek()
            if token in ("*", "/"):
                self.take()
                negative = False
                while self.peek() in ("+", "-"):
                    negative ^= self.take() == "-"
                factor = self.factor()
                factors.append(("pow", factor, MINUS_ONE) if token == "/" else factor)
                if negative:
                    factors.append(MINUS_ONE)
            elif self._starts_factor(token):
                factors.append(self.factor())
            else:
                return factors[0] if len(factors) == 1 else ("mul", *factors)

    def _starts_factor(self, token: str) -> bool:
        if not token or token in _OPERATORS or token[0] == '"':
            return False
        return token != "|" or self.bars == 0

    def factor(self) -> Tree:
        """A base with its exponents, factorials and percent signs."""
        base = self.base()
        while True:
            token = self.peek()
            if token == "^":
                self.take()
                base = ("pow", base, self.group(whole_number=True))
            elif token == "!":
                self.take()
                base = ("call", "factorial", base)
            elif token == "\\degree":
                self.take()
                base = ("call", "degrees", base)
            elif token == "%":
                self.take()
                base = quotient(base, ("number", Fraction(100)))
            else:
                return base

    def base(self) -> Tree:
        token = self.take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return self.number(token)
        if (len(token) == 1 and token.isalpha()) or token in _GREEK:
            return self.symbol(token)
        if token in ("(", "{", "["):
            inner = self.sum()
            self.take(_CLOSING[token])
            return inner
        if token == "\\frac":
            return quotient(self.group(), self.group())
        if token == "\\sqrt":
            return self.root()
        if token in _FUNCTIONS:
            return self.call(token[1:])
        if token in ("\\lfloor", "\\lceil"):
            inner = self.sum()
            self.take(_CLOSING[token])
            return ("call", "floor" if token == "\\lfloor" else "ceiling", inner)
        if token == "|":
            self.bars += 1
            inner = self.sum()
            self.take("|")
            self.bars -= 1
            return ("call", "abs", inner)
        if token == "\\binom":
            return ("call", "binomial", self.group(), self.group())
        if token in ("\\overline", "\\angle", "\\triangle"):
            return self.figure(token)
        raise NotRead(token)

    def number(self, token: str) -> Tree:
        r"""A number; with a proper fraction of whole numbers right after it, a mixed number."""
        value = read_number(token)
        if not token.isdigit():
            return ("number", value)
        after = self.tokens[self.at : self.at + 7]
        if after[:1] == ["\\frac"]:
            start = self.at
            self.take()
            over, under = self.group(), self.group()
            if (
                over[0] == under[0] == "number"
                and over[1].denominator == under[1].denominator == 1
                and 0 < over[1] < under[1]
            ):
                return ("number", value + over[1] / under[1])
            self.at = start
        elif len(after) > 2 and after[0].isdigit() and after[1] == "/" and after[2].isdigit() and int(after[2][:9]) > 0:
            self.at += 3
            return ("number", value + Fraction(int(after[0]), int(after[2])))
        return ("number", value)

    def symbol(self, token: str) -> Tree:
        """A variable or constant with its subscript and primes; f, g and h before a bracket are functions."""
        name = token
        if self.peek() == "_":
            self.take()
            name += "_" + "".join(self._raw_group())
        while self.peek() == "'":
            name += self.take()
        if token in ("f", "g") and self.peek() == "(":
            self.take()
            arguments = [self.sum()]
            while self.peek() == ",":
                self.take()
                arguments.append(self.sum())
            self.take(")")
            return ("call", name, *arguments)
        return ("symbol", name)

    def figure(self, token: str) -> Tree:
        r"""The name of a segment, an angle or a triangle: `\overline{AB}`, `\angle ABC`."""
        if self.peek() == "{":
            return ("symbol", token + "".join(self._raw_group()))
        letters = ""
        while len(self.peek()) == 1 and self.peek().isalpha():
            letters += self.take()
        if not letters:
            raise NotRead(token)
        return ("symbol", token + letters)

    def _raw_group(self) -> list[str]:
        if self.peek() != "{":
            return [self.take()]
        start, depth = self.at + 1, 0
        while True:
            depth += {"{": 1, "}": -1}.get(self.take(), 0)
            if depth == 0:
                return self.tokens[start : self.at - 1]

    def group(self, whole_number: bool = False) -> Tree:
        r"""The argument of a command: a group, or one token (of a number one digit, as in `\frac12`, unless told)."""
        token = self.peek()
        if token == "{":
            self.take()
            inner = self.sum()
            self.take("}")
            return inner
        if token in ("+", "-") and whole_number:  # 2^-1
            return ("mul", MINUS_ONE, self.group(True)) if self.take() == "-" else self.group(True)
        if token.isdigit() and len(token) > 1 and not whole_number:
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
            return ("number", Fraction(int(self.take())))
        if token.isdigit():
            return ("number", read_number(self.take()))
        self.depth += 1
        if self.depth > DEPTH:
            raise NotRead("nested too deep")
        inner = self.base()
        self.depth -= 1
        return inner

    def root(self) -> Tree:
        degree: Tree = ("number", Fraction(2))
        if self.peek() == "[":
            self.take()
            degree = self.sum()
            self.take("]")
        return ("pow", self.group(whole_number=True), ("pow", degree, MINUS_ONE))

    def call(self, name: str) -> Tree:
        r"""`\sin^2 x`, `\log_2 8`, `\cos 2x`: without brackets, the product up to the next operator or function."""
        base: Tree | None = None
        power: Tree | None = None
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = self.group(whole_number=True)
            else:
                power = self.group(whole_number=True)
        if self.peek() in ("(", "{", "["):
            closing = _CLOSING[self.take()]
            argument = self.sum()
            self.take(closing)
        else:
            factors = [self.factor()]
            while self._starts_factor(self.peek()) and self.peek() not in _FUNCTIONS and self.peek() not in ("(", "["):
                factors.append(self.factor())
            argument = factors[0] if len(factors) == 1 else ("mul", *factors)
        if name == "exp":
            return ("pow", ("symbol", "e"), argument)
        if power == MINUS_ONE or (power == ("mul", MINUS_ONE, ("number", Fraction(1))) and name in TRIGONOMETRIC):
            name, power = "arc" + name, None
        tree: Tree = ("call", name, argument) if base is None else ("call", name, argument, base)
        return tree if power is None else ("pow", tree, power)


def read_number(token: str) -> Fraction:
    r"""The exact value of a number token: `12`, `0.5`, `1.5e8`, `0.\overline{45}`.

    Raises NotRead where it is too long.
    """
    if token[-1] == "0" and "." in token and "e" not in token.lower():
        token = token.rstrip("0").rstrip(".") or "0"
    if len(token) > 4000:
        raise NotRead("a number of more than 4000 digits")
    if "\\" in token:
        head, _, period = token.partition("\\")
        digits = period[period.index("{") + 1 : -1]
        decimals = head.partition(".")[2]
        scale = 10 ** len(decimals)
        return Fraction(head + "0") + Fraction(int(digits), (10 ** len(digits) - 1) * scale)
    _, _, exponent = token.lower().partition("e")
    if len(exponent) > 6 or abs(int(exponent or 0)) > EXPONENT:
        raise NotRead("an exponent of more than 5000")
    return Fraction(token)
