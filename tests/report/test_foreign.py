"""Rollouts of verl, of TRL and in JSON lines: their metrics are those of the raw rows. TRL's files are TRL's own."""

import json
import math
import os
import random
import re
import sys
from statistics import fmean

import pytest
from foreign_logs import (
    assert_metrics,
    brute_force,
    dump,
    files_below,
    notes_of,
    samples_of,
    verl_rows,
    words,
    write_lines,
)

from polarity.errors import UserError
from polarity.report import write_report
from polarity.report.foreign import convert, find
from polarity.rundir import RunReader

# ---- verl


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_a_verl_dump_are_those_of_its_rows(tmp_path, seed):
    rng = random.Random(seed)
    steps = {step: verl_rows(rng, scores=((-1.0, 1.0), (0.0, 1.0))[seed % 2]) for step in (1, 2, 3, 10)}
    for step, rows in steps.items():
        dump(tmp_path / "exp" / "rollout_data", step, rows)
    run = convert(tmp_path / "exp", tmp_path / "out")
    assert_metrics(run, brute_force(steps))
    config = RunReader(run).config
    assert config["method"] == {"name": "exp"}  # rollout_data says nothing
    assert config["length_unit"] == "words"
    notes = "\n".join(config["notes"])
    assert "correct means `score` >= 0.5" in notes
    assert "entropy, token probabilities, truncated responses" in notes
    assert not any(metric.split("/")[-1] in ("entropy", "probability") for metric in RunReader(run).metrics[0])


def test_acc_is_the_verdict_also_as_text_and_where_some_rows_lack_it(tmp_path):
    """DAPO's score holds an overlong penalty; NumPy's bools are text in the older trainer, and v1 pads with null."""
    verdicts = [True, False, "True", "False", 1.0, 0.0, None, None]
    scores = [0.3, 0.9, -1.0, 1.0, 0.0, 1.0, 1.0, 0.2]
    rows = [
        {"input": f"p{i}", "output": "x", "gts": None, "score": s, "acc": acc}
        for i, (acc, s) in enumerate(zip(verdicts, scores, strict=True))
    ]
    dump(tmp_path / "exp", 1, rows)
    run = convert(tmp_path / "exp", tmp_path / "out")
    assert RunReader(run).metrics[0]["accuracy/mean"] == 4 / 8
    assert "correct means `acc` (6 rows), `score` >= 0.5 (2 rows)" in notes_of(run)


def test_a_uid_makes_groups_and_the_last_output_of_a_session_counts(tmp_path):
    """Two copies of one problem in a batch are two groups where verl says so, and one where it does not."""
    rows = [
        {
            "input": "same",
            "output": f"{uid} {i} {j}",
            "gts": "1",
            "score": float(i == 0 and j == 1),
            "uid": f"{uid}_{i}_{j}",
        }
        for uid in ("a-1", "b_2")
        for i in range(2)
        for j in range(2)
    ]
    rows = [row for row in rows if row["uid"] != "b_2_0_1"]  # this session ended after one output
    dump(tmp_path / "with", 1, rows)
    run = convert(tmp_path / "with", tmp_path / "out")
    metrics = RunReader(run).metrics[0]
    assert (metrics["rollouts/generated"], metrics["accuracy/mean"], metrics["accuracy/unsolved"]) == (4, 0.25, 0.5)
    assert [(r["group"], r["response"]) for r in RunReader(run).rollouts(1)] == [
        (0, "a-1 0 1"), (0, "a-1 1 1"), (1, "b_2 0 0"), (1, "b_2 1 1"),
    ]  # fmt: skip
    assert "left out: rows that are not the last output of their session (3)" in notes_of(run)
    for row in rows:
        del row["uid"]
    dump(tmp_path / "without", 1, rows)
    run = convert(tmp_path / "without", tmp_path / "out2")
    assert {r["group"] for r in RunReader(run).rollouts(1)} == {0}


