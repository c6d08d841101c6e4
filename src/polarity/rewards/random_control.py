"""Rewards that know nothing: the control for a contaminated benchmark.

A base model that improves on a benchmark when it is trained on random rewards brought the answers with it ("Spurious
Rewards: Rethinking Training Signals in RLVR", Shao et al., 2025): on such a pair of model and benchmark, gains from
true rewards prove nothing either.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from polarity.errors import UserError
from polarity.rewards.outcome import Item, Outcome


class RandomVerifier:
    """Correct with probability `p`, whatever the response says.

    The verdict is a function of seed, gold and response alone (their BLAKE2b hash as a uniform number), so it does not
    depend on the order or the number of checks, and a response sampled twice for a problem is judged alike.
    """

    def __init__(self, p: float = 0.5, seed: int = 0):
        if not 0 <= p <= 1:
            raise UserError(f"p is {p}; a probability is between 0 and 1")
        self.p, self.seed = p, seed

    def __call__(self, response: str, gold: str, row: Mapping[str, Any] | None = None) -> Outcome:
        parts = (str(self.seed), gold, response)
        data = b"".join(len(part).to_bytes(8, "big") + part.encode(errors="surrogatepass") for part in parts)
        uniform = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64
        correct = uniform < self.p
        return Outcome(correct, "correct" if correct else "wrong", float(correct))

    def check_many(self, items: Iterable[Item]) -> list[Outcome]:
        """One Outcome an item, (response, gold) or (response, gold, row), in order."""
        return [self(item[0], item[1]) for item in items]
