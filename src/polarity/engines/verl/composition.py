"""Hydra's and verl's side of a configuration: values as a command line takes them, composition, verl's own checks."""

import contextlib
import copy
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polarity.engines.verl.settings import VerlSettings
from polarity.errors import UserError

VERL = "0.9.1"
_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*")
_WORDS = ("null", "true", "false", "nan", "inf")


def hydra_value(value: Any) -> str:
    """JSON data as Hydra's command line reads it; plain words and paths stay unquoted.

    Strings may hold anything but `${`, which is a reference to another key, and stays one however it is escaped: verl
    resolves its configuration more than once.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
            return value
        return '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + (r"\"" if m[2] else ""), value) + '"'
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(str(name))}:{hydra_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(hydra_value, value)) + "]"
    return repr(value)


def _key(name: str) -> str:
    return re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", name)


def require_verl() -> Path:
    """The folder of the installed verl. Raises UserError where there is none, or one of another version."""
    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise UserError('verl is not installed; pip install "polarity-rl[verl]" in an environment of its own')
    found = version("verl")
    if found != VERL:
        raise UserError(f"verl {found} is installed, and polarity is made for {VERL}; pip install verl=={VERL}")
    return Path(next(iter(spec.submodule_search_locations)))


def compose(overrides: Iterable[str]) -> Any:
    """verl's own composition of the overrides, an OmegaConf DictConfig, after the checks verl makes before it starts.

    Nothing is fetched and no Ray is started. Raises UserError with verl's reason.
    """
    folder = require_verl()
    from hydra import compose as composed
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(config_dir=str(folder / "trainer" / "config"), version_base=None):
            config = composed("ppo_trainer", overrides=list(overrides))
        _validate(config)
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, AssertionError, ValueError, TypeError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise UserError(f"verl refuses its configuration: {' '.join(str(cause).split())[:500]}") from error
    return config


def _validate(config: Any) -> None:
    """verl's validate_config, its dataclasses, and polarity's section; the models themselves are not looked up."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.workers.config import HFModelConfig

    VerlSettings.of(config).build_method(config.trainer.total_training_steps)
    known = {field.name for field in fields(HFModelConfig)} | {"_target_"}
    for model in (config.actor_rollout_ref.model, config.critic.model):
        unknown = sorted(set(model) - known)
        if unknown:
            raise UserError(f"verl's model configuration has no key {unknown[0]!r}; drop that override")
    parts = config.actor_rollout_ref
    gpus, parallel = config.trainer.nnodes * config.trainer.n_gpus_per_node, parts.rollout.tensor_model_parallel_size
    if gpus % parallel:
        raise UserError(f"tensor parallel {parallel} does not divide the {gpus} GPUs; choose a divisor")
    checked = copy.deepcopy(config)
    checked.critic.model = None  # making it would fetch the model's tokenizer
    with contextlib.redirect_stdout(io.StringIO()):
        validate_config(checked, need_reference_policy(checked), need_critic(checked))
    for section in (parts.rollout, parts.ref.fsdp_config, config.algorithm):
        omega_conf_to_dataclass(section)
