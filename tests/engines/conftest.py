"""Tiny models that are made here: random weights, 2 layers, 32 wide, a byte-level BPE tokenizer trained on the spot."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from polarity.config import RunConfig, load_config
from polarity.engines.embedded.policy import Policy, load_policy

VOCABULARY = 384
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
    "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
# Architecture -> what it needs beside SHAPE. All but llama attend with fewer key-value heads than query heads.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 7, "head_dim": 8},
}


def gsm8k(count: int) -> list[dict[str, Any]]:
    """The first rows of GSM8K's training split, or none where the data is not there."""
    folder = os.environ.get("POLARITY_TEST_DATA")
    if not folder:
        return []
    with (Path(folder) / "gsm8k_train.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on GSM8K texts where they are there; one special token, for end and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [row["problem"] + row["solution"] for row in gsm8k(200)] or [f"{i} and {7 * i} are." for i in range(200)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_model(architecture, ends=1, **config)` -> directory of a freshly initialised model.

    ends: how many token ids end a response (generation_config's list); many of them give responses of all lengths.
    """

    def make(architecture: str, ends: int = 1, **changes: Any) -> Path:
        path = tmp_path_factory.mktemp(architecture)
        config = AutoConfig.for_model(architecture, **{**SHAPE, **ARCHITECTURES.get(architecture, {}), **changes})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.generation_config.eos_token_id = list(range(ends))
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def qwen2(make_model: Callable[..., Path]) -> Path:
    """A Qwen2 directory whose responses end about every ninth token."""
    return make_model("qwen2", ends=40)


@pytest.fixture
def policy(qwen2: Path) -> Policy:
    return load_policy(qwen2, device="cpu")


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Twelve problems as JSONL."""
    rng = random.Random(0)
    path = tmp_path / "problems.jsonl"
    rows = [{"id": f"p{i}", "problem": "What is " + "1+" * rng.randint(1, 9) + "1?", "answer": "2"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`plugins(source)` -> name of a module with that source, importable from the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        name = f"plugin_{abs(hash((tmp_path, source)))}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


# About half of random responses are correct; SLOW gives a test the time to kill a run.
VERIFIER = """
import os
import time

from polarity.rewards import Outcome


def verify(response, gold, row=None):
    time.sleep(float(os.environ.get("SLOW", 0)))
    correct = len(response) % 2 == 0
    return Outcome(correct, "correct" if correct else "wrong", float(correct), strategy="even" if correct else None)
"""


@pytest.fixture
def small_run(qwen2: Path, problems: Path, plugins: Callable[[str], str]) -> Callable[..., RunConfig]:
    """`small_run(**overrides)` -> a run of some steps on `problems`; dots of keys are double underscores."""
    verifier = plugins(VERIFIER) + ":verify"

    def configure(method: str | dict[str, Any] = "dapo", **overrides: Any) -> RunConfig:
        tree: dict[str, Any] = {
            "method": method, "model": str(qwen2), "data.train": str(problems), "data.verifier": verifier, "steps": 3,
            "data.evaluation": {"held": str(problems)}, "evaluation.problems": 3, "evaluation.samples": 8,
            "evaluation.final_samples": 8,
            "rollout.prompts": 2, "rollout.group": 4, "rollout.max_new_tokens": 10, "rollout.max_rounds": 3,
            "update.mini_batch_prompts": 1, "update.learning_rate": 1e-3, "decay_until": 0.5,
            "evaluation.every": 0, "checkpoint.every": 0, "device": "cpu",
        }  # fmt: skip
        return load_config(None, tree | {key.replace("__", "."): value for key, value in overrides.items()})

    return configure
