"""Any local causal LM directory and any JSONL of problems, through the same path: GSM8K on models made here."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from polarity.config import load_config
from polarity.engines.embedded import train
from polarity.rundir import RunReader

needs_data = pytest.mark.skipif(
    not os.environ.get("POLARITY_TEST_DATA"), reason="POLARITY_TEST_DATA is not set: GSM8K rows are not here"
)

VERIFIER = """
def has_vowel(response, gold, row=None):
    assert row["answer"] == gold and row["source"].startswith("openai/")
    return 1.0 if set(response) & set("aeiou") else 0.0
"""


@needs_data
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize(("method", "verifier"), [("dapo", "own"), ("a3po", "own"), ("a3po", "exact")])
def test_gsm8k(
    make_model: Callable[..., Path], plugins: Callable[[str], str], tmp_path: Path, architecture: str, method: str,
    verifier: str,
):  # fmt: skip
    own = plugins(VERIFIER) + ":has_vowel"
    data = Path(os.environ["POLARITY_TEST_DATA"])
    config = {
        "method": method, "decay_until": 1.0, "steps": 2, "model": str(make_model(architecture, ends=8)),
        "data": {
            "train": str(data / "gsm8k_train.jsonl"), "evaluation": {"test": str(data / "gsm8k_test.jsonl")},
            "verifier": own if verifier == "own" else "exact", "template": "Question: {problem}\nAnswer:",
            "stop": ["\n", "Question"],
        },
        "rollout": {"prompts": 4, "group": 4, "max_new_tokens": 16, "max_rounds": 2},
        "update": {"mini_batch_prompts": 2, "learning_rate": 1e-3, "micro_batch_tokens": 1500},
        "evaluation": {"every": 2, "problems": 4, "samples": 2, "final_samples": 8},
        "device": "cpu",
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    train(load_config(tmp_path / "config.yaml"), tmp_path / "run", progress=False)

    run = RunReader(tmp_path / "run")
    assert [row["step"] for row in run.metrics] == [0, 1, 2]
    assert {"pass@1", "pass@8", "entropy", "length", "truncated"} <= run.evaluations[2]["results"]["test"].keys()
    assert run.evaluations[2]["samples"]["test"][0]["problem_id"].startswith("gsm8k-test-")
    rows = run.rollouts(1)
    assert rows[0]["prompt"].startswith("Question: ")
    assert rows[0]["prompt"].endswith("\nAnswer:")
    for row in rows:
        assert row["problem_id"].startswith("gsm8k-train-")
        ended = row["token_ids"][-1] < 8
        assert row["truncated"] == (not ended and not any(s in row["response"] for s in ("\n", "Question")))
        assert "\n" not in row["response"][:-1]  # a stop string ends a response and stays in it
    if verifier == "own":
        assert sum(row.get("update/count", 0) for row in run.metrics) >= 2
        assert any(row["correct"] for row in rows)
    model = AutoModelForCausalLM.from_pretrained(run.checkpoints[2])
    assert type(model).__name__.lower() == f"{architecture}forcausallm"
