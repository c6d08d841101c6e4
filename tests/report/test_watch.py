"""`polarity watch`: files that grow, are rewound or begun again; the real process, with and without a terminal."""

import io
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import yaml
from rich.cells import cell_len

from polarity.cli import main
from polarity.report.watch import ASCII, BLOCKS, Board, Tail, number, sparkline
from polarity.rundir import RunReader, RunWriter


def row(step: int, **more: float) -> dict[str, float]:
    found = {"step": step, "accuracy/mean": 0.5, "reward/mean": 0.25, "entropy/mean": 0.2, "time/step": 2.0}
    return found | {name.replace("__", "/"): value for name, value in more.items()}


def new_run(path: Path, **config) -> RunWriter:
    settings = {"method": {"name": "dapo", "base": "dapo"}, "steps": 20, "seed": 0} | config
    return RunWriter.create(path, yaml.safe_dump(settings), seed=0)


# ---- reading ----


def test_a_tail_reads_every_row_once_whatever_happens_to_its_file(tmp_path):
    for trial in range(20):
        rng = random.Random(trial)
        writer = new_run(tmp_path / f"{trial}")
        file = writer.path / "metrics.jsonl"
        tail, seen, step, half = Tail(file), [], 0, b""
        for _ in range(60):
            match rng.choice(["row", "row", "row", "rows", "half", "rewind", "again", "gone", "look", "look"]):
                case "row" | "rows" as what:
                    for _ in range(1 if what == "row" else 30):
                        step += 1
                        line = json.dumps({"step": step, "x": rng.random(), "é": "\u2028"}).encode() + b"\n"
                        with file.open("ab") as opened:
                            opened.write(line[len(half) :] if line.startswith(half) and half else line)
                        half = b""
                case "half" if not half:
                    half = b'{"step": ' + str(step + 1).encode()
                    with file.open("ab") as opened:
                        opened.write(half)
                case "rewind":
                    step, half = max(0, step - rng.randint(0, 5)), b""
                    writer.rewind(step)
                case "again" | "gone" as what:
                    step, half = 0, b""
                    file.unlink(missing_ok=True)
                    if what == "again":
                        file.write_bytes(b"")
            if rng.random() < 0.7:
                found = tail.read()
                if found is None:
                    seen, found = [], tail.read()
                seen += found
                assert seen == RunReader(writer.path).metrics, f"trial {trial}"


def test_a_tail_does_not_read_what_it_has_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    tail = Tail(file)
    assert tail.read() == [{"step": 1}, {"step": 2}]
    with file.open("r+b") as opened:  # no writer does this; a reader of the whole file would fail on it
        opened.write(b"not json at")
    with file.open("ab") as opened:
        opened.write(b'{"step": 3}\n')
    assert tail.read() == [{"step": 3}]
    assert tail.read() == []


# ---- numbers and courses ----


def test_sparklines(tmp_path):
    assert sparkline([], 10, []) == ""
    assert sparkline([2.0] * 5, 10, [2.0]) == BLOCKS[4] * 5
    assert sparkline([0.0, 1.0], 10, [0.0, 1.0]) == BLOCKS[0] + BLOCKS[-1]
    assert sparkline([0.4, 0.6], 10, [0.0, 1.0]) == BLOCKS[3] + BLOCKS[4]
    rng = random.Random(0)
    for _ in range(300):
        values = sorted(rng.gauss(0, 10) for _ in range(rng.randint(1, 200)))
        width = rng.randint(1, 60)
        line = sparkline(values, width, values)
        assert len(line) == min(width, len(values))
        assert [BLOCKS.index(c) for c in line] == sorted(BLOCKS.index(c) for c in line)
        ascii_line = sparkline(values, width, values, ascii_only=True)
        assert [ASCII.index(c) for c in ascii_line] == [BLOCKS.index(c) for c in line]


def test_numbers_are_narrow():
    values = (0.0, 1.0, -0.5, 12.345, 1234.5, 123456.0, 1e-5)
    assert [number(v) for v in values] == ["0.000", "1.000", "-0.500", "12.3", "1234.5", "123456", "1e-05"]
    assert all(len(number(v)) <= 8 for v in values)


# ---- one frame ----


@pytest.fixture
def once(monkeypatch):
    """`once(path, ...)`: what `polarity watch --once` prints where stdout is a file of this encoding."""

    def once(*paths: Path, encoding: str = "utf-8", columns: int | None = None) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
            patch.delenv("COLUMNS", raising=False)
            if columns:
                patch.setenv("COLUMNS", str(columns))
            assert main(["watch", *map(str, paths), "--once"]) == 0
            sys.stdout.flush()
            return sys.stdout.buffer.getvalue().decode(encoding)

    return once


