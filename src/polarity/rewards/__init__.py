"""Response and reference answer in, Outcome out."""

from polarity.errors import UserError, nearest
from polarity.plugins import is_plugin, load_plugin
from polarity.rewards.exact import exact
from polarity.rewards.outcome import Outcome, Status, Verifier, as_outcome, verify, verify_all

VERIFIERS: dict[str, Verifier] = {"exact": exact}


def resolve_verifier(name: str) -> Verifier:
    """The verifier of that name, or a user's own as `module:NAME`."""
    if is_plugin(name):
        verifier = load_plugin(name, "verifier")
        if not callable(verifier):
            raise UserError(f"verifier {name!r} is not callable; write a function (response, gold, row=None)")
        return verifier
    if name not in VERIFIERS:
        raise UserError(f"unknown verifier {name!r}; {nearest(name, VERIFIERS)}, or module:NAME")
    return VERIFIERS[name]


__all__ = [
    "VERIFIERS",
    "Outcome",
    "Status",
    "Verifier",
    "as_outcome",
    "exact",
    "resolve_verifier",
    "verify",
    "verify_all",
]
