"""A run's configuration as overrides of verl's: every option of polarity has its place there, or is refused by name.

Pure, and without verl; `compose` (composition.py) has verl check the result before anything starts. Where each option
goes is listed in options.py.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polarity.config import RunConfig
from polarity.engines.verl.composition import hydra_value
from polarity.engines.verl.options import ACTOR, MODEL, OPTIONS, REF, ROLLOUT
from polarity.engines.verl.settings import AGENT_LOOP, AGENT_MODULE, VerlSettings
from polarity.errors import UserError, nearest
from polarity.loggers import PROJECT, run_name
from polarity.methods import Method, Phases
from polarity.methods.surrogates import Clip
from polarity.methods.values import CriticAdvantage
from polarity.worlds import resolve_world

TRAINER = "polarity"  # the name under which plugin.py registers the trainer
NO_BOUND = 1e9  # beyond exp(20), the largest ratio that verl's clamp leaves: a bound that never binds
PROMPT_TOKENS = 1024  # the longest prompt, as in both papers, whose context is prompt and response together
WORLD_PROMPT_TOKENS = 256  # the built-in worlds': their models have 512 positions
AGGREGATIONS = {
    "token_mean": "token-mean",
    "seq_mean_token_mean": "seq-mean-token-mean",
    "seq_mean_token_sum": "seq-mean-token-sum",
    "token_sum_const": "seq-mean-token-sum-norm",
}


@dataclass(frozen=True)
class Cluster:
    """The machines of a run.

    address: a Ray cluster to join (auto, HOST:PORT); None: a Ray of the run's own, on this machine, ended with it.
    gpus: on each node. tensor_parallel: GPUs that share one copy of the model when sampling.
    overrides: verl's own keys (KEY=VALUE), for what polarity has no option for; what it has one for is refused.
    """

    address: str | None = None
    nodes: int = 1
    gpus: int = 1
    tensor_parallel: int = 1
    overrides: tuple[str, ...] = ()


ONE_GPU = Cluster()


def overrides(
    config: RunConfig, out: Path, cluster: Cluster = ONE_GPU, *, going_on: bool = False, preset: Iterable[str] = ()
) -> list[str]:
    """KEY=VALUE for `python -m verl.trainer.main_ppo`, each key once.

    going_on: there is a checkpoint to go on from. preset: overrides that stand for a machine (cpu/), laid over ours and
    under cluster.overrides. Raises UserError, which names option and fix, for what verl cannot honour.
    """
    preset = list(preset)
    refuse(config, cpu=bool(preset))
    method, prompt = config.build_method(), prompt_tokens(config, cluster)
    tree = (
        _data(config, out, prompt)
        | _model(config, MODEL)
        | _actor(config, method, prompt)
        | _rollout(config, cluster, prompt)
        | (_critic(config, method, prompt) if "values" in method.needs else {"critic.enable": False})
        | _algorithm(method)
        | _trainer(config, out, cluster, going_on)
        | _ray(config, out, cluster)
        | _reward(config)
        | {"+polarity": settings(config, out).model_dump(mode="json")}
    )
    lines = {_bare(key): f"{key}={hydra_value(value)}" for key, value in tree.items()}
    for key, text in lines.items():
        if "${" in text:
            raise UserError(
                f"verl takes ${{ in {key} for a reference to another key; take it out, or rename the folder"
            )
    for text in preset:
        lines[_key(text)] = text
    for text in cluster.overrides:
        lines[_refuse_owned(_key(text))] = text
    return list(lines.values())


def refuse(config: RunConfig, *, cpu: bool = False) -> None:
    """Raise UserError for an option that verl cannot honour."""
    if config.device not in (("auto", "cpu") if cpu else ("auto", "cuda")):
        hint = "leave it out" if cpu else "leave it out, or add --preset cpu-demo to try things without a GPU"
        raise UserError(f"device {config.device}: the verl engine runs on {'CPUs' if cpu else 'GPUs'} here; {hint}")
    every = config.log.attribution_every
    if every and not (config.world and resolve_world(config.world).recipe.get("log.attribution_every") == every):
        raise UserError(
            "log.attribution_every: which tokens moved the entropy is measured by the embedded engine only; set it to 0"
        )


def notes(config: RunConfig, cluster: Cluster = ONE_GPU) -> list[str]:
    """What is read otherwise than written, one line each, for the user to see before the run starts."""
    found = []
    if config.rollout.logp_old == "sampled":
        found.append("rollout.logp_old: verl recomputes old log-probs with the trainer's weights, as recomputed says")
    if config.log.attribution_every:
        found.append("log.attribution_every of the world's recipe is left out: only the embedded engine measures it")
    tokens = _micro_batch(config, prompt_tokens(config, cluster))
    if tokens != config.update.micro_batch_tokens:
        found.append(f"update.micro_batch_tokens is raised to {tokens}, the longest row: verl takes no smaller limit")
    return found


def settings(config: RunConfig, out: Path) -> VerlSettings:
    """The section `polarity` of this run."""
    log = config.log
    return VerlSettings(
        method=config.method,
        decay_until=config.decay_until,
        out=str(out.resolve()),
        max_rounds=config.rollout.max_rounds,
        max_new_tokens=config.rollout.max_new_tokens,
        evaluation_tokens=config.evaluation_tokens,
        stop=config.data.stop,
        truncated=config.rollout.truncated,
        final_samples=config.evaluation.final_samples,
        rollouts_every=log.rollouts_every,
        rollout_groups=log.rollout_groups,
        ngrams=log.ngrams,
        ngram_history=log.ngram_history,
    )


def environment(config: RunConfig, out: Path) -> dict[str, str]:
    """Variables that verl's processes need beside the user's own."""
    here = os.getcwd()  # where a user's module:NAME is looked for first, in Ray's workers too
    paths = [here, *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != here)]
    found = {"VERL_USE_EXTERNAL_MODULES": "polarity.engines.verl.plugin", "PYTHONPATH": os.pathsep.join(paths)}
    run = out.resolve()
    folders = {"tensorboard": run / "tensorboard", "wandb": run, "trackio": run / "trackio"}
    for name in config.log.to:
        variable = f"{name.upper()}_DIR"
        found[variable] = os.environ.get(variable, str(folders[name]))
    if config.threads:
        found["OMP_NUM_THREADS"] = str(config.threads)
    return found


def data_files(out: Path) -> tuple[Path, Path]:
    """Where the rows for training and for validation are written."""
    return out.resolve() / "verl" / "train.parquet", out.resolve() / "verl" / "validation.parquet"


def checkpoints(out: Path) -> Path:
    """Where verl keeps its checkpoints, in folders and formats of its own."""
    return out.resolve() / "verl" / "checkpoints"


def prompt_tokens(config: RunConfig, cluster: Cluster = ONE_GPU) -> int:
    """The longest prompt that the run takes, in tokens; data.max_prompt_length among cluster.overrides sets it."""
    for text in reversed(cluster.overrides):
        key, _, value = text.partition("=")
        if key == "data.max_prompt_length" and value.isdigit():
            return int(value)
    return PROMPT_TOKENS if config.world is None else WORLD_PROMPT_TOKENS


def model_name(config: RunConfig) -> str:
    """The model's directory, absolute, or its name on the hub, which verl fetches itself."""
    if config.model is None:
        assert config.world is not None
        world = resolve_world(config.world)
        base = config.base or next(iter(world.bases))
        if base not in world.bases:
            raise UserError(f"world {world.name!r} has no base {base!r}; {nearest(base, world.bases)}")
        return str(world.base_path(base).resolve())
    if Path(config.model).is_dir():
        return str(Path(config.model).resolve())
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", config.model):
        return config.model
    raise UserError(f"no model directory {config.model}; give a directory, or a hub id such as Qwen/Qwen3-8B-Base")


