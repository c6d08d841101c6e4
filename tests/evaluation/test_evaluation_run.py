"""Whole evaluations: what is written, what is counted, and going on after a stop or a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from polarity.data import Row
from polarity.errors import UserError
from polarity.evaluation import PROTOCOLS, Generation, Task, in_batches, measure, resolve_protocol, run_evaluation
from polarity.evaluation.metrics import Graded, level_of
from polarity.evaluation.run import read_evaluation
from polarity.rewards import Outcome, exact
from polarity.seeds import seed_for

ROWS = [{"id": f"p{i}", "problem": f"{{{i}}}?", "answer": str(i % 4), "level": f"Level {1 + i % 3}"} for i in range(12)]
SETTINGS = {"model": "toy", "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 50, "seed": 0}


def task(rows: Sequence[Row] = ROWS, name: str = "toy", verifier: Any = exact) -> Task:
    return Task(name, rows, verifier, "exact", "Q: {problem}")


class Sampler:
    """A seeded guess at each problem: sometimes nothing, sometimes cut off. Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, rows: Sequence[Row], samples: int, split: str) -> list[Generation]:
        made = []
        for row in rows:
            self.asked.append(row["id"])
            for j in range(samples):
                draw = seed_for(split, row["id"], j) % 7
                text = "" if draw == 6 else f"so #### {draw % 5}"
                made.append(Generation(text, 3.0 + draw, 0.1 * draw, draw == 5))
        return made


def run(
    out: Path | None, sampler: Sampler | None = None, samples: int = 8, rows: Sequence[Row] = ROWS, **settings: Any
):
    stream = in_batches(sampler or Sampler(), 2)
    return run_evaluation([task(rows)], stream, samples, {**SETTINGS, **settings}, model="toy", out=out)


