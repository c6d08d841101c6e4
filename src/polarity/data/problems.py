"""Problem rows: what a policy is asked, and the reference answer its response is held against."""

import json
from pathlib import Path
from typing import Any

from polarity.errors import UserError

Row = dict[str, Any]


def read_problems(path: Path) -> list[Row]:
    """Read JSONL with `problem` and `answer` (non-empty strings) in each row; other columns reach the verifier.

    A missing `id` becomes the row number. Raises UserError naming file, row and fix; nothing is dropped silently.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: texts hold U+2028
    except FileNotFoundError:
        raise UserError(f"no data file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _row(path, number, line)
        if row["id"] in seen:
            raise UserError(
                f"{path} row {number}: id {row['id']!r} stands in row {seen[row['id']]} too; ids must differ"
            )
        seen[row["id"]] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no problems; each line is an object with problem and answer")
    return rows


def _row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} row {number}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise UserError(f"{path} row {number}: expected an object with problem and answer")
    for key in ("problem", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            found = "is missing" if key not in row else f"is {row[key]!r}"
            raise UserError(f"{path} row {number}: {key!r} {found}; it must be a non-empty string")
    return {**row, "id": str(row.get("id", number))}


def apply_template(template: str, problem: str) -> str:
    """The prompt text. Literal replacement, since problem texts hold braces."""
    return template.replace("{problem}", problem)
