"""Problem rows: what a policy is asked, and the reference answer its response is held against."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polarity.data.columns import Row, check_columns, to_row
from polarity.data.readers import Fault, records
from polarity.errors import UserError

MAX_BAD = 0.01
_QUARANTINED_TEXT = 4000  # characters of a bad row that are kept


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row set aside. `row`: its number, from 1; `reason` is what is counted, `detail` says it in full."""

    row: int
    reason: str
    detail: str
    content: str


@dataclass(frozen=True)
class Loaded:
    """Rows that were read, and those that were set aside.

    repeats: rows of a verl file that say again what an earlier row of the same index said; left out, not bad.
    path: the file that holds the rows set aside, where one was asked for and there are any.
    """

    source: str
    rows: list[Row]
    quarantined: list[BadRow]
    repeats: int = 0
    path: Path | None = None

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows were set aside for each reason, most first."""
        return dict(Counter(bad.reason for bad in self.quarantined).most_common())

    def summary(self) -> str:
        """One line: how many rows, how many repeated, how many set aside and why."""
        text = f"{self.source}: {len(self.rows):,} problems"
        if self.repeats:
            text += f"; {self.repeats:,} rows repeat an earlier one and were left out"
        if self.quarantined:
            text += f"; {len(self.quarantined):,} rows set aside ({_counted(self.reasons)})"
        return text + (f", see {self.path}" if self.path else "")

    def write(self, path: Path) -> Path:
        """Write the rows set aside as JSONL: row, reason, detail, content (its first 4,000 characters)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for bad in self.quarantined:
                found = {"row": bad.row, "reason": bad.reason, "detail": bad.detail, "content": bad.content}
                file.write(json.dumps(found) + "\n")
        return path


def load_rows(
    spec: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    max_bad: float = MAX_BAD,
    quarantine: Path | None = None,
    prepare: Callable[[Row], Row] | None = None,
) -> Loaded:
    """Read the problems of a file, a directory or a hub dataset (`readers.py`), with columns as in `columns.py`.

    A row that is no JSON object, whose problem or answer is missing, empty or no string, or whose id stands in an
    earlier row, is set aside with its number and reason; `quarantine` is the file that gets them, if there are any.
    max_bad: the share of rows that may be set aside. prepare: changes a record before its columns are looked up.
    Raises UserError, one line that names the source, where more are bad, nothing is left, or nothing can be read.
    """
    columns = columns or {}
    check_columns(columns)
    rows: list[Row] = []
    bad: list[BadRow] = []
    seen: dict[str, tuple[int, Row]] = {}
    repeats = 0
    for number, record, content in records(spec):
        try:
            if isinstance(record, Fault):
                raise record
            row = to_row(prepare(record) if prepare else record, number, columns)
            if row["id"] in seen:
                first, earlier = seen[row["id"]]
                if _is_verl(record) and (earlier["problem"], earlier["answer"]) == (row["problem"], row["answer"]):
                    repeats += 1
                    continue
                raise Fault("duplicate id", f"id {row['id']!r} stands in row {first} too; ids must differ")
        except Fault as fault:
            bad.append(BadRow(number, fault.reason, fault.detail, _content(content)))
            continue
        seen[row["id"]] = (number, row)
        rows.append(row)
    loaded = Loaded(str(spec), rows, bad, repeats, quarantine if bad else None)
    if loaded.path:
        loaded.write(loaded.path)
    _check(loaded, max_bad)
    return loaded


def read_problems(spec: str | Path) -> list[Row]:
    """`load_rows` where no row may be bad. Raises UserError naming the first that is."""
    return load_rows(spec, max_bad=0).rows


def _is_verl(record: Mapping[str, Any]) -> bool:
    """DAPO-Math-17k is published with each of its problems about a hundred times, under one extra_info.index."""
    return isinstance(record.get("prompt"), list) and "extra_info" in record


def _check(loaded: Loaded, max_bad: float) -> None:
    bad, read = loaded.quarantined, len(loaded.rows) + len(loaded.quarantined)
    if not read:
        raise UserError(f"{loaded.source} holds no problems; each line is an object with problem and answer")
    if len(bad) > max_bad * read:
        more = f" ({len(bad):,} of {read:,} rows are bad: {_counted(loaded.reasons)})" if len(bad) > 1 else ""
        where = f"; all of them: {loaded.path}" if loaded.path else ""
        raise UserError(f"{loaded.source} row {bad[0].row}: {bad[0].detail}{more}{where}")


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())


def _content(content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
    return text[:_QUARANTINED_TEXT]
