"""verl's actor worker, cutting mini-batches where polarity cuts them.

The trainer lays the rows of a step out by mini-batch and rank (trainer.py); here every rank walks through its own rows
in that order. Denominators are the whole mini-batch's over all ranks, and so is what the method selects from it.
n rows of this rank in a mini-batch, T padded response length.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.utils.py_functional import append_to_dict
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.padding import response_to_nested

from polarity.engines.verl.loss import PLAN, SELECTED, SELECTION, Loss, loss_inputs
from polarity.methods import Denominators, LossInputs, Selection
from polarity.seeds import seed_for


class PolarityActor(TrainingWorker):
    """Updates on the mini-batches that the trainer laid out."""

    loss_fn: Loss

    def train_mini_batch(self, data: Any) -> Any:
        """One update for each entry of `polarity_rows`, the number of rows this rank has in each mini-batch.

        polarity_counts: (tokens, sequences) of each mini-batch over all ranks. Returns metrics as verl's own does.
        """
        rows, counts = tu.pop(data, "polarity_rows"), tu.pop(data, "polarity_counts")
        seed, schedule = tu.pop(data, "seed"), tu.pop(data, "polarity_schedule")
        ranks, start = self.engine.get_data_parallel_size(), 0
        collected: dict[str, Any] = {}
        with self.engine.train_mode(disable_auto_offload=tu.pop(data, "disable_auto_offload", default=False)):
            for i, (size, (tokens, sequences)) in enumerate(zip(rows, counts, strict=True)):
                part = tu.index_select_tensor_dict(data, list(range(start, start + size)))
                start += size
                last = schedule and i == len(rows) - 1
                tu.assign_non_tensor(part, update_lr_scheduler=last, disable_auto_offload=True)
                tu.assign_non_tensor_data(part, PLAN, (tokens, sequences, ranks))
                if "select" in self.loss_fn.method.needs:
                    self._select(part, Denominators(tokens, sequences, self.loss_fn.max_length), seed_for(seed, i))
                tu.assign_non_tensor_data(part, "global_token_num", self._lengths(part))
                output = self.train_batch(part)
                if self.engine.is_mp_src_rank_with_outputs():
                    append_to_dict(collected, _flat(tu.get(output, "metrics")))
        if not self.engine.is_mp_src_rank_with_outputs():
            return None
        return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": collected}).cpu()

    def infer_batch(self, data: Any) -> Any:
        """As verl's; with the proxy's log-probs where the trainer asks for them (Lp-Reg)."""
        if tu.pop(data, "polarity_proxy", default=False):
            tu.assign_non_tensor(data, distillation_use_topk=True, compute_loss=True)
        return super().infer_batch(data)

    def _select(self, part: Any, denominators: Denominators, seed: int) -> None:
        """Method.select over the mini-batch of all ranks; this rank's tokens and the common values go into `part`."""
        output = self.engine.infer_batch(part, loss_function=None)
        own = loss_inputs(self.loss_fn.method, output["model_output"], part)
        group = self.engine.get_data_parallel_group()
        everyone: list[Any] = [None] * self.engine.get_data_parallel_size()
        torch.distributed.all_gather_object(everyone, _to_cpu(own), group)
        whole = _joined(everyone, denominators)
        generator = torch.Generator().manual_seed(seed)
        selection: Selection = self.loss_fn.method.select(whole, generator=generator)
        tu.assign_non_tensor_data(part, SELECTION, (selection.values, selection.count))
        if selection.tokens is not None:
            rank = self.engine.get_data_parallel_rank()
            first = sum(len(inputs.logp) for inputs in everyone[:rank])
            tokens = selection.tokens[first : first + len(own.logp), : own.logp.shape[1]]
            part[SELECTED] = response_to_nested(tokens.to(own.mask.device), part["response_mask"])

    def _lengths(self, part: Any) -> list[int]:
        """Tokens of every row of the mini-batch on all ranks, for verl's count of operations."""
        everyone: list[Any] = [None] * self.engine.get_data_parallel_size()
        own = part["input_ids"].offsets().diff().tolist()
        torch.distributed.all_gather_object(everyone, own, self.engine.get_data_parallel_group())
        return [length for lengths in everyone for length in lengths]


class PolarityWorker(ActorRolloutRefWorker):
    actor_worker_cls = PolarityActor


def _flat(metrics: dict[str, Any]) -> dict[str, Any]:
    """A mini-batch's metrics: ranks and micro-batches flattened, as verl's own loop does."""
    for key, value in metrics.items():
        if isinstance(value, list):
            metrics[key] = (
                Metric.aggregate_dp(value) if isinstance(value[0], Metric) else [x for xs in value for x in xs]
            )
    return metrics


def _to_cpu(inputs: LossInputs) -> LossInputs:
    values: dict[str, Any] = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    moved: dict[str, Any] = {name: x.detach().cpu() if isinstance(x, Tensor) else x for name, x in values.items()}
    return LossInputs(**moved)


def _joined(parts: list[LossInputs], denominators: Denominators) -> LossInputs:
    """The rows of all ranks, padded to the longest response of them."""
    width = max(part.logp.shape[1] for part in parts)

    def stack(name: str) -> Any:
        tensors = [getattr(part, name) for part in parts]
        if not isinstance(tensors[0], Tensor):
            return tensors[0]
        if tensors[0].dim() == 1:
            return torch.cat(tensors)
        return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in tensors])

    joined: dict[str, Any] = {f.name: stack(f.name) for f in fields(LossInputs)}
    return LossInputs(**(joined | {"denominators": denominators}))
