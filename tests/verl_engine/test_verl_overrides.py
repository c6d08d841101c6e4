"""A run's options in verl's configuration: each has its place, arrives unharmed, and means there what it means here."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from polarity.config import RunConfig, load_config, options
from polarity.engines.verl.composition import compose, hydra_value
from polarity.engines.verl.cpu import cpu_overrides
from polarity.engines.verl.options import OPTIONS, REMARKS
from polarity.engines.verl.overrides import (
    Cluster,
    environment,
    notes,
    overrides,
    prompt_tokens,
    settings,
    verl_loss,
)
from polarity.engines.verl.settings import VerlSettings
from polarity.errors import UserError
from polarity.methods import METHODS, Denominators, LossInputs

OUT = Path("/tmp/a run, with 'quotes' = {$x}")
FAMILIES = ("polarity_p0.5n1", "token_negative_high_prob", "token_positive_low_entropy")
PHASES = ("nsr_50_then_dapo", "psr_10_then_nsr_20_then_ppo")


def configured(**changes: Any) -> RunConfig:
    """A run on the user's own data with a model from the hub; dots as double underscores."""
    base = {"method": "dapo", "model": "org/model", "data.train": "problems.jsonl", "steps": 300}
    return load_config(None, base | {key.replace("__", "."): value for key, value in changes.items()})


def found(config: RunConfig, cluster: Cluster = Cluster(), **more: Any) -> dict[str, Any]:  # noqa: B008
    """Bare key -> value, as Hydra parses each override, by itself; a mapping as its leaves."""
    parser, tree = OverridesParser.create(), {}
    for text in overrides(config, OUT, cluster, **more):
        override = parser.parse_override(text)
        value = OmegaConf.to_container(OmegaConf.create({"v": override.value()}), resolve=True)["v"]
        tree[override.key_or_group] = value
    return tree


def test_every_option_has_its_place():
    assert set(OPTIONS) == set(options())
    assert set(REMARKS) <= set(OPTIONS)
    assert {option for option, keys in OPTIONS.items() if not keys} <= set(REMARKS)


def test_the_page_has_both_tables():
    lines = (Path(__file__).parents[2] / "docs" / "verl.md").read_text().splitlines()
    rows = [
        f"| `{option}` | {', '.join(f'`{key}`' for key in keys) or '-'} | {REMARKS.get(option, '')} |"
        for option, keys in OPTIONS.items()
    ]
    for name, field in VerlSettings.model_fields.items():
        default = "required" if field.is_required() else "null" if field.default is None else field.default
        rows.append(f"| `polarity.{name}` | {default} | {field.description} |")
    assert [line for line in lines if line in set(rows)] == rows


def test_every_key_that_is_named_is_a_key_of_verl():
    config = configured(method="ppo", data__rewards={"boxed_format": 0.5})
    composed = compose(overrides(config, OUT))
    for keys in OPTIONS.values():
        for key in keys:
            missing = object()
            assert OmegaConf.select(composed, key, default=missing) is not missing, key


# One other value for each option, or None where the place is the data files (test_verl_data.py).
OTHER: dict[str, Any] = {
    "world": None, "base": None, "model": "org/other", "seed": 3, "steps": 299, "decay_until": 0.5, "data.train": None,
    "data.evaluation": None, "data.columns": None, "data.max_bad": None, "data.verifier": "math",
    "data.verifier_limit": 7.5, "data.unsafe": True, "data.rewards": {"my_file:reward": 0.25}, "data.template": None,
    "data.stop": ["\n\n", "it's {over}"], "rollout.prompts": 64, "rollout.group": 4, "rollout.max_rounds": 2,
    "rollout.temperature": 0.7, "rollout.max_new_tokens": 77, "rollout.truncated": "masked",
    "rollout.logp_old": "recomputed", "rollout.batch_rows": 33, "update.mini_batch_prompts": 16,
    "update.micro_batch_tokens": 20000, "update.epochs": 2, "update.learning_rate": 3e-7,
    "update.critic_learning_rate": 2e-5, "update.warmup_steps": 9, "update.beta1": 0.8, "update.beta2": 0.99,
    "update.weight_decay": 0.2, "update.grad_clip": 0.5, "update.gradient_checkpointing": True, "evaluation.every": 0,
    "evaluation.splits": None, "evaluation.problems": None, "evaluation.samples": 5, "evaluation.final_samples": 6,
    "evaluation.temperature": 0, "evaluation.top_p": 0.9, "evaluation.max_new_tokens": 2000, "checkpoint.every": 0,
    "checkpoint.keep": 2, "log.rollouts_every": 3, "log.rollout_groups": 2, "log.ngrams": None,
    "log.ngram_history": "problem", "log.attribution_every": 4, "log.to": ["wandb"], "dtype": "bfloat16",
    "device": "cpu", "threads": 2,
}  # fmt: skip
NULL = {"log.ngrams"}


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_nothing_that_is_set_is_ignored(option: str):
    """Another value shows in one of the option's keys, in the environment or a note, or is refused by name."""
    if OTHER[option] is None and option not in NULL:
        assert set(OPTIONS[option]) & {"data.train_files", "data.val_files", "actor_rollout_ref.model.path"}
        return
    fixed = {"rollout__logp_old": "recomputed"} if option == "dtype" else {}
    method = "a3po" if option == "decay_until" else "ppo"
    verifier = {"data__verifier": {"data.unsafe": "code", "data.verifier_limit": "math"}.get(option, "exact")}
    before = configured(method=method, **fixed, **verifier)
    after = configured(**{"method": method, **fixed, **verifier, option: OTHER[option]})
    try:
        new = found(after)
    except UserError as error:
        refused = str(error)
        assert refused.startswith(option) and not OPTIONS[option]  # noqa: PT018
        return
    old = found(before)
    if not OPTIONS[option]:
        assert environment(after, OUT) != environment(before, OUT) or notes(after) != notes(before)
    for key in OPTIONS[option]:
        if option == "rollout.max_new_tokens" or key.startswith(("polarity.", "reward.")):
            top = key.split(".")[0] if key.startswith("polarity") else key.rpartition(".")[0]
            assert old.get(key, old.get(top)) != new.get(key, new.get(top)), key
        else:
            changed = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
            assert any(k == key or k.startswith(f"{key}.") for k in changed), key