def lines(out: Path) -> list[dict[str, Any]]:
    (file,) = out.glob("samples_toy_*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def test_protocols_are_the_papers():
    a3po, nsr, qwen3, greedy = (PROTOCOLS[name] for name in ("a3po", "nsr", "nsr_qwen3", "greedy"))
    assert (a3po.samples, a3po.temperature, a3po.top_p, a3po.top_k) == (32, 0.6, 0.95, None)
    assert (nsr.samples, nsr.temperature, nsr.top_p, nsr.top_k, nsr.max_new_tokens) == (256, 0.6, 0.95, None, 4096)
    assert (qwen3.samples, qwen3.temperature, qwen3.top_p, qwen3.top_k) == (64, 0.7, 0.8, 20)
    assert (greedy.samples, greedy.temperature) == (1, 0.0)
    with pytest.raises(UserError, match="did you mean 'nsr_qwen3'"):
        resolve_protocol("nsr_qwen")


def test_metrics_by_hand():
    """Two problems, four responses each: 1 and 2 correct."""
    said = {"a": ["1", "2", "2", None], "b": ["3", "3", "4", "4"]}
    gold = {"a": "1", "b": "3"}
    problems = []
    for name, answers in said.items():
        outcomes = [
            Outcome(False, "unparsed", 0.0)
            if a is None
            else Outcome(a == gold[name], "correct" if a == gold[name] else "wrong", 0.0, extracted=a)
            for a in answers
        ]
        made = [Generation("", 10.0 * (i + 1), 0.5, i == 3) for i in range(4)]
        problems.append(Graded(name, "5" if name == "a" else "10", made, outcomes))
    found = measure(problems)
    means = found["means"]
    assert means["avg@4"] == means["pass@1"] == pytest.approx(3 / 8)
    assert means["pass@2"] == pytest.approx(((1 - 3 / 6) + (1 - 1 / 6)) / 2)
    assert means["pass@4"] == 1.0
    assert means["maj@4"] == pytest.approx((0 + 0.5) / 2)  # 2 wins the vote on a; b is a tie
    assert means["biased_best@4"] == pytest.approx(((1 - 0.75**4) + (1 - 0.5**4)) / 2)
    assert (means["truncated"], means["unparsed"], means["timeout"]) == (0.25, 0.125, 0.0)
    assert (means["length"], means["entropy"]) == (25.0, pytest.approx(0.5))
    assert found["stderr"]["avg@4"] == pytest.approx(0.125)
    assert found["intervals"]["avg@4"] == [0.25, 0.5]
    assert list(found["levels"]) == ["5", "10"]  # as numbers
    assert found["levels"]["10"] == {"problems": 1, "accuracy": 0.5, "low": 0.5, "high": 0.5}
    assert (found["problems"], found["samples"]) == (2, 4)


def test_what_is_not_known_is_left_out():
    yes = Outcome(True, "correct", 1.0)
    made = [Generation("", None, None, None)] * 4
    means = measure([Graded("a", None, made, [yes] * 4)])["means"]
    assert {"length", "entropy", "truncated", "maj@4"} & means.keys() == set()
    assert means["pass@4"] == 1.0


def test_problems_with_different_numbers_of_responses():
    yes, no = Outcome(True, "correct", 1.0), Outcome(False, "wrong", 0.0)
    made = [Generation("", None, None, None)] * 4
    found = measure([Graded("a", None, made, [yes, no, no, no]), Graded("b", None, made[:2], [yes, no])])
    assert found["samples"] == [2, 4]
    assert found["means"]["avg@2"] == pytest.approx((0.25 + 0.5) / 2)
    assert found["means"]["pass@2"] == pytest.approx((0.5 + 1) / 2)
    assert "pass@4" not in found["means"]


def test_levels():
    assert [level_of(row) for row in ({"level": "Level 3"}, {"level": 3}, {"difficulty": "hard"}, {})] == [
        *("3", "3", "hard", None)
    ]


def test_an_evaluation_and_its_files(tmp_path: Path):
    found = run(tmp_path / "e")
    assert found["directory"] == str(tmp_path / "e")
    assert found["results"]["toy"]["pass@8"] >= found["results"]["toy"]["pass@1"] > 0
    assert list(found["tasks"]["toy"]["levels"]) == ["1", "2", "3"]
    line = lines(tmp_path / "e")[3]
    assert (line["doc_id"], line["doc"], line["target"]) == (3, ROWS[3], "3")
    assert line["arguments"]["gen_args_0"]["arg_0"] == "Q: {3}?"
    assert len(line["resps"][0]) == len(line["correct"]) == 8
    settings, verdicts = read_evaluation(tmp_path / "e")
    assert settings["samples"] == 8
    assert list(verdicts["toy"]) == [row["id"] for row in ROWS]
    assert measure(list(verdicts["toy"].values())) == found["tasks"]["toy"]


def test_an_evaluation_without_a_directory_and_one_into_a_single_file(tmp_path: Path):
    kept = run(tmp_path / "e")
    assert run(None)["tasks"] == kept["tasks"]
    assert run(tmp_path / "sub" / "found.json")["tasks"] == kept["tasks"]
    assert json.loads((tmp_path / "sub" / "found.json").read_text())["results"]["toy"]["sample_len"] == 12
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["found.json"]


def test_a_finished_evaluation_is_read_and_not_made_again(tmp_path: Path):
    first, again = run(tmp_path / "e"), Sampler()
    assert run(tmp_path / "e", again) == first
    assert again.asked == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 1.0}, "temperature = 0.6, not 1.0"),
        ({"samples": 4}, "samples = 8, not 4"),
        ({"top_k": 20}, "top_k = None, not 20"),
        ({"rows": [*ROWS[:-1], {**ROWS[-1], "answer": "9"}]}, "toy.problems = '12 problems, "),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path: Path, change: dict[str, Any], said: str):
    run(tmp_path / "e")
    before = {p.name: p.read_bytes() for p in (tmp_path / "e").iterdir()}
    with pytest.raises(UserError) as caught:
        run(tmp_path / "e", **change)
    assert f"holds an evaluation with {said}" in str(caught.value)
    assert {p.name: p.read_bytes() for p in (tmp_path / "e").iterdir()} == before


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else than an evaluation"):
        run(tmp_path)
    with pytest.raises(UserError, match="something else than an evaluation"):
        run(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"is not an evaluation \(it has no evaluation.json\)"):
        read_evaluation(tmp_path)


