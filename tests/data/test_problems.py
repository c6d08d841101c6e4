"""Reading problems: what is wrong is named by row and set aside, never dropped in silence."""

import json
from pathlib import Path
from typing import Any

import pytest

from polarity.data import load_rows, read_problems
from polarity.errors import UserError

GOOD = {"id": "a", "problem": "1+1?", "answer": "2"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def many(count: int) -> list[dict[str, str]]:
    return [{"id": f"n{i}", "problem": f"{i}+1?", "answer": str(i + 1)} for i in range(count)]


def test_rows_keep_what_they_hold(tmp_path: Path):
    odd = {"problem": "line\u2028separator \x85 {braces}", "answer": " 3 ", "topic": {"x": [1]}}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(odd, ensure_ascii=False) + "\n", "utf-8")
    assert read_problems(path) == [GOOD, {"id": "3", **odd}]


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
        ([GOOD, {"id": "b", "problem": "1", "answer": "\u200b\n"}], r"row 2: 'answer' is '\\u200b\\n'"),
        ([{**GOOD, "answer": 2}], r"row 1: 'answer' is 2; it must be a non-empty string"),
        ([{**GOOD, "answer": ["2"]}], r"row 1: 'answer' is \['2'\]"),
        ([{**GOOD, "problem": None}], r"row 1: 'problem' is None"),
        ([{**GOOD, "problem": "half \ud83d"}], r"row 1: 'problem' holds half a character"),
        ([GOOD, "{'id': 1}"], r"row 2: not JSON: .* at column 2"),
        ([GOOD, "[1]"], r"row 2: expected an object with problem and answer"),
        ([GOOD, "[" * 100_000], r"row 2: not JSON"),
        ([GOOD, '{"id": ' + "1" * 5000 + "}"], r"row 2: not JSON"),
        ([GOOD, {**GOOD, "id": "b"}, GOOD], r"row 3: id 'a' stands in row 1 too; ids must differ"),
        ([{**GOOD, "id": 1}, {**GOOD, "id": "1"}], r"row 2: id '1' stands in row 1 too"),
        ([GOOD, "x", "y", {"id": "c"}], r"row 2: not JSON.* \(3 of 4 rows are bad: 2 not JSON, 1 problem missing\)"),
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
    with pytest.raises(UserError, match="row 1: cannot be read as UTF-8"):
        read_problems(tmp_path / "latin.jsonl")


def test_a_few_bad_rows_are_set_aside_with_their_reasons(tmp_path: Path):
    rows: list[Any] = many(397)
    rows[10:10] = ["{oops", {"id": "e", "problem": "?", "answer": ""}, {"id": "n3", "problem": "again", "answer": "x"}]
    path, aside = write(tmp_path / "p.jsonl", *rows), tmp_path / "new" / "bad.jsonl"
    loaded = load_rows(path, quarantine=aside)
    assert [row["id"] for row in loaded.rows] == [f"n{i}" for i in range(397)]
    assert loaded.reasons == {"not JSON": 1, "answer empty": 1, "duplicate id": 1}
    assert loaded.path == aside
    kept = [json.loads(line) for line in aside.read_text().splitlines()]
    assert [(bad["row"], bad["reason"]) for bad in kept] == [
        (11, "not JSON"), (12, "answer empty"), (13, "duplicate id"),
    ]  # fmt: skip
    assert kept[0]["content"] == "{oops"
    assert json.loads(kept[2]["content"]) == rows[12]
    assert loaded.summary() == (
        f"{path}: 397 problems; 3 rows set aside (1 not JSON, 1 answer empty, 1 duplicate id), see {aside}"
    )


def test_too_many_bad_rows_stop_the_reading_and_are_written_first(tmp_path: Path):
    path, aside = write(tmp_path / "p.jsonl", *many(98), "x", "y"), tmp_path / "bad.jsonl"
    assert len(load_rows(path, max_bad=0.02).rows) == 98
    with pytest.raises(
        UserError, match=r"row 99: not JSON.*2 of 100 rows are bad: 2 not JSON\); all of them: .*bad"
    ) as e:
        load_rows(path, quarantine=aside)
    assert "p.jsonl" in str(e.value)
    assert len(aside.read_text().splitlines()) == 2


def test_a_clean_file_leaves_no_quarantine(tmp_path: Path):
    loaded = load_rows(write(tmp_path / "p.jsonl", *many(3)), quarantine=tmp_path / "bad.jsonl")
    assert loaded.path is None
    assert not (tmp_path / "bad.jsonl").exists()
    assert loaded.summary() == f"{tmp_path / 'p.jsonl'}: 3 problems"