def test_the_same_prompt_with_another_answer_is_another_problem(tmp_path):
    rows = [{"input": "p", "output": "x", "gts": gts, "score": 1.0} for gts in ("1", "2", ["1"], None, "1")]
    dump(tmp_path / "exp", 1, rows)
    logged = RunReader(convert(tmp_path / "exp", tmp_path / "out")).rollouts(1)
    assert len({row["problem_id"] for row in logged}) == len({row["group"] for row in logged}) == 4
    assert [row.get("gold") for row in logged] == ["1", "1", "2", '["1"]', None]


def test_a_validation_dump_becomes_the_evaluations_of_its_run(tmp_path):
    rng = random.Random(3)
    for step in (1, 2, 3, 4):
        dump(tmp_path / "exp" / "rollouts", step, verl_rows(rng))
    validation = {}
    for step in (0, 4):
        rows = [
            {"input": f"v{p}", "output": words(rng), "gts": "7", "score": rng.choice([0.0, 1.0])}
            for p in range(4)
            for _ in range(8)
        ]
        validation[step] = rows
        dump(tmp_path / "exp" / "anything", step, [r | {"reward": r["score"], "acc": r["score"] > 0} for r in rows])
    assert [source.label for source in find(tmp_path)] == ["exp"]
    reader = RunReader(convert(tmp_path, tmp_path / "out"))
    rows = {row["step"]: row for row in reader.metrics}
    assert list(rows) == [0, 1, 2, 3, 4]
    for step, raw in validation.items():
        by_problem = [[r for r in raw if r["input"] == f"v{p}"] for p in range(4)]
        counts = [sum(r["score"] > 0 for r in g) for g in by_problem]
        assert rows[step]["eval/validation/pass@1"] == pytest.approx(sum(counts) / 32)
        assert rows[step]["eval/validation/pass@8"] == fmean(c > 0 for c in counts)
        assert rows[step]["eval/validation/reward"] == pytest.approx(sum(counts) / 32)
        right = [len(r["output"].split()) for r in raw if r["score"] > 0]
        assert rows[step]["eval/validation/positive/length"] == pytest.approx(fmean(right))
        kept = reader.evaluations[step]["samples"]["validation"]
        assert [sum(problem["correct"]) for problem in kept] == counts
    assert "accuracy/mean" in rows[4]
    assert "accuracy/mean" not in rows[0]
    page = write_report([tmp_path / "exp"], tmp_path / "report.html").read_text()
    assert "pass@1, validation" in page


def test_a_validation_dump_alone_has_a_page(tmp_path):
    for step in (5, 10):
        rows = [{"input": "v", "output": "x y", "gts": "7", "score": s, "reward": s} for s in (0.0, 1.0)]
        dump(tmp_path / "val", step, rows)
    page = write_report([tmp_path / "val"], tmp_path / "report.html").read_text()
    assert "pass@1, validation" in page
    assert [step["step"] for step in samples_of(page)[0]["steps"]] == [5, 10]


