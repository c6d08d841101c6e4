"""Reading problem files: everything that is wrong is named by row, nothing is dropped."""

import json
from pathlib import Path
from typing import Any

import pytest

from polarity.data import apply_template, read_problems
from polarity.errors import UserError

GOOD = {"id": "a", "problem": "1+1?", "answer": "2"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def test_rows_keep_what_they_hold(tmp_path: Path):
    path = write(
        tmp_path / "p.jsonl", GOOD, "", {"problem": "line\u2028separator {braces}", "answer": " 3 ", "level": 5}
    )
    rows = read_problems(path)
    assert rows[0] == GOOD
    assert rows[1] == {"id": "3", "problem": "line\u2028separator {braces}", "answer": " 3 ", "level": 5}


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps({**GOOD, "id": 7}).encode())
    assert [row["id"] for row in read_problems(path)] == ["a", "7"]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], r"holds no problems; each line is an object with problem and answer"),
        (["", "  "], r"holds no problems"),
        ([GOOD, {"id": "b", "problem": "1"}], r"row 2: 'answer' is missing; it must be a non-empty string"),
        ([GOOD, {"id": "b", "problem": "1", "answer": " "}], r"row 2: 'answer' is ' '"),
        ([{**GOOD, "answer": 2}], r"row 1: 'answer' is 2; it must be a non-empty string"),
        ([{**GOOD, "problem": None}], r"row 1: 'problem' is None"),
        ([GOOD, "{'id': 1}"], r"row 2: not JSON: .* at column 2"),
        ([GOOD, "[1]"], r"row 2: expected an object with problem and answer"),
        ([GOOD, {**GOOD, "id": "b"}, GOOD], r"row 3: id 'a' stands in row 1 too; ids must differ"),
        ([{**GOOD, "id": 1}, {**GOOD, "id": "1"}], r"row 2: id '1' stands in row 1 too"),
    ],
)
def test_refused(tmp_path: Path, rows: list[Any], match: str):
    with pytest.raises(UserError, match=match) as error:
        read_problems(write(tmp_path / "p.jsonl", *rows))
    assert "\n" not in str(error.value)
    assert "p.jsonl" in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(UserError, match="no data file"):
        read_problems(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_problems(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        read_problems(tmp_path / "latin.jsonl")


def test_template_is_replaced_literally():
    assert apply_template("Q: {problem} {x}", "{y} {problem}") == "Q: {y} {problem} {x}"
