"""The critic: values from before each token, one gradient whatever the split, and PPO runs that use it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polarity.config import RunConfig, UpdateConfig, load_config
from polarity.engines.embedded import prepare, train, train_step
from polarity.engines.embedded.critic import Critic, value_metrics
from polarity.engines.embedded.policy import load_policy
from polarity.engines.embedded.sampler import Sampling, sample
from polarity.engines.embedded.updater import Batch
from polarity.errors import UserError
from polarity.methods import METHODS
from polarity.rundir import RunReader

PPO, LIMIT = METHODS["ppo"], 12


def make_critic(path: Path, *, head: float = 0.3, checkpointing: bool = False, **changes: Any) -> Critic:
    """A critic whose head is not 0, so that its values differ."""
    config = UpdateConfig(**{"critic_learning_rate": 1e-3, "micro_batch_tokens": 10**6, **changes})
    critic = Critic(load_policy(path, device="cpu", gradient_checkpointing=checkpointing), config, LIMIT)
    torch.nn.init.normal_(critic.head.weight, std=head, generator=torch.Generator().manual_seed(3))
    return critic


@pytest.fixture
def batch(qwen2: Path) -> Batch:
    """Twelve rows of several lengths; old values and targets of a critic, some of them further apart than the clip."""
    prompts = [[5, 6, 7], [9, 8], list(range(60, 75))]
    made = sample(load_policy(qwen2, device="cpu"), prompts, 4, Sampling(LIMIT), 1)
    g = torch.Generator().manual_seed(2)
    zeros = torch.zeros_like(made.logp)
    return Batch(
        prompts=[p for p in prompts for _ in range(4)],
        responses=made.responses(),
        mask=made.mask,
        logp_old=made.logp,
        entropy_old=made.entropy,
        advantages=zeros,
        correct=torch.arange(12) % 2 == 0,
        values=torch.randn(made.logp.shape, generator=g),
        value_targets=torch.randn(made.logp.shape, generator=g),
    )


def gradient(critic: Critic, batch: Batch) -> tuple[float, Tensor, dict[str, tuple[float, float]]]:
    loss, sums = critic.gradient(PPO, batch)
    return loss, torch.cat([p.grad.double().flatten() for p in critic.parameters]), sums  # type: ignore[union-attr]


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert float(wanted.norm()) > 1e-3
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


def test_a_value_is_read_before_its_token(qwen2: Path, batch: Batch):
    """Another token t changes no value up to t's own, and those after it; the prompt changes all of them."""
    critic = make_critic(qwen2)
    one = batch.rows(torch.tensor([int(batch.mask.sum(1).argmax())]))
    before, (response,) = critic.values(one), one.responses
    assert len(response) == LIMIT
    for t in (0, 4, LIMIT - 1):
        other = [*response[:t], (response[t] + 1) % 300, *response[t + 1 :]]
        after = critic.values(dataclasses.replace(one, responses=[other]))
        assert torch.equal(before[0, : t + 1], after[0, : t + 1])
        assert ((before - after)[0, t + 1 :].abs() > 1e-4).all()
    (prompt,) = one.prompts
    after = critic.values(dataclasses.replace(one, prompts=[[*prompt[:-1], prompt[-1] + 1]]))
    assert ((before - after)[0].abs() > 1e-4).all()


def test_values_are_those_of_the_formula(qwen2: Path, batch: Batch):
    """Value and half the clipped squared error, in float64 and row by row; the gradient of decoder and head."""
    critic = make_critic(qwen2)
    values = critic.values(batch)
    loss, found, _ = gradient(critic, batch)
    assert values.dtype == torch.float32
    assert (values[~batch.mask] == 0).all()
    model = critic.module.double()
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for i, (prompt, response) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        n = len(response)
        hidden = model["decoder"](input_ids=torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        value = model["head"](hidden[len(prompt) - 1 : -1])[:, 0]
        torch.testing.assert_close(values[i, :n], value.detach().float(), atol=1e-5, rtol=1e-5)
        assert batch.values is not None
        assert batch.value_targets is not None
        old, target = batch.values[i, :n].double(), batch.value_targets[i, :n].double()
        near = old + (value - old).clamp(-0.5, 0.5)
        total = total + torch.maximum((value - target) ** 2, (near - target) ** 2).sum()
    total = 0.5 * total / int(batch.mask.sum())
    model.zero_grad()
    total.backward()
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    assert_close(found, torch.cat([p.grad.flatten() for p in model.parameters()]), 1e-4)


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_gradient_and_values_are_the_same_for_every_split(
    make_model: Callable[..., Path], batch: Batch, architecture: str
):
    path = make_model(architecture, ends=40)
    loss, wanted, metrics = gradient(make_critic(path), batch)
    values = make_critic(path).values(batch)
    for changes in ({"micro_batch_tokens": 1}, {"micro_batch_tokens": 45}, {"checkpointing": True}):
        critic = make_critic(path, **changes)
        again, found, sums = gradient(critic, batch)
        assert again == pytest.approx(loss, rel=1e-5)
        assert_close(found, wanted)
        torch.testing.assert_close(critic.values(batch), values, atol=1e-5, rtol=1e-5)
        assert sums["value/clip_fraction"] == metrics["value/clip_fraction"]
        assert sums["value/error"] == pytest.approx(metrics["value/error"], rel=1e-4)
    assert 0 < metrics["value/clip_fraction"][0] < metrics["value/clip_fraction"][1] == int(batch.mask.sum())


def test_rows_that_are_masked_out_leave_everything(qwen2: Path, batch: Batch):
    out = torch.arange(12) % 3 == 0
    critic = make_critic(qwen2)
    loss, found, _ = gradient(critic, dataclasses.replace(batch, mask=batch.mask & ~out[:, None]))
    again, wanted, _ = gradient(critic, batch.rows((~out).nonzero()[:, 0]))
    assert loss == pytest.approx(again, rel=1e-5)
    assert_close(found, wanted)


def test_it_starts_at_zero_and_learns_a_fixed_batch(qwen2: Path, batch: Batch):
    """Advantages of the batch are all 0: its rows train the critic all the same."""
    critic = make_critic(qwen2, head=0.0, epochs=5)
    assert not critic.values(batch).any()
    targets = torch.where(batch.correct[:, None], 1.0, 0.0).expand_as(batch.mask)
    batch = dataclasses.replace(batch, values=targets, value_targets=targets)
    found = [critic.update(PPO, batch, 5, step, step) for step in range(8)]
    assert [sorted(row) for row in found] == [["update/critic_grad_norm", "value/clip_fraction", "value/error"]] * 8
    error = [row["value/error"] for row in found]
    assert error[-1] < 0.5 * error[0]
    assert value_metrics(critic.values(batch), targets, batch.mask)["value/explained_variance"] > 0.5


def test_its_parameters_and_learning_rate(make_model: Callable[..., Path]):
    critic = make_critic(make_model("llama"), critic_learning_rate=None, learning_rate=2e-4, warmup_steps=4)
    decoder = sum(p.numel() for p in critic.policy.model.parameters())
    assert sum(p.numel() for p in critic.parameters) == decoder + 32 + 1  # an untied output layer is dropped
    assert critic.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)  # ten times the policy's


