r"""An answer as it was written -> tokens, with everything that changes only its looks removed.

A token is a number (`12`, `2.5`, `1.5e8`, `0.\overline{45}`), one letter (`x`), a control word (`\pi`), a bracket or an
operator, or a word. Words start with a double quote: `"feet` from `\text{ feet}`, or from `feet` after a number.
Dropped: dollars around formulas, `\left`, `\big`, spacing, colours, fonts, phantoms, thousands separators. Unified:
`\dfrac`, `\leqslant`, `√`, `½`, `−`, `x²`, full-width and other decimal digits. Every step is linear in the length of
the answer.
"""

import re
import unicodedata
from functools import lru_cache

from polarity.rewards.units import is_unit

Tokens = tuple[str, ...]
OPENING = frozenset(["(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil", "\\begin"])
CLOSING = frozenset([")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil", "\\end"])
SHORT = 200  # characters of an answer worth remembering

_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi "
    "psi omega"
).split()
_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "∗": "*", "÷": "/", "∕": "/", "⁄": "/",
    "≤": "\\leq ", "⩽": "\\leq ", "≥": "\\geq ", "⩾": "\\geq ", "≠": "\\neq ", "≈": "\\approx ", "±": "\\pm ",
    "∓": "\\mp ", "∞": "\\infty ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∖": "\\setminus ",
    "∅": "\\emptyset ", "Ø": "\\emptyset ",
    "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}",
    "√": "\\sqrt ", "∛": "\\sqrt[3] ", "∜": "\\sqrt[4] ", "°": "\\degree ", "º": "\\degree ", "˚": "\\degree ",
    "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "⟨": "\\langle ", "⟩": "\\rangle ",
    "〈": "\\langle ", "〉": "\\rangle ", "′": "'", "’": "'", "。": ".", "、": ",", "∣": "|", "∠": "\\angle ",
    "△": "\\triangle ",
    "∧": " and ", "∨": " or ", "…": "\\ldots ", "£": "\\pounds ", "€": "\\euro ", "¥": "\\yen ", "¢": "\\cents ",
    "“": "", "”": "", "∶": ":", "ϕ": "\\phi ", "ϵ": "\\epsilon ", "Δ": "\\Delta ", "Σ": "\\Sigma ", "Ω": "\\Omega ",
}  # fmt: skip
_CHARACTERS |= {
    chr(0x3B1 + at + (at >= 17)): f"\\{name} " for at, name in enumerate(_GREEK)
}  # U+03C2 is the final sigma
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ"
_ON_THE_LINE = str.maketrans(_RAISED + _LOWERED, "0123456789+-()n" * 2)
_RAISED_RUN, _LOWERED_RUN = re.compile(f"[{_RAISED}]+"), re.compile(f"[{_LOWERED}]+")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")

# 12{,}345  12,\!345  12\,345  12 345: what stands between digits, before a group of exactly three of them
_SEPARATOR = re.compile(r"(?<=\d)\s?(?:\{,\}|,\s?\\!|\\[,;:! ]|~)\s?(?=\d{3}(?!\d))|(?<=\d) (?=\d{3}(?![\d/]))")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_BRACKETS = re.compile(r"(?<!\\)[(\[]|\\\{|\\langle|\\begin|\\lbrace")
_HALF_DAY = re.compile(r"(?<![a-zA-Z])([apAP])\.\s?[mM]\.?(?![a-zA-Z])")

