"""What verl loads in every process of a CPU run (VERL_USE_EXTERNAL_MODULES): a platform, a rollout, three repairs.

The repairs replace functions of verl 0.9.1 that need a GPU whatever the configuration says. All this is imported while
verl is, before the modules that use it.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import verl.utils.distributed
import verl.utils.fsdp_utils
import verl.utils.model
import verl.workers.rollout.base
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from polarity.engines.verl.cpu import ROLLOUT


class HostMemory:
    """In place of `torch.cuda`: the part of it that verl calls. Memory is that of the process and of the machine."""

    @staticmethod
    def is_available() -> bool:
        return False  # no caches to empty, no random state beside PyTorch's own

    @staticmethod
    def memory_allocated() -> int:
        return psutil.Process().memory_info().rss

    @staticmethod
    def max_memory_allocated() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated
    set_rng_state = staticmethod(torch.set_rng_state)

    @staticmethod
    def mem_get_info() -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @staticmethod
    def get_device_name() -> str:
        return "CPU"  # under which verl looks up peak FLOPS

    @staticmethod
    def set_device(index: int) -> None:
        pass

    @staticmethod
    def synchronize() -> None:
        pass

    @staticmethod
    def empty_cache() -> None:
        pass


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """The CPU as verl's accelerator. Ray counts ranks as resource "GPU", so that verl's own placement applies."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = HostMemory

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # never picked by itself, only with VERL_PLATFORM=cpu

    def current_device(self) -> torch.device:
        return torch.device("cpu")  # an index would mean an accelerator to `tensor.to`

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None


def initialize_process_group(timeout_second: float | None = None, backend: str | None = None) -> None:
    """verl's own, but gloo for CPU tensors only (it would name the device twice), and ranks that meet in a file.

    verl lets them meet at a port that it finds free seconds before it is used, from the range of which the system hands
    ports to everybody: at times somebody else has it by then (EADDRINUSE). All ranks of a CPU run are on one machine.
    """
    if torch.distributed.is_initialized():
        return
    environment = os.environ
    ray_session = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1]
    torch.distributed.init_process_group(
        backend or "cpu:gloo",
        init_method=f"file://{ray_session}/{environment['WG_PREFIX']}",
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        timeout=None if timeout_second is None else timedelta(seconds=timeout_second),
    )


def load_value_model(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
    """verl's own, which asks for flash attention whatever the configuration says: a critic, a model with one label."""
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_pretrained(
        local_path,
        dtype=torch_dtype,
        config=model_config,
        attn_implementation="sdpa",
        trust_remote_code=trust_remote_code,
    )


def offload_policy(pin_memory: bool) -> CPUOffloadPolicy:
    """How FSDP2 keeps the weights of a reference model: pinned for transfers to a GPU, which is not there."""
    return CPUOffloadPolicy(pin_memory=False)


def _load_replica() -> type[RolloutReplica]:
    from polarity.engines.verl.cpu.rollout import Replica

    return Replica


verl.utils.distributed.initialize_global_process_group_ray = initialize_process_group
verl.utils.fsdp_utils.CPUOffloadPolicy = offload_policy
verl.utils.model.load_valuehead_model = load_value_model
verl.workers.rollout.base._ROLLOUT_REGISTRY[ROLLOUT, "async"] = "polarity.engines.verl.cpu.rollout.WeightSender"
RolloutReplicaRegistry.register(ROLLOUT, _load_replica)