def test_a_gradient_that_is_not_finite(qwen2: Path, batch: Batch):
    critic = make_critic(qwen2)
    before = [p.clone() for p in critic.parameters]
    broken = dataclasses.replace(batch, value_targets=torch.full_like(batch.logp_old, float("nan")))
    with pytest.raises(UserError, match=r"step 3 is not finite; lower update.critic_learning_rate"):
        critic.update(PPO, broken, 5, 2, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, critic.parameters, strict=True))


def test_value_metrics():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    targets = torch.tensor([[1.0, 0.0, 9.0], [1.0, 0.0, 0.5]])
    assert value_metrics(targets, targets, mask) == {"value/mean": 0.5, "value/explained_variance": 1.0}
    assert value_metrics(torch.full_like(targets, 0.3), targets, mask) == pytest.approx(
        {"value/mean": 0.3, "value/explained_variance": 0.0}
    )
    assert value_metrics(-targets, targets, mask)["value/explained_variance"] == pytest.approx(-3.0)
    assert value_metrics(targets, torch.ones_like(targets), mask) == {"value/mean": 0.5}  # there is nothing to explain
    assert value_metrics(targets, targets, torch.zeros_like(mask)) == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_steps(small_run: Callable[..., RunConfig], dtype: str):
    """Values are from before the step's updates; the advantages are GAE's, whitened; the weights stay float32."""
    settings = {"rollout__truncated": "masked", "rollout__logp_old": "recomputed", "update__epochs": 2}
    run = prepare(small_run("ppo", **settings, dtype=dtype))
    assert run.critic is not None
    assert {p.dtype for p in run.critic.parameters} == {torch.float32}
    for step in range(2):
        before = [p.clone() for p in run.policy.model.parameters()]
        rollouts, credit, row = train_step(run)
        assert row["update/count"] == 4
        mask, found = rollouts.mask, credit["advantages"]
        assert found.shape == mask.shape
        assert (found[~mask] == 0).all()
        assert float(found[mask].mean()) == pytest.approx(0, abs=1e-4)
        assert float(found[mask].var()) == pytest.approx(1, abs=1e-3)
        assert (row["value/mean"] == 0) == (step == 0)
        assert row["update/critic_grad_norm"] > 0
        assert any(not torch.equal(a, b) for a, b in zip(before, run.policy.model.parameters(), strict=True))


def test_records_of_token_advantages(small_run: Callable[..., RunConfig], tmp_path: Path):
    """One advantage a token; the weight is 1 where a token is trained on, and 0 in responses that are masked out."""
    train(small_run("ppo", steps=1, rollout__truncated="masked"), tmp_path / "run", progress=False)
    rows = RunReader(tmp_path / "run").rollouts(1)
    assert {row["truncated"] for row in rows} == {True, False}
    for row in rows:
        n = len(row["token_ids"])
        assert row["weight"] == [0.0 if row["truncated"] else 1.0] * n
        assert len(row["advantage"]) == n
        assert any(row["advantage"]) != row["truncated"]


def test_twenty_steps_on_the_default_world(tmp_path: Path):
    """Twice the same, and the critic has left 0 for what a response may hope for."""
    small = {"rollout.prompts": 4, "rollout.group": 4, "rollout.max_new_tokens": 40}
    config = load_config(None, {"method": "ppo", "steps": 20, "evaluation.every": 0, "log.rollouts_every": 0, **small})
    rows = []
    for out in (tmp_path / "one", tmp_path / "two"):
        train(config, out, progress=False)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines])
    assert len(rows[0]) == 20
    assert rows[0] == rows[1]
    assert 0.03 < rows[0][-1]["value/mean"] < 0.9
