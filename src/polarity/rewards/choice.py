r"""Which option of a multiple-choice question does a response choose?

Where it is looked for, and the first place that names an option decides: the last complete `\boxed{...}` (nothing else
where there is one); what follows `answer is`, `Answer:` or the like, the last first; the last line. An option is named
by its letter (`B`, `(B)`, `B.`, `**B**`, `\text{B}`, `Option B`, `B) 42`) or, where the row lists the options (column
`options` or `choices`), by its full text. Two options in the deciding place, or none anywhere, leave the response
unparsed.

GPQA has four options, A to D; a row with other options has as many letters.
"""

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from polarity.rewards.comparison import matches
from polarity.rewards.extraction import last_boxed
from polarity.rewards.latex import SHORT, tokenize
from polarity.rewards.outcome import Item, Outcome

LETTERS = "ABCD"
CHARACTERS = 4000  # from the end of a response: its answer stands there
_ANNOUNCED = re.compile(
    r"\b(?:answer|choice|option)\b(?:\s+(?:is|would\s+be|must\s+be|should\s+be)\b)?(?=[^\S\n]*:?\s*(?P<rest>[^\n]{1,400}))",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|mathsf|left|right)(?![a-zA-Z])|[*_`$~{}\\]")
_LABEL = re.compile(
    r"(?:the\s+)?(?:(?:final|correct|best|right)\s+)?(?:answer|option|choice)\s*(?:is\b|[:=])?\s*(?:option\s+|choice\s+)?",
    re.IGNORECASE,
)
_LETTER = re.compile(r"[(\[]?([A-Za-z])(?![A-Za-z'’])[)\]]?")
_NEXT = re.compile(r"\s*(?:,|/|&|\bor\b|\band\b)\s*(?:option\s+)?[(\[]?([A-Z])(?![A-Za-z'’])[)\]]?", re.IGNORECASE)
_REASON = re.compile(r"\s*(?:because|since|as|for|due|is|with|which)\b", re.IGNORECASE)


class ChoiceVerifier:
    """(response, gold, row=None) -> Outcome. gold: the right option's letter, or its text where the row lists them.

    status unparsed: no option, or several, were chosen; error: the reference is none of the options. `extracted` is the
    letter that was chosen.
    """

    def __call__(self, response: str, gold: str, row: Mapping[str, Any] | None = None) -> Outcome:
        options = _options(row)
        letters = string.ascii_uppercase[: len(options)] or LETTERS
        right = _only(_named(gold, options, letters)) if isinstance(gold, str) else None
        if right is None:
            return Outcome(
                False, "error", 0.0, extracted=f"the reference answer is none of the options {', '.join(letters)}"
            )
        chosen = _only(_choice(response, options, letters)) if isinstance(response, str) else None
        if chosen is None:
            return Outcome(False, "unparsed", 0.0)
        return Outcome(
            chosen == right, "correct" if chosen == right else "wrong", float(chosen == right), extracted=chosen
        )

    def check_many(self, items: Iterable[Item]) -> list[Outcome]:
        """One Outcome an item, (response, gold) or (response, gold, row), in order."""
        return [self(*item) for item in items]


def _options(row: Mapping[str, Any] | None) -> list[str]:
    found = (row or {}).get("options") or (row or {}).get("choices") or ()
    if isinstance(found, Mapping):  # {"A": "...", "B": "..."}
        found = [found[key] for key in sorted(found)]
    if isinstance(found, str) or not isinstance(found, Sequence):
        return []
    return [str(option) for option in found][:26]


def _only(found: set[str]) -> str | None:
    return next(iter(found)) if len(found) == 1 else None


def _choice(response: str, options: list[str], letters: str) -> set[str]:
    """The letters of the options named in the place that decides."""
    boxed = last_boxed(response)
    if boxed is not None:
        return _named(boxed, options, letters)
    tail = response[-CHARACTERS:]
    for match in reversed(list(_ANNOUNCED.finditer(tail))):
        found = _named(match["rest"], options, letters, prose=True)
        if found:
            return found
    lines = tail.strip().splitlines()
    return _named(lines[-1], options, letters) if lines else set()


def _named(text: str, options: list[str], letters: str, prose: bool = False) -> set[str]:
    """The options that `text` names: by full text, by letters at its start, or by value (0.5 for \\frac12).

    prose: a sentence may follow the letter.
    """
    plain, written = _without_label(_MARKUP.sub(" ", text)), _without_label(text.replace("*", ""))
    form = _form(written)
    by_text = {letter for letter, option in zip(letters, options, strict=False) if form and form == _form(option)}
    by_letter = set() if by_text else _letters(plain, letters, prose)
    if by_text or by_letter or len(written) > SHORT:
        return by_text or by_letter
    return {letter for letter, option in zip(letters, options, strict=False) if matches(option, written)}


def _letters(plain: str, letters: str, prose: bool) -> set[str]:
    first = _LETTER.match(plain)
    if not first or first[1].upper() not in letters:
        return set()
    found, at = {first[1].upper()}, first.end()
    while (other := _NEXT.match(plain, at)) and other[1].upper() in letters:
        found.add(other[1].upper())
        at = other.end()
    rest = plain[at:].strip()
    if not rest or (rest[0] in ".:,;)!—-" and (first[1].isupper() or not rest[1:])):
        return found
    bracketed = plain[at - 1] in ")]"
    sentence = prose and first[1].isupper() and (first[1] != "A" or bool(_REASON.match(rest)))
    return found if bracketed or sentence else set()


def _without_label(text: str) -> str:
    text = text.strip()
    match = _LABEL.match(text)
    return text[match.end() :] if match else text


def _form(text: str) -> str:
    """A text without white space, case, punctuation at its end, and LaTeX that only changes its looks."""
    return "".join(tokenize(text)).replace('"', "").lower()