def verl_loss(method: Method | Phases) -> dict[str, Any] | None:
    """The keys of verl's `actor` with which its own loss is the method's, in every phase; None where it cannot be.

    verl always clips dually: a bound that the method does not have is set where it never binds.
    """
    found = [_verl_loss(phase) for phase in method.methods]
    return found[0] if all(loss == found[0] for loss in found) else None


def _verl_loss(method: Method) -> dict[str, Any] | None:
    surrogate = method.surrogate
    own = type(method).token_loss is not Method.token_loss or type(method).loss is not Method.loss
    chosen = method.token_mask is not None and method.token_mask.scope != "step"  # a step's are chosen by `shape`
    if own or chosen or method.token_penalty or method.correction or method.off_policy_mask:
        return None
    if type(surrogate) is not Clip:
        return None
    return {
        "policy_loss.loss_mode": "vanilla",
        "clip_ratio_low": 1.0 if surrogate.low is None else surrogate.low,
        "clip_ratio_high": NO_BOUND if surrogate.high is None else surrogate.high,
        "clip_ratio_c": NO_BOUND if surrogate.dual is None else surrogate.dual,
        "loss_agg_mode": AGGREGATIONS[method.aggregation],
        "entropy_coeff": method.entropy_bonus,
        "use_kl_loss": method.kl.coefficient > 0,
        "kl_loss_coef": method.kl.coefficient,
        "kl_loss_type": method.kl.estimator,
    }


def _data(config: RunConfig, out: Path, prompt: int) -> dict[str, Any]:
    train, validation = data_files(out)
    return {
        "data.train_files": str(train),
        "data.val_files": str(validation),
        "data.train_batch_size": config.rollout.prompts,
        "data.max_prompt_length": prompt,
        "data.max_response_length": _responses(config),
        "data.truncation": "error",
        "data.shuffle": False,  # the file is in the order of the run
        "data.validation_shuffle": False,
        "data.dataloader_num_workers": 0,
        "data.seed": config.seed,
    }


