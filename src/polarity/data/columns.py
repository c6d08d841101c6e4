"""From a record as published to a problem row: which column is what, and what a published answer wraps.

Where no mapping is given, the first of these that a record has (case does not matter):

    problem   problem | question | prompt, which may be a list of chat messages, as verl stores it
    answer    answer | reward_model.ground_truth | the last \\boxed of solution
    id        id | unique_id | extra_info.index | question_id | record id | the row's number

A GSM8K answer (reasoning, then `#### 18`) becomes what stands after the mark, and its text the `solution`. DAPO's two
wrapper sentences are taken off a problem: a row holds the bare problem, and a template says what is asked for. MATH's
`level` ("Level 3" or 3) is kept as `difficulty`, an int.
"""

import re
from collections.abc import Mapping
from typing import Any

from polarity.data.readers import Fault
from polarity.data.templates import load_template
from polarity.errors import UserError, nearest

Row = dict[str, Any]

PROBLEM = ("problem", "question", "prompt")
ANSWER = ("answer", "reward_model.ground_truth", "solution")
IDENTITY = ("id", "unique_id", "extra_info.index", "question_id", "record id")
DAPO_BEFORE, DAPO_AFTER = (part.strip() for part in load_template("dapo").split("{problem}"))
_ABSENT = object()
_GSM8K = re.compile(r"(?:^|\n)#### *(?P<answer>[^\n]*)\s*\Z")
_NUMBER = re.compile(r"\d+")


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse a mapping of anything but problem, answer and id."""
    for name in columns:
        if name not in ("problem", "answer", "id"):
            raise UserError(f"columns: {name!r} cannot be mapped; {nearest(name, ('problem', 'answer', 'id'))}")


def to_row(record: Mapping[str, Any], number: int, columns: Mapping[str, str]) -> Row:
    """The record with `id`, `problem` and `answer` (non-empty strings); other columns stay, for the verifier.

    columns: which column (`a.b` looks into an object) is the problem, the answer, the id; others are found by name.
    Raises Fault where problem or answer is missing, empty or no string.
    """
    lower = {key.lower(): key for key in reversed(list(record))}
    problem_key, problem = _first(record, lower, columns.get("problem"), PROBLEM)
    answer_key, answer = _first(record, lower, columns.get("answer"), ANSWER)
    identity = _first(record, lower, columns.get("id"), IDENTITY)[1]
    row = dict(record)
    if problem_key in row and problem_key not in ("problem", "answer"):
        del row[problem_key]
    problem = _unwrapped(_text("problem", _user_message(problem)))
    if isinstance(answer, str):
        marked = _GSM8K.search(answer)
        if marked:
            row.setdefault("solution", answer)
            answer = marked["answer"].strip()
        elif answer_key.lower().endswith("solution"):
            boxed = last_boxed(answer)
            if boxed is None and "answer" not in columns:
                raise Fault("answer missing", "'answer' is missing, and its solution has no \\boxed answer")
            answer = answer if boxed is None else boxed
    answer = _text("answer", answer)
    if "level" in row and "difficulty" not in row:
        level = _NUMBER.search(str(row["level"]))
        row |= {"difficulty": int(level[0])} if level else {}
    return {**row, "id": str(number if identity is None else identity), "problem": problem, "answer": answer}


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{...}` (or `\\boxed 2`) of a text holds; None where there is none or it never closes."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    rest = text[start + len("\\boxed") :].lstrip()
    if not rest.startswith("{"):
        token = re.match(r"\\?\w+", rest)
        return token[0] if token else None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # an escaped brace is text
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return rest[1 : match.start()].strip()
    return None


def _first(
    record: Mapping[str, Any], lower: Mapping[str, str], mapped: str | None, names: tuple[str, ...]
) -> tuple[str, Any]:
    """(name, value) of the mapped column, else of the first of `names` there is; ("", None) where there is none."""
    for name in (mapped,) if mapped is not None else names:
        if name in record:
            return name, record[name]
        if mapped is None and name in lower:
            return lower[name], record[lower[name]]
        head, _, tail = name.partition(".")
        if tail and isinstance(record.get(head), Mapping) and tail in record[head]:
            return name, record[head][tail]
    return "", _ABSENT if names is not IDENTITY else None


def _user_message(problem: Any) -> Any:
    """The user's message, where the problem is a chat; a system message belongs to the template."""
    if not isinstance(problem, list):
        return problem
    if not all(isinstance(turn, Mapping) and isinstance(turn.get("content"), str) for turn in problem):
        raise Fault("problem not a string", "'problem' is a list, but not of chat messages {role, content}")
    user = [turn["content"] for turn in problem if turn.get("role") != "system"]
    if len(user) != 1 or problem[-1].get("role") not in ("user", "human"):
        raise Fault("several turns", f"the chat has {len(user)} turns; a problem is one message of the user")
    return user[0]


def _unwrapped(problem: str) -> str:
    text = problem.strip()
    wrapped = text.startswith(DAPO_BEFORE) and text.endswith(DAPO_AFTER)
    return text[len(DAPO_BEFORE) : -len(DAPO_AFTER)].strip() if wrapped else problem


def _text(key: str, value: Any) -> str:
    """`value`, a string that shows something and that UTF-8 can hold."""
    if value is _ABSENT:
        raise Fault(f"{key} missing", f"{key!r} is missing; it must be a non-empty string")
    if not isinstance(value, str):
        raise Fault(f"{key} not a string", f"{key!r} is {_short(value)}; it must be a non-empty string")
    if not any(c.isprintable() and not c.isspace() for c in value):  # zero-width characters show nothing
        raise Fault(f"{key} empty", f"{key!r} is {_short(value)}; it must be a non-empty string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Fault(f"{key} not UTF-8", f"{key!r} holds half a character (a lone surrogate)") from error
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