_TOKEN = re.compile(
    r"(?P<text>\\(?:text|mbox|hbox|textnormal|textrm|textbf|textit|textsf|texttt|emph|mathrm|mathbf|mathit|mathsf|operatorname)"
    r"\s*\{[^{}]*\})|(?P<number>\d*\.\d*\\(?:overline|bar|dot)\s?\{\d+\}|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<space>\s+)|(?P<letters>[a-zA-Z]+)|\\[a-zA-Z]+|\\.|.",
    re.DOTALL,
)
_DROPPED = frozenset(
    "\\left \\right \\middle \\big \\Big \\bigg \\Bigg \\bigl \\bigr \\Bigl \\Bigr \\biggl \\biggr \\bigm "
    "\\displaystyle \\textstyle \\scriptstyle \\limits \\nolimits \\quad \\qquad \\thinspace \\, \\; \\: \\! \\( \\) "
    "\\[ \\] ~ \\boldsymbol \\bm \\pmb \\underline \\mathbf \\mathrm \\mathit \\mathsf \\mathcal \\rm \\bf \\it "
    "\\boxed \\fbox \\mathop \\ensuremath \\text \\mbox \\textbf \\textrm \\textnormal \\textit \\operatorname \\strut "
    "\\par \\noindent \\hfill \\newline \\space \\enspace \\> \\small \\large \\Large \\normalsize \\mathtt \\emph "
    "\\smash \\nonumber".split()
) | {"\\ ", "\\\n", "\\", "$", '"', "\x00"}
_WITH_ARGUMENT = frozenset(
    "\\color \\textcolor \\phantom \\hphantom \\vphantom \\hspace \\vspace \\label \\tag \\mspace \\colorbox".split()
)
_SAME = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\dbinom": "\\binom",
    "\\tbinom": "\\binom", "\\%": "%",
    "\\le": "\\leq", "\\leqslant": "\\leq", "\\leqq": "\\leq", "\\ge": "\\geq", "\\geqslant": "\\geq",
    "\\geqq": "\\geq",
    "\\lt": "<", "\\gt": ">", "\\ne": "\\neq", "\\lvert": "|", "\\rvert": "|", "\\vert": "|", "\\mid": "|", "\\|": "|",
    "\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]", "\\times": "*", "\\cdot": "*", "\\ast": "*",
    "\\div": "/", "\\varnothing": "\\emptyset", "\\simeq": "\\approx", "\\doteq": "\\approx", "\\arcdegree": "\\degree",
    "\\dots": "\\ldots", "\\cdots": "\\ldots", "\\backslash": "\\setminus", "\\varphi": "\\phi",
    "\\varepsilon": "\\epsilon",
    "\\vartheta": "\\theta", "\\land": '"and', "\\lor": '"or', "\\wedge": '"and', "\\vee": '"or', "\\colon": ":",
    "\\imath": "i", "\\textdollar": "\\$", "\\infin": "\\infty", "\\vec": "\\overline",
    "\\overrightarrow": "\\overline",
    "\\tg": "\\tan", "\\ctg": "\\cot", "\\lg": "\\log", "\\bigcup": "\\cup", "\\prime": "'", "\\gets": "=",
}  # fmt: skip
_NAMES = {
    name: "\\" + name
    for name in "sin cos tan cot sec csc arcsin arccos arctan log ln exp gcd lcm sqrt frac binom".split()
}
_NAMES |= {name: "\\" + name for name in _GREEK} | {
    "inf": "\\infty",
    "infty": "\\infty",
    "infinity": "\\infty",
    "oo": "\\infty",
}
_WORDS = frozenset("and or if for is the no yes true false none all odd even by per of usd eur gbp".split())
_END = frozenset([".", ",", ";", ":", "\\\\"])


def from_unicode(text: str) -> str:
    """`text` with mathematical characters as LaTeX, digits of any script as ASCII, invisible characters dropped."""
    if text.isascii():
        return text
    text = _RAISED_RUN.sub(lambda run: "^{" + run.group().translate(_ON_THE_LINE) + "}", text)
    text = _LOWERED_RUN.sub(lambda run: "_{" + run.group().translate(_ON_THE_LINE) + "}", text)
    text = _VULGAR.sub(
        lambda mark: "\\frac{{{}}}{{{}}}".format(*tuple(unicodedata.normalize("NFKC", mark.group()).split("⁄"))), text
    )
    return "".join(char if char.isascii() else _ascii(char) for char in text)


@lru_cache(maxsize=4096)
def _ascii(char: str) -> str:
    category = unicodedata.category(char)
    if char in _CHARACTERS:
        return _CHARACTERS[char]
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category == "Cf":
        return ""
    return "".join(_CHARACTERS.get(part, part) for part in unicodedata.normalize("NFKC", char))


def tokenize(text: str) -> Tokens:
    """The tokens of an answer, without punctuation at its end."""
    return _tokenize_short(text) if len(text) <= SHORT else _tokenize(text)


def _tokenize(text: str) -> Tokens:
    text = _HALF_DAY.sub(r"\1m", _SEPARATOR.sub("", from_unicode(text))).strip().strip("*`'")
    if "," in text and not _BRACKETS.search(text):
        text = _THOUSANDS.sub(lambda number: number.group().replace(",", ""), text)
    found: list[str] = []
    _scan(text, found, words=False)
    while found and found[-1] in _END:
        found.pop()
    return _peeled(_unify(found))


