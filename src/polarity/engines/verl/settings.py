"""The top-level key `polarity` of a verl configuration: what polarity's trainer reads.

`polarity train --engine verl` fills it from the run's YAML. In a stock verl command the keys have a plus sign, as in
`+polarity.method=a3po`, since verl's own schema does not know them. The verifier is the reward function's (reward.py).
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from polarity.config import Count, Fraction, Whole
from polarity.errors import UserError, nearest
from polarity.methods import Method, Phases, build_method

# Key of a row's extra_info in the files of data.py: how many tokens its response may have (agent.py).
LIMIT = "max_new_tokens"
AGENT_LOOP, AGENT_MODULE = "polarity", "polarity.engines.verl.agent"
_BY_AGENT_LOOP = ("max_new_tokens", "evaluation_tokens", "stop")


class VerlSettings(BaseModel):
    """Defaults are those of polarity's own configuration, but for `decay_until`: without it a method keeps its rate."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str | dict[str, Any] = Field(description="a catalog name, module:NAME, or a mapping of parts")
    decay_until: Fraction | None = Field(
        None, description="fraction of the run after which decaying shaping has faded out; null = the method's own rate"
    )
    out: str | None = Field(
        None, description="run directory for metrics.jsonl, rollouts/ and evaluations/; null = none is written"
    )
    max_rounds: Count = Field(
        10, description="generation rounds a step may take when the method resamples dropped groups; 1 = drop only"
    )
    max_new_tokens: Count | None = Field(
        None, description="response limit of training rollouts in tokens; null = data.max_response_length"
    )
    evaluation_tokens: Count | None = Field(
        None, description="response limit of evaluations in tokens; null = data.max_response_length"
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="strings that end a response; read by the agent loop `polarity` (agent.py)"
    )
    truncated: Literal["scored", "penalised", "masked"] = Field(
        "scored", description="responses that hit the limit: scored, penalised (by the method), or masked"
    )
    final_samples: Count | None = Field(
        None, description="responses for each problem in the validation after the last step; null = val_kwargs.n"
    )
    rollouts_every: Whole = Field(
        10, description="write rollouts every so many steps, and at the first and last; 0 = never"
    )
    rollout_groups: Count = Field(4, description="groups written each time")
    ngrams: Literal["token", "word"] | None = Field(
        "token", description="n-grams of which sharpening and discovery are measured; null = neither"
    )
    ngram_history: Literal["global", "problem"] = Field(
        "global", description="earlier rollouts that count: those of all problems, or of the same problem"
    )

    @field_validator("method", mode="before")
    @classmethod
    def _json(cls, value: Any) -> Any:
        """A mapping may come as JSON text, which shells and job files carry unharmed."""
        if not isinstance(value, str) or not value.lstrip().startswith("{"):
            return value
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error

    @classmethod
    def of(cls, config: Any) -> "VerlSettings":
        """The settings in a verl configuration (an OmegaConf DictConfig, or plain mappings).

        Raises UserError, one line with the fix, where there are none, a key is unknown or a value is out of range.
        """
        tree = config.get("polarity")
        if tree is None:
            raise UserError("verl's configuration has no key polarity; add for example +polarity.method=a3po")
        if not isinstance(tree, Mapping | str):
            from omegaconf import OmegaConf  # verl brings it; plain mappings need none of it

            tree = OmegaConf.to_container(tree, resolve=True)
        if not isinstance(tree, Mapping):
            raise UserError(f"polarity: expected a mapping of keys such as method, found {tree!r}")
        found = cls.read(tree)
        loop = next((name for name in _BY_AGENT_LOOP if getattr(found, name)), None)
        if loop is not None and _agent_loop(config) != AGENT_LOOP:
            raise UserError(
                f"polarity.{loop} is honoured by the agent loop {AGENT_LOOP!r} only: set actor_rollout_ref."
                f"rollout.agent.default_agent_loop={AGENT_LOOP} and actor_rollout_ref.model.external_lib={AGENT_MODULE}"
            )
        return found

    @classmethod
    def read(cls, tree: Mapping[str, Any]) -> "VerlSettings":
        for key in tree:
            if key not in cls.model_fields:
                raise UserError(f"unknown key 'polarity.{key}'; {nearest(str(key), cls.model_fields)}")
        if tree.get("method") is None:
            raise UserError("polarity.method is not set; add for example +polarity.method=a3po")
        try:
            return cls.model_validate(dict(tree))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(f"polarity.{where}: {first['msg']}, got {first['input']!r}") from error

    def build_method(self, steps: int) -> Method | Phases:
        """The method of a run of `steps` rollout steps (verl's trainer.total_training_steps)."""
        return build_method(self.method, steps=steps, decay_until=self.decay_until)


def _agent_loop(config: Any) -> str | None:
    part = config
    for key in ("actor_rollout_ref", "rollout", "agent", "default_agent_loop"):
        part = None if part is None else part.get(key)
    return part