def _reward(config: RunConfig) -> dict[str, Any]:
    data = config.data
    arguments = {
        "verifier": data.verifier if config.world is None else None,
        "world": config.world,
        "verifier_limit": data.verifier_limit,
        "rewards": data.rewards,
        "unsafe": data.unsafe,
    }
    return {
        "reward.custom_reward_function.path": "pkg://polarity.engines.verl.reward",
        "reward.custom_reward_function.name": "compute_score",
        "+reward.custom_reward_function.reward_kwargs": arguments,
    }


def _model(config: RunConfig, where: str) -> dict[str, Any]:
    found = {
        f"{where}.path": model_name(config),
        f"{where}.enable_gradient_checkpointing": config.update.gradient_checkpointing,
        f"{where}.use_remove_padding": config.dtype == "bfloat16",  # packed rows need flash attention, which is 16 bit
    }
    if config.dtype == "float32":
        found[f"+{where}.override_config.attn_implementation"] = "sdpa"
    return found


def _actor(config: RunConfig, method: Method | Phases, prompt: int) -> dict[str, Any]:
    update, loss = config.update, verl_loss(method) or {}
    if loss.get("loss_agg_mode") == AGGREGATIONS["token_sum_const"]:
        loss["loss_scale_factor"] = config.rollout.max_new_tokens
    return {
        f"{ACTOR}.strategy": "fsdp2",
        f"{ACTOR}.ppo_mini_batch_size": update.mini_batch_prompts,
        f"{ACTOR}.ppo_epochs": update.epochs,
        f"{ACTOR}.data_loader_seed": config.seed,
        f"{ACTOR}.use_dynamic_bsz": True,
        f"{ACTOR}.ppo_max_token_len_per_gpu": _micro_batch(config, prompt),
        f"{ACTOR}.calculate_entropy": "entropy" in method.needs,
        # what makes verl keep a reference policy
        f"{ACTOR}.use_kl_loss": any(phase.kl.coefficient > 0 for phase in method.methods),
        **{f"{ACTOR}.{key}": value for key, value in loss.items()},
        **_optimizer(config, f"{ACTOR}.optim", update.learning_rate),
        **_precision(config, f"{ACTOR}.fsdp_config"),
        **_precision(config, f"{REF}.fsdp_config"),
    }


def _optimizer(config: RunConfig, where: str, rate: float) -> dict[str, Any]:
    """verl's schedule goes on once a rollout step, as ours does.

    Its constant schedule begins a warm-up at 0; its cosine can begin at 1 / warmup_steps, as ours does, and is constant
    after it where it has no cycle.
    """
    update = config.update
    found = {
        f"{where}.lr": rate,
        f"{where}.betas": [update.beta1, update.beta2],
        f"{where}.weight_decay": update.weight_decay,
        f"{where}.clip_grad": update.grad_clip,
        f"{where}.lr_warmup_steps": update.warmup_steps,
    }
    if update.warmup_steps:
        found |= {f"{where}.lr_scheduler_type": "cosine", f"{where}.num_cycles": 0.0}
        found[f"{where}.zero_indexed_step"] = False
    return found


def _precision(config: RunConfig, where: str) -> dict[str, Any]:
    kinds = {"param": "bf16" if config.dtype == "bfloat16" else "fp32", "reduce": "fp32", "buffer": "fp32"}
    return {
        f"{where}.model_dtype": "fp32",
        **{f"+{where}.mixed_precision.{kind}_dtype": dtype for kind, dtype in kinds.items()},
    }


def _rollout(config: RunConfig, cluster: Cluster, prompt: int) -> dict[str, Any]:
    rollout, evaluation = config.rollout, config.evaluation
    return {
        f"{ROLLOUT}.name": "vllm",
        f"{ROLLOUT}.n": rollout.group,
        f"{ROLLOUT}.temperature": rollout.temperature,
        f"{ROLLOUT}.max_model_len": prompt + _responses(config),
        f"{ROLLOUT}.max_num_seqs": rollout.batch_rows,
        f"{ROLLOUT}.dtype": config.dtype,
        f"{ROLLOUT}.seed": config.seed,
        f"{ROLLOUT}.tensor_model_parallel_size": cluster.tensor_parallel,
        f"{ROLLOUT}.calculate_log_probs": True,
        f"{ROLLOUT}.val_kwargs.n": evaluation.samples,
        f"{ROLLOUT}.val_kwargs.temperature": evaluation.temperature,
        f"{ROLLOUT}.val_kwargs.top_p": evaluation.top_p,
        f"{ROLLOUT}.val_kwargs.do_sample": evaluation.temperature > 0,
        f"{ROLLOUT}.agent.default_agent_loop": AGENT_LOOP,
        f"{MODEL}.external_lib": AGENT_MODULE,  # registers it in the processes that sample
    }


