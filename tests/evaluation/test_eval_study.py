"""What `polarity eval` calls: a model, a server and a file of responses on worlds, files and benchmarks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_server import LocalServer

from polarity.errors import UserError
from polarity.evaluation import Server, compare_evaluations
from polarity.studies.evaluate import (
    comparison_table,
    evaluate_model,
    evaluate_server,
    grade_responses,
    result_table,
)
from polarity.worlds import resolve_world

TINY = {"evaluation.problems": 3, "evaluation.splits": ["id", "long"], "threads": 1, "device": "cpu"}
ROWS = [{"id": f"q{i}", "problem": f"{i} + 0 = ?", "answer": str(i), "level": i % 2} for i in range(6)]


@pytest.fixture
def base() -> Path:
    return resolve_world("ledger").base_path("general-small")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "template.txt").write_text("Q: {problem} A:\n")
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def server() -> Iterator[LocalServer]:
    """Right on even problems; the third choice of each call is cut off."""
    made = LocalServer(lambda prompt, j: "CUT" if j == 2 else f"#### {int(prompt.split()[1]) // 2 * 2}")
    yield made
    made.close()


def ask(server: LocalServer, data: Path, out: Path | None = None, **settings: Any) -> dict[str, Any]:
    overrides = {
        "data.template": str(data.with_name("template.txt")),
        "data.verifier": "exact",
        "evaluation.max_new_tokens": 40,
    }
    given = {"samples": 4, "data": data, "out": out, **settings}
    return evaluate_server(Server(server.url, "m", concurrency=1, backoff=0.001, retries=1), overrides, **given)


def test_a_model_on_a_worlds_splits_and_again(base: Path, tmp_path: Path):
    found = evaluate_model(base, TINY, samples=4, out=tmp_path / "e")
    assert list(found["results"]) == ["id", "long"]
    assert found["settings"]["id.verifier"] == "world ledger"
    heading, first, *_ = result_table(found)
    assert heading[:5] == ["task", "problems", "samples", "pass@1", "95 % interval"]
    assert first[:3] == ["id", "3", "4"]
    assert evaluate_model(base, TINY, samples=4, out=tmp_path / "e") == found
    assert evaluate_model(base, TINY, samples=4)["tasks"] == found["tasks"]  # seeded
    with pytest.raises(UserError, match=r"evaluation with seed = 0, not 1"):
        evaluate_model(base, {**TINY, "seed": 1}, samples=4, out=tmp_path / "e")


def test_a_stopped_evaluation_of_a_model_ends_with_the_same_numbers(base: Path, tmp_path: Path):
    """Problems are sampled two at a time; after a stop the rest are the same as without one."""
    settings = {**TINY, "evaluation.problems": 5, "evaluation.splits": ["id"], "rollout.batch_rows": 8}
    whole = evaluate_model(base, settings, samples=4, out=tmp_path / "whole")
    (file,) = (tmp_path / "whole").glob("samples_*")
    (results,) = (tmp_path / "whole").glob("results_*")
    text = file.read_text(encoding="utf-8")
    results.unlink()
    file.write_text("".join(text.splitlines(keepends=True)[:2]) + '{"doc_id": 2, "do', encoding="utf-8")
    assert evaluate_model(base, settings, samples=4, out=tmp_path / "whole")["tasks"] == whole["tasks"]
    assert file.read_text(encoding="utf-8") == text


def test_the_protocol_sets_what_is_not_set_by_hand(base: Path):
    settings = evaluate_model(base, TINY, protocol="greedy")["settings"]
    assert (settings["samples"], settings["temperature"], settings["top_p"]) == (1, 0.0, 1.0)
    settings = evaluate_model(base, {**TINY, "evaluation.temperature": 0.9}, protocol="a3po", samples=2)["settings"]
    assert (settings["samples"], settings["temperature"], settings["top_p"]) == (2, 0.9, 0.95)
    with pytest.raises(UserError, match="unknown protocol"):
        evaluate_model(base, TINY, protocol="a3")


def test_a_server_on_a_file(server: LocalServer, data: Path, tmp_path: Path):
    found = ask(server, data, tmp_path / "e", protocol="nsr_qwen3")
    means = found["results"]["sums"]
    assert means["pass@1"] == pytest.approx(0.5 * 0.75)
    assert means["pass@4"] == 0.5
    assert means["truncated"] == 0.25
    assert "entropy" not in means
    assert means["length"] == pytest.approx(4.5)
    assert server.requests[0]["prompt"].startswith("Q: ")
    assert server.requests[0]["top_k"] == 20
    assert found["tasks"]["sums"]["levels"]["0"]["accuracy"] == pytest.approx(0.75)
    assert result_table(found)[1][0] == "sums"
    asked = len(server.requests)
    assert ask(server, data, tmp_path / "e", protocol="nsr_qwen3") == found
    assert len(server.requests) == asked


def test_a_server_that_fails_is_gone_on_with(server: LocalServer, data: Path, tmp_path: Path):
    whole = ask(server, data)
    server.broken = "Q: 4"
    with pytest.raises(UserError, match="HTTP 500: broken"):
        ask(server, data, tmp_path / "e")
    (file,) = (tmp_path / "e").glob("samples_*")
    assert [json.loads(line)["problem_id"] for line in file.read_text().splitlines()] == ["q0", "q1", "q2", "q3"]
    server.broken = ""
    server.requests.clear()
    assert ask(server, data, tmp_path / "e")["tasks"] == whole["tasks"]
    # A set: the first evaluation's last call may still have been under way.
    assert {r["prompt"] for r in server.requests} == {"Q: 4 + 0 = ? A:", "Q: 5 + 0 = ? A:"}


def test_a_server_needs_a_response_limit(data: Path):
    with pytest.raises(UserError, match=r"needs a response limit in tokens; add --evaluation.max_new_tokens"):
        evaluate_server(Server("http://127.0.0.1:9/v1", "m"), {}, data=data, protocol="a3po")


def test_a_benchmark_brings_template_and_verifier(server: LocalServer, tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    overrides = {"data.verifier": "exact"}
    client = Server(server.url, "m", backoff=0.001, retries=1)
    server.reply = lambda prompt, j: "#### 1"
    found = evaluate_server(client, overrides, samples=1, protocol="nsr", benchmarks=[f"amc23={path}"])
    assert list(found["results"]) == ["amc23"]
    assert server.requests[0]["prompt"].startswith("<|im_start|>system")
    assert server.requests[0]["max_tokens"] == 4096
    assert found["settings"]["amc23.verifier"] == "exact"


def test_responses_are_graded(data: Path, tmp_path: Path):
    responses = tmp_path / "made.jsonl"
    responses.write_text(
        "".join(json.dumps({"id": r["id"], "responses": ["#### 2", f"#### {r['answer']}"]}) + "\n" for r in ROWS[:4])
    )
    exact = {"data.verifier": "exact"}
    found = grade_responses(responses, exact, data=data, out=tmp_path / "e")
    assert found["results"]["sums"]["pass@1"] == pytest.approx((1 + 3 * 0.5) / 4)
    assert found["notes"] == ["2 of 6 problems have no response and are left out"]
    assert found["settings"]["model"] == str(responses)
    assert grade_responses(responses, exact, data=data, out=tmp_path / "e") == found
    responses.write_text(responses.read_text().replace("#### 2", "#### 3"))
    with pytest.raises(UserError, match="holds an evaluation with responses = "):
        grade_responses(responses, exact, data=data, out=tmp_path / "e")
    with pytest.raises(UserError, match="one benchmark or one data file"):
        grade_responses(responses, exact, data=data, benchmarks=["aime24"])


def test_our_own_samples_are_graded_again_with_the_same_verdicts(server: LocalServer, data: Path, tmp_path: Path):
    made = ask(server, data, tmp_path / "e")
    (file,) = (tmp_path / "e").glob("samples_*")
    again = grade_responses(file, {"data.verifier": "exact"}, out=tmp_path / "again")
    before, after = made["results"]["sums"], again["results"][file.stem]
    assert {k: v for k, v in before.items() if k != "length"} == after  # lengths are not read from a file
    found = compare_evaluations(tmp_path / "e", tmp_path / "e")
    table = comparison_table(found)
    assert table[0][0] == "task"
    assert table[1][:5] == ["sums", "accuracy", "0.375", "0.375", "+0.000"]
