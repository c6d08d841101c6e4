"""The training loop. One step, top to bottom:

prompts (P) -> rollouts (N = P*G) -> outcomes -> rewards -> rows kept -> advantages -> shaped advantages (N,T)
-> mini-batches -> loss -> update.

The trainer never asks what a method is called: it asks `method.needs` and calls the method's functions.
s is the rollout step, the first is 0; files and metrics carry s + 1, the number of steps completed.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from polarity.analysis import credit_metrics, mismatch, rollout_metrics
from polarity.config import RunConfig, refuse_changes, save_config
from polarity.engines.embedded.checkpoint import CRITIC, TrainerState, load_state, save_checkpoint
from polarity.engines.embedded.critic import Critic, value_metrics
from polarity.engines.embedded.evaluator import evaluate_policy
from polarity.engines.embedded.learner import Learner
from polarity.engines.embedded.policy import Policy, load_policy
from polarity.engines.embedded.rollout import Rollouts, collect, tokenize
from polarity.engines.embedded.source import Source, make_source, model_path
from polarity.engines.embedded.updater import Batch
from polarity.errors import UserError
from polarity.methods import Method, Phases
from polarity.rundir import RunReader, RunWriter
from polarity.seeds import seed_for

Metrics = dict[str, float]
Credit = dict[str, Tensor]  # advantages (N,) or (N,T); shaped, logp_old (N,T)


@dataclass
class Run:
    """Everything a step reads or changes."""

    config: RunConfig
    method: Method | Phases
    source: Source
    policy: Policy
    reference: Policy | None
    learner: Learner
    critic: Critic | None
    step: int = 0
    cursor: int = 0
    method_state: Any = None


def train(
    config: RunConfig, out: Path, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> None:
    """Train as `config` says and write the run directory `out`. Raises UserError for anything the user can mend."""
    if config.threads:
        torch.set_num_threads(config.threads)
    run = prepare(config, _resume_from(config, out) if resume else None)
    if run.step > config.steps:
        raise UserError(f"{out} has completed {run.step} steps already; give --steps {run.step} or more to go on")
    writer = RunWriter(out)
    if resume:
        writer.rewind(run.step or -1)
        writer.config(save_config(config))
    else:
        RunWriter.create(out, save_config(config), seed=config.seed, overwrite=overwrite)
        for line in run.source.quarantine(out / "quarantine"):
            print(line, file=sys.stderr)
    if run.step == 0 and config.evaluation.every and run.source.split_names:
        _evaluate(run, writer, {"step": 0}, config.evaluation.samples)
    bar = tqdm(total=config.steps, initial=run.step, desc=run.method.name, disable=not progress, unit="step")
    while run.step < config.steps:
        rollouts, credit, row = train_step(run)
        _record(run, writer, rollouts, credit, row)
        bar.set_postfix(
            reward=f"{row['reward/mean']:.3f}", entropy=f"{row['entropy/mean']:.3f}", length=f"{row['length/mean']:.0f}"
        )
        bar.update()
    bar.close()


def prepare(config: RunConfig, checkpoint: Path | None = None) -> Run:
    """Load everything a run needs, from the base model or from a checkpoint."""
    method = config.build_method()
    source = make_source(config)
    source.splits(config.evaluation.splits, 1)  # an unknown split is an error now, not after an hour
    base, limit = model_path(config), config.rollout.max_new_tokens

    def load(path: Path, *, trained: bool) -> Policy:
        checkpointing = trained and config.update.gradient_checkpointing
        bfloat16 = config.dtype == "bfloat16"
        return load_policy(path, device=config.device, bfloat16=bfloat16, gradient_checkpointing=checkpointing)

    policy = load(checkpoint or base, trained=True)
    tokenize(policy, source, source.finite(), limit)  # a prompt too long is an error now, too
    reference = load(base, trained=False) if "logp_ref" in method.needs else None
    critic = Critic(load(base, trained=True), config.update, limit) if "values" in method.needs else None
    learner = Learner(policy, config.update, config.rollout.temperature, limit)
    run = Run(config, method, source, policy, reference, learner, critic)
    if checkpoint is not None:
        state = load_state(checkpoint)
        learner.optimizer.load_state_dict(state.optimizer)
        run.step, run.cursor, run.method_state = state.step, state.cursor, state.method
        if critic is not None:
            if state.critic_optimizer is None:
                raise UserError(f"{checkpoint} has no critic, which method {method.name!r} needs; drop --resume")
            critic.load(checkpoint / CRITIC)
            critic.optimizer.load_state_dict(state.critic_optimizer)
    return run


def train_step(run: Run) -> tuple[Rollouts, Credit, Metrics]:
    """One rollout step. Returns the rollouts, what credit each token was given, and the step's metrics row."""
    started = time.perf_counter()
    s, method = run.step, run.method.at(run.step)
    seed = seed_for(run.config.seed, "step", s)
    rollouts, run.cursor = collect(
        run.policy, run.source, method, run.config.rollout, cursor=run.cursor, seed=seed_for(seed, "sampling")
    )
    sampled = time.perf_counter()
    samples = rollouts.samples
    row = rollout_metrics(
        rollouts.correct,
        rollouts.rewards,
        rollouts.groups,
        samples.truncated,
        samples.logp,
        samples.entropy,
        samples.mask,
    )
    row |= {
        "rollouts/generated": float(len(rollouts.keep)),
        "rollouts/kept": float(rollouts.keep.sum()),
        "rollouts/rounds": float(rollouts.rounds),
    }
    statuses = [outcome.status for outcome in rollouts.outcomes]
    for status in ("unparsed", "timeout", "error"):
        row[f"verifier/{status}"] = statuses.count(status) / len(statuses)
    credit, found = learn(run, method, rollouts, seed)
    row |= found
    run.method_state = method.update_state(run.method_state, row)
    run.step = s + 1
    done = time.perf_counter()
    row |= {"time/rollout": sampled - started, "time/update": done - sampled, "time/step": done - started}
    return rollouts, credit, {"step": run.step} | row


