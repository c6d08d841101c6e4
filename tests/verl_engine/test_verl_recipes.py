"""The papers' runs as shipped: each with every method of its paper, composed and checked by verl itself."""

from pathlib import Path

import pytest

import polarity
from polarity.config import RunConfig, load_config
from polarity.data import BENCHMARKS, TEMPLATES
from polarity.engines.verl.composition import compose
from polarity.engines.verl.overrides import Cluster, notes, overrides

RECIPES = Path(polarity.__file__).parent / "recipes"
OUT = Path("runs/paper")

# Sections 3 and 5 are about all three models, section 4 about Qwen2.5-Math-7B, table 3 about Qwen3-8B-Base.
A3PO = ("psr", "nsr", "psr_group", "nsr_group", "grpo", "dapo", "fork_tokens", "w_reinforce", "lp_reg", "a3po")
SECTION_4 = (
    "polarity_p2n1", "polarity_p1n0.5", "polarity_p1n5", "polarity_p0.5n1",
    *(f"token_{polarity}_{end}_{by}" for polarity in ("positive", "negative") for end in ("high", "low")
      for by in ("entropy", "prob")),
)  # fmt: skip
TABLE_3 = ("a3po_no_pl", "a3po_no_nh", "a3po_no_adaptive")
NSR = ("ppo", "grpo_zhu", "psr", "nsr", "w_reinforce")
METHODS = {
    "a3po_qwen25_math_7b": (*A3PO, *SECTION_4), "a3po_qwen3_8b": (*A3PO, *TABLE_3), "a3po_r1_distill_qwen_7b": A3PO,
    "nsr_qwen25_math_7b": NSR, "nsr_qwen3_4b": NSR,
}  # fmt: skip
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def shipped(name: str, method: str) -> RunConfig:
    return load_config(RECIPES / f"{name}.yaml", {"method": method})


def test_what_is_shipped():
    assert set(SHIPPED) == set(METHODS)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_method_of_the_paper(name: str):
    """As composed by verl: the paper's numbers, and the method itself."""
    paper = name.split("_")[0]
    cluster = {"a3po": Cluster(nodes=2, gpus=8), "nsr": Cluster(gpus=8)}[paper]
    numbers = {"a3po": (512, 32, 300, 5, 32, 0.6, 0.95), "nsr": (1024, 256, 140, 7, 1, 0, 1.0)}[paper]
    for method in METHODS[name]:
        config = shipped(name, method)
        composed = compose(overrides(config, OUT, cluster))
        assert notes(config, cluster) == []
        assert composed.actor_rollout_ref.model.path == config.model  # a hub id, for verl to fetch
        assert composed.polarity.method.name == method
        actor, rollout = composed.actor_rollout_ref.actor, composed.actor_rollout_ref.rollout
        assert (actor.optim.lr, rollout.n, rollout.temperature, rollout.top_p) == (1e-6, 8, 1.0, 1.0)
        assert numbers == (
            composed.data.train_batch_size, actor.ppo_mini_batch_size, composed.trainer.total_training_steps,
            composed.trainer.test_freq, rollout.val_kwargs.n, rollout.val_kwargs.temperature, rollout.val_kwargs.top_p,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "model", "context"),
    [
        ("a3po_qwen25_math_7b", "Qwen/Qwen2.5-Math-7B", 4096),
        ("a3po_qwen3_8b", "Qwen/Qwen3-8B-Base", 16384),
        ("a3po_r1_distill_qwen_7b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 16384),
        ("nsr_qwen25_math_7b", "Qwen/Qwen2.5-Math-7B", 4096),
        ("nsr_qwen3_4b", "Qwen/Qwen3-4B", 32768),
    ],
)
def test_models_and_contexts(name: str, model: str, context: int):
    config = shipped(name, "dapo" if name.startswith("a3po") else "nsr")
    composed = compose(overrides(config, OUT, Cluster(gpus=8)))
    assert composed.actor_rollout_ref.model.path == model
    assert composed.actor_rollout_ref.rollout.max_model_len == context
    assert composed.data.max_prompt_length + composed.data.max_response_length == context
    assert composed.actor_rollout_ref.actor.ppo_max_token_len_per_gpu >= context
    assert composed.actor_rollout_ref.rollout.dtype == "bfloat16"


@pytest.mark.parametrize("name", SHIPPED)
def test_names_in_them_exist(name: str):
    config = shipped(name, "dapo")
    assert config.data.template in TEMPLATES
    for split, benchmark in config.data.evaluation.items():
        assert split == benchmark
        assert BENCHMARKS[benchmark].problems <= config.evaluation.problems
        assert BENCHMARKS[benchmark].verifier == config.data.verifier


def test_a3po_s_decay_is_the_paper_s():
    method = shipped("a3po_qwen3_8b", "a3po").build_method()
    weights = [method.at(s).shaping.weights(s, None)["negative"] for s in (0, 100, 200, 299)]
    assert weights == pytest.approx([2.0, 1.5, 1.0, 1.0])
