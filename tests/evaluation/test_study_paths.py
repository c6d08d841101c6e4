"""`polarity study paths` end to end: real tiny evaluations and a run of a world, and a judge that is a small server."""

import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_server import LocalServer

from polarity.analysis.paths import new_paths
from polarity.cli.studies import study
from polarity.config import load_config
from polarity.engines.embedded import train
from polarity.errors import UserError
from polarity.evaluation import Server, read_evaluation
from polarity.evaluation.judge import SAMPLING
from polarity.studies.evaluate import evaluate_model, grade_responses
from polarity.studies.paths import Judge, paths_lines, paths_table, study_paths
from polarity.worlds import resolve_world

TINY = {"evaluation.problems": 3, "threads": 1, "device": "cpu"}
RUN = {
    "method": "dapo", "world": "ledger", "base": "general-small", "steps": 2, "rollout.prompts": 2, "rollout.group": 4,
    "rollout.max_new_tokens": 60, "evaluation.max_new_tokens": 60, "evaluation.every": 1, "evaluation.problems": 3,
    "evaluation.samples": 4, "evaluation.final_samples": 6, "evaluation.splits": ["id", "long"], "threads": 1,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of `polarity eval`: base, other (another base), and one (one split of base); and a run."""
    folder, world = tmp_path_factory.mktemp("evaluations"), resolve_world("ledger")
    splits = {"evaluation.splits": ["id", "long"]}
    for name, base, samples, more in (
        ("base", "general-small", 6, splits),
        ("other", "distilled", 4, {**splits, "seed": 1}),
        ("one", "general-small", 8, {"evaluation.splits": ["id"], "seed": 2, "evaluation.temperature": 0.5}),
    ):
        evaluate_model(world.base_path(base), {**TINY, **more}, samples=samples, out=folder / name)
    train(load_config(None, RUN), folder / "run", progress=False)
    return {file.name: file for file in folder.iterdir()}


@pytest.fixture
def server() -> Iterator[LocalServer]:
    """Judges new what begins with a word of `fresh`."""
    made = LocalServer(lambda prompt, j: "None of them.\nVERDICT: " + ("NEW" if "fresh" in later(prompt) else "KNOWN"))
    yield made
    made.close()


def later(prompt: str) -> str:
    return re.findall(r"BEGIN LATER RESPONSE \w+\n(.*?)\nEND", prompt, re.DOTALL)[0]


def by_hand(initial: Path, later: Path, task: str, n: int) -> Any:
    """The numbers of two directories of `polarity eval`, from their verdicts."""
    sides = [read_evaluation(path)[1][task] for path in (initial, later)]
    strategies = [{p: [o.strategy for o in g.outcomes] for p, g in side.items()} for side in sides]
    correct = [{p: g.correct for p, g in side.items()} for side in sides]
    for column in (strategies[1], correct[1]):
        for p in column:
            column[p] = column[p][:n]
    return new_paths(*strategies, *correct)


def test_two_evaluations_by_strategy(worlds: dict[str, Path], tmp_path: Path):
    found = study_paths(worlds["base"], [worlds["other"]], out=tmp_path / "deep" / "paths.json")
    assert json.loads((tmp_path / "deep" / "paths.json").read_text()) == found
    assert (found["by"], found["judge"], found["notes"]) == ("strategy", None, [])
    (tasks,) = [entry["tasks"] for entry in found["later"]]
    assert list(tasks) == ["id", "long", "all"]
    for task in ("id", "long"):
        wanted = by_hand(worlds["base"], worlds["other"], task, 4)
        assert tasks[task]["any"]["share"] == wanted.any.share
        assert tasks[task]["correct"] == vars(wanted.correct)
        assert tasks[task]["found"] == wanted.found
        assert tasks[task]["rollouts"] == {"initial": 6, "later": 4}
    pooled = tasks["all"]["any"]
    assert pooled["problems"] == 6
    assert pooled["share"] == pytest.approx((tasks["id"]["any"]["share"] + tasks["long"]["any"]["share"]) / 2)
    assert pooled["chance"] == pytest.approx((tasks["id"]["any"]["chance"] + tasks["long"]["any"]["chance"]) / 2)
    heading, first, *_ = paths_table(found)
    assert heading[2:7] == ["problems", "responses", "new path", "95 % interval", "by chance"]
    assert first[1:5] == ["id", "3", "6 -> 4", f"{tasks['id']['any']['share']:.3f}"]
    assert len(heading) == len(first)


def test_several_later_ones_count_as_many_responses(worlds: dict[str, Path]):
    found = study_paths(worlds["base"], [worlds["one"], worlds["other"]])
    one, other = (entry["tasks"] for entry in found["later"])
    assert list(one) == ["id"]
    assert one["id"]["rollouts"] == other["id"]["rollouts"] == {"initial": 6, "later": 4}
    assert one["id"]["found"] == by_hand(worlds["base"], worlds["one"], "id", 4).found
    assert found["notes"] == [
        "later evaluations have 4 to 8 responses a problem; the first 4 of each count",
        f"temperature is 1.0 in {worlds['base']} and 0.5 in {worlds['one']}",
        "long is not in all of them and is left out where it is missing",
    ]


def test_an_evaluation_against_itself_shows_nothing_new(worlds: dict[str, Path]):
    found = study_paths(worlds["base"], [worlds["base"]])
    for numbers in found["later"][0]["tasks"].values():
        assert numbers["any"]["share"] == numbers["correct"]["share"] == 0.0
        assert numbers["found"] == {}
    assert "all sampled with seed 0" in found["notes"][0]


def test_a_run_by_strategy(worlds: dict[str, Path]):
    run = worlds["run"]
    found = study_paths(run, [])
    assert found["initial"] == f"{run}, step 0"
    assert [entry["name"] for entry in found["later"]] == [f"{run}, step 1", f"{run}, step 2"]
    assert study_paths(run, [run]) == found
    kept = {step: json.loads((run / f"evaluations/step_00000{step}.json").read_text())["samples"] for step in (0, 2)}
    for task in ("id", "long"):
        first, last = ({r["problem_id"]: r for r in kept[step][task]} for step in (0, 2))
        columns = [
            {p: r[key][:4] for p, r in side.items()} for key in ("strategies", "correct") for side in (first, last)
        ]
        wanted = new_paths(*columns)
        numbers = found["later"][1]["tasks"][task]
        assert numbers["rollouts"] == {"initial": 4, "later": 4}  # 6 at the end; the first 4 count
        assert numbers["any"] == vars(wanted.any)
        assert numbers["found"] == wanted.found
    files = [run / "evaluations" / f"step_00000{step}.json" for step in (0, 1)]
    alone = study_paths(files[0], files[1:])
    assert alone["later"][0]["tasks"] == found["later"][0]["tasks"]
    assert "keeps no full responses" in fails(run, [], judge=Judge(Server("http://127.0.0.1:9/v1", "m"), run / "c"))


def graded(path: Path, responses: dict[str, list[str]]) -> Path:
    """A directory of `polarity eval` from texts; the correct ones end with #### 1."""
    data, made = path.with_name("data.jsonl"), path.with_suffix(".jsonl")
    data.write_text("".join(json.dumps({"id": p, "problem": f"what is {p}?", "answer": "1"}) + "\n" for p in responses))
    made.write_text("".join(json.dumps({"id": p, "responses": r}) + "\n" for p, r in responses.items()))
    grade_responses(made, {"data.verifier": "exact"}, data=data, out=path)
    return path


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """b finds a fresh path that is wrong, c one that is right; d is at first only."""
    first = graded(tmp_path / "first", {p: ["old way #### 1", "older way #### 2"] for p in "abcd"})
    after = {
        "a": ["mum old way #### 1", "same #### 1"],
        "b": ["fresh mum, wrong #### 2", "old way #### 1"],
        "c": ["old #### 2", "fresh and right #### 1"],
    }
    return first, graded(tmp_path / "after", after)


def test_texts_by_a_judge(texts: tuple[Path, Path], server: LocalServer, tmp_path: Path, capsys: Any):
    out = tmp_path / "paths.json"
    command = ["paths", *map(str, texts), "--server", server.url, "--judge", "m", "--repeats", "3", "--out", str(out)]
    assert study(command) == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(out.read_text())
    numbers = found["later"][0]["tasks"]["data"]
    assert numbers["any"]["share"] == pytest.approx(2 / 3)
    assert numbers["correct"]["share"] == pytest.approx(1 / 3)
    assert numbers["found"] == {"b": [1], "c": [2]}
    assert (numbers["left_out"], numbers["undecided"]) == (1, 0)
    assert found["judge"] | {"asked": 0} == {
        "model": "m", "questions": 6, "repeats": 3, "replies": 18, "asked": 0, "unparsed": 0, "shortened": 0,
        "characters": 60_000, "agreement": {"items": 6, "percent": 100.0, "kappa": 1.0},
    }  # fmt: skip
    assert printed[1].split()[1:] == ["data", "3", "2", "->", "2", "0.667", "0.000-1.000", "0.333", "0.000-1.000"]
    assert printed[2].startswith("note: the judge agrees with itself in 100.0 % of pairs of verdicts, kappa 1.00")
    assert f"note: {texts[1]}, data: 1 problems cannot be compared and are left out" in printed
    assert len(server.requests) == 18
    assert all(r["max_tokens"] == SAMPLING.max_new_tokens for r in server.requests)
    assert study(command) == 0
    assert len(server.requests) == 18
    assert len((tmp_path / "paths.json.judge.jsonl").read_text().splitlines()) == 18


def test_a_judge_who_does_not_say(texts: tuple[Path, Path], server: LocalServer, tmp_path: Path):
    """No verdict on one response: its problem is left out where nothing else is new, and counts where something is."""

    def silent(prompt: str, j: int) -> str:
        if "mum" in later(prompt):
            return "who knows"
        return "VERDICT: " + ("NEW" if "fresh" in later(prompt) else "KNOWN")

    server.reply = silent
    judge = Judge(Server(server.url, "m", chat=True), tmp_path / "c", repeats=2, characters=54)
    found = study_paths(texts[0], [texts[1]], judge=judge)
    numbers = found["later"][0]["tasks"]["data"]
    assert numbers["undecided"] == 2
    assert (numbers["any"]["problems"], numbers["any"]["share"]) == (1, 1.0)
    assert numbers["correct"]["problems"] == 2  # b's response without a verdict is wrong
    assert numbers["correct"]["share"] == 0.5
    assert found["judge"]["unparsed"] == 4
    lines = paths_lines(found)
    assert lines[1] == "4 of 12 replies hold no verdict and do not count"
    assert lines[2].startswith("2 of 6 questions were judged with the middle of a text left out; raise --characters")
    assert lines[4].endswith("data: 2 problems without a majority of verdicts are left out")
    server.reply = lambda prompt, j: "who knows"
    nothing = study_paths(texts[0], [texts[1]], judge=Judge(Server(server.url, "other", chat=True), tmp_path / "c"))
    assert nothing["later"][0]["tasks"]["data"]["any"] is None
    assert nothing["judge"]["agreement"] is None
    assert paths_table(nothing)[1][2:] == ["0", "2 -> 2", "-", "-", "-", "-"]


def test_a_server_that_fails_is_gone_on_with(texts: tuple[Path, Path], server: LocalServer, tmp_path: Path):
    client = Server(server.url, "m", chat=True, concurrency=1, backoff=0.001, retries=1)
    judge = Judge(client, tmp_path / "c", repeats=2)
    whole = study_paths(texts[0], [texts[1]], judge=Judge(client, tmp_path / "whole", repeats=2))
    answer, made = server.reply, iter(range(99))

    def tired(prompt: str, j: int) -> str:
        if next(made) == 5:
            server.fail = [500] * 99
        return answer(prompt, j)

    server.reply = tired
    assert "HTTP 500" in fails(texts[0], [texts[1]], judge=judge)
    server.fail = []
    assert len((tmp_path / "c").read_text().splitlines()) == 6
    assert study_paths(texts[0], [texts[1]], judge=judge)["later"] == whole["later"]


def fails(initial: Path, later: list[Path], **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        study_paths(initial, later, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_compared(worlds: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path):
    first, after = texts
    assert "the verifier named no strategies, now or at first; a judge can read texts" in fails(first, [after])
    assert "have no problem in common" in fails(first, [worlds["base"]])
    assert "give what is compared with it" in fails(first, [])
    assert "is no evaluation" in fails(tmp_path, [first])
    assert "is no evaluation" in fails(first, [tmp_path / "nowhere"])
    (tmp_path / "odd.json").write_text('{"samples": []}')
    assert "odd.json is not an evaluation of a run" in fails(tmp_path / "odd.json", [first])
    (tmp_path / "odd.json").write_text("{")
    assert "odd.json is not an evaluation of a run" in fails(tmp_path / "odd.json", [first])
    other = graded(tmp_path / "renamed", {"a": ["x"]})
    (samples,) = other.glob("samples_*")
    samples.write_text(samples.read_text().replace("what is a?", "who is a?"))
    assert "problem 'a' of" in fails(first, [other])
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_text("steps: 1\n")
    assert "has no evaluation before training" in fails(tmp_path / "young", [])
    assert "has no evaluation after step 0 yet" in fails(worlds["run"], [tmp_path / "young"])
    assert "cannot be written" in fails(worlds["base"], [worlds["other"]], out=tmp_path)


def test_the_command_line(worlds: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    assert study(["paths", str(worlds["run"]), "--out", str(tmp_path / "p.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["later", "task", "problems", "responses"]
    assert lines[-1] == f"numbers: {tmp_path / 'p.json'}"
    assert study([]) == study(["--help"]) == 0
    assert "usage: polarity study paths" in capsys.readouterr().out
    for name in ("paths", "gradients"):
        with pytest.raises(SystemExit):
            study([name, "--help"])
        text = capsys.readouterr().out
        assert "examples:\n  polarity study" in text
        assert all(len(line) < 140 for line in text.splitlines())
    for words, said in (
        (["path"], "did you mean 'paths'"),
        (["paths", "a", "b", "--server", "http://x/v1"], "go together"),
        (["paths", "a", "b", "--judge", "m"], "go together"),
        (["paths", "a", "b", "--repeats", "2"], "--repeats and --characters are for a judge"),
        (["paths", "a", "b", "--server", "http://x/v1", "--judge", "m"], "add --out FILE.json"),
        (["paths", "a", "b", "--repeats", "0"], "whole number of 1 or more"),
        (["paths", "a", "b", "--repeat", "2"], "did you mean '--repeats'"),
        (["paths", str(tmp_path / "none")], "give what is compared"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            study(words)
    asked: list[Any] = []
    stand_in = types.ModuleType("polarity.studies.gradients")
    stand_in.study_gradients = lambda run, step, out: asked.append((run, step, out)) or "table"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "polarity.studies.gradients", stand_in)
    assert study(["gradients", "runs/a", "--step", "5"]) == 0
    assert asked == [(Path("runs/a"), 5, None)]
    assert capsys.readouterr().out == "table\n"