def learn(run: Run, method: Method, rollouts: Rollouts, seed: int) -> tuple[Credit, Metrics]:
    """Everything of a step that comes after sampling: old policy, credit for each token, updates."""
    batch, row = _old_policy(run, method, rollouts)
    if run.critic is not None and "values" in method.needs:
        batch, found = _old_values(run.critic, method, rollouts, batch)
        row |= found
    advantages = method.advantages(
        rollouts.rewards, rollouts.groups, rollouts.correct,
        mask=batch.mask, values=batch.values, logp_old=batch.logp_old, logp_ref=batch.logp_ref,
    )  # fmt: skip
    shaped = method.shape(
        advantages, batch.logp_old, batch.entropy_old, batch.mask & rollouts.keep[:, None],
        correct=rollouts.correct, step=run.step, state=run.method_state,
    )  # fmt: skip
    batch.advantages.copy_(shaped)
    weights = method.shaping.weights(run.step, run.method_state)
    row |= {f"{polarity}/weight": weight for polarity, weight in weights.items()}
    kept = rollouts.keep.nonzero()[:, 0]
    trained = batch.rows(kept)
    if len(kept):
        row |= credit_metrics(
            advantages[kept], shaped[kept], batch.logp_old[kept], rollouts.correct[kept], batch.mask[kept]
        )
        rows_per_update = run.config.update.mini_batch_prompts * run.config.rollout.group
        row |= run.learner.update(method, trained, rows_per_update, run.step, seed_for(seed, "update"))
        if run.critic is not None and trained.values is not None:
            row |= run.critic.update(method, trained, rows_per_update, run.step, seed_for(seed, "critic"))
    else:
        row["update/count"] = 0.0
    return {"advantages": advantages, "shaped": shaped, "logp_old": batch.logp_old}, row


def _old_policy(run: Run, method: Method, rollouts: Rollouts) -> tuple[Batch, Metrics]:
    """All N rows with old log-probs and entropy: as sampled, or recomputed and then compared with sampling."""
    samples = rollouts.samples
    batch = Batch(
        prompts=rollouts.prompts,
        responses=rollouts.responses,
        mask=rollouts.mask,
        logp_old=samples.logp,
        entropy_old=samples.entropy,
        advantages=torch.zeros_like(samples.logp),
        correct=rollouts.correct,
        logp_rollout=samples.logp if "logp_rollout" in method.needs else None,
    )
    found: Metrics = {}
    again = run.config.rollout.logp_old == "recomputed"
    proxy = method.logp_proxy if "logp_proxy" in method.needs else None
    if again or proxy is not None:
        logp, entropy, logp_proxy = run.learner.score(batch, entropy=again, proxy=proxy)
        batch = replace(batch, logp_proxy=logp_proxy)
        if again:
            found = mismatch(samples.logp, logp, samples.mask)
            assert entropy is not None
            batch = replace(batch, logp_old=logp, entropy_old=entropy)
    if run.reference is not None and "logp_ref" in method.needs:
        batch = replace(batch, logp_ref=run.learner.score(batch, entropy=False, policy=run.reference)[0])
    return batch, found