def _critic(config: RunConfig, method: Method | Phases, prompt: int) -> dict[str, Any]:
    part = next(m.advantage for m in method.methods if isinstance(m.advantage, CriticAdvantage))
    tokens = _micro_batch(config, prompt)
    return {
        "critic.enable": True,
        "critic.strategy": "fsdp2",
        "critic.data_loader_seed": config.seed,
        "critic.cliprange_value": NO_BOUND if part.value_clip is None else part.value_clip,
        "critic.loss_agg_mode": "token-mean",
        "critic.ppo_max_token_len_per_gpu": tokens,
        "+critic.ppo_infer_max_token_len_per_gpu": tokens,  # the one that verl's trainer reads
        **_optimizer(config, "critic.optim", config.update.critic_learning_rate or 10 * config.update.learning_rate),
        **_precision(config, "critic.fsdp"),
        **_model(config, "critic.model"),
    }


def _algorithm(method: Method | Phases) -> dict[str, Any]:
    """What verl reads to know which models there are; advantages and rewards are polarity's."""
    critic = next((m.advantage for m in method.methods if isinstance(m.advantage, CriticAdvantage)), None)
    found: dict[str, Any] = {"algorithm.adv_estimator": "grpo"}
    if critic is not None:
        found = {"algorithm.adv_estimator": "gae", "algorithm.gamma": critic.gamma, "algorithm.lam": critic.lam}
    penalty = max(getattr(m.advantage, "reward_kl", 0.0) for m in method.methods)
    if penalty:
        found |= {"algorithm.use_kl_in_reward": True, "algorithm.kl_penalty": "kl"}
        found |= {"algorithm.kl_ctrl.type": "fixed", "algorithm.kl_ctrl.kl_coef": penalty}
    return found


def _trainer(config: RunConfig, out: Path, cluster: Cluster, going_on: bool) -> dict[str, Any]:
    every, keep = config.evaluation.every, config.checkpoint.keep
    return {
        "trainer.v1.trainer_mode": TRAINER,
        "trainer.nnodes": cluster.nodes,
        "trainer.n_gpus_per_node": cluster.gpus,
        "trainer.total_epochs": 1,  # the file holds the whole run
        "trainer.total_training_steps": config.steps,
        "trainer.test_freq": every or -1,
        "trainer.val_before_train": every > 0 and not going_on,
        "trainer.save_freq": config.checkpoint.every or config.steps,
        "trainer.max_actor_ckpt_to_keep": keep,
        "trainer.max_critic_ckpt_to_keep": keep,
        "trainer.default_local_dir": str(checkpoints(out)),
        "trainer.resume_mode": "auto" if going_on else "disable",
        "trainer.project_name": PROJECT,
        "trainer.experiment_name": run_name(out.resolve()),
        "trainer.logger": ["console", *config.log.to],
    }


def _ray(config: RunConfig, out: Path, cluster: Cluster) -> dict[str, Any]:
    """Without an address Ray would join any cluster it finds on the machine; `local` starts one of the run's own."""
    if cluster.address is None:
        return {"+ray_kwargs.ray_init.address": "local", "+ray_kwargs.ray_init.include_dashboard": False}
    return {
        "+ray_kwargs.ray_init.address": cluster.address,
        "+ray_kwargs.ray_init.runtime_env.env_vars": environment(config, out),  # its nodes know nothing of ours
    }


def _responses(config: RunConfig) -> int:
    """The longest response of the run, in training or evaluation."""
    return max(config.rollout.max_new_tokens, config.evaluation_tokens if config.evaluation.every else 0)


def _micro_batch(config: RunConfig, prompt: int) -> int:
    """Tokens of a forward pass: as set, or the longest row there can be."""
    return max(config.update.micro_batch_tokens, prompt + config.rollout.max_new_tokens)


def _bare(key: str) -> str:
    return key.lstrip("+~")


def _key(text: str) -> str:
    """The key of an override as a user writes it."""
    key, equals, _ = text.partition("=")
    if not _bare(key) or not (equals or key.startswith("~")):
        raise UserError(f"verl override {text!r}: write KEY=VALUE, for example trainer.balance_batch=False")
    return _bare(key)


def _refuse_owned(key: str) -> str:
    """The key, unless one of polarity's options is meant for it: config.yaml would say something else."""
    if key.split(".")[0] == "polarity" or key == "trainer.v1.trainer_mode":
        raise UserError(f"verl override {key}: polarity sets it; use polarity's own options")
    for option, owned in OPTIONS.items():
        if any(key == name or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in owned):
            raise UserError(f"verl override {key}: set polarity's option {option} instead")
    return key
