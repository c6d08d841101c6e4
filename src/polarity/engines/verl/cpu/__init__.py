"""verl without a GPU: the support that tests and demos need. Nothing here is used where there are GPUs.

verl 0.9.1 trains on a CPU once it is given a platform (platform.py) and a rollout (rollout.py). What a run needs beside
them stands here, without a dependency, so that launcher and tests say the same: start
`python -m polarity.engines.verl.cpu.main` (MAIN; verl's own verl.trainer.main_ppo does as well, but starts in twice the
time) with `cpu_overrides(ranks)` among its overrides and `cpu_environment()` in its environment.
"""

MAIN = "polarity.engines.verl.cpu.main"
ROLLOUT = "hf_cpu"


def cpu_environment(*modules: str) -> dict[str, str]:
    """Environment variables of a CPU run, for the process that starts verl; Ray hands them on to all of its workers.

    modules: further modules that verl shall load in every process; the platform comes first, what they import finds it.
    """
    return {
        "VERL_USE_EXTERNAL_MODULES": ",".join(["polarity.engines.verl.cpu.platform", *modules]),
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",  # verl registers its FSDP engine for cuda and npu only; it runs on a CPU as well
        "GLOO_SOCKET_IFNAME": "lo",  # all ranks are here, and a host's own name does not resolve everywhere
        # A dozen processes share the cores: one thread each, and none that spins.
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TQ_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_prestart_worker_first_driver": "0",  # a worker before anybody asks, which nobody then uses
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def cpu_overrides(ranks: int = 1) -> list[str]:
    """verl's overrides for `ranks` FSDP2 processes on this machine: float32, gloo, one process of each service.

    They say nothing about model, data, method or length of the run.
    """
    float32 = [f"mixed_precision.{name}_dtype=fp32" for name in ("param", "reduce", "buffer")]
    engines = ("actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.ref.fsdp_config", "critic.fsdp")
    return [
        "trainer.device=cpu",
        "trainer.nnodes=1",
        f"trainer.n_gpus_per_node={ranks}",
        # FSDP1 asks for a GPU. Attention without padding, torch.compile and bfloat16 are for GPUs, too.
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.ref.strategy=fsdp2",
        "critic.strategy=fsdp2",
        *(f"+{engine}.{setting}" for engine in engines for setting in float32),
        *(f"{engine}.use_torch_compile=False" for engine in engines),
        "actor_rollout_ref.actor.use_torch_compile=False",
        "actor_rollout_ref.model.use_remove_padding=False",
        "critic.model.use_remove_padding=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "+critic.model.override_config.attn_implementation=sdpa",
        f"actor_rollout_ref.rollout.name={ROLLOUT}",
        "actor_rollout_ref.rollout.dtype=float32",
        "actor_rollout_ref.rollout.free_cache_engine=False",
        # One rollout for all ranks: verl deals requests to several at random, and no run could be repeated.
        f"actor_rollout_ref.rollout.tensor_model_parallel_size={ranks}",
        # Every process costs seconds to start.
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "reward.num_workers=1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "data.dataloader_num_workers=0",
        f"ray_kwargs.ray_init.num_cpus={8 + 3 * ranks}",  # what all those processes claim, not what there is
        f"+ray_kwargs.ray_init.num_gpus={ranks}",
        "+ray_kwargs.ray_init.include_dashboard=False",
    ]
