"""Method: what a training method is, as data, and the pure functions that engines call.

P prompts, G responses per prompt, N = P*G responses of a rollout step, n of a (micro-)batch, T padded response length,
V vocabulary, s rollout step. One rollout step: rewards -> keep -> advantages -> shape, on all N rows; then for each
mini-batch (select ->) loss. Engines ask `needs` what to compute; they never ask for a method's name.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Generator, Tensor

from polarity.methods.advantages import (
    Advantage,
    GroupAdvantage,
    SignedAdvantage,
    group_normalised,
    mixed_groups,
    signed,
)
from polarity.methods.aggregation import Aggregation, aggregate
from polarity.methods.corrections import Correction, correction_weights
from polarity.methods.fork_tokens import ForkTokens
from polarity.methods.inputs import Denominators, LossInputs, LossOutput, Selection
from polarity.methods.metrics import loss_metrics
from polarity.methods.part import Part, merged, validated
from polarity.methods.regularizers import KL, kl_estimate
from polarity.methods.schedules import State
from polarity.methods.shaping import Shaping, shape
from polarity.methods.surrogates import Clip, PolicyTokens, Surrogate, TokenLoss, at_least_float32
from polarity.methods.values import CriticAdvantage, gae, token_rewards, value_loss, whitened


class Filter(Part):
    """Which responses are trained on. The others leave every denominator."""

    polarity: Literal["all", "positive", "negative"] = "all"
    """all responses, only correct ones (PSR), or only wrong ones (NSR)."""
    dynamic_sampling: bool = False
    """Drop groups whose responses are all correct or all wrong, and generate on until enough are left (DAPO)."""


class Overlong(Part):
    """DAPO's soft penalty for length: from 0 at max_length - buffer down to -factor at max_length."""

    buffer: Annotated[int, Field(ge=1)] = 4096
    """Tokens below the response limit in which the penalty grows."""
    factor: NonNegativeFloat = 1.0
    """Penalty at the response limit."""


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
    token_mask: ForkTokens | None = None
    """Restriction of the policy loss to some tokens; null: all tokens."""
    surrogate: Surrogate = Clip()
    """The policy loss of a token."""
    correction: Correction | None = None
    """Importance weights against train-inference mismatch; null: none."""
    aggregation: Aggregation = "token_mean"
    """Token losses to one number, over the whole mini-batch."""
    kl: KL = KL()
    """Penalty for leaving the reference policy."""
    entropy_bonus: NonNegativeFloat = 0.0
    """Coefficient of the mean token entropy that is subtracted from the loss."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.overlong and isinstance(self.advantage, SignedAdvantage):
            raise ValueError(
                "overlong changes rewards, which a signed advantage does not read: "
                "set overlong: null, or advantage: {kind: group}"
            )
        dropped = {"positive": "negative", "negative": "positive"}.get(self.filter.polarity)
        if dropped and getattr(self.shaping, dropped):
            raise ValueError(
                f"filter.polarity {self.filter.polarity} drops the samples that shaping.{dropped} weights: "
                f"set shaping.{dropped}: null, or filter.polarity: all"
            )
        return self

    # what engines ask

    @property
    def needs(self) -> frozenset[str]:
        """What an engine must compute, or do, for this method beyond logp and logp_old.

        entropy_old, entropy, logp_ref, logp_rollout, values: tensors of LossInputs, `advantages` and `shape`.
        select, logp_proxy: call the function of that name. resample: generate on until P groups are kept.
        """
        fork = self.token_mask
        critic = self.advantage if isinstance(self.advantage, CriticAdvantage) else None
        by_entropy = any(part.by == "entropy" for _, part in self.shaping.parts)
        asked = {
            "entropy_old": by_entropy or (fork is not None and fork.entropy_from == "old"),
            "entropy": self.entropy_bonus > 0 or (fork is not None and fork.entropy_from == "current"),
            "logp_ref": self.kl.coefficient > 0 or (critic is not None and critic.reward_kl > 0),
            "logp_rollout": self.correction is not None,
            "values": critic is not None,
            "select": fork is not None and fork.scope in ("minibatch", "response"),
            "resample": self.filter.dynamic_sampling,
        }
        return frozenset(name for name, wanted in asked.items() if wanted)

    @property
    def group_normalised(self) -> bool:
        """Whether advantages compare a response with its group, so that groups of one teach nothing."""
        return isinstance(self.advantage, GroupAdvantage)

    @property
    def skips_zero_advantage(self) -> bool:
        """Whether rows with A = 0 carry no gradient, so that a learner may leave them out of the loss.

        They stay in the denominators, and in what `select` sees.
        """
        splits = self.token_mask is not None and self.token_mask.scope == "microbatch"
        return self.kl.coefficient == 0 and self.entropy_bonus == 0 and not splits

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
        if self.overlong is None:
            return rewards
        if max_length is None:
            raise ValueError("overlong: rewards() needs max_length, the run's response limit")
        if self.overlong.buffer > max_length:
            raise ValueError(
                f"overlong.buffer {self.overlong.buffer} is longer than the response limit {max_length}: "
                f"set overlong.buffer to about a fifth of it"
            )
        excess = (lengths - (max_length - self.overlong.buffer)) / self.overlong.buffer
        return rewards - self.overlong.factor * excess.clamp(min=0)

    def keep(self, rewards: Tensor, groups: Tensor, correct: Tensor) -> Tensor:
        """(N,) bool: the rows that are trained on, by correctness only. groups: (N,) int; correct: (N,) bool."""
        keep = torch.ones_like(correct, dtype=torch.bool)
        if self.filter.polarity != "all":
            keep = correct == (self.filter.polarity == "positive")
        if self.filter.dynamic_sampling:
            keep = keep & mixed_groups(groups, correct)
        return keep

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
        """Advantages of all N rows, before any are dropped: (N,) float32, or (N, T) for methods with a critic.

        rewards: (N,) float; groups: (N,) int; correct: (N,) bool. mask, values, logp_old, logp_ref (N, T) are read by
        methods with a critic only.
        """
        if isinstance(self.advantage, SignedAdvantage):
            return signed(correct, self.advantage.positive, self.advantage.negative)
        if isinstance(self.advantage, CriticAdvantage):
            mask, part = _given(mask, "mask"), self.advantage
            reward = token_rewards(part, rewards, mask, logp_old, logp_ref)
            advantages = gae(part, reward, _given(values, "values"), mask)
            return whitened(advantages, mask) if part.whiten else advantages
        return group_normalised(rewards, groups, self.advantage.eps)

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
        """(N,) or (N, T) advantages -> (N, T) float32, zero outside the mask; `step` is s, the first is 0."""
        shaped = shape(self.shaping, advantages, logp_old, entropy_old, mask, correct, step, state)
        fork = self.token_mask
        if fork is None or fork.scope != "step":
            return shaped
        kept = fork.kept(_given(entropy_old, "entropy_old"), mask)
        # A step's kept share stands for each of its mini-batches: dividing by it is dividing by kept tokens.
        share = kept.sum() / mask.sum().clamp(min=1) if fork.denominator == "kept" else 1.0
        return torch.where(kept, shaped / share, 0.0)

    def logp_proxy(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability of tokens (c,) under a proxy of the old policy with logits (c, V); only if in `needs`."""
        raise NotImplementedError(f"method {self.name!r} has no proxy policy (logp_proxy is not in its needs)")

    def update_state(self, state: State | None, metrics: Mapping[str, float]) -> State | None:
        """State of closed-loop schedules after a step with these metrics; an open-loop method has none to change."""
        return state

    # per mini-batch and micro-batch

    def select(self, inputs: LossInputs, generator: Generator | None = None) -> Selection:
        """What the losses of a mini-batch's micro-batches share, from the whole mini-batch; only if in `needs`."""
        fork = self.token_mask
        if fork is None or fork.scope == "step":
            raise NotImplementedError(f"method {self.name!r} has nothing to select (select is not in its needs)")
        entropy = inputs.entropy if fork.entropy_from == "current" else inputs.entropy_old
        kept = fork.kept(_given(entropy, "entropy" if fork.entropy_from == "current" else "entropy_old"), inputs.mask)
        return Selection(kept, count=int(kept.sum()) if fork.denominator == "kept" else None)

    def token_loss(self, tokens: PolicyTokens) -> TokenLoss:
        """Policy loss of each token, before masks, weights and aggregation. Override it for a loss of your own."""
        return self.surrogate.token_loss(tokens)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Policy loss + KL penalty - entropy bonus of one micro-batch, with the mini-batch's denominators."""
        mask = inputs.mask
        denominators = inputs.denominators or Denominators.of(mask)
        tokens = PolicyTokens.of(inputs)
        token = self.token_loss(tokens)
        values, trained, counted, policy_denominators = token.loss, mask, mask, denominators
        if self.correction:
            rollout = at_least_float32(_given(inputs.logp_rollout, "logp_rollout"))
            values = values * correction_weights(self.correction, tokens.logp_old, rollout, mask)
        selection = self._selection(inputs, denominators)
        if selection is not None and selection.tokens is not None:
            trained = mask & selection.tokens
            values = torch.where(trained, values, 0.0)
        if selection is not None and selection.count is not None:
            counted = trained
            policy_denominators = replace(denominators, tokens=selection.count)
        loss = aggregate(values, counted, self.aggregation, policy_denominators)
        reported: dict[str, Tensor] = {}
        if inputs.entropy is not None or self.entropy_bonus:
            entropy = torch.where(mask, at_least_float32(_given(inputs.entropy, "entropy")), 0.0)
            reported["entropy"] = entropy
            if self.entropy_bonus:
                loss = loss - self.entropy_bonus * aggregate(entropy, mask, self.aggregation, denominators)
        if inputs.logp_ref is not None or self.kl.coefficient:
            logp_ref = at_least_float32(_given(inputs.logp_ref, "logp_ref"))
            reported["kl"] = kl = kl_estimate(tokens.logp, logp_ref, mask, self.kl.estimator)
            if self.kl.coefficient:
                loss = loss + self.kl.coefficient * aggregate(kl, mask, self.aggregation, denominators)
        return LossOutput(loss, loss_metrics(tokens, token, trained, inputs.correct, reported))

    def value_targets(
        self,
        rewards: Tensor,
        mask: Tensor,
        values: Tensor,
        logp_old: Tensor | None = None,
        logp_ref: Tensor | None = None,
    ) -> Tensor:
        """(N, T) float32 returns that the critic is fitted to: advantages before whitening, plus values."""
        part = self._critic()
        advantages = gae(part, token_rewards(part, rewards, mask, logp_old, logp_ref), values, mask)
        return torch.where(mask, advantages + values.float(), 0.0)

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
        fork = self.token_mask
        if inputs.select is not None or fork is None or fork.scope == "step":
            return inputs.select
        if fork.scope == "microbatch":
            selection = self.select(inputs)
            if selection.count is None:
                return selection
            # Kept tokens of this batch, each batch weighing by its share of the mini-batch's tokens.
            share = denominators.tokens / max(int(inputs.mask.sum()), 1)
            return replace(selection, count=float(selection.count * share))
        if inputs.denominators is None:
            return self.select(inputs)
        raise ValueError(f"method {self.name!r}: the loss of a micro-batch needs select=, made by Method.select")


def _given(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"this method needs {name} (see Method.needs)")
    return tensor