def test_the_real_process_prints_one_frame_where_stdout_is_no_terminal(make_run, tmp_path, once):
    run = make_run(tmp_path / "run", "dapo", 0, done=12)
    done = subprocess.run(
        [sys.executable, "-m", "polarity", "watch", str(run)],
        capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 12 of 20" in done.stdout
    assert done.stdout == once(run)


def test_one_frame_of_a_run_shows_its_numbers(make_run, tmp_path, once):
    run = make_run(tmp_path / "run", "dapo", 0, steps=20, done=12)
    rows = RunReader(run).metrics
    with (run / "metrics.jsonl").open("a") as file:  # NaN is no JSON, but Python writes it: a broken writer's row
        file.write(json.dumps({"step": 13, "time/step": 1.5, "entropy/mean": float("nan"), "length/mean": 40.0}) + "\n")
    text = once(run)
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines()}
    assert "step 13 of 20, 1.500 s a step, 0:00:10 to go" in text
    first, last = rows[1], rows[-1]
    for title, metric in (
        ("train accuracy", "accuracy/mean"),
        ("reward", "reward/mean"),
        ("truncated", "length/truncated"),
    ):
        words = lines[title][len(title.split()) :]
        assert words[:2] == [f"{first[metric]:.3f}", f"{last[metric]:.3f}"]
        assert set(words[2]) <= set(BLOCKS)
        assert len(words[2]) == 12
    assert lines["positive entropy"][2:4] == [f"{first['positive/entropy']:.3f}", f"{last['positive/entropy']:.3f}"]
    assert lines["id pass@1"][2:4] == ["0.300", "0.800"]
    assert "pass@8 0.330 → 0.880" in text
    assert "last evaluation: step 12" in text
    assert "✓ learning: train accuracy" in text
    assert "nan" not in text.lower()
    assert all(cell_len(line) <= 80 for line in text.splitlines())


def test_a_comparison_has_a_table_and_every_run(make_run, tmp_path, once):
    for method, seed in (("dapo", 0), ("dapo", 1), ("psr", 0)):
        make_run(tmp_path / "five" / method / f"seed_{seed}", method, seed, done=5 if seed else 20)
    new_run(tmp_path / "five" / "nsr" / "seed_0")
    text = once(tmp_path / "five")
    table = text[: text.index("\n\n")].splitlines()
    assert len(table) == 5
    assert [line.split()[0] for line in table[1:]] == ["✓", "•", "nsr/seed_0", "✓"]
    assert ["5/20" in line for line in table[1:]] == [False, True, False, False]
    assert text.count("train accuracy  ") == 3
    assert "nsr/seed_0" in text.split("\n\n")[3]
    assert "waiting for the first step" in text
    for columns in (40, 60, 80, 132):
        text = once(tmp_path / "five", columns=columns)
        assert all(cell_len(line) <= columns for line in text.splitlines())


def test_other_encodings_get_ascii(make_run, tmp_path, once):
    run = make_run(tmp_path / "rün→", "dapo", 0, done=12)
    text = once(run, encoding="ascii")
    assert "r?n->" in text
    assert "-> 0." in text
    assert set(text.split("entropy, nats")[1].splitlines()[0].split()[2]) <= set(ASCII)
    assert "r?n->" in once(run, encoding="latin-1")


def test_text_of_a_run_cannot_drive_the_terminal(tmp_path, once):
    writer = new_run(tmp_path / "a\x1b[31m\u202eb", method={"name": "\x1b[2J", "base": "\x1b[2J"})
    for step in range(1, 4):
        writer.metrics(row(step) | {"eval/\x1b]0;t\x07[red]x/pass@1": 0.5})
    text = once(writer.path)
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "a⟨001B⟩[31m⟨202E⟩b" in text
    assert "[red]x pass@1" in text


def test_kept_share_and_new_reasoning_are_shown_where_they_are(tmp_path, once):
    writer = new_run(tmp_path / "run")
    for step in range(1, 4):
        more = {"sharpening__n3": 0.1 * step, "discovery__n3": 0.9}
        writer.metrics(row(step, rollouts__generated=64.0, rollouts__kept=16.0 * step, **more))
    lines = {line[:16].strip(): line.split()[-3:-1] for line in once(writer.path).splitlines()}
    assert lines["kept"] == ["0.250", "0.750"]
    assert lines["sharpening, n 3"] == ["0.100", "0.300"]
    assert lines["discovery, n 3"] == ["0.900", "0.900"]
    writer = new_run(tmp_path / "other")
    writer.metrics(row(1))
    text = once(writer.path)
    assert not any(word in text for word in ("kept", "sharpening", "positive", "pass@", "last evaluation"))


