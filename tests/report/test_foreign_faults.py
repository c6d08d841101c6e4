"""Foreign rollouts that are broken, hostile or large, and where they stand in the report."""

import gc
import json
import random
import tracemalloc
from pathlib import Path

import pytest
import yaml
from foreign_logs import dump, notes_of, verl_rows, write_lines

from polarity.errors import UserError
from polarity.report import write_report
from polarity.report.foreign import convert
from polarity.report.foreign.jsonl import JsonLines
from polarity.report.runs import load_runs
from polarity.rundir import RunReader

HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "\u202eevil \u2028 \u0085 \x00",
    "half a pair: \ud83d",
    "a " * 500_000,
]


# ---- what may go wrong


def test_bad_lines_are_left_out_and_named(tmp_path):
    rows = [{"prompt": "p", "response": "r", "reward": 1.0, "step": 1 + i // 200} for i in range(400)]
    path = write_lines(tmp_path / "mine.jsonl", rows)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[10] = b'{"prompt": "p", "response": \n'
    lines[20] = b'{"prompt": "p", "response": "r", "reward": NaN, "step": 1}\n'
    lines[299] = b'{"prompt": "p", "reward": 1.0, "step": 2}\n'
    lines[300] = b"\xff\xfe\n"
    path.write_bytes(b"".join(lines) + b'{"prompt": "p", "respon')
    run = convert(path, tmp_path / "out")
    assert [row["rollouts/generated"] for row in RunReader(run).metrics] == [198, 198]
    (note,) = [note for note in notes_of(run) if "cannot be read" in note]
    assert note.startswith("4 rows cannot be read and are left out: mine.jsonl line 11: not JSON:")
    assert "mine.jsonl line 21: reward is no finite number" in note
    assert "mine.jsonl line 300: no text under response or completion or output" in note
    assert note.endswith("and 1 more")
    assert "mine.jsonl line 401, the last one, is half written and left out" in notes_of(run)


def test_too_many_bad_lines_are_refused(tmp_path):
    rows = [{"prompt": "p", "response": "r", **({} if i % 20 == 7 else {"correct": True})} for i in range(200)]
    path = write_lines(tmp_path / "mine.jsonl", rows)
    message = r"10 of 200 rows cannot be read, the first mine.jsonl line 8: neither correct nor reward nor score; mend"
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / "out")
    dump(tmp_path / "verl", 3, verl_rows(random.Random(0)))
    text = (tmp_path / "verl" / "3.jsonl").read_text()
    (tmp_path / "verl" / "3.jsonl").write_text(text + text.splitlines()[0].replace('"step": 3', '"step": 4') + "\n")
    run = convert(tmp_path / "verl", tmp_path / "out2")  # a single one always may
    assert any("its step is 4, in a file of step 3" in note for note in notes_of(run))


def test_what_is_no_rollouts_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "problems" / "train.jsonl", [{"problem": "p", "answer": "1"}])
    (tmp_path / "void.jsonl").write_text("\n\n")
    for path in ("empty", "problems", "void.jsonl"):
        for attempt in (lambda p: convert(p, tmp_path / "out"), lambda p: write_report([p], tmp_path / "report.html")):
            with pytest.raises(UserError, match=r"no run at or below .*looked for run directories") as caught:
                attempt(tmp_path / path)
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    write_lines(tmp_path / "all_bad.jsonl", [{"prompt": 1, "response": "r", "correct": True}])
    with pytest.raises(
        UserError, match=r"has no rollout that can be read: all_bad\.jsonl line 1: no text under prompt"
    ):
        convert(tmp_path / "all_bad.jsonl", tmp_path / "out")


def test_odd_numbers_and_names_are_no_reason_to_fail(tmp_path):
    common = {"input": "p", "output": "r", "gts": "1"}
    rows = [
        {**common, "score": 1.0, "uid": "a_1_" + "9" * 5000},
        {**common, "score": 1.0, "uid": ["a"]},
        {**common, "score": 1.0, "acc": "maybe"},
    ]
    dump(tmp_path / "exp", 1, rows)
    text = (tmp_path / "exp" / "1.jsonl").read_text()
    (tmp_path / "exp" / "\u00b2.jsonl").write_text(text.replace('"step": 1', '"step": 2'))  # a digit, and no number
    with pytest.raises(
        UserError, match=r"2 of 6 rows cannot be read, the first 1\.jsonl line 3: acc is no finite number"
    ):
        convert(tmp_path / "exp", tmp_path / "out")
    huge = '{"prompt": "p", "response": "r", "reward": 1' + "0" * 400 + "}\n"
    path = tmp_path / "huge.jsonl"
    path.write_text('{"prompt": "p", "response": "r", "reward": 1}\n' + huge)
    run = convert(path, tmp_path / "out2")
    assert any("huge.jsonl line 2: reward is no finite number" in note for note in notes_of(run))


