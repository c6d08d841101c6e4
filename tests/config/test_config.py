"""Configuration: what is refused, with which words, and that config.yaml is the run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polarity.config import RunConfig, load_config, options, save_config
from polarity.errors import UserError
from polarity.methods import METHODS

# Every option outside `method:`. A new one must earn its place here; 60 is the most there may ever be.
OPTIONS = [
    "world", "base", "model", "seed", "steps", "decay_until", "dtype", "device", "threads",
    "data.train", "data.evaluation", "data.columns", "data.max_bad", "data.verifier", "data.verifier_limit",
    "data.unsafe", "data.rewards", "data.template", "data.stop",
    "rollout.prompts", "rollout.group", "rollout.max_rounds", "rollout.temperature", "rollout.max_new_tokens",
    "rollout.truncated", "rollout.logp_old", "rollout.batch_rows",
    "update.mini_batch_prompts", "update.micro_batch_tokens", "update.epochs", "update.learning_rate",
    "update.critic_learning_rate", "update.warmup_steps", "update.beta1", "update.beta2", "update.weight_decay",
    "update.grad_clip", "update.gradient_checkpointing",
    "evaluation.every", "evaluation.splits", "evaluation.problems", "evaluation.samples", "evaluation.final_samples",
    "evaluation.temperature", "evaluation.top_p", "evaluation.max_new_tokens",
    "checkpoint.every", "checkpoint.keep", "log.rollouts_every", "log.rollout_groups",
    "log.ngrams", "log.ngram_history", "log.attribution_every", "log.to",
]  # fmt: skip
METHOD_FIELDS = [
    "name", "source", "advantage", "filter", "overlong", "shaping", "token_mask", "token_penalty", "surrogate",
    "correction", "off_policy_mask", "aggregation", "kl", "entropy_bonus",
]  # fmt: skip


def test_list_of_options():
    assert sorted(options()) == sorted(OPTIONS)
    assert len(OPTIONS) <= 60
    assert all(options().values())  # each says what it means


def test_list_of_method_fields():
    assert sorted(type(METHODS["a3po"]).model_fields) == sorted(METHOD_FIELDS)


# A weight that follows a metric, and two methods in turn.
LOOP = {"kind": "closed_loop", "metric": "entropy", "low": 5.0, "high": 5.5, "start": 1.5, "step": 0.25, "ceiling": 2.0}
NSR_THEN_A3PO = {"phases": [{"method": "nsr", "steps": 2}, {"method": {"base": "a3po", "shaping.positive.ratio": 0.1}}]}


def refused(tree: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_config(None, {"method": "dapo", **tree})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ({"method": "a3p"}, r"unknown method 'a3p'; did you mean 'a3po'"),
        ({"method": None}, r"no method given; add --method"),
        ({"method": ["a3po"]}, r"base is a name or module:NAME"),
        ({"method": "no_such_module:method"}, r"no module 'no_such_module'.*my_file:my_name"),
        ({"method": {"base": "a3po", "shapin": {}}}, r"unknown method key 'shapin'; did you mean 'shaping'"),
        ({"method.shaping.positive.ratio": 3}, r"'shaping.negative.ratio'|'shaping.positive.ratio'.*less than"),
        ({"world": "legder"}, r"unknown world 'legder'; did you mean 'ledger'"),
        ({"world": 3}, r"world: expected a name, found 3"),
        ({"rollout.promts": 4}, r"unknown key 'rollout.promts'; did you mean 'rollout.prompts'"),
        ({"lr": 4}, r"unknown key 'lr'; .*'?update\.|known: "),
        ({"rollout": 4}, r"rollout: expected a mapping with keys prompts, group"),
        ({"seed": 1, "seed.x": 4}, r"--seed.x: seed is a single value"),
        ({"steps": 0}, r"steps: .*greater than or equal to 1, got 0"),
        ({"steps": "ten"}, r"steps: .*valid integer.*'ten'"),
        ({"steps": "[1"}, r"--steps '\[1': not a YAML value"),
        ({"update.learning_rate": "nan"}, r"update.learning_rate: .*got nan"),
        ({"update.learning_rate": ".inf"}, r"update.learning_rate: .*finite number, got inf"),
        ({"rollout.temperature": 0}, r"rollout.temperature: .*greater than 0"),
        ({"evaluation.top_p": 1.5}, r"evaluation.top_p: .*less than or equal to 1"),
        ({"rollout.truncated": "dropped"}, r"rollout.truncated: .*'scored', 'penalised' or 'masked'.*got 'dropped'"),
        ({"rollout.prompts": 6, "update.mini_batch_prompts": 4}, r"4 does not divide rollout.prompts 6.*divisor of 6"),
        ({"rollout.prompts": 4, "update.mini_batch_prompts": 8}, r"8 does not divide rollout.prompts 4"),
        ({"rollout.group": 1}, r"'dapo' compares rewards within a group.*rollout.group to 2 or more"),
        ({"rollout.truncated": "penalised"}, r"no overlong penalty; set method.overlong.buffer"),
        ({"method.overlong.buffer": 20}, r"overlong penalty but rollout.truncated is 'scored'; set"),
        (
            {"method.overlong.factor": 0.5, "rollout.truncated": "penalised", "rollout.max_new_tokens": 100},
            r"overlong.buffer 4096 is longer than rollout.max_new_tokens 100; set it to about a fifth",
        ),
        ({"update.critic_learning_rate": 1e-5}, r"critic_learning_rate is set but method 'dapo' has no critic; leave"),
        (
            {"method": {"phases": [{"method": "ppo", "steps": 9}, {"method": "rloo"}]}, "rollout.group": 1},
            r"'rloo' compares rewards within a group",
        ),
        (
            {"method": NSR_THEN_A3PO, "rollout.truncated": "penalised"},
            r"'penalised' but method 'nsr' has no overlong penalty",
        ),
        ({"method": NSR_THEN_A3PO, "update.critic_learning_rate": 1e-5}, r"method 'nsr_2_then_a3po' has no critic"),
        ({"method": NSR_THEN_A3PO, "steps": 2}, r"its last phase begins after 2 rollout steps and the run has 2"),
        (
            {"method": "a3po", "method.shaping.positive.scale": {**LOOP, "metric": "mismatch"}},
            r"'a3po' follows mismatch/mean, and there is nothing to measure: .*; set rollout.logp_old to recomputed",
        ),
        ({"dtype": "bfloat16"}, r"set rollout.logp_old to recomputed"),
        ({"world": None}, r"neither world nor data.train is set; .*--world ledger"),
        ({"data.train": "x.jsonl"}, r"data.train needs a model; set model"),
        ({"world": "ledger", "data.train": "x.jsonl"}, r"world and data are both set.*drop one"),
        ({"data.train": "x.jsonl", "model": "m", "base": "general"}, r"base names a world's base model"),
        ({"base": "general", "model": "m"}, r"base names a world's base model"),
        ({"method": "a3po", "decay_until": None, "steps": 150}, r"decays over 200 rollout steps .* has 150; set decay"),
        ({"data.train": "x", "model": "m", "data.stop": [""]}, r"data.stop.0: .*at least 1 character"),
    ],
)
def test_refused(tree: dict[str, Any], match: str):
    refused(tree, match)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused({}, r"one process; for several GPUs use the TRL or verl engine")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("method: a3po\n  steps: [1\n", r"config.yaml line 2: malformed YAML"),
        ("a3po", r"expected a mapping of keys such as `method: a3po`, found str"),
        ("- a3po", r"found list"),
        ("method: dapo\nstep: 3\n", r"unknown key 'step'; did you mean 'steps'"),
        ("", r"no method given"),
        (b"\xff\xfe\x00", r"malformed YAML"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str | bytes, match: str):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=match) as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path: Path):
    with pytest.raises(UserError, match="no configuration file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory; give a YAML file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "tree",
    [
        {"method": "a3po", "steps": 40},
        {"method": "polarity_p0.5n1"},
        {"method": {"base": "dapo", "surrogate.high": 0.3}},
        {"method": {"name": "mine", "entropy_bonus": 0.01}},
        {"method": "w_reinforce", "rollout.group": 1, "base": "general"},
        {"method": "grpo", "model": "m", "data.train": "x", "data.evaluation": {"a": "y"}, "data.stop": ["\n"]},
        {"method": NSR_THEN_A3PO, "steps": 40},
        {"method": "nsr_5_then_a3po", "steps": 40},
        {
            "method": {"phases": [{"method": "dapo", "steps": 3}, {"method": "ppo"}]},
            "update.critic_learning_rate": 1e-4,
        },
        {"method": "a3po", "method.shaping.positive.scale": LOOP},
        {"method": "a3po", "method.shaping.positive.scale": {**LOOP, "metric": "mismatch"}}
        | {"rollout.logp_old": "recomputed"},
        {"method": "token_positive_low_prob", "world": "ledger", "seed": 3, "dtype": "bfloat16"}
        | {"rollout.logp_old": "recomputed"},
    ],
)
def test_what_is_written_reads_back_as_the_same_run(tmp_path: Path, tree: dict[str, Any]):
    config = load_config(None, tree)
    (tmp_path / "config.yaml").write_text(save_config(config))
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert again.build_method() == config.build_method()
    assert save_config(again) == save_config(config)


def test_precedence(tmp_path: Path):
    """Defaults, then the world's recipe, then the file, then overrides."""
    path = tmp_path / "config.yaml"
    path.write_text("method: {base: a3po, shaping: {positive: {ratio: 0.1}}}\nrollout: {prompts: 16}\nsteps: 50\n")
    world = load_config(None, {"method": "dapo"})
    assert world.rollout.max_new_tokens < RunConfig.model_fields["rollout"].default.max_new_tokens
    config = load_config(path, {"steps": "60", "method.shaping.negative.ratio": "0.3", "update.learning_rate": "1e-4"})
    assert (config.rollout.prompts, config.steps, config.update.learning_rate) == (16, 60, 1e-4)
    assert config.rollout.max_new_tokens == world.rollout.max_new_tokens
    shaping = config.method["shaping"]
    assert (shaping["positive"]["ratio"], shaping["negative"]["ratio"]) == (0.1, 0.3)
    own = load_config(None, {"method": "dapo", "model": "m", "data.train": "x"})  # own data: no world's recipe
    assert own.world is None
    assert own.rollout.max_new_tokens == 1024