@pytest.mark.parametrize("seed", range(40))
def test_any_string_reaches_hydra(seed: int):
    rng = random.Random(seed)
    alphabet = [*"ab1 _-.,:;=+~'\"\\(){}[]$@#!?/\t", "\\'", '\\"', "null", "é"]
    texts = ["".join(rng.choice(alphabet) for _ in range(rng.randint(0, 12))).replace("${", "$") for _ in range(25)]
    tree = {
        "texts": texts,
        "words": ["null", "True", "1e3", "nan", "-", "", "a/b.c"],
        "n": [1, -2.5, 1e-06, None, True],
    }
    tree |= {"keys": {text: i for i, text in enumerate({"my_file:reward", "a b", "x=y", "p", *FAMILIES})}}
    override = OverridesParser.create().parse_override(f"+x={hydra_value(tree)}")
    assert OmegaConf.to_container(OmegaConf.create({"x": override.value()}), resolve=True)["x"] == tree


@pytest.mark.parametrize("name", [*METHODS, *FAMILIES, *PHASES])
def test_methods_arrive_whole(name: str):
    config = configured(method=name, rollout__logp_old="recomputed")
    read = VerlSettings.read(found(config)["polarity"])
    assert read == settings(config, OUT)
    assert read.build_method(config.steps) == config.build_method()


def test_settings_come_out_of_a_composed_configuration():
    config = configured(method="a3po", decay_until=None, data__stop=["it's {over}", "\n"], log__ngrams=None)
    assert VerlSettings.of(compose(overrides(config, OUT))) == settings(config, OUT)


