"""What training the policy and training the critic have in common: rows, mini-batches, micro-batches, AdamW.

N rows (responses) of a step, n of a (mini- or micro-) batch, T padded response length. Mini-batches are cut from a
seeded shuffle of the rows; every denominator is the whole mini-batch's, counted before the micro-batch loop, so that
the gradient is the same whatever the split.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from polarity.config import UpdateConfig
from polarity.errors import UserError
from polarity.methods import Denominators, LossInputs, LossOutput, Method

Metrics = dict[str, float]
Rows = Sequence[Sequence[int]]

# What one more forward and backward pass costs, whatever its size, in tokens: about 100 on a CPU core, on two models
# of 0.2M and 3.4M parameters; a GPU needs thousands of tokens to be busy at all.
PIECE_COST = {"cpu": 100, "cuda": 4096}


@dataclass(frozen=True)
class Batch:
    """Rows of a step, on the CPU. Tensors are (N,T) unless said otherwise; advantages are the shaped ones."""

    prompts: list[list[int]]
    responses: list[list[int]]
    mask: Tensor
    logp_old: Tensor
    entropy_old: Tensor
    advantages: Tensor
    correct: Tensor  # (N,)
    logp_rollout: Tensor | None = None
    logp_ref: Tensor | None = None
    logp_proxy: Tensor | None = None
    values: Tensor | None = None  # the critic's, before the step's updates
    value_targets: Tensor | None = None

    def rows(self, index: Tensor) -> "Batch":
        """The rows of `index`, padded to the longest of them."""
        chosen = index.tolist()
        responses = [self.responses[i] for i in chosen]
        width = max((len(r) for r in responses), default=0)

        def take(x: Tensor | None) -> Any:
            return None if x is None else x[index] if x.dim() == 1 else x[index, :width]

        tensors = {f.name: take(getattr(self, f.name)) for f in dataclasses.fields(self)[2:]}
        return Batch([self.prompts[i] for i in chosen], responses, **tensors)


class Watch(Protocol):
    """Looks on while a step's updates are made (attribution.py); it must not change them."""

    def mini_batch(self, batch: Batch) -> None:
        """An update on the rows of `batch` begins."""

    def micro_batch(self, rows: Tensor, inputs: LossInputs) -> None:
        """The loss of these rows (n,) int64 of the mini-batch is about to be computed from `inputs`."""

    def updated(self, norm: float) -> None:
        """The optimiser has made its step; norm: the gradient's before clipping."""


class Updater:
    """AdamW on some parameters. A subclass says, in `losses`, what their loss is."""

    rate_key: ClassVar[str]  # the option that is this one's learning rate, for messages
    watch: Watch | None = None

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        learning_rate: float,
        config: UpdateConfig,
        *,
        max_length: int,
        device: torch.device,
    ):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.learning_rate, self.config = learning_rate, config
        self.max_length, self.device = max_length, device
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def losses(
        self, method: Method, batch: Batch, denominators: Denominators, generator: torch.Generator | None
    ) -> Iterator[LossOutput]:
        """The loss of each micro-batch of the mini-batch `batch`, one after another; they add up to its loss."""
        raise NotImplementedError

    def fit(self, method: Method, batch: Batch, rows_per_update: int, step: int, seed: int) -> Metrics:
        """ceil(rows / rows_per_update) updates per epoch; a short last mini-batch uses its own denominators.

        Returns the loss's own metrics as means over the step, and `count`, `learning_rate`, `loss` and `grad_norm`
        (before clipping). Raises UserError when a gradient is not finite; weights and optimiser are then as after the
        last good update.
        """
        rate = self.learning_rate * min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(seed)
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        norms, losses = [], []
        for _ in range(self.config.epochs):
            for index in torch.randperm(len(batch.responses), generator=generator).split(rows_per_update):
                loss, metrics = self.gradient(method, batch.rows(index), generator)
                norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip))
                if norm != norm or norm == float("inf"):
                    raise UserError(
                        f"the gradient of step {step + 1} is not finite; lower {self.rate_key} and start again in "
                        f"another --out"
                    )
                self.optimizer.step()
                if self.watch is not None:
                    self.watch.updated(norm)
                norms.append(norm)
                losses.append(loss)
                for name, (total, count) in metrics.items():
                    sums[name][0] += total
                    sums[name][1] += count
        means = {name: total / count for name, (total, count) in sums.items() if count > 0}
        if norms:
            means |= {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)}
        return means | {"count": float(len(norms)), "learning_rate": rate}

    def gradient(
        self, method: Method, batch: Batch, generator: torch.Generator | None = None
    ) -> tuple[float, dict[str, tuple[float, float]]]:
        """Leave the gradient of one mini-batch in `.grad`; returns its loss and additive (sum, count) metrics."""
        for p in self.parameters:  # zeros, not None: an update without any gradient still is an AdamW step
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        lengths = batch.mask.sum(1)
        denominators = Denominators(
            tokens=int(lengths.sum()), sequences=int((lengths > 0).sum()), max_length=self.max_length
        )
        loss_sum = 0.0
        sums: dict[str, tuple[float, float]] = {}
        for out in self.losses(method, batch, denominators, generator):
            out.loss.backward()
            loss_sum += float(out.loss.detach())
            for name, (total, count) in out.metrics.items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + total, old[1] + count)
        return loss_sum, sums

    def micro_batches(self, batch: Batch, rows: Tensor) -> Iterator[Tensor]:
        """Cut the rows where `rows` (n,) bool holds, sorted by length, into pieces of micro_batch_tokens or less."""
        length = [len(p) + len(r) for p, r in zip(batch.prompts, batch.responses, strict=True)]
        order = sorted(rows.nonzero()[:, 0].tolist(), key=lambda i: length[i])
        start = 0
        for end in _cheapest_cuts([length[i] for i in order], self.config.micro_batch_tokens, self.device.type):
            yield torch.tensor(order[start:end])
            start = end

    @torch.no_grad()
    def for_all_rows(
        self, batch: Batch, function: Callable[[Rows, Rows], Sequence[Tensor]], outputs: int
    ) -> list[Tensor]:
        """The (n,T) `outputs` of function(prompts, responses), in micro-batches, without gradient.

        (N,T) float32 on the CPU, zero past the end of a response.
        """
        out = [torch.zeros(batch.mask.shape) for _ in range(outputs)]
        for index in self.micro_batches(batch, torch.tensor([len(r) > 0 for r in batch.responses])):
            found = function([batch.prompts[i] for i in index.tolist()], [batch.responses[i] for i in index.tolist()])
            for whole, part in zip(out, found, strict=True):
                whole[index, : part.shape[1]] = part.cpu()
        return out


def _cheapest_cuts(lengths: list[int], limit: int, device: str) -> list[int]:
    """Where to end pieces of ascending `lengths` so that padding and the fixed cost of a piece are least in all.

    A piece costs its padded tokens, never more than `limit` unless it is one row, and PIECE_COST.
    """
    fixed = PIECE_COST.get(device, PIECE_COST["cuda"])
    best = [(0, 0)]  # for the first `end` rows: the least cost, and where their last piece starts
    for end, longest in enumerate(lengths, 1):
        fit = max(1, limit // longest)
        best.append(min((best[i][0] + fixed + (end - i) * longest, i) for i in range(max(0, end - fit), end)))
    cuts = []
    end = len(lengths)
    while end:
        cuts.append(end)
        end = best[end][1]
    return cuts[::-1]
