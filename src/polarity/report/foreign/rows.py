"""A row of anybody's rollouts, and what is shared by those who read them."""

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]

THRESHOLD = 0.5  # correct at a score of this or more, as everywhere in polarity; right for {0, 1} and for {-1, 1}
EXAMPLES = 3


class Fault(Exception):
    """Why a row is left out."""


@dataclass(slots=True)
class Row:
    """One response. reward: None where only a verdict was logged; group: rows of one step that share it belong
    together; given: further keys of our rollouts format; turn: (session, output) in verl's multi-output agent loops."""

    prompt: str
    response: str
    correct: bool
    reward: float | None
    problem: str
    group: str
    given: Record = field(default_factory=dict)
    turn: tuple[str, int] | None = None


@dataclass
class Tally:
    """What was read, and how. rows: those that count; rules, grouping: how `correct` and groups were found, with rows;
    faults: rows that could not be read, of which examples are FILE line N: reason; left_out: what was not read, with
    how often; remarks: sentences for the page, each once."""

    rows: int = 0
    faults: int = 0
    examples: list[str] = field(default_factory=list)
    rules: Counter[str] = field(default_factory=Counter)
    grouping: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    remarks: dict[str, None] = field(default_factory=dict)

    def fault(self, place: str, reason: str) -> None:
        self.faults += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{place}: {reason}")

    def remark(self, sentence: str) -> None:
        self.remarks[sentence] = None


def text_of(value: Any) -> str | None:
    """Text as it is; of a conversation [{role, content}] the content of its one message, or all of them with their
    roles. None for anything else."""
    if isinstance(value, str):
        return clean(value)
    if not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        return None
    contents = [_content(message) for message in value]
    if len(value) == 1:
        return clean(contents[0])
    roles = [message.get("role") or "?" for message in value]
    return clean("\n\n".join(f"{role}: {content}" for role, content in zip(roles, contents, strict=True)))


def _content(message: Record) -> str:
    content = message.get("content")
    if isinstance(content, list):  # parts: text, images ...
        return "".join(str(p.get("text") or f"[{p.get('type')}]") if isinstance(p, dict) else str(p) for p in content)
    if content is None:
        return json.dumps(message.get("tool_calls"), ensure_ascii=False, default=str)
    return str(content)


def clean(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def digest(*parts: str | None) -> str:
    """A short name for texts, the same in every process."""
    made = hashlib.blake2b(digest_size=6)
    for part in parts:
        made.update(b"\0" if part is None else b"\1" + part.encode() + b"\2")
    return made.hexdigest()


def number(value: Any, name: str) -> float:
    """A finite number. True is 1; text counts too: verl's older trainer writes NumPy's values as text. Raises Fault."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return float(value.lower() == "true")
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise Fault(f"{name} is no finite number")
    return found


def missing(value: Any) -> bool:
    """None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def short(error: Exception) -> str:
    """The beginning of an error's first line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
