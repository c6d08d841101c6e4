"""Real runs of verl on this machine's cores: a tiny model and its data, made here, and a way to start verl on them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from polarity.engines.verl.cpu import MAIN, cpu_environment, cpu_overrides

# A run takes half a minute; one that takes this long hangs.
TIMEOUT = 600

# They need verl with its engine, which lives in an environment of its own.
if find_spec("verl") is None or find_spec("transfer_queue") is None:
    collect_ignore_glob = ["test_*.py"]

# A reward that half of random responses earn.
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return {"score": float(len(solution_str) % 2 == 0), "acc": float(len(solution_str) % 2 == 0)}
"""


@dataclass(frozen=True)
class VerlRun:
    """A run of verl that has ended: exit code, all it printed, and what it logged, a dict of metrics for each step."""

    code: int
    output: str
    metrics: list[dict[str, Any]]


@pytest.fixture(scope="session")
def verl_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`verl_model(architecture="qwen2", ends=1, **config)` -> directory of a freshly initialised model on bytes.

    ends: how many token ids end a response; many of them give responses of all lengths.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    # verl's agent loop asks for ChatML's end in every Qwen tokenizer.
    tokens = ["<|end|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    shape = {
        "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip

    def make(architecture: str = "qwen2", ends: int = 1, **changes: Any) -> Path:
        path = tmp_path_factory.mktemp(architecture)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **{**shape, **changes}))
        model.generation_config.eos_token_id = list(range(ends))
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def verl_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen sums in verl's columns, as parquet."""
    import pandas

    rows = [
        {
            "data_source": "sums", "prompt": [{"role": "user", "content": "1+" * (i % 5) + f"{i}="}], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i % 5 + i)}, "extra_info": {"index": i},
        }
        for i in range(16)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("data") / "sums.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    return path


@pytest.fixture
def start_verl(tmp_path: Path) -> Callable[..., VerlRun]:
    """`start_verl(overrides, ranks=1, modules=(), environment={})` runs verl's main_ppo to its end, in `tmp_path`.

    modules: what verl loads beside the CPU support (VERL_USE_EXTERNAL_MODULES).
    """

    def start(
        overrides: Sequence[str],
        *,
        ranks: int = 1,
        modules: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> VerlRun:
        metrics, log = tmp_path / "metrics.jsonl", tmp_path / "output.log"
        metrics.unlink(missing_ok=True)
        environment = {
            **os.environ, **cpu_environment(*modules), "HF_HUB_OFFLINE": "1", "VERL_FILE_LOGGER_PATH": str(metrics),
            **(environment or {}),
        }  # fmt: skip
        # Sockets live below it, and their paths must be short.
        with tempfile.TemporaryDirectory(prefix="ray_", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
            command = [
                sys.executable, "-m", MAIN, *cpu_overrides(ranks), *overrides,
                "trainer.logger=[file]", "hydra.run.dir=.", "hydra.output_subdir=null",
                f"+ray_kwargs.ray_init._temp_dir={ray_folder}",
            ]  # fmt: skip
            with log.open("w") as file:
                process = subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    code = process.wait(TIMEOUT)
                finally:
                    if process.poll() is None:  # Ray's processes end with the one that started them
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
        logged = [json.loads(line)["data"] for line in metrics.read_text().splitlines()] if metrics.exists() else []
        return VerlRun(code, log.read_text(errors="replace"), logged)

    return start


@pytest.fixture
def small_verl(start_verl: Callable[..., VerlRun], verl_data: Path, tmp_path: Path) -> Callable[..., VerlRun]:
    """`small_verl(model, *overrides, steps=2, **settings)`: GRPO on 4 sums x 4 responses of up to 12 tokens."""

    def start(model: Path, *overrides: str, steps: int = 2, **settings: Any) -> VerlRun:
        reward = tmp_path / "reward.py"
        reward.write_text(REWARD)
        actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
        return start_verl(
            [
                f"actor_rollout_ref.model.path={model}",
                f"data.train_files={verl_data}", f"data.val_files={verl_data}",
                "data.train_batch_size=4", "data.max_prompt_length=32", "data.max_response_length=12",
                "algorithm.adv_estimator=grpo", f"{rollout}.n=4",
                f"{actor}.ppo_mini_batch_size=2", f"{actor}.ppo_micro_batch_size_per_gpu=4", f"{actor}.optim.lr=1e-3",
                f"{rollout}.log_prob_micro_batch_size_per_gpu=4",
                f"reward.custom_reward_function.path={reward}",
                f"trainer.total_training_steps={steps}", "trainer.total_epochs=100",
                "trainer.val_before_train=False", "trainer.test_freq=-1", "trainer.save_freq=-1",
                f"trainer.default_local_dir={tmp_path}/checkpoints",
                *overrides,
            ],
            **settings,
        )  # fmt: skip

    return start
