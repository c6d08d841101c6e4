"""The files that verl reads: the embedded engine's problems, in its order, as its tokens; and how it asks for one."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from polarity.config import RunConfig, load_config
from polarity.engines.embedded.source import make_source
from polarity.engines.verl.data import Prompts, check_data, row_of, training_rows, write_data
from polarity.engines.verl.settings import LIMIT
from polarity.errors import UserError
from polarity.worlds import WORLDS

BASE = WORLDS["ledger"].base_path("general")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "verl" / "train.parquet", tmp_path / "verl" / "validation.parquet"


def run_on_world(**changes: Any) -> RunConfig:
    base = {"method": "dapo", "world": "ledger", "steps": 3, "rollout.prompts": 4, "rollout.max_rounds": 2}
    base |= {"update.mini_batch_prompts": 2, "evaluation.problems": 5}
    return load_config(None, base | {key.replace("__", "."): value for key, value in changes.items()})


def run_on_file(path: Path, rows: list[dict[str, Any]], **changes: Any) -> RunConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {"method": "grpo", "model": str(BASE), "data.train": str(path), "steps": 5, "rollout.prompts": 4}
    base |= {"update.mini_batch_prompts": 2, "data.template": "Q: {problem}\n"}
    return load_config(None, base | {key.replace("__", "."): value for key, value in changes.items()})


def test_a_world_s_problems_in_the_order_of_the_run(files: tuple[Path, Path], tokenizer: Any):
    config = run_on_world()
    source = make_source(config)
    write_data(config, source, Prompts(tokenizer, 256, 53), files)
    written = pq.read_table(files[0]).to_pylist()
    assert len(written) == training_rows(config) == 3 * 4 * 2  # two rounds in each step
    drawn = source.train(0, 24)
    assert [row_of(record["extra_info"]) for record in written] == drawn
    assert [record["prompt"] for record in written] == [
        [{"role": "user", "content": source.prompt(row)}] for row in drawn
    ]
    assert [record["reward_model"]["ground_truth"] for record in written] == [row["answer"] for row in drawn]
    assert {record["data_source"] for record in written} == {"train"}
    assert [record["extra_info"]["index"] for record in written] == list(range(24))
    assert {record["extra_info"][LIMIT] for record in written} == {140}


def test_validation_is_every_split_in_turn(files: tuple[Path, Path], tokenizer: Any):
    config = run_on_world(evaluation__splits=["long", "id"])
    source = make_source(config)
    write_data(config, source, Prompts(tokenizer, 256, 53), files)
    written = pq.read_table(files[1]).to_pylist()
    assert [record["data_source"] for record in written] == ["long"] * 5 + ["id"] * 5
    assert [row_of(record["extra_info"]) for record in written] == source.split("long", 5) + source.split("id", 5)
    assert {record["extra_info"][LIMIT] for record in written} == {240}
    check_data(config, source, Prompts(tokenizer, 256, 53))


def test_without_evaluation_verl_has_a_file_to_open(files: tuple[Path, Path], tokenizer: Any):
    config = run_on_world(evaluation__every=0)
    write_data(config, make_source(config), Prompts(tokenizer, 256, 53), files)
    assert len(pq.read_table(files[1])) == 1


def test_a_file_s_epochs_and_shuffles(tmp_path: Path, files: tuple[Path, Path], tokenizer: Any):
    """Rows of unlike columns, some that parquet has no type for, come back as they were."""
    rows = [{"problem": f"{i} ?", "answer": str(i), "id": f"p{i}"} for i in range(7)]
    rows[2] |= {"tests": [{"input": 1}, {"input": "two"}], "level": 3}
    rows[5]["level"] = "Level 5"
    config = run_on_file(tmp_path / "own.jsonl", rows, seed=4)
    source = make_source(config)
    write_data(config, source, Prompts(tokenizer, 256, 53), files)
    written = pq.read_table(files[0]).to_pylist()
    assert len(written) == training_rows(config) == 5 * 4  # one round: nothing is sampled again
    assert [row_of(record["extra_info"]) for record in written] == source.train(0, 20)
    for epoch in (written[:7], written[7:14]):
        assert sorted(record["extra_info"]["id"] for record in epoch) == [f"p{i}" for i in range(7)]
    assert written[0]["prompt"][0]["content"].startswith("Q: ")


def test_a_longer_run_draws_the_same_problems_first(tmp_path: Path, tokenizer: Any):
    drawn = []
    for steps in (3, 6):
        config = run_on_world(steps=steps)
        files = tmp_path / f"{steps}" / "train.parquet", tmp_path / f"{steps}" / "validation.parquet"
        write_data(config, make_source(config), Prompts(tokenizer, 256, 53), files)
        drawn.append(pq.read_table(files[0]).to_pylist())
    assert drawn[1][: len(drawn[0])] == drawn[0]


@pytest.mark.parametrize(
    ("problem", "limits", "message"),
    [
        (
            "1 2 3 4 5 6 7 8 9",
            (12, 53),
            r"problem 'b': its prompt has \d+ tokens and the run takes 12.*max_prompt_length=",
        ),
        ("1 + 1", (256, 4), "problem 'a': the tokenizer's .* is beyond the model's vocabulary of 4"),
    ],
)
def test_prompts_that_do_not_fit(tmp_path: Path, tokenizer: Any, problem: str, limits: tuple[int, int], message: str):
    rows = [{"problem": "1", "answer": "1", "id": "a"}, {"problem": problem, "answer": "1", "id": "b"}]
    config = run_on_file(tmp_path / "own.jsonl", rows, evaluation__every=0)
    with pytest.raises(UserError, match=message):
        check_data(config, make_source(config), Prompts(tokenizer, *limits))


def test_unknown_split(tokenizer: Any):
    for every in (0, 5):
        config = run_on_world(evaluation__splits=["lng"], evaluation__every=every)
        with pytest.raises(UserError, match="did you mean 'long'"):
            check_data(config, make_source(config), Prompts(tokenizer, 256, 53))


def test_more_rows_than_a_disk_has(tmp_path: Path, tokenizer: Any):
    rows = [{"problem": "1", "answer": "1", "id": "a", "tests": "x" * 200_000}]
    changes = {"rollout__prompts": 512, "steps": 1000, "evaluation__every": 0}
    config = run_on_file(tmp_path / "own.jsonl", rows, **changes)
    with pytest.raises(UserError, match=r"102 GB; lower rollout\.max_rounds"):
        check_data(config, make_source(config), Prompts(tokenizer, 256, 53))


def test_verl_reads_them_in_order(tmp_path: Path, files: tuple[Path, Path], tokenizer: Any, monkeypatch: Any):
    """Through verl's own dataset and sampler, as the composed configuration sets them up."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from verl.trainer.ppo.utils import create_rl_dataset, create_rl_sampler

    from polarity.engines.verl.composition import compose
    from polarity.engines.verl.overrides import data_files, overrides

    config = run_on_world()
    source = make_source(config)
    assert data_files(tmp_path) == files
    write_data(config, source, Prompts(tokenizer, 256, 53), files)
    composed = compose(overrides(config, tmp_path))
    dataset = create_rl_dataset(composed.data.train_files, composed.data, tokenizer, None)
    order = list(create_rl_sampler(composed.data, dataset))
    read = [dataset[i]["raw_prompt"][0]["content"] for i in order]
    assert read == [source.prompt(row) for row in source.train(0, training_rows(config))]


