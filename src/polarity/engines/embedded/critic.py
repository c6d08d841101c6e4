"""The critic of methods that need `values`: a model of its own, beside the policy, that predicts a response's return.

N rows of a step, n of a micro-batch, T padded response length. The decoder starts as the base model's; the linear head
on top starts at 0, and with it every value. The value at position t is read from the state before token t is emitted,
the one that predicts it (Zhu et al.'s PPO baseline).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from polarity.config import UpdateConfig
from polarity.engines.embedded.policy import Policy, pad_rows, states_before
from polarity.engines.embedded.updater import Batch, Metrics, Rows, Updater
from polarity.methods import Denominators, LossOutput, Method

WEIGHTS = "model.safetensors"


class Critic(Updater):
    """AdamW on a value model, float32 weights. `update` is one rollout step's worth of optimiser updates."""

    rate_key = "update.critic_learning_rate"

    def __init__(self, base: Policy, config: UpdateConfig, max_length: int):
        """Takes over the decoder of `base`, which is not to be used for anything else; its output layer is dropped."""
        width = base.model.get_output_embeddings().weight.shape[1]
        self.policy = dataclasses.replace(base, model=base.model.get_decoder())
        self.head = torch.nn.Linear(width, 1, device=base.device, dtype=torch.float32)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.module = torch.nn.ModuleDict({"decoder": self.policy.model, "head": self.head})
        rate = config.critic_learning_rate or 10 * config.learning_rate
        super().__init__(self.module.parameters(), rate, config, max_length=max_length, device=base.device)

    def values(self, batch: Batch) -> Tensor:
        """(N,T) float32 on the CPU, without gradient, zero past the end of a response."""
        return self.for_all_rows(batch, lambda prompts, responses: [self._values(prompts, responses)], 1)[0]

    def update(self, method: Method, batch: Batch, rows_per_update: int, step: int, seed: int) -> Metrics:
        """Fit the values to `batch.value_targets` as `fit` says, on all rows, those without advantage too.

        `batch.values` are those from before the step's updates. Returns value/* metrics of the method's value loss, and
        update/critic_grad_norm.
        """
        found = self.fit(method, batch, rows_per_update, step, seed)
        row = {name: value for name, value in found.items() if "/" in name}
        return row | ({"update/critic_grad_norm": found["grad_norm"]} if "grad_norm" in found else {})

    def losses(
        self, method: Method, batch: Batch, denominators: Denominators, generator: torch.Generator | None
    ) -> Iterator[LossOutput]:
        for index in self.micro_batches(batch, batch.mask.any(1)):
            part = batch.rows(index)
            assert part.values is not None
            assert part.value_targets is not None
            old, targets, mask = (x.to(self.device) for x in (part.values, part.value_targets, part.mask))
            yield method.value_loss(self._values(part.prompts, part.responses), old, targets, mask, denominators)

    def save(self, folder: Path) -> None:
        """Write the weights into `folder`: the decoder's under `decoder.`, the head's under `head.`."""
        folder.mkdir()
        save_file({name: x.contiguous() for name, x in self.module.state_dict().items()}, folder / WEIGHTS)

    def load(self, folder: Path) -> None:
        """Take on the weights that `save` wrote."""
        self.module.load_state_dict(load_file(folder / WEIGHTS))

    def _values(self, prompts: Rows, responses: Rows) -> Tensor:
        """(n,T) float32, with gradient where grad is enabled; the head works in float32 whatever the decoder does."""
        states, _ = states_before(self.policy, prompts, responses)
        return pad_rows(self.head(states.float())[:, 0], responses)


def value_metrics(values: Tensor, targets: Tensor, mask: Tensor) -> Metrics:
    """value/mean and value/explained_variance, 1 - Var(target - value) / Var(target); (N,T) each, over the mask.

    The second is absent where targets do not vary.
    """
    value, target = values[mask].double(), targets[mask].double()
    found = {"value/mean": float(value.mean())} if len(value) else {}
    spread = float(target.var(correction=0)) if len(target) else 0.0
    if spread > 0:
        found["value/explained_variance"] = 1.0 - float((target - value).var(correction=0)) / spread
    return found