def test_settings_of_a_stock_command():
    read = VerlSettings.of(compose([*overrides(configured(), OUT)[:-1], "+polarity.method=a3po"]))
    assert read == VerlSettings(method="a3po")
    assert read.build_method(300) == METHODS["a3po"]
    with pytest.raises(UserError, match="decay_until"):
        read.build_method(100)
    assert VerlSettings.read({"method": '{"base": "dapo", "surrogate": {"high": 0.3}}'}).method["base"] == "dapo"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (None, "no key polarity"),
        ({"decay_until": 0.5}, "polarity.method is not set"),
        ({"method": "dapo", "max_round": 2}, "did you mean 'max_rounds'"),
        ({"method": "dapo", "decay_until": 1.5}, "polarity.decay_until"),
        ({"method": "{dapo"}, "not JSON"),
        ("dapo", "expected a mapping"),
        ({"method": "dapo", "stop": ["END"]}, "default_agent_loop=polarity"),
    ],
)
def test_settings_say_what_is_wrong(tree: Any, message: str):
    with pytest.raises(UserError, match=message) as error:
        VerlSettings.of(OmegaConf.create({"polarity": tree}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("warmup", [0, 1, 2, 30])
def test_learning_rate_of_every_step(warmup: int):
    """verl's own scheduler, made as its engine makes it, against the embedded engine's line."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.torch_functional import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

    config = configured(update__warmup_steps=warmup)
    optim = omega_conf_to_dataclass(compose(overrides(config, OUT)).actor_rollout_ref.actor.optim)
    assert (tuple(optim.betas), optim.lr_warmup_steps_ratio) == ((0.9, 0.95), 0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    if optim.lr_scheduler_type == "constant":
        schedule = get_constant_schedule_with_warmup(optimizer, optim.lr_warmup_steps)
    else:
        schedule = get_cosine_schedule_with_warmup(
            optimizer, optim.lr_warmup_steps, config.steps, optim.min_lr_ratio, optim.num_cycles,
            zero_indexed_step=optim.zero_indexed_step,
        )  # fmt: skip
    for step in range(60):
        ours = config.update.learning_rate * min(1.0, (step + 1) / max(1, warmup))
        assert schedule.get_last_lr()[0] == pytest.approx(ours, rel=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("name", ["grpo", "dapo", "psr", "two_sided", "dr_grpo", "grpo_zhu", "a3po"])
def test_the_loss_that_verl_is_told_is_the_method_s(name: str):
    """verl's vanilla loss with the composed configuration, ratios far beyond every bound among them."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.utils.config import omega_conf_to_dataclass

    method = METHODS[name].vary({"kl.coefficient": 0.0, "entropy_bonus": 0.0})
    config = configured(method=name, rollout__max_new_tokens=16)
    actor = omega_conf_to_dataclass(compose(overrides(config, OUT)).actor_rollout_ref.actor)
    rng = torch.Generator().manual_seed(1)
    logp = torch.randn(6, 16, generator=rng, dtype=torch.float64) * 4 - 8
    logp_old = logp + torch.randn(6, 16, generator=rng, dtype=torch.float64) * 8
    mask = torch.arange(16) < torch.tensor([[3], [16], [7], [1], [16], [9]])
    advantages = torch.randn(6, 1, generator=rng, dtype=torch.float64).expand(6, 16) * mask
    tokens = int(mask.sum())
    actor.global_batch_info.update(
        dp_size=1, batch_num_tokens=tokens, global_batch_size=6, loss_scale_factor=actor.loss_scale_factor
    )
    theirs, _ = compute_policy_loss_vanilla(logp_old, logp, advantages, mask, actor.loss_agg_mode, actor)
    inputs = LossInputs(
        logp=logp, logp_old=logp_old, advantages=advantages, mask=mask, denominators=Denominators(tokens, 6, 16)
    )
    assert float(theirs) == pytest.approx(float(method.loss(inputs).loss), rel=1e-9)


def test_losses_that_verl_does_not_have_are_not_claimed():
    own = {"fork_tokens", "lp_reg", "aspo", "aspo_archer", "gspo", "gspo_token", "cispo", "gmpo", "sapo", "bapo"}
    own |= {"clip_cov", "kl_cov", "opsm"}
    assert {name for name in METHODS if verl_loss(METHODS[name]) is None} == own
    assert verl_loss(configured(method="nsr_50_then_dapo").build_method()) is None  # no loss changes in mid-run
    assert verl_loss(configured(method="psr_50_then_nsr").build_method()) is not None


def test_models_that_a_method_needs():
    from verl.trainer.ppo.utils import need_critic, need_reference_policy

    needs = {"dapo": (False, False), "grpo_zhu": (True, False), "ppo": (True, True), "aspo": (True, False)}
    needs |= {"nsr_50_then_grpo_zhu": (True, False)}
    for name, (reference, critic) in needs.items():
        composed = compose(overrides(configured(method=name), OUT))
        assert (need_reference_policy(composed), need_critic(composed)) == (reference, critic), name
    tree = found(configured(method="ppo", update__learning_rate=2e-6, update__micro_batch_tokens=30000))
    assert tree["critic.optim.lr"] == pytest.approx(2e-5)
    assert tree["critic.model.path"] == "org/model"
    assert tree["critic.ppo_infer_max_token_len_per_gpu"] == 30000
    assert (tree["algorithm.use_kl_in_reward"], tree["algorithm.kl_ctrl.kl_coef"]) == (True, 1e-3)


def test_lengths():
    config = configured(rollout__max_new_tokens=3072, evaluation__max_new_tokens=4000)
    tree = found(config)
    assert tree["data.max_prompt_length"] == 1024
    assert tree["data.max_response_length"] == 4000
    assert tree["actor_rollout_ref.rollout.max_model_len"] == 5024
    assert tree["actor_rollout_ref.actor.ppo_max_token_len_per_gpu"] == 16384
    assert tree["polarity"]["max_new_tokens"] == 3072
    cluster = Cluster(overrides=("data.max_prompt_length=2000",))
    assert prompt_tokens(config, cluster) == 2000
    assert found(config, cluster)["actor_rollout_ref.rollout.max_model_len"] == 6000
    long = configured(rollout__max_new_tokens=20000)
    assert found(long)["actor_rollout_ref.actor.ppo_max_token_len_per_gpu"] == 21024
    assert any("21024" in note for note in notes(long))


def test_going_on():
    first, later = found(configured()), found(configured(), going_on=True)
    assert (first["trainer.resume_mode"], first["trainer.val_before_train"]) == ("disable", True)
    assert (later["trainer.resume_mode"], later["trainer.val_before_train"]) == ("auto", False)


def test_checkpoint_and_evaluation_never():
    tree = found(configured(checkpoint__every=0, evaluation__every=0, steps=250))
    assert (tree["trainer.save_freq"], tree["trainer.test_freq"], tree["trainer.val_before_train"]) == (250, -1, False)


def test_machines():
    alone = found(configured())
    assert alone["ray_kwargs.ray_init.address"] == "local"  # not whatever cluster is found on the machine
    many = Cluster(address="10.0.0.1:6379", nodes=2, gpus=8, tensor_parallel=4)
    tree = found(configured(), many)
    assert tree["ray_kwargs.ray_init.address"] == "10.0.0.1:6379"
    assert tree["ray_kwargs.ray_init.runtime_env.env_vars"] == environment(configured(), OUT)
    assert (tree["trainer.nnodes"], tree["trainer.n_gpus_per_node"]) == (2, 8)
    compose(overrides(configured(), OUT, many))
    with pytest.raises(UserError, match="tensor parallel 3 does not divide the 16 GPUs"):
        compose(overrides(configured(), OUT, Cluster(nodes=2, gpus=8, tensor_parallel=3)))


def test_keys_of_verl_s_own():
    cluster = Cluster(overrides=("actor_rollout_ref.rollout.gpu_memory_utilization=0.8", "+trainer.note=x"))
    composed = compose(overrides(configured(), OUT, cluster))
    assert composed.actor_rollout_ref.rollout.gpu_memory_utilization == 0.8
    assert composed.trainer.note == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("actor_rollout_ref.actor.optim.lr=1e-5", "update.learning_rate"),
        ("actor_rollout_ref.actor.optim={lr:1}", "update."),
        ("data.train_files=mine.parquet", "data.train"),
        ("++trainer.total_training_steps=3", "steps"),
        ("+polarity.method=dapo", "polarity's own options"),
        ("trainer.v1.trainer_mode=sync", "polarity's own options"),
        ("nonsense", "KEY=VALUE"),
    ],
)
def test_keys_that_an_option_sets_are_refused(text: str, message: str):
    with pytest.raises(UserError, match=message):
        overrides(configured(), OUT, Cluster(overrides=(text,)))


