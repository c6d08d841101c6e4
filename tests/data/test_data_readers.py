"""Files, directories and hub names: the same rows come out of each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polarity.data import load_rows, read_problems
from polarity.errors import UserError

ROWS = [{"id": f"r{i}", "problem": f"{i} + {i} = ?\u2028", "answer": str(2 * i), "tags": ["a", "b"]} for i in range(7)]


def json_lines(path: Path, rows: list[dict] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def parquet(path: Path, rows: list[dict] = ROWS) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def test_parquet(tmp_path: Path):
    assert read_problems(parquet(tmp_path / "p.parquet")) == ROWS
    with pytest.raises(UserError, match=r"row 2: 'answer' is None"):
        read_problems(parquet(tmp_path / "q.parquet", [ROWS[0], {**ROWS[1], "answer": None}]))
    (tmp_path / "r.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"r\.parquet: cannot be read as parquet"):
        read_problems(tmp_path / "r.parquet")


def test_csv(tmp_path: Path):
    path = tmp_path / "p.csv"
    path.write_text('\ufeffProblem,Answer,Note\n"two\nlines, ""quoted""",5,n\nQ,,n\nR,6\n', "utf-8")
    loaded = load_rows(path, max_bad=0.5)
    assert [(row["id"], row["problem"], row["answer"]) for row in loaded.rows] == [
        ("1", 'two\nlines, "quoted"', "5"), ("3", "R", "6"),
    ]  # fmt: skip
    assert loaded.reasons == {"answer empty": 1}


def test_what_datasets_saves(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    assert read_problems(tmp_path / "one") == ROWS
    parts = datasets.DatasetDict({"train": data, "test": data.select(range(2))})
    parts.save_to_disk(tmp_path / "two")
    assert read_problems(f"{tmp_path / 'two'}:test") == ROWS[:2]
    with pytest.raises(UserError, match=r"two: holds test, train; write .*two:test"):
        read_problems(tmp_path / "two")
    with pytest.raises(UserError, match=r"no split 'tset'; did you mean 'test'"):
        read_problems(f"{tmp_path / 'two'}:tset")


def test_directories_of_files(tmp_path: Path):
    parquet(tmp_path / "hub/data/train-00000-of-00002.parquet", ROWS[:4])
    parquet(tmp_path / "hub/data/train-00001-of-00002.parquet", ROWS[4:])
    parquet(tmp_path / "hub/data/test-00000-of-00001.parquet", ROWS[:1])
    assert read_problems(f"{tmp_path / 'hub'}:train") == ROWS
    assert read_problems(f"{tmp_path / 'hub'}:test") == ROWS[:1]
    json_lines(tmp_path / "lines/main/train.jsonl")
    assert read_problems(tmp_path / "lines") == ROWS
    json_lines(tmp_path / "lines/socratic/train.jsonl", ROWS[:2])
    assert read_problems(f"{tmp_path / 'lines'}:socratic/train") == ROWS[:2]
    with pytest.raises(UserError, match="no split 'train'"):
        read_problems(f"{tmp_path / 'lines'}:train")


def test_rows_without_ids_are_numbered_over_the_files_of_a_split(tmp_path: Path):
    bare = [{"problem": row["problem"], "answer": row["answer"]} for row in ROWS]
    parquet(tmp_path / "train-00000-of-00002.parquet", bare[:4])
    parquet(tmp_path / "train-00001-of-00002.parquet", bare[4:])
    assert [row["id"] for row in read_problems(tmp_path)] == [str(i) for i in range(1, 8)]


def test_hub_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    data, calls = datasets.Dataset.from_list(ROWS), []

    def load(*arguments: object, **options: object) -> object:
        calls.append((*arguments, options))
        return data if options["split"] else datasets.DatasetDict({"train": data, "test": data})

    def download(*arguments: object, **options: object) -> str:
        calls.append((*arguments, options))
        return str(json_lines(tmp_path / "p.jsonl"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_problems("hf:org/name/main:test") == ROWS
    assert read_problems("hf:org/name/data/p.jsonl") == ROWS
    assert calls == [("org/name", "main", {"split": "test"}), ("org/name", "data/p.jsonl", {"repo_type": "dataset"})]
    with pytest.raises(UserError, match=r"hf:org/name: holds test, train; write hf:org/name:test"):
        read_problems("hf:org/name")
    for wrong in ("hf:name", "hf:org/", "hf:"):
        with pytest.raises(UserError, match=r"write hf:org/name\[/config\]\[:split\]"):
            read_problems(wrong)


OFFLINE = """
from polarity.data import load_benchmark, read_problems
from polarity.errors import UserError
for call in (lambda: read_problems("hf:org/no-such-dataset:test"), lambda: read_problems("hf:org/name/p.jsonl"),
             lambda: load_benchmark("aime24")):
    try:
        call()
    except UserError as error:
        print(str(error))
"""


def test_off_line_is_one_clear_line(tmp_path: Path):
    pytest.importorskip("datasets")
    import os

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("POLARITY_DATA", None)
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, env=environment, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("cannot be fetched" in line and "give the local path" in line for line in lines)
    assert "hf:org/no-such-dataset:test" in lines[0]
    assert lines[2].startswith("benchmark aime24: hf:")
    assert lines[2].endswith("aime24=PATH, or a folder in POLARITY_DATA")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow; pip install 'polarity-rl\[data\]'"):
        read_problems(tmp_path / "p.parquet")
