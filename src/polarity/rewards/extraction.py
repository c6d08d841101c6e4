r"""The last complete `\boxed{...}` of a response, in one pass.

Rules: the last complete box counts, and of nested boxes the outermost; an unclosed or an empty box is no answer;
`\fbox` is a box; `\boxed 2` and `\boxed\frac12`, without braces, hold the number or the fraction that follows. Nothing
outside a box is ever read. Time is linear in the length of the response, whatever it holds.
"""

import re

# A box (its brace, the number after it, or nothing before a fraction), an escaped character, a brace.
_STEP = re.compile(
    r"\\\\?(?:boxed|fbox)(?![a-zA-Z])\s*(\{|[-+]?\d(?:[\d.,/]*\d)?|(?=\\[dtc]?frac|\\sqrt))|\\[^a-zA-Z]|[{}]"
)
_ARGUMENT = r"\s*(?:\{[^{}]*\}|[a-zA-Z\d])"
_BARE = re.compile(rf"\\(?:[dtc]?frac{_ARGUMENT}{_ARGUMENT}|sqrt{_ARGUMENT})")
_SPACE = re.compile(r"\s*")


def last_boxed(response: str) -> str | None:
    r"""Content of the last complete, non-empty box, without white space at its ends; None where there is no such box.

    >>> last_boxed(r"first \boxed{1}, so \boxed{\frac{1}{2}}. And \boxed{")
    '\\frac{1}{2}'
    """
    first = min((at for at in (response.find("\\boxed"), response.find("\\fbox")) if at >= 0), default=-1)
    if first < 0:
        return None
    content = whole = (0, 0)  # of the last complete box: its content; the box itself, from the backslash on
    opened: list[tuple[int, int]] = []  # for each open brace: where its box starts (-1: no box), where its content does
    for step in _STEP.finditer(response, first):
        mark, held = step.group(), step.group(1)
        if mark == "{":
            opened.append((-1, step.end()))
        elif mark == "}":
            start, begin = opened.pop() if opened else (-1, 0)
            ink = _SPACE.match(response, begin).end()  # type: ignore[union-attr]  # it always matches
            if start >= 0 and ink < step.start():
                around_a_box = ink == whole[0] and _SPACE.match(response, whole[1]).end() == step.start()  # type: ignore[union-attr]
                content = content if around_a_box else (begin, step.start())
                whole = (start, step.end())
        elif held == "{":
            opened.append((step.start(), step.end()))
        elif held is not None:
            bare = _BARE.match(response, step.end()) if held == "" else None
            end = bare.end() if bare else step.end()
            if end > step.start(1):
                content, whole = (step.start(1), end), (step.start(), end)
    return response[slice(*content)].strip() or None
