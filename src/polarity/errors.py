"""The one error a user is meant to read: a single line that says what is wrong and how to put it right.

The command line prints it without a traceback and exits with code 2.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line and names the fix."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'a' or 'b'?` for the known names closest to `name`; all of them when none is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(known)
