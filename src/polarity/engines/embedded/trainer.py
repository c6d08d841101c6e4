"""The training loop. One step, top to bottom:

prompts (P) -> rollouts (N = P*G) -> outcomes -> rewards -> rows kept -> advantages -> shaped advantages (N,T)
-> mini-batches -> loss -> update.

The trainer never asks what a method is called: it asks `method.needs` and calls the method's functions.
s is the rollout step, the first is 0; files and metrics carry s + 1, the number of steps completed.
"""

import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from polarity.analysis import NGramMetrics, credit_metrics, mismatch, rollout_metrics
from polarity.config import RunConfig, refuse_changes, save_config
from polarity.engines.embedded.attribution import Attribution
from polarity.engines.embedded.checkpoint import CRITIC, NGRAMS, TrainerState, load_state, save_checkpoint
from polarity.engines.embedded.critic import Critic, value_metrics
from polarity.engines.embedded.evaluator import evaluate_policy
from polarity.engines.embedded.learner import Learner
from polarity.engines.embedded.policy import Policy, load_policy
from polarity.engines.embedded.rollout import Rollouts, collect, tokenize
from polarity.engines.embedded.source import Source, make_source, model_path
from polarity.engines.embedded.updater import Batch
from polarity.errors import UserError
from polarity.loggers import check_loggers, make_loggers
from polarity.methods import Method, Phases
from polarity.rollout_log import logged_rows, token_fields
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
    ngrams: NGramMetrics | None = None


def train(
    config: RunConfig, out: Path, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> None:
    """Train as `config` says and write the run directory `out`. Raises UserError for anything the user can mend."""
    if config.threads:
        torch.set_num_threads(config.threads)
    check_loggers(config.log.to)
    checkpoint = _resume_from(config, out) if resume else None
    run = prepare(config, checkpoint)
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
    spill = out / "ngrams"
    if config.log.ngrams is not None:
        run.ngrams = NGramMetrics(config.log.ngrams, config.log.ngram_history, spill)
        if checkpoint is not None:
            run.ngrams.load(checkpoint / NGRAMS)
    loggers = make_loggers(config.log.to, out, config.model_dump(mode="json"))
    writer.listeners += [logger.log for logger in loggers]
    try:
        _train(run, writer, progress)
    finally:
        for logger in loggers:
            logger.close()
        shutil.rmtree(spill, ignore_errors=True)  # the checkpoint has what a resumed run needs of it


def _train(run: Run, writer: RunWriter, progress: bool) -> None:
    config = run.config
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
    if run.ngrams is not None:
        problems = [row["id"] for row in rollouts.problems for _ in range(run.config.rollout.group)]
        row |= run.ngrams.step(rollouts.responses, rollouts.texts, rollouts.correct, problems)
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
        due = _due(run.config.log.attribution_every, run.step + 1, run.config.steps)
        watch = run.learner.watch = Attribution(run.learner, batch, rollouts.samples.mask) if due else None
        row |= run.learner.update(method, trained, rows_per_update, run.step, seed_for(seed, "update"))
        row |= watch.metrics() if watch is not None else {}
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
            found = mismatch(samples.logp, logp, samples.mask, rollouts.correct)
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
    if _due(config.log.rollouts_every, step, config.steps):
        writer.rollouts(step, rollout_records(run, rollouts, credit))
    if config.evaluation.every and (last or step % config.evaluation.every == 0):
        _evaluate(run, writer, row, config.evaluation.final_samples if last else config.evaluation.samples)
    else:
        writer.metrics(row)
    if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
        critic_optimizer = run.critic.optimizer.state_dict() if run.critic else None
        optimizer = run.learner.optimizer.state_dict()
        state = TrainerState(step, run.cursor, run.method_state, optimizer, critic_optimizer)
        path = writer.checkpoint_path(step)
        save_checkpoint(path, run.policy, run.critic, run.ngrams, state, config.checkpoint.keep)


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
    """The rows of a rollouts file: `log.rollout_groups` groups whole, mixed groups before uniform ones."""
    group, tokenizer, samples = run.config.rollout.group, run.policy.tokenizer, rollouts.samples
    records = []
    for i in logged_rows(rollouts.groups, rollouts.correct, run.config.log.rollout_groups):
        outcome, problem = rollouts.outcomes[i], rollouts.problems[i // group]
        numbers = token_fields(
            i, len(rollouts.responses[i]), logp_old=credit["logp_old"], logp_rollout=samples.logp,
            entropy=samples.entropy, advantages=credit["advantages"], shaped=credit["shaped"], mask=rollouts.mask,
        )  # fmt: skip
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
                "truncated": bool(samples.truncated[i]),
                "kept": bool(rollouts.keep[i]),
                "token_ids": rollouts.responses[i],
                "tokens": [tokenizer.decode([t]) for t in rollouts.responses[i]],
                **numbers,
            }
        )
    return records


def _due(every: int, step: int, last: int) -> bool:
    """Whether what is logged every so many steps is logged now: at the first and the last step, too; 0 = never."""
    return every > 0 and (step in (1, last) or step % every == 0)


def _resume_from(config: RunConfig, out: Path) -> Path | None:
    """The newest complete checkpoint; None for a run that was stopped before its first one and so starts again."""
    if not (out / "config.yaml").exists():
        raise UserError(f"there is no run in {out} to resume; drop --resume to start it")
    reader = RunReader(out)
    refuse_changes(out, reader.config, config)
    checkpoints = reader.checkpoints
    return checkpoints[max(checkpoints)] if checkpoints else None
