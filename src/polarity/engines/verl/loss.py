"""The method's own loss, in the form in which verl's workers call it.

verl hands a worker one loss function, called for each micro-batch with the model's outputs, and before that, where it
is asked for, with the logits. n rows of a micro-batch, T padded response length, M tokens of the packed micro-batch
(prompts too), V vocabulary. Loss and metrics are sums over micro-batches and ranks: verl averages gradients over ranks,
so the loss is multiplied by their number.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from polarity.methods import Denominators, LossInputs, Method, Selection

# verl's name in a batch -> ours in LossInputs; those that are not there stay None.
FIELDS = {
    "old_log_probs": "logp_old",
    "advantages": "advantages",
    "old_entropy": "entropy_old",
    "ref_log_prob": "logp_ref",
    "rollout_log_probs": "logp_rollout",
    "logp_proxy": "logp_proxy",
}

# Keys that the worker adds to a mini-batch.
PLAN = "polarity_plan"  # (tokens, sequences, ranks) of the whole mini-batch
SELECTION = "polarity_selection"  # (values, count) of Method.select
SELECTED = "polarity_selected"  # (n,T) its tokens


@dataclass(frozen=True)
class Loss:
    """Picklable: it goes to every worker. max_length: the run's response limit."""

    method: Method
    max_length: int

    def __call__(
        self,
        model_output: Any = None,
        data: Any = None,
        dp_group: Any = None,
        student_logits: Tensor | None = None,
    ) -> Any:
        if student_logits is not None:
            return {"logp_proxy": self._proxy(student_logits, data)}
        if PLAN not in data:  # the pass for old log-probs: nothing to minimise
            return model_output["log_probs"].values().sum() * 0.0, {}
        tokens, sequences, ranks = tu.get_non_tensor_data(data, PLAN, None)
        denominators = Denominators(tokens=tokens, sequences=sequences, max_length=self.max_length)
        inputs = loss_inputs(self.method, model_output, data)
        out = self.method.loss(replace(inputs, select=_selection(data, inputs), denominators=denominators))
        metrics = {"polarity/update/loss": _summed(out.loss.detach() * ranks)}
        for name, (total, count) in out.metrics.items():
            metrics[f"polarity/{name}/sum"], metrics[f"polarity/{name}/count"] = _summed(total), _summed(count)
        return out.loss * ranks, metrics

    @torch.no_grad()
    def _proxy(self, logits: Tensor, data: Any) -> Tensor:
        """(1,M): the proxy's log-prob of the token that follows each position; logits (1,M,V) at the temperature."""
        following = data["input_ids"].values().roll(-1)
        return self.method.logp_proxy(logits[0].float(), following)[None]


def loss_inputs(method: Method, model_output: Any, data: Any) -> LossInputs:
    """What the method's loss takes, (n,T), from verl's nested tensors; T is the longest response of these rows."""
    logp = no_padding_2_padding(model_output["log_probs"], data).float()
    entropy = None
    if "entropy" in method.needs:
        entropy = no_padding_2_padding(model_output["entropy"], data).float()
    present = [name for name in (*FIELDS, "response_mask") if name in data]
    padded = data.select(*present).to_padded_tensor()
    given = {ours: padded[name].float() for name, ours in FIELDS.items() if name in padded}
    correct = data["correct"].bool()
    return LossInputs(logp=logp, entropy=entropy, mask=padded["response_mask"].bool(), correct=correct, **given)


def _selection(data: Any, inputs: LossInputs) -> Selection | None:
    """The rows' part of what the worker chose for the mini-batch (worker.py)."""
    found = tu.get_non_tensor_data(data, SELECTION, None)
    if found is None:
        return None
    values, count = found
    tokens = data.select(SELECTED).to_padded_tensor()[SELECTED].bool() if SELECTED in data else None
    return Selection(tokens=tokens, values=values, count=count)


def _summed(value: Any) -> Metric:
    return Metric(value=float(value), aggregation=AggregationType.SUM)
