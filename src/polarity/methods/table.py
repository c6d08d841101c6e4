"""The comparison table of the A3PO paper (Table 4), derived from the definitions and extended to every method.

adaptive: the treatment changes with the training step or with what was measured. asymmetric: the update itself treats
positive and negative samples differently (clip-higher counts). shaping: the level at which advantages are weighted,
token before polarity; a ratio inverted for one polarity, or a loss taken from one, counts as polarity.
"""

from polarity.methods.advantages import SignedAdvantage
from polarity.methods.catalog import METHODS
from polarity.methods.method import Method
from polarity.methods.phases import Phases
from polarity.methods.schedules import changes
from polarity.methods.surrogates import ASPO, BAPO
from polarity.methods.token_penalties import LpReg

Row = dict[str, str | bool]
_LEVELS = ("none", "polarity", "token")


def method_table() -> list[Row]:
    """One row for each literal name of METHODS."""
    return [table_row(method) for method in METHODS.values()]


def table_row(method: Method | Phases) -> Row:
    """name, adaptive, asymmetric, shaping (none, polarity or token), advantage, loss, aggregation, filter, source."""
    if isinstance(method, Phases):
        return _sequence_row(method)
    return {
        "name": method.name,
        "adaptive": any(changes(part.scale) for _, part in method.shaping.parts) or isinstance(method.surrogate, BAPO),
        "asymmetric": _asymmetric(method),
        "shaping": _level(method),
        "advantage": _advantage(method),
        "loss": method.surrogate.label,
        "aggregation": method.aggregation,
        "filter": _filter(method),
        "source": method.source,
    }


def _sequence_row(phases: Phases) -> Row:
    rows = [table_row(method) for method in phases.methods]
    told = {key: " > ".join(str(row[key]) for row in rows) for key in ("advantage", "loss", "aggregation", "filter")}
    return {
        "name": phases.name,
        "adaptive": True,
        "asymmetric": any(row["asymmetric"] for row in rows),
        "shaping": max((str(row["shaping"]) for row in rows), key=_LEVELS.index),
        **told,
        "source": phases.source,
    }


def _polarity_weights(method: Method) -> tuple[float, float]:
    """Size of the advantage's factor for positive and for negative samples; a dropped polarity has 0."""
    a = method.advantage
    positive, negative = (a.positive, -a.negative) if isinstance(a, SignedAdvantage) else (1.0, 1.0)
    positive *= method.shaping.positive_weight * (method.filter.polarity != "negative")
    negative *= method.shaping.negative_weight * (method.filter.polarity != "positive")
    return positive, negative


def _asymmetric(method: Method) -> bool:
    positive, negative = _polarity_weights(method)
    return (
        positive != negative
        or method.shaping.positive != method.shaping.negative
        or method.shaping.entropy_term is not None  # it raises positive advantages and softens negative ones
        or method.surrogate.asymmetric
        or isinstance(method.token_penalty, LpReg)
        or method.off_policy_mask is not None
    )


def _level(method: Method) -> str:
    if method.token_mask or method.token_penalty or method.shaping.by_token:
        return "token"
    inverted = isinstance(method.surrogate, ASPO)
    return "polarity" if inverted or method.off_policy_mask or _polarity_weights(method) != (1.0, 1.0) else "none"


def _advantage(method: Method) -> str:
    a = method.advantage
    return f"{a.positive:+g} / {a.negative:+g}" if isinstance(a, SignedAdvantage) else a.kind


def _filter(method: Method) -> str:
    parts = [] if method.filter.polarity == "all" else [method.filter.polarity]
    return " + ".join(parts + ["dynamic"] * method.filter.dynamic_sampling) or "none"