def test_files_beside_that_are_not_read_are_named(tmp_path):
    dump(tmp_path / "exp", 1, verl_rows(random.Random(0)))
    write_lines(tmp_path / "exp" / "metrics.jsonl", [{"loss": 1.0}])
    assert "files beside them that are not read: metrics.jsonl" in notes_of(convert(tmp_path / "exp", tmp_path / "out"))


def test_hostile_text_survives_and_stays_text(tmp_path):
    rows = [
        {"input": HOSTILE[0], "output": text, "gts": HOSTILE[1], "score": float(i % 2)}
        for i, text in enumerate(HOSTILE)
    ]
    folder = tmp_path / "<b>exp"
    folder.mkdir()
    lines = [json.dumps({**row, "step": 1}) for row in rows]  # escapes carry the half pair through the file
    (folder / "1.jsonl").write_text("\n".join(lines) + "\n")
    logged = RunReader(convert(folder, tmp_path / "out")).rollouts(1)
    assert [row["response"] for row in logged] == [text.replace("\ud83d", "\ufffd") for text in HOSTILE]
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert "hacked" not in page
    assert "<b>exp" not in page
    assert "&lt;b&gt;exp" in page


def test_a_dump_is_not_held_in_memory(tmp_path):
    rng = random.Random(0)
    size = 0
    for step in range(1, 31):
        rows = [{"input": f"p{i}", "output": rng.randbytes(1000).hex(), "gts": "1", "score": 1.0} for i in range(100)]
        dump(tmp_path / "exp", step, rows)
        size += (tmp_path / "exp" / f"{step}.jsonl").stat().st_size
    together = tmp_path / "all.jsonl"
    together.write_bytes(b"".join((tmp_path / "exp" / f"{step}.jsonl").read_bytes() for step in range(1, 31)))
    for files in ([tmp_path / "exp" / f"{step}.jsonl" for step in range(1, 31)], [together]):
        tracemalloc.start()
        reader = JsonLines(files, "verl")
        count = sum(len(reader.rows(step)) for step in reader.steps)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == 3000
        assert peak < size / 6, f"{peak} bytes at most, of {size}"


def test_logged_groups_are_few_and_keep_best_and_worst(tmp_path):
    rows = [{"prompt": "uniform", "response": f"u{i}", "reward": 1.0} for i in range(4)]
    rows += [{"prompt": "large", "response": f"l{i}", "reward": (i * 37 % 100) / 100} for i in range(100)]
    rows += [{"prompt": f"m{p}", "response": f"m{p} {i}", "reward": float(i)} for p in range(5) for i in range(2)]
    run = convert(write_lines(tmp_path / "mine.jsonl", rows), tmp_path / "out")
    logged = RunReader(run).rollouts(1)
    assert list(dict.fromkeys(row["prompt"] for row in logged)) == ["large", "m0", "m1", "m2"]
    kept = sorted(row["reward"] for row in logged if row["prompt"] == "large")
    assert kept == sorted([i / 100 for i in range(16)] + [i / 100 for i in range(84, 100)])
    assert RunReader(run).metrics[0]["rollouts/generated"] == len(rows)


# ---- in the report


def test_a_folder_with_runs_of_ours_and_dumps_has_both(tmp_path, make_run):
    make_run(tmp_path / "ours", "dapo")
    dump(tmp_path / "theirs", 1, verl_rows(random.Random(0)))
    assert sorted(load_runs([tmp_path]).labels) == ["dapo", "theirs"]


def test_what_was_converted_is_removed(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    dump(tmp_path / "exp", 1, verl_rows(random.Random(0)))
    write_report([tmp_path / "exp"], tmp_path / "report.html")
    gc.collect()
    assert list(scratch.iterdir()) == []


def test_convert_takes_one_run_and_an_empty_folder(tmp_path):
    for name in ("a", "b"):
        dump(tmp_path / "both" / name, 1, verl_rows(random.Random(0)))
    with pytest.raises(UserError, match="holds 2 runs"):
        convert(tmp_path / "both", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        convert(tmp_path / "both" / "a", tmp_path / "full")
    assert yaml.safe_load((convert(tmp_path / "both" / "a", tmp_path / "out") / "config.yaml").read_text())["notes"]
    assert Path(tmp_path / "out" / "metrics.jsonl").exists()
