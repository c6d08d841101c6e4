"""A run in one YAML file: every option there is outside `method:`, its default, its range and what it means.

Order of precedence, lowest first: the defaults below, the world's recipe, the YAML file, dotted overrides. The result
is resolved (the method written out in full) before anything runs, and `config.yaml` in the run directory is that
result: reading it back gives the same run.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from polarity.errors import UserError, nearest
from polarity.methods import Method, Phases, build_method

Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Your own problems, instead of a world."""

    train: str | None = Field(
        None, description="training problems: a .jsonl, .parquet or .csv file, a directory, or hf:org/name:split"
    )
    evaluation: dict[str, str] = Field({}, description="split name -> evaluation problems: as train, or a benchmark")
    columns: dict[str, str] = Field(
        {}, description="which column is problem, answer or id, where names differ; a dot looks into an object"
    )
    max_bad: float = Field(0.01, ge=0, le=1, description="share of bad rows that may be set aside before reading stops")
    verifier: str = Field(
        "exact",
        description="exact, math, math_answer, choice, code, random, or module:NAME of a function "
        "(response, gold, row=None)",
    )
    verifier_limit: float | None = Field(
        None, gt=0, description="seconds a verifier may take for one response; null = the verifier's own limit"
    )
    unsafe: bool = Field(False, description="let the verifier code run programs where no sandbox is to be had")
    rewards: dict[str, float] = Field(
        {}, description="further verifiers and their weights, added to the score; data.verifier decides what is correct"
    )
    template: str = Field(
        "{problem}",
        description="prompt text, a template's name (a3po, qwen, ...) or a file; {problem} is replaced literally",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="strings that end a response, beside the end-of-sequence token"
    )


class RolloutConfig(Section):
    """How responses are sampled in each step."""

    prompts: Count = Field(32, description="P: prompts kept in a rollout step")
    group: Count = Field(8, description="G: responses sampled for each prompt")
    max_rounds: Count = Field(
        10, description="generation rounds a step may take when the method resamples dropped groups; 1 = drop only"
    )
    temperature: float = Field(1.0, gt=0, description="sampling temperature; divides the logits everywhere")
    max_new_tokens: Count = Field(1024, description="response limit in tokens")
    truncated: Literal["scored", "penalised", "masked"] = Field(
        "scored",
        description="responses that hit the limit: scored as they are, penalised (by the method's overlong penalty), "
        "or masked (no token of them is trained on)",
    )
    logp_old: Literal["sampled", "recomputed"] = Field(
        "sampled",
        description="old log-probs: as captured while sampling (exact in float32), or from a second forward pass",
    )
    batch_rows: Count = Field(512, description="responses decoded at the same time (memory, not mathematics)")


class UpdateConfig(Section):
    """How the policy is updated from the rows a step keeps."""

    mini_batch_prompts: Count = Field(
        32, description="optimiser update = this many prompts x G responses; must divide P"
    )
    micro_batch_tokens: Count = Field(16384, description="tokens in one forward pass (memory, not mathematics)")
    epochs: Count = Field(1, description="passes over the kept rows in a step")
    learning_rate: float = Field(1e-6, gt=0, description="AdamW learning rate, constant after the warm-up")
    critic_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the critic's, for methods that have one; null = ten times learning_rate, as Zhu et al."
    )
    warmup_steps: Whole = Field(0, description="rollout steps of linear learning-rate warm-up")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta1")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW beta2")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    gradient_checkpointing: bool = Field(False, description="trade compute for memory in the backward pass")


class EvaluationConfig(Section):
    """Evaluation while training; also what `polarity eval` does."""

    every: Whole = Field(20, description="evaluate every so many steps, before the first and after the last; 0 = never")
    splits: list[str] | None = Field(None, description="splits to evaluate; null = all")
    problems: Count = Field(32, description="problems of each split")
    samples: Count = Field(8, description="responses for each problem, in evaluations before the last")
    final_samples: Count = Field(64, description="responses for each problem, in the evaluation after the last step")
    temperature: float = Field(1.0, ge=0, description="0 = greedy")
    top_p: Fraction = Field(1.0, description="nucleus sampling in evaluation")
    max_new_tokens: Count | None = Field(None, description="response limit in evaluation; null = rollout's")


class CheckpointConfig(Section):
    every: Whole = Field(20, description="checkpoint every so many steps and after the last; 0 = after the last only")
    keep: Count = Field(1, description="how many checkpoints stay on disk")


