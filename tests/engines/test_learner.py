"""The update: one gradient whatever the split, with the whole mini-batch's denominators; a bad one changes nothing."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polarity.config import UpdateConfig
from polarity.engines.embedded import policy as policy_module
from polarity.engines.embedded.learner import Learner
from polarity.engines.embedded.policy import Policy, load_policy, token_logp
from polarity.engines.embedded.sampler import Sampling, sample
from polarity.engines.embedded.updater import Batch
from polarity.errors import UserError
from polarity.methods import METHODS, Method

LIMIT, GROUP = 12, 4
TRAINABLE = [name for name in METHODS if "values" not in METHODS[name].needs]
FAMILIES = ["polarity_p0.5n1", "token_positive_high_entropy", "token_negative_low_prob"]


def make_batch(policy: Policy, method: Method, rows: int = 16) -> Batch:
    """Sampled rows with an old policy that differs a little (so that tokens are clipped) and rewards of both kinds."""
    prompts = [[5, 6, 7], [9, 8], list(range(60, 75)), [5, 6]] * 4
    prompts = prompts[: rows // GROUP]
    made = sample(policy, prompts, GROUP, Sampling(LIMIT), 1)
    g = torch.Generator().manual_seed(2)
    correct = torch.rand(rows, generator=g) < 0.5
    correct[:GROUP] = True  # a group that teaches nothing, and so has advantage 0 where groups are compared
    groups = torch.arange(rows) // GROUP

    def near(scale: float) -> Tensor:
        return (made.logp + scale * torch.randn(made.logp.shape, generator=g)).clamp(max=-1e-3)

    logp_old, mask = near(0.3), made.mask
    advantages = method.advantages(correct.float(), groups, correct, mask=mask, logp_old=logp_old, logp_ref=near(0.5))
    shaped = method.shape(advantages, logp_old, made.entropy, mask, correct=correct, step=0)
    everything = Batch(
        prompts=[p for p in prompts for _ in range(GROUP)],
        responses=made.responses(),
        mask=mask,
        logp_old=logp_old,
        entropy_old=made.entropy,
        advantages=shaped,
        correct=correct,
        logp_ref=near(0.5),
        logp_rollout=near(0.3),
        logp_proxy=near(0.5),
    )
    return everything.rows(method.keep(correct.float(), groups, correct).nonzero()[:, 0])


def make_learner(policy: Policy, **changes: Any) -> Learner:
    return Learner(policy, UpdateConfig(**{"learning_rate": 1e-3, **changes}), 1.0, LIMIT)


def gradient(policy: Policy, method: Method, batch: Batch, micro_batch_tokens: int) -> tuple[float, Tensor, dict]:
    learner = make_learner(policy, micro_batch_tokens=micro_batch_tokens)
    loss, metrics = learner.gradient(method, batch, torch.Generator().manual_seed(0))
    return loss, torch.cat([p.grad.double().flatten() for p in learner.parameters]), metrics


def assert_same_gradient(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert float(wanted.norm()) > 1e-4
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("name", [*TRAINABLE, *FAMILIES])
def test_loss_and_gradient_are_the_same_for_every_split(policy: Policy, name: str):
    method = METHODS[name]
    batch = make_batch(policy, method)
    loss, wanted, metrics = gradient(policy, method, batch, 10**6)
    for micro_batch_tokens in (1, 45):  # one row at a time; two or three
        again, found, sums = gradient(policy, method, batch, micro_batch_tokens)
        assert again == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert_same_gradient(found, wanted)
        for key, (total, count) in metrics.items():
            assert sums[key] == pytest.approx((total, count), rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", ["grpo", "dapo", "a3po", "w_reinforce"])
def test_gradient_is_that_of_the_formula(policy: Policy, name: str):
    """Clipped surrogate, aggregation and bonus written out in float64 over one padded forward pass."""
    method = METHODS[name]
    batch = make_batch(policy, method)
    _, found, _ = gradient(policy, method, batch, 45)
    model = policy.model.double()
    total: Tensor = torch.zeros((), dtype=torch.float64)
    tokens, sequences = int(batch.mask.sum()), len(batch.responses)
    for i, (prompt, response) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
        logp_all = logits[len(prompt) - 1 : -1].log_softmax(-1)
        n = len(response)
        ratio = (logp_all[torch.arange(n), response] - batch.logp_old[i, :n].double()).exp()
        a = batch.advantages[i, :n].double()
        clip = method.surrogate
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip.low, 1 + clip.high))
        if clip.dual is not None:
            loss = torch.where(a < 0, torch.minimum(loss, -a * clip.dual), loss)
        loss = loss + method.entropy_bonus * (logp_all.exp() * logp_all).sum(-1)
        total = total + (loss.mean() / sequences if name == "grpo" else loss.sum() / tokens)
    model.zero_grad()
    total.backward()
    assert_same_gradient(found, torch.cat([p.grad.flatten() for p in model.parameters()]), 1e-4)


@pytest.mark.parametrize("name", [n for n in [*TRAINABLE, *FAMILIES] if METHODS[n].skips_zero_advantage])
def test_rows_without_advantage_may_be_skipped(policy: Policy, monkeypatch: pytest.MonkeyPatch, name: str):
    method = METHODS[name]
    batch = make_batch(policy, method)
    batch.advantages[1::3] = 0.0
    loss, skipped, _ = gradient(policy, method, batch, 45)
    monkeypatch.setattr(type(method), "skips_zero_advantage", False)
    again, computed, _ = gradient(policy, method, batch, 45)
    assert again == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert_same_gradient(skipped, computed)


def test_rows_without_advantage_count_in_denominators(policy: Policy):
    for name, count in ("dapo", lambda b: int(b.mask.sum())), ("grpo", lambda b: len(b.responses)):
        method = METHODS[name]
        batch = make_batch(policy, method)
        batch.advantages[::2] = 0.0
        alone = batch.rows(torch.arange(1, len(batch.responses), 2))
        _, whole, _ = gradient(policy, method, batch, 10**6)
        _, part, _ = gradient(policy, method, alone, 10**6)
        assert_same_gradient(whole * count(batch), part * count(alone))


@pytest.mark.parametrize("name", ["grpo", "dapo", "grpo_zhu", "fork_tokens"])
def test_rows_that_are_masked_out_leave_everything(policy: Policy, name: str):
    """`truncated: masked` hands over rows with mask all False: as if they were not there."""
    method = METHODS[name]
    batch = make_batch(policy, method)
    out = torch.arange(len(batch.responses)) % 3 == 0
    masked = dataclasses.replace(
        batch, mask=batch.mask & ~out[:, None], advantages=torch.where(out[:, None], 0.0, batch.advantages)
    )
    loss, found, metrics = gradient(policy, method, masked, 45)
    again, wanted, sums = gradient(policy, method, batch.rows((~out).nonzero()[:, 0]), 45)
    assert loss == pytest.approx(again, rel=1e-5, abs=1e-6)
    assert_same_gradient(found, wanted)
    assert metrics["ratio"] == pytest.approx(sums["ratio"])


def test_everything_masked_out_is_no_error(policy: Policy):
    batch = make_batch(policy, METHODS["grpo_zhu"])
    nothing = dataclasses.replace(
        batch, mask=torch.zeros_like(batch.mask), advantages=torch.zeros_like(batch.advantages)
    )
    for name in ("grpo_zhu", "dapo", "fork_tokens"):
        loss, found, _ = gradient(policy, METHODS[name], nothing, 45)
        assert loss == 0
        assert not found.any()


@pytest.mark.parametrize("name", ["dapo", "grpo_zhu"])
def test_logits_in_chunks(policy: Policy, monkeypatch: pytest.MonkeyPatch, name: str):
    method = METHODS[name]
    batch = make_batch(policy, method)
    loss, whole, _ = gradient(policy, method, batch, 10**6)
    for tokens in (0.5, 1, 7):  # less than one token's logits too
        monkeypatch.setattr(policy_module, "LOGITS_IN_A_CHUNK", int(tokens * policy.model.config.vocab_size))
        again, chunked, _ = gradient(policy, method, batch, 10**6)
        assert again == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert_same_gradient(chunked, whole)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_splits_and_checkpointing_of_other_architectures(make_model: Callable[..., Path], architecture: str):
    path = make_model(architecture, ends=40)
    method = METHODS["grpo_zhu"]
    policy = load_policy(path, device="cpu")
    batch = make_batch(policy, method)
    _, wanted, _ = gradient(policy, method, batch, 10**6)
    _, found, _ = gradient(policy, method, batch, 45)
    assert_same_gradient(found, wanted)
    checkpointed = load_policy(path, device="cpu", gradient_checkpointing=True)
    _, found, _ = gradient(checkpointed, method, batch, 45)
    assert_same_gradient(found, wanted)


def test_temperature_divides_the_logits(policy: Policy):
    prompts, responses = [[5, 6], [9]], [[50, 51, 3], [70]]
    logp, entropy, seen = token_logp(
        policy, prompts, responses, temperature=0.5, entropy=True, proxy=lambda logits, tokens: logits.logsumexp(-1)
    )
    logits = policy.model(input_ids=torch.tensor([[5, 6, 50, 51, 3]])).logits[0, 1:4] / 0.5
    p = logits.log_softmax(-1)
    torch.testing.assert_close(logp[0], p[torch.arange(3), responses[0]], atol=1e-5, rtol=0)
    assert logp[1, 1:].tolist() == [0.0, 0.0]
    assert entropy is not None
    assert seen is not None
    torch.testing.assert_close(entropy[0], -(p.exp() * p).sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0], logits.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_updates_are_counted_by_kept_rows(policy: Policy):
    method = METHODS["psr"]
    batch = make_batch(policy, method)
    kept = len(batch.responses)
    assert kept not in (0, 16)
    for piece in (1, 3, kept, 100):
        done = make_learner(policy, epochs=2).update(method, batch, piece, 0, 0)
        assert done["update/count"] == 2 * math.ceil(kept / piece)


def test_warm_up(policy: Policy):
    method = METHODS["dapo"]
    batch = make_batch(policy, method)
    learner = make_learner(policy, warmup_steps=4)
    rates = [learner.update(method, batch, 100, s, 0)["update/learning_rate"] for s in range(6)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_a_gradient_that_is_not_finite_changes_nothing(policy: Policy):
    method = METHODS["dapo"]
    batch = make_batch(policy, method)
    learner = make_learner(policy)
    learner.update(method, batch, 100, 0, 0)
    before = [p.clone() for p in policy.model.parameters()]
    moments = [m.clone() for state in learner.optimizer.state.values() for m in state.values()]
    for bad in (float("nan"), float("inf")):
        broken = dataclasses.replace(batch, advantages=torch.where(batch.mask, bad, 0.0))
        with pytest.raises(UserError, match=r"step 2 is not finite; .*learning_rate"):
            learner.update(method, broken, 100, 1, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    after = [m for state in learner.optimizer.state.values() for m in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