@pytest.fixture
def ask(tokenizer: Any) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`ask(prompt, extra_info, **polarity)` -> what the agent loop makes of it, and what the server was asked for."""
    from polarity.engines.verl.agent import PolarityAgentLoop

    def asked(prompt: str, extra_info: dict[str, Any], length: int = 9, **polarity: Any) -> tuple[Any, dict[str, Any]]:
        seen: dict[str, Any] = {}

        async def generate(**request: Any) -> SimpleNamespace:
            seen.update(request)
            n = request["sampling_params"]["max_tokens"]
            return SimpleNamespace(token_ids=[7] * n, log_probs=[-0.5] * n, extra_fields={"global_steps": 3})

        rollout = {"response_length": length, "agent": {"default_agent_loop": "polarity"}}
        tree = {
            "polarity": {"method": "dapo", **polarity},
            "actor_rollout_ref": {"rollout": rollout},
        }
        loop = PolarityAgentLoop(
            SimpleNamespace(config=OmegaConf.create(tree)),
            SimpleNamespace(generate=generate),
            tokenizer,
            processor=None,
        )
        row = {"raw_prompt": [{"role": "user", "content": prompt}], "extra_info": extra_info, "data_source": "train"}
        return asyncio.run(loop.run({"temperature": 0.5}, **row)), seen

    return asked


def test_the_prompt_s_tokens_are_the_embedded_engine_s(ask: Callable, tokenizer: Any):
    """Its base is a Qwen3 without ChatML's tokens, at which verl's own agent loop stops."""
    source = make_source(run_on_world())
    for row in [*source.train(0, 20), {"problem": "A1+2 \n"}]:
        output, seen = ask(source.prompt(row), {})
        assert output.prompt_ids == seen["prompt_ids"]
        assert output.prompt_ids == tokenizer([source.prompt(row)], add_special_tokens=False)["input_ids"][0]


def test_each_row_has_its_limit(ask: Callable):
    output, seen = ask("1", {LIMIT: 4})
    assert seen["sampling_params"] == {"temperature": 0.5, "max_tokens": 4}
    assert (output.response_ids, output.response_mask, output.response_logprobs) == ([7] * 4, [1] * 4, [-0.5] * 4)
    assert output.extra_fields["global_steps"] == 3
    assert ask("1", {})[1]["sampling_params"]["max_tokens"] == 9


def test_stop_strings_reach_the_server(ask: Callable):
    assert ask("1", {}, stop=["\n\n", "END"])[1]["sampling_params"]["stop"] == ["\n\n", "END"]


def test_verl_finds_the_agent_loop():
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

    import polarity.engines.verl.agent as agent

    assert _agent_loop_registry["polarity"] == {"_target_": f"{agent.__name__}.PolarityAgentLoop"}


def test_rows_of_other_files_are_what_they_hold():
    assert row_of({"index": 3, "level": 2}) == {"index": 3, "level": 2}
    assert row_of(None) == {}