_tokenize_short = lru_cache(maxsize=8192)(_tokenize)  # references come again and again


def _scan(text: str, found: list[str], words: bool) -> None:
    r"""Append the tokens of `text` to `found`. words: the text is the argument of `\text`, so letters are words."""
    skipping = -1  # depth inside the argument of a dropped command; -1: outside
    delimiter = False  # the last token was \left or the like, so that a dot is no full stop
    spaced = True
    for match in _TOKEN.finditer(text):
        token, kind = match.group(), match.lastgroup
        if skipping >= 0:
            if kind != "space" and token != "*":
                skipping += (token == "{") - (token == "}")
                skipping = skipping or -1
            continue
        if kind == "text":
            command, _, content = token[:-1].partition("{")
            bold = command.startswith("\\math") and (
                len(content.strip()) == 1 or not found or not found[-1][-1].isdigit()
            )
            _scan(content.strip(), found, words=not bold)
        elif kind == "letters":
            found.extend(_letters(token, found, spaced, words))
        elif token in _WITH_ARGUMENT:
            skipping = 0
        elif kind != "space" and token not in _DROPPED and not (delimiter and token == "."):
            found.append(_SAME.get(token, token))
        delimiter = token in ("\\left", "\\right")
        spaced = kind == "space" or token in _DROPPED


def _letters(run: str, found: list[str], spaced: bool, words: bool) -> list[str]:
    """The tokens of a run of letters: a function, a word or unit, or variables side by side."""
    lower = run.lower()
    last = found[-1] if found else ""
    after_number = last[-1:].isdigit() or last in ("}", ")", "\\degree")
    if run in _NAMES:
        return [_NAMES[run]]
    if len(run) == 1:
        in_unit = after_number or last in ("/", "*") or (last[:1] == '"' and last[1:] not in _WORDS)
        return ['"' + run] if words and in_unit else [run]
    word = words or lower in _WORDS or (len(run) > 3 and spaced) or (run.istitle() and len(run) > 2)
    if word or (is_unit(run) and (after_number or last[:1] == '"')):
        return ['"' + lower]
    return list(run)


_PAIRS = {
    ("*", "*"): "^",
    ("<", "="): "\\leq",
    (">", "="): "\\geq",
    ("\\not", "="): "\\neq",
    ("^", "\\circ"): "\\degree",
}
_PAIRS[("^", "\\degree")] = "\\degree"


def _unify(found: list[str]) -> Tokens:
    """Notations of several tokens as one: `^{\\circ}`, `\\mathbb{R}`, `**`, `<=`."""
    tokens: list[str] = []
    at = 0
    while at < len(found):
        token = found[at]
        after = found[at + 1 : at + 4]
        if (
            token == "^"
            and len(after) == 3
            and after[0] == "{"
            and after[1] in ("\\circ", "\\degree")
            and after[2] == "}"
        ):
            tokens.append("\\degree")
            at += 4
        elif token == "\\mathbb":
            braced = len(after) == 3 and after[0] == "{" and after[2] == "}"
            tokens.append("\\mathbb" + (after[1] if braced else after[0] if after else ""))
            at += 4 if braced else 2
        elif after and (token, after[0]) in _PAIRS:
            tokens.append(_PAIRS[token, after[0]])
            at += 2
        else:
            tokens.append(token)
            at += 1
    return tuple(tokens)


def _peeled(tokens: Tokens) -> Tokens:
    """Without the brackets around the whole that say nothing: {...}, and all but one of ((...))."""
    if not tokens or tokens[0] not in ("{", "("):
        return tokens
    closes: dict[int, int] = {}
    opened: list[int] = []
    for at, token in enumerate(tokens):
        if token in ("{", "("):
            opened.append(at)
        elif token in ("}", ")") and opened:
            closes[opened.pop()] = at
    first, last = 0, len(tokens) - 1
    while closes.get(first) == last and (tokens[first] == "{" or closes.get(first + 1) == last - 1):
        first, last = first + 1, last - 1
    return tokens[first : last + 1]


def depth(tokens: Tokens) -> int:
    """The deepest nesting of brackets."""
    deepest = level = 0
    for token in tokens:
        level += (token in OPENING) - (token in CLOSING)
        deepest = max(deepest, level)
    return deepest