def _old_values(critic: Critic, method: Method, rollouts: Rollouts, batch: Batch) -> tuple[Batch, Metrics]:
    """The batch with the critic's values before the step's updates, and the returns that it is then fitted to."""
    values = critic.values(batch)
    targets = method.value_targets(rollouts.rewards, batch.mask, values, batch.logp_old, batch.logp_ref)
    return replace(batch, values=values, value_targets=targets), value_metrics(values, targets, batch.mask)


def _record(run: Run, writer: RunWriter, rollouts: Rollouts, credit: Credit, row: Metrics) -> None:
    """Write what a step leaves behind. The checkpoint comes last: a resumed run repeats what is not in it."""
    config, step = run.config, run.step
    last = step == config.steps
    every = config.log.rollouts_every
    if every and (step == 1 or last or step % every == 0):
        writer.rollouts(step, rollout_records(run, rollouts, credit))
    if config.evaluation.every and (last or step % config.evaluation.every == 0):
        _evaluate(run, writer, row, config.evaluation.final_samples if last else config.evaluation.samples)
    else:
        writer.metrics(row)
    if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
        critic_optimizer = run.critic.optimizer.state_dict() if run.critic else None
        optimizer = run.learner.optimizer.state_dict()
        state = TrainerState(step, run.cursor, run.method_state, optimizer, critic_optimizer)
        save_checkpoint(writer.checkpoint_path(step), run.policy, run.critic, state, config.checkpoint.keep)


def _evaluate(run: Run, writer: RunWriter, row: Metrics, samples: int) -> None:
    """Evaluate, write results and samples, and the metrics row with eval/SPLIT/NAME added."""
    started = time.perf_counter()
    found = evaluate_policy(run.policy, run.source, run.config, samples)
    writer.evaluation(run.step, {"step": run.step, **found})
    for split, metrics in found["results"].items():
        row |= {f"eval/{split}/{name}": value for name, value in metrics.items() if isinstance(value, float)}
    row["time/evaluation"] = time.perf_counter() - started
    writer.metrics(row)


def rollout_records(run: Run, rollouts: Rollouts, credit: Credit) -> list[dict[str, Any]]:
    """The rows of a rollouts file: the first `log.rollout_groups` groups whole, mixed groups before uniform ones."""
    group, tokenizer = run.config.rollout.group, run.policy.tokenizer
    solved = rollouts.correct.view(-1, group).double().mean(1)
    order = sorted(range(len(solved)), key=lambda g: (bool(solved[g] == 0 or solved[g] == 1), g))
    records = []
    for i in (g * group + j for g in order[: run.config.log.rollout_groups] for j in range(group)):
        n = len(rollouts.responses[i])
        outcome, problem = rollouts.outcomes[i], rollouts.problems[i // group]
        advantage = credit["advantages"][i] if credit["advantages"].dim() == 2 else credit["advantages"][i].expand(n)
        shaped = credit["shaped"][i, :n]
        weight = torch.where(advantage[:n] != 0, shaped / advantage[:n], 1.0) * rollouts.mask[i, :n]
        records.append(
            {
                "step": run.step,
                "problem_id": problem["id"],
                "group": i // group,
                "prompt": run.source.prompt(problem),
                "response": rollouts.texts[i],
                "gold": problem["answer"],
                "correct": outcome.correct,
                "status": outcome.status,
                "strategy": outcome.strategy,
                "reward": float(rollouts.rewards[i]),
                "truncated": bool(rollouts.samples.truncated[i]),
                "kept": bool(rollouts.keep[i]),
                "token_ids": rollouts.responses[i],
                "tokens": [tokenizer.decode([t]) for t in rollouts.responses[i]],
                "logp_old": _rounded(credit["logp_old"][i, :n]),
                "logp_rollout": _rounded(rollouts.samples.logp[i, :n]),
                "entropy": _rounded(rollouts.samples.entropy[i, :n]),
                "advantage": float(advantage[0]) if credit["advantages"].dim() == 1 else _rounded(advantage[:n]),
                "weight": _rounded(weight),
            }
        )
    return records


def _rounded(values: Tensor) -> list[float]:
    return [round(v, 5) for v in values.tolist()]


def _resume_from(config: RunConfig, out: Path) -> Path | None:
    """The newest complete checkpoint; None for a run that was stopped before its first one and so starts again."""
    if not (out / "config.yaml").exists():
        raise UserError(f"there is no run in {out} to resume; drop --resume to start it")
    reader = RunReader(out)
    refuse_changes(out, reader.config, config)
    checkpoints = reader.checkpoints
    return checkpoints[max(checkpoints)] if checkpoints else None
