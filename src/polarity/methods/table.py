"""The comparison table of the A3PO paper (Table 4), derived from the definitions and extended to every method.

asymmetric: the update itself treats positive and negative samples differently (clip-higher counts). adaptive: the
treatment changes with the training step or state. shaping: the level at which advantages are weighted, token before
polarity.
"""

from polarity.methods.advantages import SignedAdvantage
from polarity.methods.catalog import METHODS
from polarity.methods.method import Method
from polarity.methods.schedules import changes


def method_table() -> list[dict[str, str | bool]]:
    """One row for each literal name of METHODS."""
    return [table_row(method) for method in METHODS.values()]


def table_row(method: Method) -> dict[str, str | bool]:
    """name, adaptive, asymmetric, shaping (none, polarity or token), advantage, clip, aggregation, filter, source."""
    return {
        "name": method.name,
        "adaptive": any(changes(part.scale) for _, part in method.shaping.parts),
        "asymmetric": _asymmetric(method),
        "shaping": _level(method),
        "advantage": _advantage(method),
        "clip": _clip(method),
        "aggregation": method.aggregation,
        "filter": _filter(method),
        "source": method.source,
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
    clip = method.surrogate
    return (
        positive != negative
        or method.shaping.positive != method.shaping.negative
        or clip.low != clip.high
        or clip.dual is not None
    )


def _level(method: Method) -> str:
    if method.token_mask or method.shaping.parts:
        return "token"
    return "polarity" if _polarity_weights(method) != (1.0, 1.0) else "none"


def _advantage(method: Method) -> str:
    a = method.advantage
    return f"{a.positive:+g} / {a.negative:+g}" if isinstance(a, SignedAdvantage) else a.kind


def _clip(method: Method) -> str:
    clip = method.surrogate
    return f"{clip.low:g} / {clip.high:g}" + (f" / {clip.dual:g}" if clip.dual else "")


def _filter(method: Method) -> str:
    parts = [] if method.filter.polarity == "all" else [method.filter.polarity]
    return " + ".join(parts + ["dynamic"] * method.filter.dynamic_sampling) or "none"
