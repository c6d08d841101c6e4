r"""DAPO's answer check, exactly: the last `Answer:` line, normalised as text and compared as text.

Source: DAPO's scorer (verl, math_dapo). It knows no mathematics, and its quirks are part of what DAPO was trained with:
- only the last 300 characters of the response count, so a long remark after the answer loses it;
- `Answer: 42.` is wrong (the full stop stays) and `Answer: $42$.` is right; `\(42\)`, `**42**`, `007`, `7.0` and
  `\dfrac` are not read; a bare `\boxed{42}` is no answer;
- units and a few words are deleted wherever they occur, also inside other words (`banana 3` becomes `banan3`).
So the prompt must ask for that line. DAPO's reward is +1 and -1; here the score is 1.0 and 0.0, and group-normalised
advantages are the same.
"""

import re

CHARACTERS = 300  # from the end of the response
_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"), (",\\text{and}", ","),
    ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
_DELETED = (
    *"square ways integers dollars mph inches hours km units".split(), "\\ldots",
    *"sue points feet minutes digits cents degrees cm gm pounds meters meals edges students childrentickets "
    "multiples".split(), "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}",
    "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
)  # fmt: skip
_DOLLARS = re.compile(r"[^$\n]*\$([^$\n]*)\$[^\n]*")
_UNWRAPPED = (
    re.compile(r"\\text\{(.*?)\}"),
    re.compile(r"\\textbf\{(.*?)\}"),
    re.compile(r"\\overline\{(.*?)\}"),
    re.compile(r"\\boxed\{(.*)\}"),
)
_FRACTION, _ROOT = re.compile(r"frac([^{])(.)"), re.compile(r"sqrt([^{])")


def answer_line(response: str) -> str | None:
    """What follows the last `Answer:` in the last 300 characters, normalised; None where there is none."""
    found = _ANSWER.findall(response[-CHARACTERS:])
    return normalize(found[-1]) if found else None


def same_answer(answer: str, gold: str) -> bool:
    """Whether a normalised answer is the reference answer, normalised here."""
    return answer == normalize(gold)


def normalize(answer: str) -> str:
    """An answer as DAPO compares it. The order of the steps is part of the rule."""
    answer = answer.rsplit("=", 1)[-1]
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    for expression in _DELETED:
        answer = answer.replace(expression, "")
    answer = _DOLLARS.sub(lambda found: f"${found[1]}$", answer)
    for wrapper in _UNWRAPPED:
        answer = wrapper.sub(lambda found: found[1], answer)
    answer = _FRACTION.sub(lambda found: f"frac{{{found[1]}}}{{{found[2]}}}", answer)
    answer = _ROOT.sub(lambda found: f"sqrt{{{found[1]}}}", answer).replace("$", "")
    digits = answer.replace(",", "")
    return (digits if digits.isdigit() else answer).strip()
