"""The policy's update: the method's loss over mini-batches of kept rows.

n rows of a (mini- or micro-) batch, N rows of a step, T padded response length.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from polarity.config import UpdateConfig
from polarity.engines.embedded.policy import Policy, token_logp
from polarity.engines.embedded.updater import Batch, Metrics, Rows, Updater
from polarity.methods import Denominators, LossInputs, LossOutput, Method


class Learner(Updater):
    """AdamW on one policy. `update` is one rollout step's worth of optimiser updates."""

    rate_key = "update.learning_rate"

    def __init__(self, policy: Policy, config: UpdateConfig, temperature: float, max_length: int):
        parameters = policy.model.parameters()
        super().__init__(parameters, config.learning_rate, config, max_length=max_length, device=policy.device)
        self.policy, self.temperature = policy, temperature

    def update(self, method: Method, batch: Batch, rows_per_update: int, step: int, seed: int) -> Metrics:
        """Train on the rows of `batch` as `fit` says; returns update/* metrics and the others of the method's loss."""
        found = self.fit(method, batch, rows_per_update, step, seed)
        return {name if "/" in name else f"update/{name}": value for name, value in found.items()}

    def losses(
        self, method: Method, batch: Batch, denominators: Denominators, generator: torch.Generator | None
    ) -> Iterator[LossOutput]:
        if "select" in method.needs:
            with torch.no_grad():
                whole = self._forward_all(method, batch)
            selection = method.select(dataclasses.replace(whole, denominators=denominators), generator=generator)
        else:
            selection = None
        if self.watch is not None:
            self.watch.mini_batch(batch)
        trained = batch.mask.any(1)
        if method.skips_zero_advantage:
            trained &= (batch.advantages != 0).any(1)
        for index in self.micro_batches(batch, trained):
            part = batch.rows(index)
            sliced = selection
            if selection is not None and selection.tokens is not None:
                tokens = selection.tokens[index, : part.mask.shape[1]].to(self.device)
                sliced = dataclasses.replace(selection, tokens=tokens)
            inputs = self._forward(method, part)
            if self.watch is not None:
                self.watch.micro_batch(index, inputs)
            yield method.loss(dataclasses.replace(inputs, select=sliced, denominators=denominators))

    def score(
        self,
        batch: Batch,
        *,
        entropy: bool,
        proxy: Callable[[Tensor, Tensor], Tensor] | None = None,
        policy: Policy | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-prob, entropy and proxy (N,T) of the rows under `policy` (default: the one in training), no gradient."""

        def found(prompts: Rows, responses: Rows) -> list[Tensor]:
            scores = token_logp(
                policy or self.policy, prompts, responses, temperature=self.temperature, entropy=entropy, proxy=proxy
            )
            return [x for x in scores if x is not None]

        out = self.for_all_rows(batch, found, 1 + entropy + (proxy is not None))
        return out[0], out[1] if entropy else None, out[-1] if proxy is not None else None

    def _forward(self, method: Method, part: Batch) -> LossInputs:
        logp, entropy, _ = token_logp(
            self.policy, part.prompts, part.responses, temperature=self.temperature, entropy="entropy" in method.needs
        )
        return _inputs(part, logp, entropy, self.device)

    def _forward_all(self, method: Method, batch: Batch) -> LossInputs:
        logp, entropy, _ = self.score(batch, entropy="entropy" in method.needs)
        device = self.device
        return _inputs(batch, logp.to(device), entropy if entropy is None else entropy.to(device), device)


def _inputs(part: Batch, logp: Tensor, entropy: Tensor | None, device: torch.device) -> LossInputs:
    def put(x: Tensor | None) -> Any:
        return None if x is None else x.to(device)

    return LossInputs(
        logp=logp,
        logp_old=put(part.logp_old),
        advantages=put(part.advantages),
        mask=put(part.mask),
        entropy=entropy,
        entropy_old=put(part.entropy_old),
        correct=put(part.correct),
        logp_ref=put(part.logp_ref),
        logp_rollout=put(part.logp_rollout),
        logp_proxy=put(part.logp_proxy),
    )