@pytest.mark.parametrize("text", ["trainer.total_epoch=3", "actor_rollout_ref.model.pth=x", "+critic.model.nothing=1"])
def test_keys_that_verl_does_not_have_are_refused(text: str):
    with pytest.raises(UserError, match=text.split("=")[0].split(".")[-1]) as error:
        compose(overrides(configured(), OUT, Cluster(overrides=(text,))))
    assert "\n" not in str(error.value)


def test_refused_by_name():
    with pytest.raises(UserError, match=r"device cpu.*cpu-demo"):
        overrides(configured(device="cpu"), OUT)
    with pytest.raises(UserError, match=r"device cuda"):
        overrides(configured(device="cuda"), OUT, preset=cpu_overrides())
    with pytest.raises(UserError, match=r"log.attribution_every.*set it to 0"):
        overrides(configured(log__attribution_every=1), OUT)
    with pytest.raises(UserError, match=r"no model directory \./models/mine"):
        overrides(configured(model="./models/mine"), OUT)
    with pytest.raises(UserError, match=r"\$\{ in data\.train_files"):
        overrides(configured(), Path("/tmp/${HOME}"))


def test_the_default_world_needs_no_other_settings():
    """What its recipe says for the embedded engine is honoured or left out with a note, never refused."""
    config = load_config(None, {"method": "a3po"})
    composed = compose(overrides(config, OUT, preset=cpu_overrides(2), cluster=Cluster(gpus=2)))
    assert composed.actor_rollout_ref.model.path.endswith("bases/ledger-general")
    assert composed.trainer.n_gpus_per_node == 2
    assert composed.actor_rollout_ref.rollout.name == "hf_cpu"
    assert environment(config, OUT)["OMP_NUM_THREADS"] == "1"
    assert [note.split()[0].rstrip(":") for note in notes(config)] == ["rollout.logp_old", "log.attribution_every"]


def test_loggers_write_into_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_DIR", "/mine")
    found = environment(configured(log__to=["tensorboard", "wandb"]), Path("runs/x"))
    assert found["TENSORBOARD_DIR"] == str(Path("runs/x/tensorboard").resolve())
    assert found["WANDB_DIR"] == "/mine"
