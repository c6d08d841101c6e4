"""verl's synchronous trainer with polarity's methods: one step, top to bottom.

rollouts (in rounds, sampling.py) -> old log-probs, reference, values (verl) -> credit for each token (rows.py) -> kept
rows, laid out over mini-batches and ranks (layout.py) -> updates with the method's own loss (worker.py, loss.py).

Nothing is forked: what verl does between these is verl's. s, the rollout step, counts from 0 and is verl's
global_steps - 1; files and metrics carry s + 1. Loaded by plugin.py; chosen with trainer.v1.trainer_mode=polarity.
"""

from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.utils.padding import response_from_nested, response_to_nested

from polarity.analysis import credit_metrics, mismatch, rollout_metrics
from polarity.engines.verl.layout import lay_out
from polarity.engines.verl.loss import Loss
from polarity.engines.verl.record import Recorder
from polarity.engines.verl.rows import TENSORS, Credit, Rows, credit, kept, read_rows
from polarity.engines.verl.sampling import Rounds
from polarity.engines.verl.settings import VerlSettings
from polarity.engines.verl.validation import evaluation
from polarity.engines.verl.worker import PolarityWorker
from polarity.errors import UserError
from polarity.seeds import seed_for

Metrics = dict[str, float]


@register_trainer("polarity")
class PolarityTrainer(PPOTrainerSync):
    """The method of the configuration's `polarity` section, on verl's workers."""

    def __init__(self, config: Any):
        self.settings = VerlSettings.of(config)
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl compares with this word in several places
        super().__init__(config)
        self.limit = int(self.settings.max_new_tokens or config.data.max_response_length)
        self.recorder: Recorder | None = None
        self.row: Metrics = {}
        self.evaluated: Metrics = {}
        self.val_dataloader: Any

    # ---- start ----

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        self.method = self.settings.build_method(self.total_training_steps)
        if "logp_ref" in self.method.needs and not self.use_reference_policy:
            raise UserError(f"method {self.method.name!r} needs a reference policy; set actor.use_kl_loss=True")
        if ("values" in self.method.needs) != self.use_critic:
            has = "needs" if "values" in self.method.needs else "has no"
            raise UserError(f"method {self.method.name!r} {has} critic; set critic.enable to match it")
        self.eos = _ends(self.config.actor_rollout_ref.model.path, self.tokenizer)

    def _build_replay_buffer(self) -> Rounds:
        sampler = self.config.trainer.v1.sampler
        method = self.settings.build_method(int(self.config.trainer.total_training_steps or 1))
        return Rounds(
            self.settings.max_rounds,
            self._kept_groups if "resample" in method.needs else None,
            trainer_mode="sync",
            trainer_config=self.config.trainer.v1.get("sync", {}),
            max_off_policy_threshold=sampler.max_off_policy_threshold,
            max_off_policy_strategy=sampler.max_off_policy_strategy,
            sampler_kwargs=sampler.sampler_kwargs,
            refill_fn=self._add_prompts_to_generate,
            poll_interval=0.2,
        )

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.ActorRollout, Role.ActorRolloutRef, Role.Actor):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(PolarityWorker)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self.recorder = Recorder(self.settings, self.tokenizer)
        self.method_state = self.recorder.resume(self.global_steps, self._checkpoint_folder())

    def _save_checkpoint(self) -> None:
        assert self.recorder is not None
        self.recorder.save(self._checkpoint_folder(), self.method_state)  # before verl names the checkpoint complete
        super()._save_checkpoint()

    def _checkpoint_folder(self) -> Path:
        return Path(self.config.trainer.default_local_dir).absolute() / f"global_step_{self.global_steps}"

    # ---- a step ----

    def on_step_begin(self) -> None:
        super().on_step_begin()
        self.now = self.method.at(self.global_steps - 1)
        self.actor_rollout_wg.set_loss_fn(Loss(self.now, self.limit))

    def _kept_groups(self, batch: KVBatchMeta) -> int:
        rows = read_rows(batch, self.eos, self.limit)
        _, keep = kept(self.now, rows, self.limit, len(batch.keys))
        return len(rows.groups[keep].unique())

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        return dp_size if not self.use_critic else super()._get_required_batch_multiple(dp_size)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: Metrics) -> KVBatchMeta:
        proxy = "logp_proxy" in self.now.needs
        batch.extra_info["polarity_proxy"] = proxy
        batch = super()._compute_old_log_prob(batch, metrics)
        if proxy:
            names = ["logp_proxy", "response_mask"]
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
            data["logp_proxy"] = response_from_nested(data["logp_proxy"], data["response_mask"])
            batch = tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=data.select("logp_proxy"))
        batch.extra_info.pop("polarity_proxy", None)
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: Metrics) -> KVBatchMeta:
        """Credit for all rows; then the batch is the rows that are trained on, and the others leave the queue."""
        s = self.global_steps - 1
        rows = read_rows(batch, self.eos, self.limit)
        masked = self.settings.truncated == "masked"
        given = credit(self.now, rows, self.limit, self.config.data.train_batch_size, masked, s, self.method_state)
        self.row = self._metrics(rows, given, s)
        assert self.recorder is not None
        self.row |= self.recorder.rollouts(self.global_steps, rows, given, self.total_training_steps)
        where = {key: i for i, key in enumerate(rows.keys)}
        tags = {key: tag for key, tag in zip(batch.keys, batch.tags, strict=True) if key in where}
        keys = [key for key, keep in zip(rows.keys, given.keep.tolist(), strict=True) if keep]
        gone = [key for key in batch.keys if key not in set(keys)]
        if gone:
            tq.kv_clear(keys=gone, partition_id=batch.partition_id)
        chosen = torch.tensor([where[key] for key in keys], dtype=torch.long)
        self.lengths = given.mask[chosen].sum(1)
        trained = KVBatchMeta(
            partition_id=batch.partition_id, keys=keys, tags=[tags[key] for key in keys], extra_info=batch.extra_info
        )
        if keys:
            self._put(trained, given, chosen, rows)
        return trained

    def _put(self, trained: KVBatchMeta, given: Credit, chosen: torch.Tensor, rows: Rows) -> None:
        mask = tq.kv_batch_get(keys=trained.keys, partition_id=trained.partition_id, select_fields=["response_mask"])[
            "response_mask"
        ]
        own = given.mask[chosen].long()
        fields = {"advantages": given.shaped[chosen], "response_mask": own, "loss_mask": own}
        fields["returns"] = given.returns[chosen] if given.returns is not None else given.shaped[chosen]
        nested: dict[str, Any] = {name: response_to_nested(value, mask) for name, value in fields.items()}
        nested["correct"] = rows.correct[chosen]
        tq.kv_batch_put(
            keys=trained.keys,
            partition_id=trained.partition_id,
            fields=TensorDict(nested, batch_size=len(trained.keys)),
        )

    def _update_actor(self, batch: KVBatchMeta, metrics: Metrics) -> KVBatchMeta:
        """The step's mini-batches, epoch by epoch. A step that keeps nothing makes no update."""
        actor = self.config.actor_rollout_ref.actor
        per_update = actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        found: dict[str, list[Any]] = {}
        epochs = actor.ppo_epochs if batch.keys else 0
        for epoch in range(epochs):
            seed = seed_for(actor.data_loader_seed, "update", self.global_steps - 1, epoch)
            laid = lay_out(self.lengths, per_update, self._ranks(), seed)
            part = self._padded(batch, laid.order)
            part.extra_info = {
                "temperature": self.config.actor_rollout_ref.rollout.temperature,
                "calculate_entropy": "entropy" in self.now.needs,
                "distillation_use_topk": False,
                "distillation_only": False,
                "global_batch_size": per_update,
                "seed": seed,
                "polarity_rows": laid.rows,
                "polarity_counts": laid.counts,
                "polarity_schedule": epoch == epochs - 1,
            }
            output = self.actor_rollout_wg.update_actor(part)
            for name, values in output["metrics"].items():
                found.setdefault(name, []).extend(values if isinstance(values, list) else [values])
            padding = [key for key in part.keys if key not in set(batch.keys)]
            if padding:
                tq.kv_clear(keys=padding, partition_id=part.partition_id)
        self.row |= update_metrics(found)
        metrics |= {f"actor/{name}": value for name, value in self.row.items() if name.startswith("update/")}
        self.method_state = self.now.update_state(self.method_state, self.row)
        return batch

    def _padded(self, batch: KVBatchMeta, order: list[int | None]) -> KVBatchMeta:
        """The batch in this order, with verl's synthetic rows, which no mask counts, in place of None."""
        whole = upsample_batch_to_divisible_size(batch, len(order), self.tokenizer.eos_token_id)
        spare = whole.keys[len(batch.keys) :]
        if spare:  # one token each; what was computed since the rollouts is copied from a real row, and too long
            names = [name for name in (*TENSORS, "advantages", "returns", "logp_proxy") if name != "rollout_log_probs"]
            known = tq.kv_batch_get(keys=batch.keys[:1], partition_id=batch.partition_id, select_fields=names)
            nothing = torch.nested.as_nested_tensor([torch.zeros(1)] * len(spare), layout=torch.jagged)
            fields = TensorDict({name: nothing for name in names if name in known}, batch_size=len(spare))
            tq.kv_batch_put(keys=spare, partition_id=batch.partition_id, fields=fields)
        padding = iter(range(len(batch.keys), len(order)))
        index = [next(padding) if i is None else i for i in order]
        return KVBatchMeta(
            partition_id=whole.partition_id,
            keys=[whole.keys[i] for i in index],
            tags=[whole.tags[i] for i in index],
        )

    def _ranks(self) -> int:
        return max(self.actor_rollout_wg._dispatch_info["actor"]) + 1

    # ---- numbers ----

    def _metrics(self, rows: Rows, given: Credit, s: int) -> Metrics:
        assert rows.logp_old is not None
        assert rows.entropy_old is not None
        logp = rows.logp_rollout if rows.logp_rollout is not None else rows.logp_old
        row = rollout_metrics(
            rows.correct, given.rewards, rows.groups, rows.truncated, logp, rows.entropy_old, rows.mask
        )
        if rows.logp_rollout is not None:
            row |= mismatch(rows.logp_rollout, rows.logp_old, rows.mask, rows.correct)
        row |= {
            "rollouts/generated": float(len(rows.keys)),
            "rollouts/kept": float(given.keep.sum()),
            "rollouts/rounds": float(self.replay_buffer.rounds),
        }
        statuses = [verdict.get("status") for verdict in rows.verdicts]
        for status in ("unparsed", "timeout", "error"):
            row[f"verifier/{status}"] = statuses.count(status) / len(statuses)
        weights = self.now.shaping.weights(s, self.method_state)
        row |= {f"{polarity}/weight": weight for polarity, weight in weights.items()}
        keep = given.keep.nonzero()[:, 0]
        if len(keep):
            row |= credit_metrics(
                given.advantages[keep], given.shaped[keep], rows.logp_old[keep], rows.correct[keep], given.mask[keep]
            )
        return row

    def _compute_metrics(self, batch: KVBatchMeta, metrics: Metrics, timing_raw: Metrics, **where: Any) -> None:
        """verl's own numbers where there are rows to count, and polarity's row of the step."""
        if batch.keys:
            super()._compute_metrics(batch, metrics, timing_raw, **where)
        assert self.recorder is not None
        seconds = {"time/rollout": "gen", "time/step": "step", "time/evaluation": "testing"}
        times = {name: timing_raw[own] for name, own in seconds.items() if own in timing_raw}
        times["time/update"] = sum(timing_raw.get(own, 0.0) for own in ("old_log_prob", "ref", "values", "adv"))
        times["time/update"] += timing_raw.get("update_critic", 0.0) + timing_raw.get("update_actor", 0.0)
        self.recorder.row(self.global_steps, {**self.row, **self.evaluated, **times})
        self.evaluated = {}
        if self.global_steps >= self.total_training_steps:
            self.recorder.close()

    def _validate(self) -> Metrics:
        self.replay_buffer.validation_lengths = []
        loader, samples = self.val_dataloader, self.settings.final_samples
        if samples is not None and self.global_steps >= self.total_training_steps:
            self.val_dataloader = [_sampled(batch, samples) for batch in loader]
        try:
            metrics = super()._validate()
        finally:
            self.val_dataloader = loader
        if self.global_steps == 0:  # before training
            assert self.recorder is not None
            self.recorder.row(0, self.evaluated)
            self.evaluated = {}
        return metrics

    def _val_metrics_update(self, data_sources: Any, sample_uids: Any, verdicts: Any, *rest: Any, **named: Any) -> Any:
        lengths = self.replay_buffer.validation_lengths
        limit = int(self.settings.evaluation_tokens or self.config.data.max_response_length)
        found = evaluation(data_sources, sample_uids, verdicts, lengths, limit)
        self.evaluated = {
            f"eval/{split}/{name}": value
            for split, means in found["results"].items()
            for name, value in means.items()
            if isinstance(value, float)
        }
        assert self.recorder is not None
        self.recorder.evaluation(self.global_steps, {"step": self.global_steps, **found})
        return super()._val_metrics_update(data_sources, sample_uids, verdicts, *rest, **named)