class LogConfig(Section):
    rollouts_every: Whole = Field(
        10, description="write rollouts every so many steps, and at the first and last; 0 = never"
    )
    rollout_groups: Count = Field(4, description="groups written each time; a group's best and worst are always there")
    ngrams: Literal["token", "word"] | None = Field(
        "token", description="n-grams of which sharpening and discovery are measured in every step; null = neither"
    )
    ngram_history: Literal["global", "problem"] = Field(
        "global", description="earlier rollouts that count: those of all problems, or of the same problem"
    )
    attribution_every: Whole = Field(
        0,
        description="measure which tokens moved the entropy every so many steps, and at the first and last; 0 = never",
    )
    to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="loggers that get the rows of metrics.jsonl as well; one name, or a list"
    )

    @field_validator("to", mode="before")
    @classmethod
    def _one_logger(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class RunConfig(Section):
    """One training run."""

    method: dict[str, Any] = Field(description="a catalog name, module:NAME, or a mapping of parts")
    world: str | None = Field("ledger", description="a world's name or module:NAME; null with data.train")
    base: str | None = Field(None, description="which base model of the world; null = its default")
    model: str | None = Field(None, description="directory of a Hugging Face causal LM, instead of a world's base")
    seed: Whole = Field(0, description="seeds problems, sampling, shuffling")
    steps: Count = Field(100, description="rollout steps")
    decay_until: Fraction | None = Field(
        0.667,
        description="fraction of the run after which decaying shaping has faded out; null = the method's own rate",
    )
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    update: UpdateConfig = UpdateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the forward passes; weights stay float32")
    device: str = Field("auto", description="auto, cpu or cuda")
    threads: Whole = Field(0, description="CPU threads; 0 = PyTorch's choice")

    @property
    def evaluation_tokens(self) -> int:
        """The response limit of evaluations."""
        return self.evaluation.max_new_tokens or self.rollout.max_new_tokens

    def build_method(self) -> Method | Phases:
        return build_method(self.method, steps=self.steps, decay_until=self.decay_until)


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read YAML and dotted overrides (values as parsed YAML or strings) into a resolved, checked RunConfig.

    Raises UserError, one line with the fix, on malformed YAML, unknown keys, values out of range and combinations
    that would silently do something else.
    """
    tree = _read_yaml(path) if path else {}
    for dotted, value in sorted((overrides or {}).items(), key=lambda item: item[0].count(".")):  # wholes, then parts
        _set(tree, dotted, _parse(dotted, value))
    tree = _with_recipe(tree)
    spec = tree.pop("method", None)
    if spec is None:
        raise UserError("no method given; add --method a3po (polarity methods lists them)")
    _reject_unknown(tree, RunConfig, "")
    try:
        config = RunConfig.model_validate({**tree, "method": spec if isinstance(spec, dict) else {"base": spec}})
    except ValidationError as error:
        raise UserError(_one_line(error)) from error
    method = config.build_method()
    check(config, method)
    base = config.method.get("base")
    resolved = ({"base": base} if base else {}) | method.model_dump(mode="json")
    return config.model_copy(update={"method": resolved})


def check(config: RunConfig, method: Method | Phases) -> None:
    """Refuse what cannot work, with the fix."""
    rollout, update = config.rollout, config.update
    if rollout.prompts % update.mini_batch_prompts:
        raise UserError(
            f"update.mini_batch_prompts {update.mini_batch_prompts} does not divide rollout.prompts {rollout.prompts}; "
            f"both count prompts: choose a divisor of {rollout.prompts}"
        )
    for phase in method.methods:
        _check_method(rollout, phase)
    if update.critic_learning_rate is not None and "values" not in method.needs:
        raise UserError(
            f"update.critic_learning_rate is set but method {method.name!r} has no critic; leave it out, or use ppo"
        )
    if config.dtype == "bfloat16" and rollout.logp_old == "sampled":
        raise UserError("dtype bfloat16 samples in lower precision; set rollout.logp_old to recomputed")
    if config.world is None and config.data.train is None:
        raise UserError("neither world nor data.train is set; give one of them, for example --world ledger")
    if config.world is None and config.model is None:
        raise UserError("data.train needs a model; set model to the directory of a Hugging Face causal LM")
    if config.world is not None and config.data != DataConfig():
        raise UserError("world and data are both set; a world brings its own problems and verifier: drop one of them")
    if config.base is not None and (config.world is None or config.model is not None):
        raise UserError("base names a world's base model; it cannot stand beside model or without a world")
    if config.log.ngrams is None and config.log.ngram_history != "global":
        raise UserError("log.ngram_history is set but log.ngrams is null; set log.ngrams to token or word")
    if config.log.ngram_history == "problem" and config.world is not None:
        raise UserError(
            "log.ngram_history is problem, and a world never gives the same problem twice, so that everything would "
            "count as discovered; set it to global"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the embedded engine is one process; for several GPUs use the TRL or verl engine")


def _check_method(rollout: RolloutConfig, method: Method) -> None:
    """Refuse rollout settings that do not fit the method, or one phase of it."""
    if rollout.group == 1 and method.compares_group:
        raise UserError(
            f"method {method.name!r} compares rewards within a group and rollout.group is 1, so every advantage "
            f"would be 0; set rollout.group to 2 or more, or use reinforce, psr or nsr"
        )
    if rollout.truncated == "penalised" and method.overlong is None:
        raise UserError(
            f"rollout.truncated is 'penalised' but method {method.name!r} has no overlong penalty; "
            f"set method.overlong.buffer, or rollout.truncated to scored or masked"
        )
    if method.overlong is not None and rollout.truncated != "penalised":
        raise UserError(
            f"method {method.name!r} has an overlong penalty but rollout.truncated is {rollout.truncated!r}; "
            f"set rollout.truncated to penalised, or method.overlong to null"
        )
    if method.overlong is not None and method.overlong.buffer > rollout.max_new_tokens:
        raise UserError(
            f"method.overlong.buffer {method.overlong.buffer} is longer than rollout.max_new_tokens "
            f"{rollout.max_new_tokens}; set it to about a fifth of that"
        )
    if method.correction is not None and rollout.logp_old == "sampled":
        raise UserError(
            f"method {method.name!r} corrects for train-inference mismatch, and there is none: sampler and trainer "
            f"share weights and precision; set rollout.logp_old to recomputed, or method.correction to null"
        )
    watched = sorted(name for name in method.watches if name.startswith("mismatch/"))
    if watched and rollout.logp_old == "sampled":
        raise UserError(
            f"method {method.name!r} follows {watched[0]}, and there is nothing to measure: sampler and trainer share "
            f"weights and precision; set rollout.logp_old to recomputed"
        )


def refuse_changes(out: Path, saved: Mapping[str, Any], config: RunConfig) -> None:
    """Raise UserError when the run in `out`, whose config.yaml is `saved`, was started with other settings."""
    old, new = flatten(saved), flatten(config.model_dump(mode="json"))
    changed = sorted(k for k in old.keys() | new.keys() if k != "steps" and old.get(k) != new.get(k))
    if not changed:
        return
    if all(k.endswith(".per_step") for k in changed) and old.get("steps") != new.get("steps"):
        raise UserError(
            f"{out} was started with {old['steps']} steps and a decay laid out over them; go on with that number, or "
            f"start a run of {new['steps']} in another --out"
        )
    key = changed[0]
    raise UserError(
        f"{out} was started with {key} = {old.get(key)!r}, not {new.get(key)!r}; only steps may change on --resume: "
        f"drop the other settings, or choose another --out"
    )


def save_config(config: RunConfig) -> str:
    """The resolved configuration as YAML text."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def options(model: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, str]:
    """Dotted key -> description of every option outside `method:`."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            found |= options(annotation, f"{prefix}{name}.")
        elif name != "method":
            found[prefix + name] = field.description or ""
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys; a list of mappings (the phases of a method) has its indices as keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(i): item for i, item in enumerate(value)}
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: malformed YAML: {getattr(error, 'problem', None) or error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys such as `method: a3po`, found {type(tree).__name__}")
    return tree


def _parse(dotted: str, value: Any) -> Any:
    if not isinstance(value, str) or dotted == "data.template":  # a prompt may look like YAML
        return value
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--{dotted} {value!r}: not a YAML value") from error
    if isinstance(parsed, str):  # YAML 1.1 reads 1e-5 as text
        try:
            return float(parsed)
        except ValueError:
            return parsed
    return parsed


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for i, parent in enumerate(parents):
        child = tree.get(parent, {})
        if parent == "method" and i == 0 and isinstance(child, str):
            child = {"base": child}
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise UserError(f"--{dotted}: {'.'.join(parents[: i + 1])} is a single value, it has no parts")
        tree[parent] = child = dict(child)
        tree = child
    tree[leaf] = value


def _with_recipe(tree: dict[str, Any]) -> dict[str, Any]:
    """Lay the user's tree over the recipe of the world it names."""
    from polarity.worlds import resolve_world  # worlds stand on the same floor; only their recipe is read here

    data = tree.get("data")
    if "world" not in tree and isinstance(data, dict) and data.get("train"):
        return {**tree, "world": None}
    world = tree.get("world", RunConfig.model_fields["world"].default)
    if world is None:
        return tree
    if not isinstance(world, str):
        raise UserError(f"world: expected a name, found {world!r}")
    found = resolve_world(world)
    merged: dict[str, Any] = {}
    base = found.bases.get(tree["base"]) if isinstance(tree.get("base"), str) else None
    for dotted, value in {**found.recipe, **(base.recipe if base else {})}.items():
        _set(merged, dotted, value)
    return _merge(merged, tree)


def _merge(low: dict[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(low)
    for key, value in high.items():
        both = isinstance(out.get(key), dict) and isinstance(value, Mapping)
        out[key] = _merge(out[key], value) if both else value
    return out


def _reject_unknown(tree: Mapping[str, Any], model: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        if key not in model.model_fields:
            raise UserError(f"unknown key {prefix + str(key)!r}; {nearest(prefix + str(key), [*options(), 'method'])}")
        annotation = model.model_fields[key].annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            if not isinstance(value, Mapping):
                raise UserError(f"{prefix}{key}: expected a mapping with keys {', '.join(annotation.model_fields)}")
            _reject_unknown(value, annotation, f"{prefix}{key}.")


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(p) for p in first['loc'])}: {first['msg']}, got {first['input']!r}"
