"""Where each option of a run goes in verl's configuration, and what there is to know about it.

docs/verl.md prints these tables; tests hold overrides.py and the page to them.
"""

from collections.abc import Mapping

ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
REF = "actor_rollout_ref.ref"
_OPTIM = (f"{ACTOR}.optim", "critic.optim")
_FILES = ("data.train_files", "data.val_files")
_REWARD = "reward.custom_reward_function.reward_kwargs"

# option of polarity -> keys of verl
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "world": (*_FILES, f"{_REWARD}.world"),
    "base": (f"{MODEL}.path", "critic.model.path"),
    "model": (f"{MODEL}.path", "critic.model.path"),
    "seed": ("data.seed", f"{ACTOR}.data_loader_seed", f"{ROLLOUT}.seed", "critic.data_loader_seed"),
    "steps": ("trainer.total_training_steps",),
    "decay_until": ("polarity.decay_until",),
    "data.train": _FILES[:1],
    "data.evaluation": _FILES[1:],
    "data.columns": _FILES,
    "data.max_bad": _FILES,
    "data.verifier": (f"{_REWARD}.verifier",),
    "data.verifier_limit": (f"{_REWARD}.verifier_limit",),
    "data.unsafe": (f"{_REWARD}.unsafe",),
    "data.rewards": (f"{_REWARD}.rewards",),
    "data.template": _FILES,
    "data.stop": ("polarity.stop",),
    "rollout.prompts": ("data.train_batch_size",),
    "rollout.group": (f"{ROLLOUT}.n",),
    "rollout.max_rounds": ("polarity.max_rounds",),
    "rollout.temperature": (f"{ROLLOUT}.temperature",),
    "rollout.max_new_tokens": ("polarity.max_new_tokens", "data.max_response_length", f"{ROLLOUT}.max_model_len"),
    "rollout.truncated": ("polarity.truncated",),
    "rollout.logp_old": (),
    "rollout.batch_rows": (f"{ROLLOUT}.max_num_seqs",),
    "update.mini_batch_prompts": (f"{ACTOR}.ppo_mini_batch_size",),
    "update.micro_batch_tokens": (f"{ACTOR}.ppo_max_token_len_per_gpu", "critic.ppo_infer_max_token_len_per_gpu"),
    "update.epochs": (f"{ACTOR}.ppo_epochs",),
    "update.learning_rate": (f"{ACTOR}.optim.lr",),
    "update.critic_learning_rate": ("critic.optim.lr",),
    "update.warmup_steps": tuple(f"{o}.lr_warmup_steps" for o in _OPTIM),
    "update.beta1": tuple(f"{o}.betas" for o in _OPTIM),
    "update.beta2": tuple(f"{o}.betas" for o in _OPTIM),
    "update.weight_decay": tuple(f"{o}.weight_decay" for o in _OPTIM),
    "update.grad_clip": tuple(f"{o}.clip_grad" for o in _OPTIM),
    "update.gradient_checkpointing": tuple(f"{m}.enable_gradient_checkpointing" for m in (MODEL, "critic.model")),
    "evaluation.every": ("trainer.test_freq", "trainer.val_before_train"),
    "evaluation.splits": _FILES[1:],
    "evaluation.problems": _FILES[1:],
    "evaluation.samples": (f"{ROLLOUT}.val_kwargs.n",),
    "evaluation.final_samples": ("polarity.final_samples",),
    "evaluation.temperature": (f"{ROLLOUT}.val_kwargs.temperature", f"{ROLLOUT}.val_kwargs.do_sample"),
    "evaluation.top_p": (f"{ROLLOUT}.val_kwargs.top_p",),
    "evaluation.max_new_tokens": ("polarity.evaluation_tokens", "data.max_response_length"),
    "checkpoint.every": ("trainer.save_freq",),
    "checkpoint.keep": ("trainer.max_actor_ckpt_to_keep", "trainer.max_critic_ckpt_to_keep"),
    "log.rollouts_every": ("polarity.rollouts_every",),
    "log.rollout_groups": ("polarity.rollout_groups",),
    "log.ngrams": ("polarity.ngrams",),
    "log.ngram_history": ("polarity.ngram_history",),
    "log.attribution_every": (),
    "log.to": ("trainer.logger",),
    "dtype": (
        f"{ROLLOUT}.dtype",
        *(f"{part}.mixed_precision" for part in (f"{ACTOR}.fsdp_config", f"{REF}.fsdp_config", "critic.fsdp")),
    ),
    "device": (),
    "threads": (),
}  # fmt: skip
REMARKS: Mapping[str, str] = {
    "model": "a directory, or a hub id, which verl fetches itself",
    "data.train": "written before verl starts, in the order of the run; and so is the next",
    "data.template": "applied to the rows; agent.py puts no chat template around them",
    "data.stop": "read by agent.py: verl's own loop has none",
    "rollout.max_rounds": "and the number of rows in data.train_files",
    "rollout.logp_old": "verl always recomputes; sampled is read as recomputed, and said",
    "update.mini_batch_prompts": "prompts there, too",
    "update.micro_batch_tokens": "raised to the longest row, below which verl stops",
    "update.warmup_steps": "rollout steps there, too; with the keys of a cosine without a cycle, which begins as ours",
    "evaluation.max_new_tokens": "each row has its limit, for agent.py; the longer of both is verl's",
    "checkpoint.every": "0 becomes the number of steps",
    "log.attribution_every": "refused: the embedded engine measures it; a world's own recipe is left out, and said",
    "device": "auto or cuda; cpu with the preset cpu-demo",
    "threads": "OMP_NUM_THREADS of every process",
}
