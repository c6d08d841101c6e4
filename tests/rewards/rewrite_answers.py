r"""Other ways to write an answer that a grader has to accept: \dfrac, spaces, decimals, $..$, `x =`, units, \left( ...

`rewrites(answer)` is deterministic; every form it returns has the value of the answer.
"""

import re
from fractions import Fraction

_FRACTION = re.compile(r"(?<![\d )])\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_PLAIN = re.compile(r"-?\d+")


def rewrites(answer: str) -> list[str]:
    """Correct forms of `answer` that differ from it as text."""
    forms = [
        f"${answer}$",
        f"\\(\\displaystyle {answer}\\)",
        re.sub(r"(?<!\\[a-z]{3}) ", "", answer) + " ",
        f"\\boldsymbol{{{answer}}}",
        f"{answer}.",
    ]
    formula = not re.search(
        r"\\text|\\mbox|\\begin|[=<>,:_%$]|\\le|\\ge|\\cup|\\in\b|\\circ|\\pm|^\W*[A-Z]\W*$", answer
    )
    if "frac" in answer:
        forms += [
            answer.replace("\\frac", "\\dfrac"),
            re.sub(r"\\[dt]frac", r"\\frac", answer),
            _FRACTION.sub(r"\1/\2", answer),
        ]
    if answer.startswith(("(", "[")) and answer.endswith((")", "]")) and "," in answer:
        forms += [
            f"\\left{answer[:-1]}\\right{answer[-1]}",
            f"\\bigl{answer[:-1]} \\bigr{answer[-1]}",
            answer.replace(",", ",\\,"),
        ]
    if formula:
        forms += [f"x = {answer}", f"\\left( {answer} \\right)", f"{answer} \\text{{ units}}"]
    if "\\sqrt" in answer:
        forms += [re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", answer), re.sub(r"\\sqrt\{(\d+)\}", r"√{\1}", answer)]
    if "\\pi" in answer:
        forms.append(answer.replace("\\pi", "π"))
    if _PLAIN.fullmatch(answer):
        forms += [f"{int(answer):,}", f"{answer}.0", f"\\frac{{{2 * int(answer)}}}{{2}}"]
    whole = _FRACTION.fullmatch(answer)
    if whole:
        value = Fraction(int(whole[1]), int(whole[2]))
        rest = value.denominator
        for prime in (2, 5):
            while rest % prime == 0:
                rest //= prime
        forms += [str(float(value))] if rest == 1 and value.denominator < 10**5 else []
        forms += [f"\\frac{{{3 * value.numerator}}}{{{3 * value.denominator}}}"]
    return [form for form in dict.fromkeys(forms) if form != answer]
