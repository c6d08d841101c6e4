"""Responses generated elsewhere: every shape of file, matching with data, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from polarity.errors import UserError
from polarity.evaluation import Generation
from polarity.evaluation.offline import match, own_rows, read_responses, uneven

ROWS = [{"id": "a", "problem": "1+1?", "answer": "2"}, {"id": "b", "problem": "2+2?", "answer": "4"}]
CHAT = {"message": {"content": "#### 2"}, "finish_reason": "length"}


def write(path: Path, *records: Any) -> Path:
    file = path / "responses.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("records", "truncated"),
    [
        ([{"id": "a", "responses": ["#### 2", "no"], "answer": "2"}], None),
        ([{"problem_id": "a", "response": "#### 2", "answer": "2"}, {"id": "a", "response": "no", "answer": 2}], None),
        (
            [
                {"problem_id": "a", "response": "#### 2", "gold": "2", "truncated": True, "token_ids": [1]},
                {"problem_id": "a", "response": "no", "gold": "2", "truncated": False, "token_ids": [2]},
            ],
            [True, False],
        ),
        (
            [
                {"doc_id": 0, "doc": {"id": "a"}, "target": "2", "resps": [["#### 2", "no"]], "filter": "none"},
                {"doc_id": 0, "doc": {"id": "a"}, "target": "2", "resps": [["#### 2", "no"]], "filter": "strict"},
            ],
            None,
        ),
        ([{"input": "a", "output": text, "gts": "2", "score": 1} for text in ("#### 2", "no")], None),
        (
            [
                {
                    "id": "a", "prompt": "?", "answer": "2",
                    "outputs": [{"text": "#### 2", "finish_reason": "stop"}, {"text": "no", "finish_reason": "length"}],
                }
            ],
            [False, True],
        ),
        (
            [
                {
                    "custom_id": "a", "answer": "2",
                    "response": {"body": {"choices": [CHAT, {"text": "no", "finish_reason": "stop"}]}},
                }
            ],
            [True, False],
        ),
    ],
)  # fmt: skip
def test_every_shape_is_understood(tmp_path: Path, records: list[dict[str, Any]], truncated: list[bool] | None):
    (found,) = read_responses(write(tmp_path, *records))
    assert (found.row["id"], found.row["answer"]) == ("a", "2")
    assert "token_ids" not in found.row
    assert [g.text for g in found.made] == ["#### 2", "no"]
    assert [g.truncated for g in found.made] == (truncated or [None, None])
    assert all(g.length is None and g.entropy is None for g in found.made)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"id": "a"}, "line 1: no response found in id; give id and response"),
        ({"response": "x"}, "no response found in response"),
        ({"id": "a", "responses": "x"}, "responses (a list of texts)"),
        ({"id": "a", "response": None}, "a response is not text"),
        ({"id": "a", "responses": ["x", 3]}, "a response is not text"),
        ([1], "no response found in list"),
    ],
)
def test_lines_without_a_response_are_named(tmp_path: Path, record: Any, said: str):
    with pytest.raises(UserError) as caught:
        read_responses(write(tmp_path, record))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read"):
        read_responses(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "response": "x"}\n{"id"')
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_responses(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="holds no responses"):
        read_responses(write(tmp_path))
    with pytest.raises(UserError, match="line 2: problem 'a' has another answer"):
        read_responses(
            write(tmp_path, {"id": "a", "response": "x", "answer": "1"}, {"id": "a", "response": "x", "answer": "2"})
        )


def test_matching_by_id_and_by_text(tmp_path: Path):
    by_id = read_responses(write(tmp_path, {"id": "b", "response": "y"}, {"id": "a", "response": "x"}))
    rows, made, notes = match(by_id, ROWS)
    assert [row["id"] for row in rows] == ["a", "b"]
    assert [[g.text for g in each] for each in made] == [["x"], ["y"]]
    assert notes == []
    by_text = read_responses(write(tmp_path, {"problem": " 2+2? ", "response": "y"}))
    rows, made, notes = match(by_text, ROWS)
    assert [row["id"] for row in rows] == ["b"]
    assert notes == ["1 of 2 problems have no response and are left out"]


def test_responses_to_other_problems_are_refused(tmp_path: Path):
    strange = read_responses(write(tmp_path, {"id": "a", "response": "x"}, {"id": "z", "response": "x"}))
    with pytest.raises(UserError, match="1 of 2 problems in the responses are not in the data, the first 'z'"):
        match(strange, ROWS)


def test_an_id_alone_is_not_trusted(tmp_path: Path):
    """lm-eval counts documents from 0 and rows without an id are numbered from 1: the texts tell."""
    numbered = [{"id": str(i + 1), "problem": row["problem"], "answer": row["answer"]} for i, row in enumerate(ROWS)]
    other = read_responses(write(tmp_path, {"id": "1", "problem": "2+2?", "response": "x"}))
    with pytest.raises(UserError, match="problem '1' is another one in the data"):
        match(other, numbered)
    line = {"doc_id": 1, "doc": {"question": "2+2?"}, "target": "5", "resps": [["y"]]}
    rows, _, notes = match(read_responses(write(tmp_path, line)), numbered)
    assert rows == numbered[1:]
    assert "1 problems have another answer in the responses' file; the data's counts" in notes


def test_the_answers_of_the_file_itself(tmp_path: Path):
    path = write(tmp_path, {"id": "a", "response": "x", "answer": "1"}, {"id": "b", "response": "x"})
    with pytest.raises(UserError, match="problem 'b' has no answer; give the data"):
        own_rows(path, read_responses(path))
    assert own_rows(path, read_responses(path)[:1]) == [{"id": "a", "answer": "1", "problem": ""}]


def test_uneven_numbers_are_noted():
    one = Generation("", None, None, None)
    assert uneven([[one], [one]]) == []
    assert uneven([[one], [one] * 3]) == ["problems have 1 to 3 responses; pass@k goes up to k = 1"]
