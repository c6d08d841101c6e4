"""What verl loads: the trainer `polarity`.

By entry point (group verl.plugins) in every process that imports verl, or with
VERL_USE_EXTERNAL_MODULES=polarity.engines.verl.plugin, which is louder: verl passes over entry points that fail with a
line of DEBUG. A run that asks for `trainer.v1.trainer_mode=polarity` then ends with verl's "Unknown trainer"; one that
has settings under `polarity` but another trainer is ended here.
"""

from functools import wraps
from importlib.metadata import version
from typing import Any

from polarity.engines.verl.composition import VERL
from polarity.errors import UserError


def register() -> None:
    """Make the trainer known to verl. Raises UserError for a version of verl that is not supported."""
    found = version("verl")
    if found != VERL:
        raise UserError(f"polarity works with verl {VERL}, this is {found}; pip install verl=={VERL}")
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    import polarity.engines.verl.agent  # noqa: F401
    from polarity.engines.verl.trainer import PolarityTrainer

    start = PPOTrainer.__init__

    @wraps(start)
    def checked(self: Any, config: Any) -> None:
        if config.get("polarity") is not None and not isinstance(self, PolarityTrainer):
            raise UserError(
                f"polarity is set but the trainer is {config.trainer.v1.trainer_mode!r}, which ignores it; "
                f"add trainer.v1.trainer_mode=polarity, or drop polarity.*"
            )
        start(self, config)

    PPOTrainer.__init__ = checked


register()
