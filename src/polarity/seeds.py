"""Seeds from names: every random choice of a run has its own, so nothing depends on what was drawn before."""

import hashlib


def seed_for(*parts: object) -> int:
    """A 62-bit seed that depends on all of `parts` (ints and strings), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 2
