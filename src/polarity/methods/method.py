"""Method: what a training method is, as data, and the pure functions that engines call.

P prompts, G responses per prompt, N = P*G responses of a rollout step, n of a (micro-)batch, T padded response length,
V vocabulary, s rollout step. One rollout step: rewards -> keep -> advantages -> shape, on all N rows; then for each
mini-batch (select ->) loss. Engines ask `needs` what to compute; they never ask for a method's name.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Self

import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Generator, Tensor

from polarity.methods.advantages import Advantage, GroupAdvantage
from polarity.methods.aggregation import Aggregation, aggregate
from polarity.methods.compatibility import conflict
from polarity.methods.corrections import Correction, OffPolicyMask, correction_weights
from polarity.methods.inputs import Denominators, LossInputs, LossOutput, Scored, Selection, given
from polarity.methods.metrics import loss_metrics
from polarity.methods.part import Part, merged, validated
from polarity.methods.regularizers import KL, kl_estimate
from polarity.methods.samples import Filter, Overlong
from polarity.methods.schedules import State
from polarity.methods.selection import row_counts
from polarity.methods.shaping import Shaping, shape
from polarity.methods.surrogates import Clip, PolicyTokens, Surrogate, TokenLoss, at_least_float32
from polarity.methods.token_masks import ForkTokens, TokenMask
from polarity.methods.token_penalties import LpReg, TokenPenalty
from polarity.methods.values import CriticAdvantage, value_loss


class Method(Part):
    """A frozen composition of parts. `vary` gives a validated copy; a subclass may override any function."""

    name: Annotated[str, Field(min_length=1)]
    """Name in tables and run directories."""
    source: str = ""
    """Where the definition comes from."""
    advantage: Advantage = GroupAdvantage()
    """Rewards to advantages."""
    filter: Filter = Filter()
    """Which responses are trained on."""
    overlong: Overlong | None = None
    """Penalty on the reward of long responses; null: none."""
    shaping: Shaping = Shaping()
    """Weights on advantages, by polarity and by token."""
    token_mask: TokenMask | None = None
    """Restriction of the policy loss to some tokens; null: all tokens."""
    token_penalty: TokenPenalty | None = None
    """Penalty on a few chosen tokens, whose ratio is then not clipped; null: none."""
    surrogate: Surrogate = Clip()
    """The policy loss of a token."""
    correction: Correction | None = None
    """Importance weights against train-inference mismatch; null: none."""
    off_policy_mask: OffPolicyMask | None = None
    """Negative samples that have drifted off-policy lose their loss; null: none do."""
    aggregation: Aggregation = "token_mean"
    """Token losses to one number, over the whole mini-batch."""
    kl: KL = KL()
    """Penalty for leaving the reference policy."""
    entropy_bonus: NonNegativeFloat = 0.0
    """Coefficient of the mean token entropy that is subtracted from the loss."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        reason = conflict(self)
        if reason:
            raise ValueError(reason)
        return self

    # what engines ask

    @property
    def needs(self) -> frozenset[str]:
        """What an engine must compute, or do, for this method beyond logp and logp_old.

        entropy_old, entropy, logp_ref, logp_rollout, logp_proxy, values: tensors of LossInputs, `advantages` and
        `shape`. select, logp_proxy: call the function of that name. resample: generate on until P groups are kept.
        """
        chooser = self.token_mask or self.token_penalty
        asked = {
            "entropy_old": self.shaping.needs_entropy,
            "entropy": self.entropy_bonus > 0 or self.surrogate.needs_entropy,
            "logp_ref": self.kl.coefficient > 0 or getattr(self.advantage, "reward_kl", 0) > 0,
            "logp_rollout": self.correction is not None or self.off_policy_mask is not None,
            "values": isinstance(self.advantage, CriticAdvantage),
            "select": self.surrogate.needs_bounds,
            "resample": self.filter.dynamic_sampling,
        }
        return frozenset(name for name, wanted in asked.items() if wanted) | (chooser.needs if chooser else frozenset())

    @property
    def watches(self) -> frozenset[str]:
        """Names of the metrics that `update_state` reads: those of closed-loop schedules."""
        return frozenset(loop.watches for loop in self.shaping.closed_loops.values())

    @property
    def methods(self) -> tuple["Method", ...]:
        """The methods that a run goes through: this one, unless it is a sequence of methods."""
        return (self,)

    @property
    def compares_group(self) -> bool:
        """Whether advantages compare a response with its group, so that groups of one teach nothing."""
        return self.advantage.compares_group

    @property
    def skips_zero_advantage(self) -> bool:
        """Whether rows with A = 0 carry no gradient, so that a learner may leave them out of the loss.

        They stay in the denominators, and in what `select` sees. A subclass with a loss of its own gets all rows; where
        that loss is linear in the advantage, it may override this property.
        """
        own_loss = type(self).token_loss is not Method.token_loss or type(self).loss is not Method.loss
        splits = self.token_mask is not None and self.token_mask.scope == "microbatch"
        regularised = self.kl.coefficient > 0 or self.entropy_bonus > 0 or self.token_penalty is not None
        return not (own_loss or splits or regularised)

    def at(self, step: int) -> "Method":
        """The method in force at rollout step `step`: this one, unless it is a sequence of methods."""
        return self

    def vary(self, changes: Mapping[str, Any]) -> Self:
        """A validated copy with dotted or nested changes: vary({"shaping.positive.ratio": 0.1}).

        Raises UserError that names the full path, and the nearest key where one is unknown.
        """
        return validated(type(self), merged(self.model_dump(), changes))

    @classmethod
    def build_on(cls, base: "Method", **changes: Any) -> Self:
        """An instance of this class with the parts of `base`: MyMethod.build_on(METHODS["dapo"], name="mine")."""
        return validated(cls, merged(base.model_dump(), changes))

    # once per rollout step, on all N rows, without gradient

    def rewards(self, scores: Tensor, lengths: Tensor, truncated: Tensor, max_length: int | None = None) -> Tensor:
        """(N,) verifier scores -> (N,) float32 rewards. lengths: (N,) tokens with EOS; truncated: (N,) bool.

        The overlong penalty needs max_length, the run's response limit in tokens. A truncated response has that length.
        """
        rewards = scores.float()
        return rewards if self.overlong is None else self.overlong.penalised(rewards, lengths, max_length)

    def keep(self, rewards: Tensor, groups: Tensor, correct: Tensor) -> Tensor:
        """(N,) bool: the rows that are trained on, by correctness only. groups: (N,) int; correct: (N,) bool."""
        return self.filter.keep(groups, correct)

    def advantages(
        self,
        rewards: Tensor,
        groups: Tensor,
        correct: Tensor,
        mask: Tensor | None = None,
        values: Tensor | None = None,
        logp_old: Tensor | None = None,
        logp_ref: Tensor | None = None,
    ) -> Tensor:
        """Advantages of all N rows, before any are dropped: (N,) float32, or (N, T) for GAE and returns.

        rewards: (N,) float; groups: (N,) int; correct: (N,) bool. mask, values, logp_old, logp_ref (N, T) are read for
        token advantages only.
        """
        return self.advantage.compute(Scored(rewards, groups, correct, mask, values, logp_old, logp_ref))

    def shape(
        self,
        advantages: Tensor,
        logp_old: Tensor,
        entropy_old: Tensor | None,
        mask: Tensor,
        *,
        correct: Tensor | None = None,
        step: int = 0,
        state: State | None = None,
    ) -> Tensor:
        """(N,) or (N, T) advantages -> (N, T) float32, zero outside the mask; `step` is s, the first is 0.

        Engines leave dropped rows out of the mask, so that shares of the whole step are of what is trained on.
        """
        shaped = shape(self.shaping, advantages, logp_old, entropy_old, mask, correct, step, state)
        fork = self.token_mask
        if not isinstance(fork, ForkTokens) or fork.scope != "step":
            return shaped  # chosen later, in `select` or in the loss
        kept = fork.kept(given(entropy_old, "entropy_old"), mask)
        # A step's kept share stands for each of its mini-batches: dividing by it is dividing by kept tokens.
        if fork.denominator == "kept":
            shaped *= row_counts(mask).sum() / row_counts(kept).sum().clamp(min=1)
        return shaped.masked_fill_(~kept, 0.0)

    def logp_proxy(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability of tokens (c,) under a proxy of the old policy with logits (c, V); only if in `needs`."""
        if isinstance(self.token_penalty, LpReg):
            return self.token_penalty.logp_proxy(logits, tokens)
        raise NotImplementedError(f"method {self.name!r} has no proxy policy (logp_proxy is not in its needs)")

    def update_state(self, state: State | None, metrics: Mapping[str, float]) -> State | None:
        """State of closed-loop schedules after a step with these metrics; an open-loop method has none to change."""
        old = state or {}
        loops = self.shaping.closed_loops.items()
        new = {path: loop.following(old.get(path, loop.start), metrics) for path, loop in loops}
        return {**old, **new} if new else state

    # per mini-batch and micro-batch

    def select(self, inputs: LossInputs, generator: Generator | None = None) -> Selection:
        """What the losses of a mini-batch's micro-batches share, from the whole mini-batch; only if in `needs`."""
        chooser = self.token_mask or self.token_penalty
        if chooser is not None and chooser.scope == "step":  # chosen in `shape`
            chooser = None
        if chooser is None and not self.surrogate.needs_bounds:
            raise NotImplementedError(f"method {self.name!r} has nothing to select (select is not in its needs)")
        with torch.no_grad():
            found = Selection(values=self.surrogate.bounds(inputs))
            if chooser is None:
                return found
            tokens = PolicyTokens.of(replace(inputs, select=found))
            chosen = chooser.select(inputs, generator, lambda: self.token_loss(tokens).clipped)
        return replace(chosen, values=found.values)

    def token_loss(self, tokens: PolicyTokens) -> TokenLoss:
        """Policy loss of each token, before masks, weights and aggregation. Override it for a loss of your own."""
        return self.surrogate.token_loss(tokens)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Policy loss + penalties - entropy bonus of one micro-batch, with the mini-batch's denominators."""
        mask = inputs.mask
        denominators = inputs.denominators or Denominators.of(mask)
        selection = self._selection(inputs, denominators)
        tokens = PolicyTokens.of(replace(inputs, select=selection))
        token, trained, reported = self._policy_loss(inputs, tokens, selection)
        if selection is None or selection.count is None:
            loss = aggregate(token.loss, mask, self.aggregation, denominators)
        else:
            loss = aggregate(token.loss, trained, self.aggregation, replace(denominators, tokens=selection.count))
        for name, (term, coefficient) in self._terms(inputs, tokens).items():
            reported[name] = term
            if coefficient:
                loss = loss + coefficient * aggregate(term, mask, self.aggregation, denominators)
        metrics = loss_metrics(tokens, token, trained, inputs.correct, reported)
        n = metrics["ratio"][1]
        return LossOutput(loss, metrics | {name: (bound * n, n) for name, bound in tokens.bounds.items()})

    def _policy_loss(
        self, inputs: LossInputs, tokens: PolicyTokens, selection: Selection | None
    ) -> tuple[TokenLoss, Tensor, dict[str, Tensor]]:
        """The loss of each token after weights, masks and token penalty; which tokens count; what to report, (n, T)."""
        token = self.token_loss(tokens)
        mask, values, reported = tokens.mask, token.loss, {}
        chosen = None if selection is None else selection.tokens
        if self.token_penalty is not None:
            chosen = mask & given(chosen, "select")
            values = torch.where(chosen, -tokens.advantages * tokens.ratio, values)
            token = replace(token, clipped=token.clipped & ~chosen)
        if self.correction:
            rollout = at_least_float32(given(inputs.logp_rollout, "logp_rollout"))
            values = values * correction_weights(self.correction, tokens.logp_old, rollout, mask)
        if self.off_policy_mask:
            rollout = at_least_float32(given(inputs.logp_rollout, "logp_rollout"))
            dropped = self.off_policy_mask.dropped(tokens.logp, rollout, tokens.advantages, mask)
            values = torch.where(dropped, 0.0, values)
            reported["off_policy_share"] = dropped.to(values.dtype)
        trained = mask
        if self.token_penalty is not None and chosen is not None:
            reported["penalty"] = penalty = torch.where(chosen, self.token_penalty.penalty(tokens, inputs), 0.0)
            reported["penalised_share"] = chosen.to(values.dtype)
            values = values + penalty
        elif chosen is not None:
            trained = mask & chosen
            values = torch.where(trained, values, 0.0)
        return replace(token, loss=values), trained, reported

    def _terms(self, inputs: LossInputs, tokens: PolicyTokens) -> dict[str, tuple[Tensor, float]]:
        """Entropy and KL of each token (n, T), where needed or at hand, with their coefficients in the loss."""
        found: dict[str, tuple[Tensor, float]] = {}
        if inputs.entropy is not None or self.entropy_bonus:
            entropy = torch.where(tokens.mask, at_least_float32(given(inputs.entropy, "entropy")), 0.0)
            found["entropy"] = entropy, -self.entropy_bonus
        if inputs.logp_ref is not None or self.kl.coefficient:
            logp_ref = at_least_float32(given(inputs.logp_ref, "logp_ref"))
            found["kl"] = kl_estimate(tokens.logp, logp_ref, tokens.mask, self.kl.estimator), self.kl.coefficient
        return found

    def value_targets(
        self,
        rewards: Tensor,
        mask: Tensor,
        values: Tensor,
        logp_old: Tensor | None = None,
        logp_ref: Tensor | None = None,
    ) -> Tensor:
        """(N, T) float32 returns that the critic is fitted to: advantages before whitening, plus values."""
        return self._critic().targets(rewards, mask, values, logp_old, logp_ref)

    def value_loss(
        self,
        values: Tensor,
        values_old: Tensor,
        targets: Tensor,
        mask: Tensor,
        denominators: Denominators | None = None,
    ) -> LossOutput:
        """The critic's loss of one micro-batch, all (n, T); `values` with gradient, `targets` from value_targets."""
        return value_loss(self._critic(), values, values_old, targets, mask, denominators)

    def _critic(self) -> CriticAdvantage:
        if isinstance(self.advantage, CriticAdvantage):
            return self.advantage
        raise NotImplementedError(f"method {self.name!r} has no critic (values is not in its needs)")

    def _selection(self, inputs: LossInputs, denominators: Denominators) -> Selection | None:
        """The selection in force: as handed over, or made here where this batch is all that it is about."""
        microbatch = self.token_mask is not None and self.token_mask.scope == "microbatch"
        if microbatch and inputs.select is None:
            selection = self.select(inputs)
            if selection.count is None:
                return selection
            # Kept tokens of this batch, each batch weighing by its share of the mini-batch's tokens.
            share = denominators.tokens / max(int(inputs.mask.sum()), 1)
            return replace(selection, count=float(selection.count * share))
        if inputs.select is not None or "select" not in self.needs:
            return inputs.select
        if inputs.denominators is None:
            return self.select(inputs)
        raise ValueError(f"method {self.name!r}: the loss of a micro-batch needs select=, made by Method.select")
