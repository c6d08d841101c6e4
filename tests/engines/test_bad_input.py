"""What a run cannot start with, or go on with: one line that names the fix, and nothing lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from polarity.config import RunConfig
from polarity.engines.embedded import prepare, train
from polarity.errors import UserError

SmallRun = Callable[..., RunConfig]


def refused(config: RunConfig, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        prepare(config)
    assert "\n" not in str(error.value)


@pytest.fixture
def copied(qwen2: Path, tmp_path: Path) -> Path:
    """A model directory to spoil."""
    return Path(shutil.copytree(qwen2, tmp_path / "copied"))


def test_no_model(small_run: SmallRun, tmp_path: Path, problems: Path):
    refused(small_run(model="no/such/model"), r"no model directory no/such/model; give a local directory")
    refused(small_run(model=str(problems)), r"no model directory")
    refused(small_run(model="Qwen/Qwen3-4B"), r"no model directory Qwen/Qwen3-4B")  # nothing is fetched
    (tmp_path / "empty").mkdir()
    refused(small_run(model=str(tmp_path / "empty")), r"cannot be loaded as a causal LM with a tokenizer")


def test_adapter_directory(small_run: SmallRun, copied: Path):
    (copied / "adapter_config.json").write_text("{}")
    refused(small_run(model=str(copied)), r"LoRA adapter; .*use the TRL or verl engine")


def test_model_without_tokenizer(small_run: SmallRun, copied: Path):
    for file in copied.glob("tokenizer*"):
        file.unlink()
    refused(small_run(model=str(copied)), r"has no tokenizer; put its tokenizer.json there")


def test_half_a_weights_file(small_run: SmallRun, copied: Path):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(small_run(model=str(copied)), r"cannot be loaded")


def test_weights_that_are_not_all_there(small_run: SmallRun, copied: Path):
    """The library would fill the rest with random numbers and only warn."""
    weights = load_file(copied / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    refused(small_run(model=str(copied)), r"lacks .*model.layers.1.mlp.up_proj.weight")


def test_broken_config_of_a_model(small_run: SmallRun, copied: Path):
    (copied / "config.json").write_text("{")
    refused(small_run(model=str(copied)), r"cannot be loaded as a causal LM")


def test_another_kind_of_model(small_run: SmallRun, tmp_path: Path, copied: Path):
    shape = {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(tmp_path / "t5")
    for file in copied.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "t5")
    refused(small_run(model=str(tmp_path / "t5")), r"cannot be loaded as a causal LM")


def test_no_end_token(small_run: SmallRun, make_model: Callable[..., Path]):
    path = make_model("llama", eos_token_id=None, pad_token_id=None)
    for name in ("tokenizer_config.json", "generation_config.json"):
        settings = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({k: v for k, v in settings.items() if "eos" not in k and "pad" not in k}))
    refused(small_run(model=str(path)), r"no end-of-sequence token; set eos_token in its tokenizer_config.json")


def test_logits_that_are_not_numbers(small_run: SmallRun, copied: Path):
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"logits .* not finite") as error:
        train(small_run(model=str(copied)), copied.parent / "run", progress=False)
    assert "\n" not in str(error.value)


def test_data(small_run: SmallRun, problems: Path, tmp_path: Path):
    refused(small_run(data__train="none.jsonl"), r"no data file none.jsonl")
    refused(small_run(data__evaluation={"held": "none.jsonl"}), r"no data file none.jsonl")
    refused(small_run(data__template="Solve it."), r"template 'Solve it.' is no file, no template")
    refused(small_run(data__verifier="exat"), r"unknown verifier 'exat'; did you mean 'exact'")
    refused(small_run(data__verifier="json:dumps_"), r"json has no 'dumps_'; did you mean 'dumps'")
    refused(small_run(data__verifier="json:__name__"), r"not callable; write a function")
    refused(small_run(evaluation__splits=["hold"]), r"unknown split 'hold'; did you mean 'held'")
    with problems.open("a") as file:
        file.write(json.dumps({"id": "q", "problem": "1+1"}) + "\n")
    refused(small_run(), r"problems.jsonl row 13: 'answer' is missing")


def test_devices(small_run: SmallRun):
    refused(small_run(device="gpu"), r"unknown device 'gpu'; use auto, cpu or cuda")
    if not torch.cuda.is_available():
        refused(small_run(device="cuda"), r"PyTorch sees no GPU; set device to cpu or auto")


def test_worlds_have_bases(small_run: SmallRun):
    config = small_run().model_copy(update={"world": "ledger", "model": None, "base": "genral"})
    refused(config, r"world 'ledger' has no base 'genral'; did you mean 'general'")


def test_output_directories(small_run: SmallRun, tmp_path: Path, problems: Path):
    config = small_run(steps=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    for out, how, match in [
        (problems, {}, r"is a file; choose another --out"),
        (tmp_path / "other", {}, r"holds files that are not a run; choose another --out"),
        (tmp_path / "other", {"overwrite": True}, r"holds files that are not a run"),
        (tmp_path / "other", {"resume": True}, r"no run in .* to resume; drop --resume"),
        (problems / "below", {}, r"cannot be written \(Not a directory\); choose another --out"),
    ]:
        with pytest.raises(UserError, match=match) as error:
            train(config, out, progress=False, **how)
        assert "\n" not in str(error.value)
    assert (tmp_path / "other" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    train(config, tmp_path / "empty", progress=False)  # an empty directory is free


def test_a_checkpoint_without_the_critic(small_run: SmallRun, tmp_path: Path):
    train(small_run("grpo", steps=1), tmp_path / "run", progress=False)
    with pytest.raises(UserError, match=r"step_000001 has no critic, which method 'ppo' needs; drop --resume"):
        prepare(small_run("ppo"), tmp_path / "run" / "checkpoints" / "step_000001")
