"""The base of every configurable part of a method, and changes to such parts by dotted path.

A part is a frozen pydantic model. The docstring under each field becomes its description (and so its --help text),
and its range is in its type, so a bad value is refused where it is set.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polarity.errors import UserError, nearest

# Two ways to say the same thing (of a schedule): setting one drops the other, so a preset's choice needs no explicit
# null. It stands here because changes are laid over plain mappings, before anything knows that they are schedules.
_ALTERNATIVES = {"per_step": "until", "until": "per_step"}


class Part(BaseModel):
    """A frozen piece of a method's definition. Unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


P = TypeVar("P", bound=BaseModel)
# A share, a discount, a distance below 1.
Unit = Annotated[float, Field(ge=0, le=1)]


def validated(cls: type[P], data: Mapping[str, Any], owner: str = "method") -> P:
    """`cls` made from `data`; what is wrong with it as a UserError of one line that names the full dotted path."""
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        found = error.errors()
        # what is wrong inside a list also makes it too short: only the cause is worth telling
        causes = [e for e in found if not any(o["loc"][: len(e["loc"])] == e["loc"] != o["loc"] for o in found)]
        raise UserError("; ".join(_explain(cls, e, owner) for e in causes)) from error


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` (nested) with `changes` (nested, dotted, or both) laid over it.

    A part whose `kind` changes starts afresh: the fields of the old kind mean nothing to the new one.
    """
    return _lay_over(base, nested(changes))


def nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings; models as mappings of all their fields."""
    out: dict[str, Any] = {}
    for dotted, value in changes.items():
        *path, last = str(dotted).split(".")
        place = out
        for key in path:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise UserError(f"method key {dotted!r}: {key!r} is set both as a whole and in part; set one")
        if isinstance(value, BaseModel):
            value = value.model_dump()
        if isinstance(value, Mapping):
            value = _lay_over(place.get(last), nested(value))
        place[last] = value
    return out


def _lay_over(old: Any, new: Any) -> Any:
    if not isinstance(new, Mapping):
        return new
    if not isinstance(old, Mapping) or ("kind" in new and "kind" in old and new["kind"] != old["kind"]):
        old = {}
    out = dict(old)
    for key, value in new.items():
        out[key] = _lay_over(old.get(key), value)
        other = _ALTERNATIVES.get(key)
        if other in old and other not in new and value is not None:
            out[other] = None
    return out


def _explain(cls: type[BaseModel], error: Any, owner: str) -> str:
    """One pydantic error in one line: the dotted path as the user writes it, and what to write instead."""
    path: list[str] = []
    model: type[BaseModel] = cls
    candidates: list[type[BaseModel]] = []
    for item in error["loc"]:
        if error["type"] == "extra_forbidden" and item == error["loc"][-1]:
            dotted = ".".join([*path, str(item)])
            return f"unknown {owner} key {dotted!r}; {nearest(str(item), model.model_fields)}"
        if item in model.model_fields:
            path.append(str(item))
            candidates = list(_models_in(model.model_fields[item].annotation))
            model = candidates[0] if candidates else model
        elif isinstance(item, int):
            path.append(str(item))
        else:  # the tag of a union: not written by the user, but it says which model comes next
            model = next((c for c in candidates if _kind(c) == item), model)
    tags = [str(_kind(c)) for c in candidates]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_invalid":
        path.append("kind")
        tag = error["ctx"]["tag"]
        return f"{owner} key {'.'.join(path)!r}: {tag!r} is not a kind; {nearest(tag, tags)}"
    if error["type"] == "union_tag_not_found":
        return f"{owner} key {'.'.join(path)!r}: say which kind ({', '.join(tags)}), for example kind: {tags[0]}"
    if error["type"] == "missing":
        return f"{owner} key {'.'.join(path)!r} is missing"
    where = f"{owner} key {'.'.join(path)!r}: " if path else f"{owner}: "
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        kind = error["input"] if error["input"] in tags else tags[0]
        return f"{where}give a mapping, for example {{kind: {kind}}}" if kind != "None" else f"{where}give a mapping"
    shown = repr(error["input"])
    shown = "" if error["type"] == "value_error" or len(shown) > 60 else f", not {shown}"
    return f"{where}{message[0].lower() + message[1:]}{shown}"


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every model class inside an annotation, through unions and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _kind(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return field.default if field else None
