"""The command line: what it prints, what it passes on, and that bad input is one line and loses nothing."""

import json
import subprocess
import sys

import pytest
import yaml

from polarity.cli import COMMANDS, main

TINY = [
    "--steps", "1", "--rollout.prompts", "2", "--rollout.group", "4", "--rollout.max_new_tokens", "16",
    "--evaluation.every", "0",
]  # fmt: skip


def fails(capsys, *arguments):
    """Run, expect exit code 2 and one line on stderr; return that line."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_overview_needs_no_pytorch():
    code = "import sys; from polarity.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {name}" in done.stdout for name in COMMANDS)


SPLIT = {"data": ("data check", "data filter"), "study": ("study paths", "study gradients")}  # into sub-commands
COMMAND_NAMES = [
    *(name for name in COMMANDS if name not in SPLIT),
    *(name for names in SPLIT.values() for name in names),
]


@pytest.mark.parametrize("command", COMMAND_NAMES)
def test_every_command_has_help_with_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:\n  polarity" in text
    assert all(len(line) < 140 for line in text.splitlines())


def test_help_all_shows_every_key(capsys):
    from polarity.config import options

    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    text = capsys.readouterr().out
    assert all(f"--{key} VALUE" in text for key in options())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "did you mean 'train'"),
        (["train"], "no method given"),
        (["train", "--method", "a3p"], "did you mean 'a3po'"),
        (["train", "--method", "a3po", "--world", "leger"], "did you mean 'ledger'"),
        (["train", "--method", "a3po", "--rollout.promts", "4"], "did you mean '--rollout.prompts'"),
        (["train", "--method", "a3po", "--overwite"], "did you mean '--overwrite'"),
        (["train", "--method", "a3po", "--method.shaping.positve.ratio", "0.1"], "positve"),
        (["train", "--method", "a3po", "--steps"], "expected one argument"),
        (["train", "--method", "a3po", "--steps", "many"], "steps"),
        (["train", "--method", "a3po", "--steps", "0"], "steps"),
        (["train", "--method", "a3po", "--model", "nowhere/model"], "nowhere/model"),
        (["train", "--method", "a3po", "--rollout.group", "1"], "rollout.group is 1"),
        (["train", "--method", "a3po", "--update.mini_batch_prompts", "5"], "does not divide"),
        (["train", "--method", "dapo", "--data.train", "nowhere.jsonl", "--model", "."], "nowhere.jsonl"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--resume", "--overwrite"], "not allowed with"),
        (["compare", "--methods", "dapo", "--out", "x", "--seeds", "one"], "--seeds 0,1,2"),
        (["compare", "--methods", "dapo", "--out", "x", "--method", "dapo"], "--methods"),
        (["compare", "--methods", "dapo,a3p", "--out", "x"], "did you mean 'a3po'"),
        (["compare", "--methods", "dapo", "--out", "x", "--jobs", "0"], "whole number"),
        (["compare", "--methods", "dapo", "--out", "x", "--resume"], "no comparison in x"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["eval", "nowhere"], "neither a run nor a model"),
        (["methods", "dappo"], "did you mean 'dapo'"),
        (["worlds", "show", "leger"], "did you mean 'ledger'"),
        (["worlds", "build"], "which world"),
        (["worlds", "build", "ledger", "--base", "generl"], "did you mean 'general'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(here, capsys, arguments, message):
    assert message in fails(capsys, *arguments)
    assert list(here.iterdir()) == []


def test_malformed_yaml_names_the_line(here, capsys):
    (here / "run.yaml").write_text("method: a3po\nsteps: [1\n")
    assert "run.yaml line" in fails(capsys, "train", "run.yaml")


@pytest.mark.parametrize(
    ("text", "message"), [("", "no problems"), ('{"problem": "1+1", "answer": "2"}\n{"problem": "1+2"}\n', "2")]
)
def test_bad_data_names_the_row(here, capsys, text, message):
    (here / "rows.jsonl").write_text(text)
    from polarity.worlds import resolve_world

    base = resolve_world("ledger").base_path("general")
    line = fails(capsys, "train", "--method", "dapo", "--data.train", "rows.jsonl", "--model", str(base))
    assert "rows.jsonl" in line
    assert message in line


def test_a_run_is_made_reported_evaluated_and_never_overwritten_unasked(here, capsys):
    assert main(["train", "--method", "a3po", "--method.shaping.positive.ratio", "0.1", *TINY, "--out", "run"]) == 0
    assert str(here / "run" / "report.html") in capsys.readouterr().out
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert config["method"]["shaping"]["positive"]["ratio"] == 0.1
    assert config["rollout"]["prompts"] == 2

    before = (here / "run" / "metrics.jsonl").read_bytes()
    assert "--overwrite" in fails(capsys, "train", "--method", "dapo", *TINY, "--out", "run")
    assert (here / "run" / "metrics.jsonl").read_bytes() == before

    chosen = ["--split", "id,long", "--evaluation.problems", "2", "--samples", "2", "--out", "found.json"]
    assert main(["eval", "run", *chosen]) == 0
    assert "pass@1" in capsys.readouterr().out
    assert set(json.loads((here / "found.json").read_text())["results"]) == {"id", "long"}

    assert main(["report", "run", "--out", "page.html"]) == 0
    assert (here / "page.html").exists()


def test_evaluations_are_kept_gone_on_with_and_compared(here, capsys):
    assert main(["train", "--method", "dapo", *TINY, "--out", "run"]) == 0
    chosen = ["--split", "id", "--evaluation.problems", "4", "--protocol", "a3po"]
    assert main(["eval", "run", *chosen, "--samples", "4", "--out", "a"]) == 0
    assert str(here / "a") in capsys.readouterr().out
    assert main(["eval", "run", *chosen, "--samples", "4", "--seed", "1", "--out", "b", "--compare", "a"]) == 0
    assert "p (permutation)" in capsys.readouterr().out
    assert "samples = 4, not 8" in fails(capsys, "eval", "run", *chosen, "--samples", "8", "--out", "a")
    assert "add --out DIR" in fails(capsys, "eval", "run", *chosen, "--samples", "4", "--compare", "a")


def test_responses_made_elsewhere_are_graded(here, capsys):
    rows = [{"id": "a", "response": "#### 2", "answer": "2"}, {"id": "b", "responses": ["#### 3"], "answer": "2"}]
    (here / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["eval", "--responses", "made.jsonl", "--data.verifier", "exact"]) == 0
    assert "0.500" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of MODEL_OR_RUN, --server URL --model NAME, and --responses"),
        (["x", "--responses", "y"], "give one of MODEL_OR_RUN"),
        (["--server", "http://127.0.0.1:9/v1"], "--server URL and --model NAME go together"),
        (["--server", "http://127.0.0.1:9/v1", "--model", "m"], "add --evaluation.max_new_tokens"),
    ],
)
def test_what_eval_needs_is_said(capsys, arguments, said):
    assert said in fails(capsys, "eval", *arguments)


def test_a_model_directory_is_evaluated_on_a_file(here, capsys):
    from polarity.worlds import resolve_world

    world = resolve_world("ledger")
    rows = [{"id": row["id"], "problem": row["problem"], "answer": row["answer"]} for row in world.problems("id", 2)]
    (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = str(world.base_path("general"))
    assert main(["eval", base, "--data", "mine.jsonl", "--samples", "2", "--evaluation.max_new_tokens", "8"]) == 0
    assert "mine" in capsys.readouterr().out


def test_methods_and_worlds_are_listed(capsys):
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in listed for name in ("grpo", "dapo", "psr", "nsr", "a3po"))
    assert main(["methods", "a3po"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["shaping"]["positive"]["ratio"] == 0.2
    assert main(["worlds"]) == 0
    assert "ledger" in capsys.readouterr().out
    assert main(["worlds", "show", "ledger"]) == 0
    assert "xlong" in capsys.readouterr().out


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "train", interrupted)
    assert main(["train"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_data_check_writes_what_is_clean(tmp_path, capsys):
    rows = [{"problem": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(6)]
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join(json.dumps(row) for row in [*rows, rows[0]]))
    bench = tmp_path / "bench.jsonl"
    bench.write_text(json.dumps(rows[1]))
    out = tmp_path / "clean.jsonl"
    assert main(["data", "check", str(train), "--against", str(bench), "--out", str(out)]) == 0
    kept = [json.loads(line)["problem"] for line in out.read_text().splitlines()]
    assert kept == [row["problem"] for i, row in enumerate(rows) if i != 1]
    assert "7" in capsys.readouterr().out
    assert main(["data"]) == 0
    assert main(["data", "chekc"]) == 2
    assert "did you mean 'check'" in capsys.readouterr().err


def test_options_of_the_other_engine_are_refused(capsys, tmp_path):
    for option in (["--gpus", "2"], ["--nodes", "2"], ["--dry-run"], ["--verl", "a.b=1"], ["--preset", "cpu-demo"]):
        arguments = ["train", "--method", "dapo", "--steps", "1", "--out", str(tmp_path / "run"), *option]
        assert main(arguments) == 2
        assert f"{option[0]} belongs to the engine verl" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_verls_command_is_printed(capsys, tmp_path):
    words = "train --method dapo --engine verl --preset cpu-demo --dry-run --steps 3".split()
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "trainer.v1.trainer_mode=polarity" in text
    assert "polarity.engines.verl.plugin" in text
    assert not (tmp_path / "run").exists()
