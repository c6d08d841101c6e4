"""Which tokens moved the entropy in one rollout step, to first order.

H is the mean entropy of the policy over the tokens of the step's rollouts, theta its weights, d = dH/dtheta before the
step. By the chain rule d . delta = mean over states of -Cov(log pi, change of the logits): the covariance that Cui et
al. (2025, The Entropy Mechanism) study, with the change that this update really makes at this state, through all
weights and not only through the state's own logits.

    measured   H after the step's updates - H before them, on the same tokens
    predicted  d . (theta after - theta before)

and `predicted` is taken apart. AdamW's step is linear in the gradients once its second moments are known, so the part
of a token with loss l is -d . (K grad l), K the diagonal that AdamW multiplied that gradient with, in this update and,
through the momentum, in the later ones of the step. grad l = (dl/dlogp) grad logp, and grad logp . (K d) is the change
of the token's log-prob along the direction K d: one central difference gives it for all tokens together.

    cells        what came through the log-prob of a token: policy loss, KL and token penalties (analysis/attribution)
    regularizer  what came through the entropy term of the loss
    momentum     gradients of earlier steps, still in the optimiser (exact)
    rest         predicted less all of these: weight decay, and what the approximations below leave

Approximations: K's diagonal is its mean over the step's updates (large only in a run's first steps, where the second
moments still grow), and gradients are those at theta before the step. Memory: five copies of the weights, for the time
of the step. Forward passes are float32 whatever the run's dtype: differences of bfloat16 would be noise.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polarity.analysis.attribution import cell_bounds, cell_sums, cells_of
from polarity.engines.embedded.learner import Learner
from polarity.engines.embedded.policy import token_logp
from polarity.engines.embedded.updater import Batch, Metrics
from polarity.methods import LossInputs


@dataclass
class _Update:
    """One optimiser update: its rows, what its clipped loss depends on, and what AdamW makes of the gradient."""

    batch: Batch
    by_logp: Tensor  # (n,T): d loss / d log-prob of the token
    by_entropy: Tensor  # (n,T): d loss / d entropy at the token
    scale: float = 0.0  # learning rate x first-moment weight / bias correction


class Attribution:
    """Watches one step's updates of `learner`, without changing them; then `metrics`.

    batch: all rows of the step; mask (N,T) bool: the tokens over which H is the mean.
    """

    def __init__(self, learner: Learner, batch: Batch, mask: Tensor):
        self.learner, self.batch, self.mask = learner, batch, mask
        self.parameters, self.optimizer = learner.parameters, learner.optimizer
        self.policy = dataclasses.replace(learner.policy, bfloat16=False)
        self.start = [p.detach().clone() for p in self.parameters]
        self.entropy, self.gradient = self._entropy_and_gradient()
        state = self.optimizer.state
        self.carried = [state[p]["exp_avg"].clone() if p in state else torch.zeros_like(p) for p in self.parameters]
        self.inverse = [torch.zeros_like(p) for p in self.parameters]  # sum over updates of 1 / (sqrt(v) + eps)
        self.momentum = 0.0
        self.updates: list[_Update] = []

    def mini_batch(self, batch: Batch) -> None:
        """An update on the rows of `batch` begins."""
        self.updates.append(_Update(batch, torch.zeros(batch.mask.shape), torch.zeros(batch.mask.shape)))

    def micro_batch(self, rows: Tensor, inputs: LossInputs) -> None:
        """The loss of these rows (n,) int64 of the mini-batch is about to be computed from `inputs`."""
        update, width = self.updates[-1], inputs.logp.shape[1]

        def into(kept: Tensor) -> Callable[[Tensor], None]:
            def hook(gradient: Tensor) -> None:
                kept[rows, :width] = gradient.detach().float().cpu()

            return hook

        inputs.logp.register_hook(into(update.by_logp))
        if inputs.entropy is not None:
            inputs.entropy.register_hook(into(update.by_entropy))

    def updated(self, norm: float) -> None:
        """The optimiser has made its step; norm: the gradient's before clipping."""
        update, group = self.updates[-1], self.optimizer.param_groups[0]
        (beta1, beta2), count = group["betas"], float(self.optimizer.state[self.parameters[0]]["step"])
        rate = group["lr"] / (1 - beta1**count)
        update.scale = rate * (1 - beta1)
        clip = min(1.0, self.learner.config.grad_clip / (norm + 1e-6))  # as clip_grad_norm_ has it
        update.by_logp *= clip
        update.by_entropy *= clip
        carried = rate * beta1 ** len(self.updates)  # what is left of the momentum from before the step
        for i, p in enumerate(self.parameters):
            second = self.optimizer.state[p]["exp_avg_sq"] / (1 - beta2**count)
            inverse = second.sqrt_().add_(group["eps"]).reciprocal_()
            self.momentum -= carried * _dot([self.gradient[i] * self.carried[i]], [inverse])
            self.inverse[i] += inverse

    def metrics(self) -> Metrics:
        """attribution/*, in nats of H; empty when the step made no update."""
        if not self.updates:
            return {}
        delta = [p.detach() - start for p, start in zip(self.parameters, self.start, strict=True)]
        with torch.no_grad():
            measured = self._entropy() - self.entropy
        predicted = _dot(self.gradient, delta)
        if not _dot(delta, delta) * _dot(self.gradient, self.gradient) > 0:  # nothing moved, or there is no entropy
            return {"attribution/measured": measured, "attribution/predicted": predicted}
        parts = self._contributions(math.sqrt(_dot(delta, delta))) | {"attribution/momentum": self.momentum}
        rest = predicted - sum(parts.values())
        return {"attribution/measured": measured, "attribution/predicted": predicted, **parts, "attribution/rest": rest}

    def _contributions(self, length: float) -> Metrics:
        """The cells and the regularizer. length: of the step in weight space, by which the difference is sized."""
        count = len(self.updates)
        direction = [d * inverse / count for d, inverse in zip(self.gradient, self.inverse, strict=True)]
        width = length / math.sqrt(count * _dot(direction, direction))  # each side about one update away
        ahead = self._scores_at(direction, width)
        behind = self._scores_at(direction, -width)
        beta1 = self.optimizer.param_groups[0]["betas"][0]
        batches = [update.batch for update in self.updates]
        flat = [torch.cat([getattr(b, name)[b.mask] for b in batches]) for name in ("logp_old", "entropy_old", "mask")]
        bounds = cell_bounds(*flat)
        found: Metrics = {}
        weight = 0.0  # of a gradient in the whole step, through this update and the momentum of the later ones
        for update, (logp, entropy), (logp_behind, entropy_behind) in reversed(
            list(zip(self.updates, ahead, behind, strict=True))
        ):
            weight = update.scale + beta1 * weight
            rows, factor = update.batch, -weight / (2 * width)
            cells = cells_of(rows.logp_old, rows.entropy_old, rows.correct, bounds)
            for name, total in cell_sums(factor * update.by_logp * (logp - logp_behind), cells, rows.mask).items():
                found[name] = found.get(name, 0.0) + total
            if entropy is not None and entropy_behind is not None:
                part = factor * float((update.by_entropy * (entropy - entropy_behind))[rows.mask].double().sum())
                found["attribution/regularizer"] = found.get("attribution/regularizer", 0.0) + part
        return dict(sorted(found.items()))

    def _scores_at(self, direction: Sequence[Tensor], width: float) -> list[tuple[Tensor, Tensor | None]]:
        """Log-prob and, where the loss has an entropy term, entropy (n,T) of each update's rows at start + width x
        direction; the weights are then put back bit for bit."""
        now = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p, start, d in zip(self.parameters, self.start, direction, strict=True):
                p.copy_(start + width * d)
        scores = []
        for update in self.updates:
            entropy = bool(update.by_entropy.any())
            scores.append(self.learner.score(update.batch, entropy=entropy, policy=self.policy)[:2])
        with torch.no_grad():
            for p, kept in zip(self.parameters, now, strict=True):
                p.copy_(kept)
        return scores

    def _entropy_and_gradient(self) -> tuple[float, list[Tensor]]:
        gradient = [torch.zeros_like(p) for p in self.parameters]
        total = 0.0
        for part in self._entropy_parts():
            total += float(part.detach())
            for sum_, more in zip(gradient, torch.autograd.grad(part, self.parameters), strict=True):
                sum_ += more
        return total, gradient

    def _entropy(self) -> float:
        return sum(float(part) for part in self._entropy_parts())

    def _entropy_parts(self) -> Iterator[Tensor]:
        """H, in pieces that add up to it, one a micro-batch, with gradient where grad is enabled."""
        tokens = self.mask.sum()
        for rows in self.learner.micro_batches(self.batch, self.mask.any(1)):
            part = self.batch.rows(rows)
            _, entropy, _ = token_logp(
                self.policy, part.prompts, part.responses, temperature=self.learner.temperature, entropy=True
            )
            assert entropy is not None
            yield (entropy * self.mask[rows, : entropy.shape[1]].to(entropy.device)).double().sum() / tokens


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Inner product of two vectors in weight space, summed in float64."""
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
