"""The update: mini-batches of kept rows, micro-batches that fit in memory, one gradient whatever the split.

n rows of a (mini- or micro-) batch, T padded response length. Mini-batches are cut from a seeded shuffle of the kept
rows; every denominator is the whole mini-batch's, counted before the micro-batch loop.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polarity.config import UpdateConfig
from polarity.engines.embedded.policy import Policy, token_logp
from polarity.errors import UserError
from polarity.methods import Denominators, LossInputs, Method

Metrics = dict[str, float]

# What one more forward and backward pass costs, whatever its size, in tokens: about 100 on a CPU core, on two models
# of 0.2M and 3.4M parameters; a GPU needs thousands of tokens to be busy at all.
PIECE_COST = {"cpu": 100, "cuda": 4096}


@dataclass(frozen=True)
class Batch:
    """The rows a step keeps, on the CPU. Tensors are (N,T) unless said otherwise; advantages are the shaped ones."""

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

    def rows(self, index: Tensor) -> "Batch":
        """The rows of `index`, padded to the longest of them."""
        chosen = index.tolist()
        responses = [self.responses[i] for i in chosen]
        width = max((len(r) for r in responses), default=0)

        def take(x: Tensor | None) -> Any:
            return None if x is None else x[index] if x.dim() == 1 else x[index, :width]

        tensors = {f.name: take(getattr(self, f.name)) for f in dataclasses.fields(self)[2:]}
        return Batch([self.prompts[i] for i in chosen], responses, **tensors)


class Learner:
    """AdamW on one policy. `update` is one rollout step's worth of optimiser updates."""

    def __init__(self, policy: Policy, config: UpdateConfig, temperature: float, max_length: int):
        self.policy, self.config = policy, config
        self.temperature, self.max_length = temperature, max_length
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def update(self, method: Method, batch: Batch, rows_per_update: int, step: int, seed: int) -> Metrics:
        """ceil(rows / rows_per_update) updates per epoch; a short last mini-batch uses its own denominators.

        Returns update/* metrics and those of the method's loss, as means over the step. Raises UserError when a
        gradient is not finite; weights and optimiser are then as after the last good update.
        """
        rate = self.config.learning_rate * min(1.0, (step + 1) / max(1, self.config.warmup_steps))
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
                        f"the gradient of step {step + 1} is not finite; lower update.learning_rate and start again in "
                        f"another --out"
                    )
                self.optimizer.step()
                norms.append(norm)
                losses.append(loss)
                for name, (total, count) in metrics.items():
                    sums[name][0] += total
                    sums[name][1] += count
        means = {_named(name): total / count for name, (total, count) in sums.items() if count > 0}
        if norms:
            means |= {"update/loss": sum(losses) / len(losses), "update/grad_norm": sum(norms) / len(norms)}
        return means | {"update/count": float(len(norms)), "update/learning_rate": rate}

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
        if "select" in method.needs:
            with torch.no_grad():
                whole = self._forward_all(method, batch)
            selection = method.select(dataclasses.replace(whole, denominators=denominators), generator=generator)
        else:
            selection = None
        trained = lengths > 0
        if method.skips_zero_advantage:
            trained &= (batch.advantages != 0).any(1)
        loss_sum = 0.0
        sums: dict[str, tuple[float, float]] = {}
        for index in self._micro_batches(batch, trained.nonzero()[:, 0]):
            part = batch.rows(index)
            sliced = selection
            if selection is not None and selection.tokens is not None:
                tokens = selection.tokens[index, : part.mask.shape[1]].to(self.policy.device)
                sliced = dataclasses.replace(selection, tokens=tokens)
            inputs = self._forward(method, part)
            out = method.loss(dataclasses.replace(inputs, select=sliced, denominators=denominators))
            out.loss.backward()
            loss_sum += float(out.loss.detach())
            for name, (total, count) in out.metrics.items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + total, old[1] + count)
        return loss_sum, sums

    @torch.no_grad()
    def score(
        self,
        batch: Batch,
        *,
        entropy: bool,
        proxy: Callable[[Tensor, Tensor], Tensor] | None = None,
        policy: Policy | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-prob, entropy and proxy (N,T) of the rows under `policy` (default: the one in training), no gradient."""
        shape = batch.mask.shape
        out: list[Tensor | None] = [
            torch.zeros(shape),
            torch.zeros(shape) if entropy else None,
            torch.zeros(shape) if proxy is not None else None,
        ]
        filled = (batch.mask.shape[1] > 0) & torch.tensor([len(r) > 0 for r in batch.responses])
        for index in self._micro_batches(batch, filled.nonzero()[:, 0]):
            rows = index.tolist()
            found = token_logp(
                policy or self.policy, [batch.prompts[i] for i in rows], [batch.responses[i] for i in rows],
                temperature=self.temperature, entropy=entropy, proxy=proxy,
            )  # fmt: skip
            for target, part in zip(out, found, strict=True):
                if target is not None and part is not None:
                    target[index, : part.shape[1]] = part.cpu()
        return out[0], out[1], out[2]  # type: ignore[return-value]

    def _forward(self, method: Method, part: Batch) -> LossInputs:
        logp, entropy, _ = token_logp(
            self.policy, part.prompts, part.responses, temperature=self.temperature, entropy="entropy" in method.needs
        )
        return _inputs(part, logp, entropy, self.policy.device)

    def _forward_all(self, method: Method, batch: Batch) -> LossInputs:
        logp, entropy, _ = self.score(batch, entropy="entropy" in method.needs)
        device = self.policy.device
        return _inputs(batch, logp.to(device), entropy if entropy is None else entropy.to(device), device)

    def _micro_batches(self, batch: Batch, rows: Tensor) -> Iterator[Tensor]:
        """Cut `rows`, sorted by length, into micro-batches whose padded size stays below micro_batch_tokens."""
        length = [len(p) + len(r) for p, r in zip(batch.prompts, batch.responses, strict=True)]
        order = sorted(rows.tolist(), key=lambda i: length[i])
        start = 0
        for end in _cheapest_cuts([length[i] for i in order], self.config.micro_batch_tokens, self.policy.device.type):
            yield torch.tensor(order[start:end])
            start = end


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


def _named(metric: str) -> str:
    return metric if "/" in metric else f"update/{metric}"
