"""Response and reference answer in, Outcome out."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from polarity.errors import UserError, nearest
from polarity.plugins import is_plugin
from polarity.rewards.choice import ChoiceVerifier
from polarity.rewards.code import CodeVerifier
from polarity.rewards.exact import ExactVerifier, exact
from polarity.rewards.math import MathVerifier
from polarity.rewards.outcome import Outcome, Status, Verifier, as_outcome, check_many, verify, verify_all
from polarity.rewards.pool import WorkerPool
from polarity.rewards.random_control import RandomVerifier
from polarity.rewards.weighted import WeightedVerifier, boxed_format

# Name -> what makes the verifier, given its limit in seconds where it has one.
INSTANT: dict[str, Callable[[], Verifier]] = {
    "exact": ExactVerifier,
    "choice": ChoiceVerifier,
    "random": RandomVerifier,
    "boxed_format": lambda: boxed_format,
}
LIMITED: dict[str, Callable[..., Verifier]] = {
    "math": MathVerifier,
    "math_answer": partial(MathVerifier, "answer"),
    "code": CodeVerifier,
}
VERIFIERS: dict[str, Callable[..., Verifier]] = {**INSTANT, **LIMITED}


def resolve_verifier(
    name: str, *, limit: float | None = None, rewards: Mapping[str, float] | None = None, unsafe: bool = False
) -> Verifier:
    """The verifier of that name, or a user's own as `module:NAME`, which runs in worker processes.

    limit: seconds of wall-clock time for one response, for verifiers that have a limit (default: their own).
    unsafe: `code` may run programs where no sandbox is to be had.
    rewards: {name: weight} of further verifiers, added to the score of this one, which alone decides what is correct;
    its own weight is 1 unless `rewards` names it too. Raises UserError for a name that is unknown or cannot be loaded.
    """
    if unsafe and "code" not in (name, *(rewards or {})):
        raise UserError(f"verifier {name!r} runs no programs; drop unsafe")
    if not rewards:
        return _one(name, limit, unsafe)
    parts = {}
    for part, weight in {name: 1.0, **rewards}.items():
        parts[part] = _one(part, None if part in INSTANT and part != name else limit, unsafe), weight
    return WeightedVerifier(parts, correct=name)


def _one(name: str, limit: float | None, unsafe: bool) -> Verifier:
    if is_plugin(name):
        pool = WorkerPool(name) if limit is None else WorkerPool(name, limit=limit)
        pool.start(1)  # a name that cannot be loaded is refused here, not in the middle of a run
        return pool
    if name not in VERIFIERS:
        raise UserError(f"unknown verifier {name!r}; {nearest(name, VERIFIERS)}, or module:NAME")
    if limit is not None and name in INSTANT:
        raise UserError(f"verifier {name!r} needs no time limit; leave it out")
    settings: dict[str, Any] = {} if limit is None else {"limit": limit}
    return VERIFIERS[name](**settings, **({"unsafe": unsafe} if name == "code" else {}))


__all__ = [
    "VERIFIERS",
    "ChoiceVerifier",
    "CodeVerifier",
    "ExactVerifier",
    "MathVerifier",
    "Outcome",
    "RandomVerifier",
    "Status",
    "Verifier",
    "WeightedVerifier",
    "WorkerPool",
    "as_outcome",
    "boxed_format",
    "check_many",
    "exact",
    "resolve_verifier",
    "verify",
    "verify_all",
]
