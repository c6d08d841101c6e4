"""How much work one comparison of two answers may cost in the calling process: counted, so the same everywhere.

A step is a product of two terms, or about as much (a microsecond or two). `matches` starts with a full account; algebra
draws on it and gives up where it is empty.
"""

import threading

STEPS = 100_000


class TooMuch(Exception):
    """The account is empty, or a number or sum is over its limit."""


class _Account(threading.local):
    left = STEPS


_ACCOUNT = _Account()


def refill() -> None:
    """Start a comparison (of this thread)."""
    _ACCOUNT.left = STEPS


def spend(steps: int) -> None:
    """Draw on the account. Raises TooMuch where it is empty."""
    _ACCOUNT.left -= steps
    if _ACCOUNT.left < 0:
        raise TooMuch