def test_bad_input_is_one_line(tmp_path, capsys):
    for path, message in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "no run at or below")):
        assert main(["watch", str(path), "--once"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_silent_run_is_named(tmp_path, once):
    writer = new_run(tmp_path / "run")
    writer.metrics(row(1))
    past = time.time() - 3600
    os.utime(writer.path / "metrics.jsonl", (past, past))
    assert "no new row for 1:00:" in once(writer.path)
    for step in range(2, 21):
        writer.metrics(row(step))
    os.utime(writer.path / "metrics.jsonl", (past, past))
    assert "done" in once(writer.path)


# ---- a board over time ----


def test_a_board_follows_runs_that_come_grow_and_go(make_run, tmp_path):
    board = Board([tmp_path])
    board.update()
    assert board.runs == []
    writer = new_run(tmp_path / "a")
    board.update()  # nothing was there: it looks again at once
    assert [run.name for run in board.runs] == ["a"]
    for step in range(1, 12):
        writer.metrics(row(step, eval__id__pass_at=0.5) if step % 5 else row(step))
        board.update()
        assert board.runs[0].run.last_step == step
    assert board.runs[0].verdicts[0].name == "stalled"

    writer.rewind(4)
    writer.config(yaml.safe_dump({"method": {"name": "dapo"}, "steps": 99}))  # as --resume with more --steps does
    board.update()
    assert (board.runs[0].run.last_step, board.runs[0].steps) == (4, 99)
    assert [verdict.name for verdict in board.runs[0].verdicts] == ["too early"]

    shutil.rmtree(writer.path)
    board.update()
    assert board.runs == []
    make_run(tmp_path / "b", "psr", 0)
    make_run(tmp_path / "c", "psr", 1)
    board.update()
    assert [run.name for run in board.runs] == ["b", "c"]
    board.choose(1)
    board.choose(1)
    assert board.chosen == 1
    shutil.rmtree(tmp_path / "c")
    board.update()
    assert ([run.name for run in board.runs], board.chosen) == (["b"], 0)


# ---- in a terminal ----


class Terminal:
    """`polarity watch` under a pseudo-terminal of 80 columns."""

    def __init__(self, *paths: Path, rows: int = 40):
        self.ours, self.theirs = pty.openpty()
        termios.tcsetwinsize(self.theirs, (rows, 80))
        self.before = termios.tcgetattr(self.theirs)
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "polarity", "watch", *map(str, paths)],
            stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, start_new_session=True,
            env=environment | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        os.set_blocking(self.ours, False)
        self.text = ""

    def read(self) -> str:
        try:
            self.text += os.read(self.ours, 1 << 20).decode(errors="replace")
        except BlockingIOError:
            time.sleep(0.05)
        return self.text

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + 60
        while words not in self.read():
            assert time.monotonic() < deadline, self.text[-3000:]
            assert self.process.poll() is None, self.text[-3000:]

    def press(self, keys: str) -> None:
        self.text = ""
        os.write(self.ours, keys.encode())

    def end(self) -> int:
        for _ in range(200):
            if self.process.poll() is not None:
                break
            self.read()
        code = self.process.wait(1)
        after = termios.tcgetattr(self.theirs)
        assert after == self.before  # echo and lines are as they were
        os.close(self.ours)
        os.close(self.theirs)
        return code


@pytest.fixture
def terminal():
    opened = []

    def open_terminal(*paths: Path, **more: int) -> Terminal:
        opened.append(Terminal(*paths, **more))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.process.kill()


def test_a_live_frame_follows_the_run_and_q_ends_it(terminal, make_run, tmp_path):
    run = make_run(tmp_path / "run", "dapo", 0, done=5)
    shown = terminal(run)
    shown.wait_for("step 5 of 20")
    RunWriter(run).metrics(row(6))
    shown.wait_for("step 6 of 20")
    shutil.rmtree(run)
    shown.wait_for("waiting for a run")
    make_run(tmp_path / "run", "dapo", 0, done=7)
    shown.wait_for("step 7 of 20")
    shown.press("q")
    assert shown.end() == 0
    assert "Traceback" not in shown.text


def test_ctrl_c_ends_it_with_0_and_keys_choose_a_run(terminal, make_run, tmp_path):
    for i in range(9):
        make_run(tmp_path / f"run_{i}", "dapo", i, done=i + 1)
    shown = terminal(tmp_path, rows=24)
    shown.wait_for("run_0")
    shown.wait_for("9 runs; j and k choose, t hides the table, q quits")
    shown.wait_for("step 1 of 20")
    shown.press("j")
    shown.wait_for("step 2 of 20")
    shown.press("jjjjjjjjjj")
    shown.wait_for("step 9 of 20")
    shown.press("k")
    shown.wait_for("step 8 of 20")
    shown.press("t")
    shown.wait_for("t shows the table")
    assert "run_8" not in shown.text
    os.kill(shown.process.pid, signal.SIGINT)
    assert shown.end() == 0
    assert "Traceback" not in shown.text