def test_stopped_in_the_middle_it_goes_on(tmp_path: Path):
    class Stops(Sampler):
        def __call__(self, rows: Sequence[Row], samples: int, split: str) -> list[Generation]:
            if len(self.asked) == 6:
                raise KeyboardInterrupt
            return super().__call__(rows, samples, split)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "e", Stops())
    assert len(lines(tmp_path / "e")) == 6
    assert len(read_evaluation(tmp_path / "e")[1]["toy"]) == 6  # a stopped one can be read
    rest = Sampler()
    assert run(tmp_path / "e", rest)["tasks"] == whole["tasks"]
    assert rest.asked == [f"p{i}" for i in range(6, 12)]
    assert lines(tmp_path / "e") == lines(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_half_of_a_last_line_is_done_again(tmp_path: Path, cut: int):
    whole = run(tmp_path / "e")
    expected = lines(tmp_path / "e")
    (file,) = (tmp_path / "e").glob("samples_*")
    (results,) = (tmp_path / "e").glob("results_*")
    results.unlink()
    file.write_bytes(file.read_bytes()[:-cut])
    assert len(read_evaluation(tmp_path / "e")[1]["toy"]) == 11
    assert file.read_bytes()[-1:] != b"\n"  # reading mends nothing
    again = Sampler()
    assert run(tmp_path / "e", again)["tasks"] == whole["tasks"]
    assert again.asked == ["p11"]
    assert lines(tmp_path / "e") == expected


def test_a_damaged_line_is_named(tmp_path: Path):
    run(tmp_path / "e")
    (file,) = (tmp_path / "e").glob("samples_*")
    next((tmp_path / "e").glob("results_*")).unlink()
    text = file.read_text().split("\n")
    file.write_text("\n".join([text[0], text[1][:50], *text[2:]]))
    with pytest.raises(UserError, match=r"line 2 is damaged"):
        run(tmp_path / "e")


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_evaluation_run import Sampler, run

class Slow(Sampler):
    def __call__(self, rows, samples, split):
        time.sleep(0.05)
        return super().__call__(rows, samples, split)

run(Path({out!r}), Slow())
"""


def test_a_killed_process_loses_nothing_that_was_finished(tmp_path: Path):
    whole, out = run(tmp_path / "whole"), tmp_path / "e"
    code = SLOW.format(folder=str(Path(__file__).parent), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    deadline = time.monotonic() + 60
    while not (out.exists() and any(f.stat().st_size for f in out.glob("samples_*"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(out.glob("results_*"))
    done = len(lines(out))
    assert 0 < done < 12
    rest = Sampler()
    assert run(out, rest)["tasks"] == whole["tasks"]
    assert rest.asked == [f"p{i}" for i in range(done, 12)]
    assert lines(out) == lines(tmp_path / "whole")


def test_a_verifier_that_always_fails_leaves_nothing_behind(tmp_path: Path):
    def broken(response: str, gold: str, row: Any = None) -> bool:
        raise ZeroDivisionError("oh")

    def broken_at_first(response: str, gold: str, row: Any = None) -> bool:
        return 1 // (row["id"] not in ("p0", "p1")) == 1

    for samples in (1, 100):
        with pytest.raises(UserError, match="failed on every response, with ZeroDivisionError"):
            run_evaluation(
                [task(verifier=broken)], in_batches(Sampler(), 2), samples, SETTINGS, model="toy", out=tmp_path / "e"
            )
        assert [p.name for p in (tmp_path / "e").iterdir()] == ["evaluation.json"]
        (tmp_path / "e" / "evaluation.json").unlink()
    found = run_evaluation([task(verifier=broken_at_first)], in_batches(Sampler(), 2), 1, SETTINGS, model="toy")
    assert found["results"]["toy"]["error"] == pytest.approx(2 / 12)


def test_odd_texts_survive_the_files(tmp_path: Path):
    odd = "a\u2028b\x00c\ud800d\r\n#### 1"
    stream = in_batches(lambda rows, n, split: [Generation(odd, 1.0, 0.0, False)] * (n * len(rows)), 5)
    out = tmp_path / "e"
    run_evaluation([task()], stream, 1, SETTINGS, model="toy", out=out)
    assert {line["resps"][0][0] for line in lines(out)} == {odd}


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(UserError, match="same name"):
        run_evaluation([task(name="a/b"), task(name="a_b")], in_batches(Sampler(), 2), 1, SETTINGS, model="toy")


def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture[str]):
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == "1.0 [1.0, 1.0]\n"


def test_every_metric_is_documented(tmp_path: Path):
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = [line for line in text.split("## Metrics")[1].split("**By")[0].splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}
    written = {re.sub(r"@\d+", "@k", name) for name in run(None)["results"]["toy"]}
    assert {name.replace("avg@k", "avg@n") for name in written} == documented - {"distinct_strategies", "strategies"}
