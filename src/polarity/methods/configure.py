"""The `method` of a run's configuration -> Method, with every mistake as a UserError of one line."""

from collections.abc import Mapping
from typing import Any

from polarity.errors import UserError
from polarity.methods.catalog import METHODS
from polarity.methods.method import Method
from polarity.methods.part import merged, nested, validated
from polarity.methods.schedules import LinearDecay
from polarity.plugins import is_plugin, load_plugin

# where a method may hold a schedule
_SCHEDULES = ("shaping.positive.scale", "shaping.negative.scale")


def build_method(
    spec: str | Mapping[str, Any] | Method, *, steps: int | None = None, decay_until: float | None = None
) -> Method:
    """The Method that a configuration means.

    spec: a name of METHODS; `module:NAME`, a Method in a user's file; a mapping {base: one of these, **changes}, keys
    nested or dotted; or a mapping of parts (with a name) on top of Method's defaults.

    steps: the run's rollout steps. With it every `until` becomes a `per_step`. A preset's `per_step` is the paper's,
    made for the paper's 300 steps: it gives way to decay_until (a fraction of the run), and without one a run too
    short for it is refused. A `per_step` in `spec` itself is the user's and stays.
    """
    own: dict[str, Any] = {}
    if isinstance(spec, Method):
        method = spec
    elif isinstance(spec, str):
        method = _named(spec)
    elif isinstance(spec, Mapping):
        own = nested(spec)
        base = own.pop("base", None)
        if base is None:
            method = validated(Method, own)
        else:
            preset = _named(base)
            method = validated(type(preset), merged(preset.model_dump(), own))
    else:
        raise UserError(f"method: expected a name, module:NAME or a mapping, not {spec!r}")
    return method if steps is None else _timed(method, own, steps, decay_until)


def _named(name: Any) -> Method:
    if not isinstance(name, str):
        raise UserError(f"method: a base is a name or module:NAME, not {name!r}")
    if is_plugin(name):
        method = load_plugin(name, "method")
        if not isinstance(method, Method):
            hint = "; make an instance of it: " + name.split(":")[1].lower() if isinstance(method, type) else ""
            raise UserError(f"method {name!r} is {type(method).__name__}, not a polarity.methods.Method{hint}")
        return method
    try:
        return METHODS[name]
    except KeyError as error:
        raise UserError(error.args[0]) from None


def _timed(method: Method, own: Mapping[str, Any], steps: int, decay_until: float | None) -> Method:
    """The method with its decays laid out over a run of `steps`."""
    for path in _SCHEDULES:
        schedule = _at(method, path)
        if not isinstance(schedule, LinearDecay):
            continue
        theirs = isinstance(_at(own, f"{path}.per_step"), (int, float))
        if schedule.until is None and not theirs:
            if decay_until is not None:
                schedule = LinearDecay(start=schedule.start, floor=schedule.floor, until=decay_until)
            elif schedule.per_step and schedule.steps > steps:
                raise UserError(
                    f"method {method.name!r}: {path} decays over {schedule.steps:g} rollout steps but the run has "
                    f"{steps}; set decay_until (a fraction of the run, such as 0.667), or method.{path}.until or "
                    f".per_step to say what you mean"
                )
        method = method.vary({path: schedule.over(steps)})
    return method


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else getattr(tree, key, None)
    return tree