def update_metrics(found: dict[str, list[Any]]) -> Metrics:
    """Means over a step's mini-batches, from the workers' lists of one entry a mini-batch."""
    row: Metrics = {"update/count": float(len(found.get("grad_norm", [])))}
    for name, values in found.items():
        if name.startswith("polarity/") and name.endswith("/sum"):
            metric = name.removeprefix("polarity/").removesuffix("/sum")
            count = sum(found[f"polarity/{metric}/count"])
            if count > 0:
                row[metric if "/" in metric else f"update/{metric}"] = sum(values) / count
    for name, own in (("grad_norm", "update/grad_norm"), ("polarity/update/loss", "update/loss")):
        if name in found:
            row[own] = sum(map(float, found[name])) / len(found[name])
    if "lr" in found:
        row["update/learning_rate"] = float(found["lr"][-1])
    return row


def _sampled(batch: dict[str, Any], samples: int) -> dict[str, Any]:
    """A batch of prompts that asks for `samples` responses to each."""
    return {**batch, "__rollout_n__": np.full(len(batch["raw_prompt"]), samples, dtype=object)}


def _ends(path: str, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's, and those of the model's generation config where it has one."""
    from transformers import GenerationConfig

    try:
        listed = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model without one
        listed = None
    found = listed if isinstance(listed, list) else [listed]
    return tuple(sorted({int(e) for e in (*found, tokenizer.eos_token_id) if e is not None}))
