"""Which column is what, and what published answers and problems wrap."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from polarity.data import apply_template, last_boxed, load_rows, load_template, read_problems
from polarity.errors import UserError

DATA = os.environ.get("POLARITY_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="POLARITY_TEST_DATA names no folder of benchmark files")


def read(tmp_path: Path, *records: dict[str, Any], columns: dict[str, str] | None = None) -> list[dict[str, Any]]:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_rows(path, columns, max_bad=0).rows


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    ("record", "row"),
    [
        ({"question": "Q", "answer": "5"}, {"id": "1", "problem": "Q", "answer": "5"}),
        ({"Problem": "Q", "Answer": "5", "ID": "x"}, {"id": "x", "problem": "Q", "answer": "5"}),
        ({"prompt": "Q", "answer": "5", "unique_id": "t/1"}, {"id": "t/1", "problem": "Q", "answer": "5"}),
        ({"problem": "Q", "question": "no", "answer": "5"}, {"problem": "Q", "question": "no"}),
        ({"problem": "Q", "solution": r"so \boxed{1} or \boxed{\frac{1}{2}}."}, {"answer": r"\frac{1}{2}"}),
        ({"problem": "Q", "answer": "7", "solution": r"\boxed{8}"}, {"answer": "7", "solution": r"\boxed{8}"}),
        ({"problem": "Q", "answer": "2 * 3 = 6\n#### 1,006"}, {"answer": "1,006", "solution": "2 * 3 = 6\n#### 1,006"}),
        ({"problem": "Q", "answer": "#### is a mark"}, {"answer": "is a mark"}),
        ({"problem": "Q", "answer": "5", "level": "Level 4"}, {"level": "Level 4", "difficulty": 4}),
        ({"problem": "Q", "answer": "5", "level": 2, "difficulty": "hard"}, {"level": 2, "difficulty": "hard"}),
        ({"problem": "Q", "answer": "5", "level": "Level ?"}, {"level": "Level ?"}),
        (
            {"prompt": chat(("user", "Q")), "reward_model": {"ground_truth": "34"}, "extra_info": {"index": 9}},
            {"id": "9", "problem": "Q", "answer": "34"},
        ),
        ({"prompt": chat(("system", "S"), ("user", "Q")), "answer": "1"}, {"problem": "Q"}),
    ],
)
def test_published_layouts(tmp_path: Path, record: dict[str, Any], row: dict[str, Any]):
    found = read(tmp_path, record)[0]
    assert {key: found[key] for key in row} == row
    assert "difficulty" in row or "difficulty" not in found


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"answer": "5"}, "'problem' is missing"),
        ({"problem": "Q", "solution": "no box"}, r"no \\boxed answer"),
        ({"problem": "Q", "solution": r"\boxed{}"}, "'answer' is ''"),
        ({"problem": "Q", "solution": r"\boxed{never \{ closed}"}, None),
        ({"problem": "Q", "solution": r"\boxed{never closed"}, r"no \\boxed answer"),
        ({"problem": "Q", "answer": "work\n####"}, "'answer' is ''"),
        ({"prompt": ["Q"], "answer": "5"}, "not of chat messages"),
        ({"prompt": chat(("user", "Q"), ("assistant", "A"), ("user", "R")), "answer": "5"}, "the chat has 3 turns"),
        ({"prompt": [], "answer": "5"}, "the chat has 0 turns"),
        ({"prompt": chat(("user", "Q")), "reward_model": {"ground_truth": 34}}, "'answer' is 34"),
    ],
)
def test_what_is_no_problem(tmp_path: Path, record: dict[str, Any], match: str | None):
    if match is None:
        assert read(tmp_path, record)[0]["answer"] == r"never \{ closed"
    else:
        with pytest.raises(UserError, match=match):
            read(tmp_path, record)


def test_a_mapping_wins_and_looks_into_objects(tmp_path: Path):
    record = {"problem": "no", "text": "Q", "meta": {"gold": "5", "key": 3}, "answer": "no"}
    columns = {"problem": "text", "answer": "meta.gold", "id": "meta.key"}
    row = read(tmp_path, record, columns=columns)[0]
    assert (row["id"], row["problem"], row["answer"]) == ("3", "Q", "5")
    assert read(tmp_path, {"problem": "Q", "solution": "34"}, columns={"answer": "solution"})[0]["answer"] == "34"
    with pytest.raises(UserError, match="'answer' is missing"):
        read(tmp_path, record, columns={"answer": "gold"})
    with pytest.raises(UserError, match="'answr' cannot be mapped; did you mean 'answer'"):
        read(tmp_path, record, columns={"answr": "gold"})


def test_dapo_wrapper_is_taken_off_and_repeats_left_out(tmp_path: Path):
    bare = "Find $x$. {braces}\n\nTwo lines."
    wrapped = apply_template(load_template("dapo"), bare)
    record = {
        "data_source": "math_dapo", "prompt": chat(("user", wrapped)), "ability": "MATH",
        "reward_model": {"ground_truth": "34", "style": "rule"}, "extra_info": {"index": "9a9b"},
    }  # fmt: skip
    other = {**record, "extra_info": {"index": "77"}}
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [record, other] * 100))
    loaded = load_rows(path, max_bad=0)
    assert [(row["id"], row["problem"], row["answer"]) for row in loaded.rows] == [
        ("9a9b", bare, "34"), ("77", bare, "34"),
    ]  # fmt: skip
    assert loaded.repeats == 198
    assert "198 rows repeat an earlier one" in loaded.summary()
    with pytest.raises(UserError, match="id '9a9b' stands in row 1 too"):
        read(tmp_path, record, {**record, "reward_model": {"ground_truth": "35"}})
    assert read(tmp_path, {"problem": wrapped[:-1], "answer": "1"})[0]["problem"] == wrapped[:-1]


@pytest.mark.parametrize("depth", range(6))
def test_last_boxed_gives_back_what_was_boxed(depth: int):
    inner = r"\left\{" + "{x_{1}" * depth + r" \} \frac{a}{b}" + "}" * depth
    assert last_boxed(rf"first \boxed{{0}}, then $\boxed{{ {inner} }}$ {{}}.") == inner


def test_last_boxed_without_braces():
    assert last_boxed(r"is $\boxed 2$.") == "2"
    assert last_boxed(r"is $\boxed\pi$") == r"\pi"
    assert last_boxed(r"nothing \boxed") is None
    assert last_boxed("nothing") is None


@needs_data
@pytest.mark.parametrize("name", ["math_train", "math_test", "math500"])
def test_math_solutions_give_their_answers(name: str):
    empty = 0
    for row in read_problems(Path(str(DATA)) / f"{name}.jsonl"):
        if "answer_note" in row:  # the box is empty upstream
            empty += last_boxed(row["solution"]) == ""
        else:
            assert last_boxed(row["solution"]) == row["answer"].strip()
        assert row.get("difficulty") in (1, 2, 3, 4, 5) or row["level"] == "Level ?"
    assert empty == (2 if name == "math_train" else 0)


@needs_data
@pytest.mark.parametrize(("name", "count"), [("gsm8k_train", 7473), ("gsm8k_test", 1319)])
def test_gsm8k_as_published_gives_its_answers(tmp_path: Path, name: str, count: int):
    rows = read_problems(Path(str(DATA)) / f"{name}.jsonl")
    published = read(tmp_path, *({"question": row["problem"], "answer": row["solution"]} for row in rows))
    assert len(rows) == count
    assert [row["answer"].replace(",", "") for row in published] == [row["answer"] for row in rows]
    assert [row["solution"] for row in published] == [row["solution"] for row in rows]
