"""The `method` of a run's configuration -> Method or Phases, with every mistake as a UserError of one line."""

from collections.abc import Mapping, Sequence
from typing import Any

from polarity.errors import UserError
from polarity.methods.catalog import METHODS
from polarity.methods.method import Method
from polarity.methods.part import merged, nested, validated
from polarity.methods.phases import SEQUENCE, Phases, named_sequence
from polarity.methods.schedules import LinearDecay
from polarity.methods.shaping import scale_path
from polarity.plugins import is_plugin, load_plugin

Spec = str | Mapping[str, Any] | Method | Phases


def build_method(spec: Spec, *, steps: int | None = None, decay_until: float | None = None) -> Method | Phases:
    """The Method, or sequence of them, that a configuration means.

    spec: a name of METHODS; `module:NAME`, a Method in a user's file; a mapping {base: one of these, **changes}, keys
    nested or dotted; a mapping of parts (with a name) on top of Method's defaults; or a mapping with `phases`, a list
    of {method: spec, steps: number}, the last without steps.

    steps: the run's rollout steps. With it every `until` becomes a `per_step`. A preset's `per_step` is the paper's,
    made for the paper's 300 steps: it gives way to decay_until (a fraction of the run, or of its phase), and without
    one a run too short for it is refused. A `per_step` in `spec` itself is the user's and stays.
    """
    own: dict[str, Any] = {}
    method: Method | Phases
    if isinstance(spec, Method | Phases):
        method = spec
    elif isinstance(spec, str):
        method = _named(spec)
    elif isinstance(spec, Mapping):
        own = nested(spec)
        base = own.pop("base", None)
        phased = "phases" in own or isinstance(base and _named(base), Phases)
        method = _sequence(own, base) if phased else _changed(own, base)
    else:
        raise UserError(f"method: expected a name, module:NAME or a mapping, not {spec!r}")
    if steps is None:
        return method
    if isinstance(method, Phases):
        return _timed_phases(method, own.get("phases", ()), steps, decay_until)
    return _timed(method, own, steps, decay_until)


def _changed(own: Mapping[str, Any], base: Any) -> Method | Phases:
    if base is None:
        return validated(Method, own)
    preset = _named(base)
    return validated(type(preset), merged(preset.model_dump(), own))


def _sequence(own: Mapping[str, Any], base: Any) -> Phases:
    """Phases from {phases: [{method, steps}, ...]}, or from a named sequence with its name or phases changed."""
    unknown = own.keys() - Phases.model_fields.keys()
    if unknown:
        raise UserError(
            f"method key {min(unknown)!r} does not apply to a sequence of methods: change it within `phases`, a list "
            f"of {{method: NAME or mapping, steps: number}}"
        )
    preset = _named(base) if base is not None else None
    if isinstance(preset, Method):
        raise UserError(f"method: base {base!r} is one method, and `phases` lists several: drop base")
    fields = dict(preset or {})  # phases as they are, so that a user's own methods keep their class
    if "phases" not in own:
        return validated(Phases, fields | dict(own))
    specs = own["phases"]
    if not isinstance(specs, Sequence) or isinstance(specs, str) or not all(isinstance(s, Mapping) for s in specs):
        raise UserError("method key 'phases': give a list of {method: NAME or mapping, steps: number}")
    classes = dict(enumerate(type(method) for method in preset.methods)) if preset else {}
    phases = [_phase(dict(spec), index, classes.get(index, Method)) for index, spec in enumerate(specs)]
    name = "_then_".join(
        p["method"].name + (f"_{p['steps']}" if p.get("steps") is not None else "") for p in phases
    )  # fmt: skip
    return validated(Phases, {"name": name, **fields, **own, "phases": phases})


def _phase(spec: dict[str, Any], index: int, cls: type[Method]) -> dict[str, Any]:
    """A phase with its method made, from a name, changes to a base, or all of its parts (then of class `cls`)."""
    where = f"phases.{index}.method"
    inner, base = spec.get("method"), spec.get("base")
    if inner is None:
        raise UserError(f"method key {where!r} is missing; give a name or a mapping")
    if isinstance(inner, str):
        inner = {"base": inner}
    own = nested(inner) if isinstance(inner, Mapping) else {}
    base = own.pop("base", base)
    method: Method | Phases
    try:
        if isinstance(inner, Method | Phases):
            method = inner
        elif base is None and "phases" not in own:
            method = validated(cls, own)
        else:
            method = build_method({**own, "base": base})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if isinstance(method, Phases):
        raise UserError(f"{where}: {method.name!r} is itself a sequence; list its phases here")
    return {**spec, "method": method, "base": base if base and is_plugin(base) else None}


def _named(name: Any) -> Method | Phases:
    if not isinstance(name, str):
        raise UserError(f"method: a base is a name or module:NAME, not {name!r}")
    if is_plugin(name):
        method = load_plugin(name, "method")
        if not isinstance(method, Method | Phases):
            hint = "; make an instance of it: " + name.split(":")[1].lower() if isinstance(method, type) else ""
            raise UserError(f"method {name!r} is {type(method).__name__}, not a polarity.methods.Method{hint}")
        return method
    try:
        return named_sequence(name) or METHODS[name]
    except KeyError as error:
        hint = f"; a sequence is {SEQUENCE}, for example nsr_50_then_dapo" if "then" in name else ""
        raise UserError(error.args[0] + hint) from None


def _timed_phases(method: Phases, own: Sequence[Any], steps: int, decay_until: float | None) -> Phases:
    """Every phase with its decays laid out over the phase."""
    *_, last = method.starts
    if last >= steps:
        raise UserError(
            f"method {method.name!r}: its last phase begins after {last} rollout steps and the run has {steps}; give "
            f"more steps, or shorter phases"
        )
    phases = []
    for index, phase in enumerate(method.phases):
        theirs = own[index].get("method") if index < len(own) else None
        length = phase.steps or steps - last
        timed = _timed(phase.method, nested(theirs) if isinstance(theirs, Mapping) else {}, length, decay_until)
        phases.append(phase.model_copy(update={"method": timed}))
    return method.model_copy(update={"phases": tuple(phases)})


def _timed(method: Method, own: Mapping[str, Any], steps: int, decay_until: float | None) -> Method:
    """The method with its decays laid out over `steps`."""
    for name, part in method.shaping.parts:
        schedule, path = part.scale, scale_path(name)
        if not isinstance(schedule, LinearDecay):
            continue
        theirs = isinstance(_at(own, f"{path}.per_step"), int | float)
        if schedule.until is None and not theirs:
            if decay_until is not None:
                schedule = LinearDecay(start=schedule.start, floor=schedule.floor, until=decay_until)
            elif schedule.per_step and schedule.steps > steps:
                raise UserError(
                    f"method {method.name!r}: {path} decays over {schedule.steps:g} rollout steps but the run, or the "
                    f"phase, has {steps}; set decay_until (a fraction of the run, such as 0.667), or method.{path}"
                    f".until or .per_step to say what you mean"
                )
        method = method.vary({path: schedule.over(steps)})
    return method


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else getattr(tree, key, None)
    return tree