def test_order_of_overrides_does_not_matter():
    parts = {"method.shaping.positive.ratio": 0.1, "rollout.prompts": 8, "rollout": {"group": 4}, "method": "a3po"}
    config = load_config(None, {**parts, "update.mini_batch_prompts": 2})
    assert (config.method["shaping"]["positive"]["ratio"], config.rollout.prompts, config.rollout.group) == (0.1, 8, 4)


def test_the_decay_is_laid_out_over_the_run():
    method = load_config(None, {"method": "a3po", "steps": 60, "decay_until": 0.5}).build_method()
    scale = method.shaping.positive.scale  # type: ignore[union-attr]
    assert scale.per_step == pytest.approx(1 / 30)  # type: ignore[union-attr]
    kept = load_config(None, {"method": "a3po", "steps": 300, "decay_until": None}).build_method()
    assert kept == METHODS["a3po"]


@pytest.mark.parametrize("name", [*METHODS, "token_negative_high_entropy"])
def test_every_method_is_a_configuration(name: str):
    config = load_config(None, {"method": name})
    assert config.method["base"] == name
    assert config.build_method().needs == METHODS[name].needs


@pytest.fixture
def no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    monkeypatch.chdir(tmp_path)
    return lambda: list(tmp_path.iterdir())


def test_reading_a_configuration_writes_nothing(no_files: Callable[[], list[Path]]):
    load_config(None, {"method": "a3po"})
    assert no_files() == []


def test_correction_of_a_mismatch_that_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"set rollout\.logp_old to recomputed"):
        load_config(None, {"method": "dapo", "method.correction.kind": "truncated"})
    load_config(None, {"method": "dapo", "method.correction.kind": "truncated", "rollout.logp_old": "recomputed"})
