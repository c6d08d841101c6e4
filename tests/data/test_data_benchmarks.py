"""The registry of benchmarks, on small files of their published layouts and on the real ones where they are."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from polarity.data import BENCHMARKS, TEMPLATES, load_benchmark, load_problems
from polarity.errors import UserError

DATA = os.environ.get("POLARITY_TEST_DATA")
HERE = {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "math": 5000, "gsm8k": 1319, "olympiadbench": 675}
QUESTIONS = [f"Which of these is number {i}?" for i in range(200)]


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def gpqa(tmp_path: Path) -> Path:
    path = tmp_path / "gpqa_diamond.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [
            "Question",
            "Correct Answer",
            *(f"Incorrect Answer {i}" for i in (1, 2, 3)),
            "Record ID",
            "Explanation",
        ]
        writer.writerow(names)
        for i, question in enumerate(QUESTIONS):
            writer.writerow([question, "right\n", " wrong 1", "wrong 2", "wrong 3", f"rec{i}", "because"])
    return path


def test_the_registry_is_complete_and_names_what_exists():
    assert set(BENCHMARKS) == {*HERE, "gpqa_diamond", "livecodebench"}
    for name, benchmark in BENCHMARKS.items():
        assert name == benchmark.name
        assert benchmark.verifier in ("math", "choice", "code")
        assert set(benchmark.templates.values()) <= set(TEMPLATES)
        assert set(benchmark.samples) <= set(benchmark.templates)
        assert benchmark.rights
        assert all(spec.startswith("hf:") for spec in benchmark.hub)
    a3po = {name for name, benchmark in BENCHMARKS.items() if benchmark.samples.get("a3po") == 32}
    nsr = {name for name, benchmark in BENCHMARKS.items() if benchmark.samples.get("nsr") == 256}
    assert a3po == {"aime24", "aime25", "math500", "gpqa_diamond", "livecodebench"}
    assert nsr == {"math", "aime25", "amc23"}


def test_gpqa_options_are_shuffled_by_the_question_alone(gpqa: Path, monkeypatch: pytest.MonkeyPatch):
    rows = load_benchmark("gpqa_diamond", gpqa)
    for question, row in zip(QUESTIONS, rows, strict=True):
        assert sorted(row["options"]) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        assert row["options"]["ABCD".index(row["answer"])] == "right"
        lines = [f"({letter}) {text}" for letter, text in zip("ABCD", row["options"], strict=True)]
        assert row["problem"] == f"{question}\n\n" + "\n".join(lines)
        assert "Explanation" not in row
    assert rows[3]["id"] == "rec3"
    counts = [sum(row["answer"] == letter for row in rows) for letter in "ABCD"]
    assert min(counts) > 30  # 50 expected, standard deviation 6
    reordered = gpqa.read_text().splitlines(keepends=True)
    monkeypatch.setenv("POLARITY_DATA", str(gpqa.parent))
    assert load_benchmark("gpqa_diamond") == rows
    gpqa.write_text(reordered[0] + "".join(reordered[3:]))  # a record is two lines
    assert load_benchmark("gpqa_diamond") == rows[1:]


def test_a_prepared_gpqa_file_stays_as_it_is(tmp_path: Path):
    row = {"id": "1", "problem": "Q\n(A) x\n(B) y", "answer": "B", "options": ["x", "y"]}
    assert load_benchmark("gpqa_diamond", write(tmp_path / "g.jsonl", row)) == [row]


def test_livecodebench_keeps_its_tests(tmp_path: Path):
    record = {
        "question_title": "T", "question_content": "Add two numbers.", "question_id": "1_A", "starter_code": "",
        "public_test_cases": '[{"input": "1 2", "output": "3", "testtype": "stdin"}]',
        "private_test_cases": "eJxjYBgFo2AU", "difficulty": "easy", "metadata": "{}",
    }  # fmt: skip
    starter = {**record, "question_id": "2", "starter_code": "class Solution:\n    def add(self, a, b):\n        "}
    folder = tmp_path / "livecodebench"
    folder.mkdir()
    write(folder / "test.jsonl", record)
    write(folder / "test2.jsonl", starter)
    rows = load_benchmark("livecodebench", tmp_path)
    assert [row["id"] for row in rows] == ["1_A", "2"]
    for row in rows:
        assert row["problem"].startswith("Add two numbers.\n\n")
        assert row["answer"] == row["public_test_cases"] == record["public_test_cases"]
        assert row["private_test_cases"] == record["private_test_cases"]
        assert row["difficulty"] == "easy"
    assert "stdin" in rows[0]["problem"]
    assert "class Solution" in rows[1]["problem"]


def test_answers_that_copies_store_differently(tmp_path: Path):
    write(tmp_path / "aime24.jsonl", {"Problem": "Q", "Answer": 25}, {"Problem": "R", "Answer": 27.0})
    assert [row["answer"] for row in load_benchmark("aime24", tmp_path)] == ["25", "27"]
    write(tmp_path / "olympiadbench.jsonl", {"id": 1606, "question": "Q", "final_answer": ["2", "$x$"]})
    assert load_benchmark("olympiadbench", tmp_path)[0]["answer"] == "2, $x$"
    with pytest.raises(UserError, match=r"benchmark aime24: .*'answer' is 2\.5"):
        load_benchmark("aime24", write(tmp_path / "x.jsonl", {"problem": "Q", "answer": 2.5}))


def test_how_a_benchmark_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "aime24.jsonl", {"problem": "Q", "answer": "25"})
    monkeypatch.setenv("POLARITY_DATA", str(tmp_path))
    for spec in ("aime24", f"aime24={path}", f"aime24={tmp_path}", str(path), path):
        assert [row["problem"] for row in load_problems(spec).rows] == ["Q"]
    with pytest.raises(UserError, match=r"neither a file, a directory nor a benchmark; did you mean .*'aime24'"):
        load_problems("aime23")
    with pytest.raises(UserError, match="unknown benchmark 'gpqa'; did you mean 'gpqa_diamond'"):
        load_benchmark("gpqa")
    with pytest.raises(UserError, match="benchmark aime24: no file or folder"):
        load_problems("aime24=nowhere")
    with pytest.raises(UserError, match=r"benchmark aime24: .*row 1: 'answer' is missing"):
        load_benchmark("aime24", write(tmp_path / "y.jsonl", {"problem": "Q"}))


@pytest.mark.skipif(not DATA, reason="POLARITY_TEST_DATA names no folder of benchmark files")
@pytest.mark.parametrize("name", HERE)
def test_the_real_files_load(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("POLARITY_DATA", str(DATA))
    rows = load_benchmark(name)
    assert len(rows) == HERE[name]
    assert all(row["problem"].strip() and row["answer"].strip() for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    assert all("difficulty" in row for row in rows) == (name in ("math", "math500"))


@pytest.mark.skipif(not DATA, reason="POLARITY_TEST_DATA names no folder of benchmark files")
def test_the_real_training_files_load():
    for name, count in {"dapo_math_17k": 17917, "math_train": 7500, "gsm8k_train": 7473, "code_stdin": 30}.items():
        loaded = load_problems(Path(str(DATA)) / f"{name}.jsonl", max_bad=0)
        assert (len(loaded.rows), loaded.quarantined) == (count, [])
