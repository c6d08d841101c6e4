"""Responses that something else generated, read from JSONL files of the usual shapes and offered for grading.

| who writes it | what a line holds |
|---|---|
| anyone | id or problem_id (or the problem itself), and response or responses; answer where no data names it |
| polarity's rollouts | problem_id, response, gold, truncated |
| lm-eval's samples, and polarity's own | doc, target, resps; of several filters the first one's lines count |
| verl's rollout and validation dumps | input, output, gts |
| vLLM's outputs | prompt, outputs: a list of {text, finish_reason} |
| a batch of OpenAI's protocol (vLLM's run_batch) | custom_id, response: {body: {choices}} |

Several lines with the same problem are several responses to it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polarity.data import Row
from polarity.errors import UserError
from polarity.evaluation.metrics import Generation
from polarity.evaluation.run import Stream, Task

# Columns that speak of responses, or that are read under another name: the rest goes to the verifier with the problem.
OF_RESPONSES = {
    *("response", "responses", "outputs", "truncated", "answer", "gold", "problem", "id", "problem_id", "prompt"),
    *("step", "group", "correct", "status", "strategy", "reward", "kept", "token_ids", "tokens", "logp_old"),
    *("logp_rollout", "entropy", "advantage", "weight"),
}


@dataclass
class Answered:
    """Responses to one problem. row: id, and what else the file knows of the problem: problem, answer ..."""

    row: Row
    made: list[Generation] = field(default_factory=list)


def read_responses(path: Path) -> list[Answered]:
    """The problems of a file in the order in which they first appear. Raises UserError naming file and line."""
    found: dict[str, Answered] = {}
    filters: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: texts hold U+2028
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            row, made = _understood(record)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number}: not JSON: {error.msg} at column {error.colno}") from error
        except (KeyError, TypeError, IndexError, AttributeError):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(
                f"{path} line {number}: no response found in {keys or 'an empty object'}; "
                f"give id and response, or id and responses (a list of texts)"
            ) from None
        if not all(isinstance(g.text, str) for g in made):
            raise UserError(f"{path} line {number}: a response is not text; write an empty one as an empty text")
        if filters.setdefault(row["id"], record.get("filter", "")) != record.get("filter", ""):
            continue
        answered = found.setdefault(row["id"], Answered(row))
        if answered.row.get("answer") != row.get("answer"):
            raise UserError(
                f"{path} line {number}: problem {row['id']!r} has another answer than before; ids must differ"
            )
        answered.made += made
    if not found:
        raise UserError(f"{path} holds no responses; each line is an object with id and response")
    return list(found.values())


def match(answered: Sequence[Answered], rows: Sequence[Row]) -> tuple[list[Row], list[list[Generation]], list[str]]:
    """Problems that have responses, in the order of `rows`, their responses, and notes on what is missing.

    Matched by id, or by the text of the problem where the file's ids are none of the data's. Raises UserError when a
    response belongs to no problem: then the file and the data do not go together.
    """
    ids = {row["id"] for row in rows}
    if not any(a.row["id"] in ids for a in answered):
        by_text = {row["problem"].strip(): row["id"] for row in rows}
        keys = {a.row["id"]: by_text.get(a.row.get("problem", "").strip(), a.row["id"]) for a in answered}
    else:
        keys = {a.row["id"]: a.row["id"] for a in answered}
    strangers = [key for key in keys.values() if key not in ids]
    if strangers:
        raise UserError(
            f"{len(strangers)} of {len(answered)} problems in the responses are not in the data, the first "
            f"{strangers[0]!r}; give the data they were made for"
        )
    by_id = {row["id"]: row for row in rows}
    pairs = [(a.row, by_id[keys[a.row["id"]]]) for a in answered]
    for own, row in pairs:
        if own.get("problem", "").strip() not in ("", row["problem"].strip()):
            raise UserError(
                f"problem {own['id']!r} is another one in the data; give the data the responses are made for"
            )
    made = {keys[a.row["id"]]: a.made for a in answered}
    kept = [row for row in rows if row["id"] in made]
    missing = len(rows) - len(kept)
    notes = [f"{missing} of {len(rows)} problems have no response and are left out"] if missing else []
    other = sum("answer" in own and own["answer"] != row["answer"] for own, row in pairs)
    notes += [f"{other} problems have another answer in the responses' file; the data's counts"] if other else []
    return kept, [made[row["id"]] for row in kept], notes + uneven(list(made.values()))


def own_rows(path: Path, answered: Sequence[Answered]) -> list[Row]:
    """The problems as the file itself has them. Raises UserError where an answer is missing."""
    for a in answered:
        if not isinstance(a.row.get("answer"), str) or not a.row["answer"].strip():
            raise UserError(
                f"{path}: problem {a.row['id']!r} has no answer; give the data (--data or --benchmark) it belongs to"
            )
    return [{"problem": "", **a.row} for a in answered]


def uneven(made: Sequence[Sequence[Generation]]) -> list[str]:
    """A note where problems differ in their number of responses."""
    counts = sorted({len(responses) for responses in made})
    if len(counts) == 1:
        return []
    return [f"problems have {counts[0]} to {counts[-1]} responses; pass@k goes up to k = {counts[0]}"]


def given_stream(made: Sequence[Sequence[Generation]], problems: int = 16) -> Stream:
    """A stream that hands out what there is: made[i] are the responses to row i. Grades `problems` at a time."""

    def stream(task: Task, indices: Sequence[int], samples: int) -> Iterator[Mapping[int, Sequence[Generation]]]:
        for start in range(0, len(indices), problems):
            yield {i: made[i] for i in indices[start : start + problems]}

    return stream


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


def _understood(record: Any) -> tuple[Row, list[Generation]]:
    """Problem and responses of one line of any known shape."""
    if "resps" in record:
        doc = record.get("doc") or {}
        problem = doc.get("problem", doc.get("question"))
        own = record.get("problem_id", doc.get("id"))
        if own is None and problem is None:
            own = record["doc_id"]  # a place in somebody's data, and no better name
        return _row(own, problem, record["target"], doc), _texts(record["resps"][0], record.get("cut"))
    if "outputs" in record:
        row = _row(record.get("id"), record.get("prompt"), record.get("answer"), record)
        return row, [_choice(choice) for choice in record["outputs"]]
    if "output" in record and "input" in record:
        gold = next((record[key] for key in ("gts", "gt", "ground_truth", "answer") if key in record), None)
        return _row(record.get("id"), record["input"], gold, {}), _texts([record["output"]], None)
    own = next((record[key] for key in ("id", "problem_id", "custom_id") if key in record), None)
    row = _row(own, record.get("problem"), record.get("answer", record.get("gold")), record)
    if isinstance(record.get("response"), dict):
        return row, [_choice(choice) for choice in record["response"]["body"]["choices"]]
    texts = record["responses"] if "responses" in record else [record["response"]]
    if isinstance(texts, str):
        raise TypeError("responses is a list")
    cut = record.get("truncated")
    return row, _texts(texts, cut if isinstance(cut, list) or cut is None else [cut] * len(texts))


def _row(own: Any, problem: str | None, answer: Any, record: Mapping[str, Any]) -> Row:
    """The problem row; its id is `own`, or the problem's text. A single answer in a list is that answer."""
    if own is None and problem is None:
        raise KeyError("id")
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    row: Row = {key: value for key, value in record.items() if key not in OF_RESPONSES}
    row["id"] = str(own if own is not None else problem)
    if problem is not None:
        row["problem"] = problem
    if answer is not None:
        row["answer"] = str(answer) if isinstance(answer, (int, float)) and not isinstance(answer, bool) else answer
    return row


def _texts(texts: Sequence[str], cut: Sequence[bool | None] | None) -> list[Generation]:
    known = cut if cut is not None else [None] * len(texts)
    return [Generation(text, None, None, c) for text, c in zip(texts, known, strict=True)]


def _choice(choice: Mapping[str, Any]) -> Generation:
    """A choice of OpenAI's protocol, chat or completions, or one of vLLM's outputs."""
    text = (choice["message"]["content"] or "") if "message" in choice else choice["text"]
    reason = choice.get("finish_reason")
    return Generation(text, None, None, None if reason is None else reason == "length")