# ---- TRL


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """Output directories of real GRPOTrainers with a tiny random model, logging at every update: text prompts with two
    reward functions, two updates a generation batch (4 prompts x 2) and evaluations; conversations, 2 prompts x 4."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *" \n\t0123456789?"])}  # a fifth of it white space
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    bare.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    bare.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    config = AutoConfig.for_model(
        "qwen2", vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5, eos_token_id=0, pad_token_id=0,
        bos_token_id=None,
    )  # fmt: skip

    def accuracy_reward(completions, answer, **_):
        return [None if a == "none" else float(len(c.split()) % 2) for c, a in zip(completions, answer, strict=True)]

    def length_reward(completions, log_extra, **_):
        log_extra("words", [len(c.split()) for c in completions])
        return [-0.01 * len(c) for c in completions]

    def parity(completions, **_):
        return [float(len(c[0]["content"]) % 2) for c in completions]

    def train(name, rows, rewards, **options):
        torch.manual_seed(0)
        defaults = {
            "output_dir": str(folder / name), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "report_to": "none", "log_completions": True, "num_completions_to_print": 0, "disable_tqdm": True,
            "max_completion_length": 40, "per_device_train_batch_size": 8, "logging_steps": 1,
        }  # fmt: skip
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_config(config), reward_funcs=rewards, processing_class=tokenizer,
            args=GRPOConfig(**(defaults | options)), train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:2]),
        )  # fmt: skip
        trainer.train()

    rows = [{"prompt": f"{i} ?", "answer": "none" if i == 5 else "1"} for i in range(12)]
    train(
        "text", rows, [length_reward, accuracy_reward], num_generations=2, per_device_train_batch_size=4,
        steps_per_generation=2, max_steps=6, eval_strategy="steps", eval_steps=4, save_steps=6,
    )  # fmt: skip
    asked = [{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": f"{i} ?"}]} for i in range(8)]
    train("chat", asked, [parity], num_generations=4, max_steps=3, save_strategy="no")
    return folder


def raw_parquet(folder):
    import pyarrow.parquet

    return {
        int(f.stem[-5:]): pyarrow.parquet.read_table(f).to_pylist() for f in sorted((folder / "completions").iterdir())
    }


def test_trl_completions_have_the_numbers_of_their_rows(trl, tmp_path):
    raw = raw_parquet(trl / "text")
    assert list(raw[1][0]) == [
        "step", "prompt", "completion", "length_reward", "accuracy_reward", "words", "advantage",
    ]  # fmt: skip
    # Two updates a generation batch: step 2 repeats 1; after 4 and 6 the trainer evaluates, on other completions.
    assert raw[2] == [row | {"step": 2} for row in raw[1]]
    assert all(row["prompt"] in ("0 ?", "1 ?") for step in (4, 6) for row in raw[step][-4:])
    expected = {}
    for step in (1, 3, 5):
        rows = [row for row in raw[step] if row["accuracy_reward"] is not None]
        expected[step] = [row | {"total": row["accuracy_reward"] + row["length_reward"]} for row in rows]
    run = convert(trl / "text", tmp_path / "out")
    assert_metrics(
        run,
        brute_force(
            expected,
            prompt="prompt",
            response="completion",
            reward="total",
            correct=lambda r: r["accuracy_reward"] >= 0.5,
        ),
    )
    notes = notes_of(run)
    assert "correct means `accuracy_reward` >= 0.5" in notes
    assert any("`length_reward` + `accuracy_reward`, each with weight 1" in note for note in notes)
    assert "left out: files that repeat the generation batch of the file before (1)" in notes
    assert "left out: files of evaluations (2)" in notes
    unscored = sum(row["accuracy_reward"] is None for step in (1, 3, 5) for row in raw[step])
    assert unscored > 0
    assert f"left out: completions without a score of `accuracy_reward` ({unscored})" in notes
    logged = RunReader(run).rollouts(1)
    assert {r["response"] for r in logged} <= {r["completion"] for r in raw[1]}
    assert logged[0]["advantage"] in [r["advantage"] for r in raw[1]]
    assert RunReader(run).config["method"]["name"] == "text"


def test_trl_conversations_are_text_with_roles(trl, tmp_path):
    raw = raw_parquet(trl / "chat")
    run = convert(trl / "chat" / "completions", tmp_path / "out")
    expected = {
        step: [{**r, "prompt": json.dumps(r["prompt"]), "completion": r["completion"][0]["content"]} for r in rows]
        for step, rows in raw.items()
    }
    right = brute_force(
        expected, prompt="prompt", response="completion", reward="parity", correct=lambda r: r["parity"] > 0
    )
    assert_metrics(run, right)
    row = RunReader(run).rollouts(1)[0]
    assert re.fullmatch(r"system: s\n\nuser: \d \?", row["prompt"])
    assert row["response"] in [r["completion"][0]["content"] for r in raw[1]]
    assert "correct means `parity` >= 0.5" in notes_of(run)


def completions(path, **columns):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_several_trl_rewards_without_a_verdict_are_summed(tmp_path):
    file = tmp_path / "exp" / "completions" / "completions_00010.parquet"
    completions(
        file, step=[10] * 4, prompt=["p"] * 4, completion=list("abcd"), format_reward=[0.2, 0.2, None, None],
        helpful=[0.4, 0.1, 0.6, None], advantage=[0.0] * 4,
    )  # fmt: skip
    run = convert(tmp_path / "exp", tmp_path / "out")
    assert [(r["response"], r["correct"], pytest.approx(r["reward"])) for r in RunReader(run).rollouts(10)] == [
        ("a", True, 0.6), ("b", False, 0.3), ("c", True, 0.6),
    ]  # fmt: skip
    assert "correct means `format_reward` + `helpful` >= 0.5" in notes_of(run)
    assert "left out: completions without a score of any reward function (1)" in notes_of(run)


def test_a_parquet_file_that_is_being_written_is_left_out(tmp_path):
    folder = tmp_path / "exp" / "completions"
    completions(
        folder / "completions_00001.parquet", step=[1], prompt=["p"], completion=["a"], r=[1.0], advantage=[0.0]
    )
    (folder / "completions_00002.parquet").write_bytes((folder / "completions_00001.parquet").read_bytes()[:100])
    run = convert(tmp_path / "exp", tmp_path / "out")
    assert [row["step"] for row in RunReader(run).metrics] == [1]
    assert any("completions_00002.parquet cannot be read as TRL's parquet" in note for note in notes_of(run))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    file = tmp_path / "completions" / "completions_00001.parquet"
    completions(file, step=[1], prompt=["p"], completion=["a"], r=[1.0], advantage=[0.0])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow; pip install 'polarity-rl\[data\]'"):
        convert(tmp_path, tmp_path / "out")


# ---- JSON lines of anybody's


@pytest.mark.parametrize(
    ("prompt", "response", "verdict"),
    [("problem", "completion", "correct"), ("prompt", "output", "reward"), ("prompt", "response", "score")],
)
def test_the_least_keys_are_enough(tmp_path, prompt, response, verdict):
    rows = [{prompt: "p", response: "a b", verdict: v} for v in ((True, False) if verdict == "correct" else (1, -1))]
    run = convert(write_lines(tmp_path / "mine.jsonl", rows), tmp_path / "out")
    row = RunReader(run).metrics[0]
    assert (row["step"], row["accuracy/mean"], row["positive/length"]) == (1, 0.5, 2.0)
    assert ("reward/mean" in row) == (verdict != "correct")
    assert RunReader(run).config["method"]["name"] == "mine"


def test_steps_may_be_scattered_over_lines_and_files(tmp_path):
    rng = random.Random(5)
    rows = [
        {"prompt": f"p{rng.randint(0, 3)}", "response": words(rng), "reward": rng.choice([0.0, 1.0])}
        for _ in range(200)
    ]
    for row in rows:
        row["step"] = rng.randint(1, 6)
    write_lines(tmp_path / "d" / "rank0.jsonl", rows[:90])
    write_lines(tmp_path / "d" / "rank1.jsonl", rows[90:])
    steps = {step: [row for row in rows if row["step"] == step] for step in range(1, 7)}
    run = convert(tmp_path / "d", tmp_path / "out")
    assert_metrics(
        run,
        brute_force(steps, prompt="prompt", response="response", reward="reward", correct=lambda r: r["reward"] > 0),
    )


def test_steps_come_from_names_of_files_else_and_count_from_one(tmp_path):
    for step in (0, 1, 7):
        write_lines(tmp_path / "d" / f"step_{step:03d}.jsonl", [{"prompt": "p", "response": "r", "correct": True}])
    run = convert(tmp_path / "d", tmp_path / "out")
    assert [row["step"] for row in RunReader(run).metrics] == [1, 2, 8]
    assert any("the source counts from 0" in note for note in notes_of(run))
    assert any("number at the end of a file's name" in note for note in notes_of(run))


def test_token_values_are_used_where_every_row_has_them(tmp_path):
    rng = random.Random(6)
    rows = []
    for step in (1, 2):
        for i in range(6):
            n = rng.randint(1, 5)
            logp = [-rng.random() for _ in range(n)]
            row = {
                "step": step,
                "prompt": f"p{i // 2}",
                "response": "x y z",
                "correct": i % 2 == 0,
                "truncated": i == 0,
            }
            row |= {"tokens": ["t"] * n, "logp": logp, "logp_rollout": [v - 0.01 for v in logp], "advantage": logp}
            row |= {"token_ids": list(range(n)), "weight": 1.0}
            rows.append(row | ({"entropy": [rng.random() for _ in range(n)]} if (step, i) != (2, 3) else {}))
    run = convert(write_lines(tmp_path / "mine.jsonl", rows), tmp_path / "out")
    first, second = RunReader(run).metrics
    own = [row for row in rows if row["step"] == 1]
    assert first["length/mean"] == pytest.approx(fmean(len(r["tokens"]) for r in own))  # tokens, not words
    assert first["entropy/mean"] == pytest.approx(fmean(v for r in own for v in r["entropy"]))
    wrong = [r for r in own if not r["correct"]]
    assert first["negative/entropy"] == pytest.approx(fmean(v for r in wrong for v in r["entropy"]))
    assert first["positive/probability"] == pytest.approx(
        fmean(math.exp(v) for r in own if r["correct"] for v in r["logp"])
    )
    assert first["length/truncated"] == pytest.approx(1 / 6)
    assert first["mismatch/k1"] == pytest.approx(-0.01)
    assert "entropy/mean" not in second  # one row has none
    assert "positive/probability" in second
    assert RunReader(run).config["length_unit"] == "tokens"
    logged = RunReader(run).rollouts(1)[0]
    assert logged["logp_old"] == logged["advantage"] == rows[0]["logp"]
    assert json.dumps(logged["token_ids"]) == json.dumps(rows[0]["token_ids"])
    assert "left out: values of `weight` that are no list with an entry a token (12)" in notes_of(run)


def test_our_own_rollouts_come_back_as_they_were(tmp_path, make_run):
    """A folder of our rollouts alone, say from another machine, is JSON lines as well."""
    source = make_run(tmp_path / "run") / "rollouts"
    run = convert(source, tmp_path / "out")
    for step in (1, 20):
        theirs, ours = RunReader(source.parent).rollouts(step), RunReader(run).rollouts(step)
        assert [{k: v for k, v in row.items() if k != "step"} for row in ours] == theirs


# ---- together


def test_runs_of_all_kinds_stand_on_one_page(tmp_path, trl, make_run):
    rng = random.Random(8)
    for name in ("baseline", "mine"):
        for step in range(1, 5):
            dump(tmp_path / "verl" / name / "rollouts", step, verl_rows(rng))
    write_lines(tmp_path / "other.jsonl", [{"problem": "p", "response": "r s", "correct": c} for c in (True, False)])
    make_run(tmp_path / "ours", "dapo")
    before = files_below(tmp_path)
    paths = [tmp_path / "verl", trl / "chat", tmp_path / "other.jsonl", tmp_path / "ours"]
    page = write_report(paths, tmp_path / "report.html").read_text()
    names = [samples["name"] for samples in samples_of(page)]
    assert sorted(names) == [f"{label} seed 0" for label in ("baseline", "chat", "dapo", "mine", "other")]
    assert all(samples["steps"] for samples in samples_of(page))
    assert "lengths are in words, not in tokens" in page
    after = files_below(tmp_path)
    assert after.keys() - before.keys() == {tmp_path / "report.html"}
    assert all(after[path] == content for path, content in before.items())
