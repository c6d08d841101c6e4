"""Advantages, rewards and critic targets equal those of verl's registered estimators.

P prompts, G responses per prompt, N = P*G, T padded length. Runs in the environment that holds verl (`make test`).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from batches import Batch, G, P, T, assert_equal, random_batch
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import compute_rewards, get_adv_estimator_fn

from polarity.methods import METHODS, Method

# Polarity hands out float32 advantages, computed in float64 where they are normalised.
TOLERANCE = 1e-5
BY_GROUP = {
    "grpo": ("grpo", {}),
    "dr_grpo": ("grpo", {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("rloo", {}),
    "reinforce_pp_baseline": ("reinforce_plus_plus_baseline", {}),
}


def at_the_end(rewards: Tensor, mask: Tensor) -> Tensor:
    """(N,) rewards on the last valid token of each response, (N, T), as verl stores them."""
    position = torch.arange(mask.shape[1])
    last = torch.where(mask, position, -1).amax(1, keepdim=True)
    return torch.where(position == last, rewards[:, None], 0.0)


def verl(estimator: str, batch: Batch, rewards: Tensor, **arguments: object) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N, T) of one of verl's estimators; rewards (N, T)."""
    if estimator != "gae":
        arguments |= {"index": batch.groups.numpy().astype(str).astype(object)}
    return get_adv_estimator_fn(estimator)(
        token_level_rewards=rewards, response_mask=batch.mask.to(rewards.dtype), **arguments
    )


def ours(method: Method, batch: Batch, **more: Tensor) -> Tensor:
    """Polarity's advantages spread over tokens, (N, T)."""
    correct = batch.rewards > 0.5
    advantages = method.advantages(batch.rewards, batch.groups, correct, mask=batch.mask, **more)
    return torch.where(batch.mask, advantages if advantages.dim() == 2 else advantages[:, None], 0.0)


def inside(values: Tensor, batch: Batch) -> Tensor:
    return torch.where(batch.mask, values, 0.0)


def graded(batch: Batch, seed: int) -> Batch:
    """The batch with continuous rewards."""
    rewards = torch.rand(P * G, generator=torch.Generator().manual_seed(seed), dtype=batch.rewards.dtype)
    return Batch(**{**vars(batch), "rewards": rewards})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("holes", [False, True], ids=["single-turn", "multi-turn"])
@pytest.mark.parametrize("name", BY_GROUP)
def test_group_estimators(name: str, holes: bool, dtype: torch.dtype) -> None:
    estimator, arguments = BY_GROUP[name]
    for seed in range(4):
        batch = random_batch(seed, dtype, holes=holes, empty_row=True)
        batch = graded(batch, seed) if seed % 2 else batch
        theirs, _ = verl(estimator, batch, at_the_end(batch.rewards, batch.mask), **arguments)
        # the empty response has no last token: verl's scores leave it out, so its reward is 0 there
        batch = Batch(**{**vars(batch), "rewards": torch.where(batch.mask.any(1), batch.rewards, 0.0)})
        assert_equal(ours(METHODS[name], batch), theirs, TOLERANCE, name)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("reward_kl", [0.0, 1e-2])
@pytest.mark.parametrize("holes", [False, True], ids=["single-turn", "multi-turn"])
def test_reinforce_plus_plus(holes: bool, reward_kl: float, gamma: float) -> None:
    method = METHODS["reinforce_pp"].vary({"advantage.gamma": gamma, "advantage.reward_kl": reward_kl})
    for seed in range(4):
        batch = random_batch(seed, holes=holes, empty_row=True)
        rewards = at_the_end(batch.rewards, batch.mask)
        if reward_kl:
            rewards = inside(compute_rewards(rewards, batch.logp_old, batch.logp_ref, reward_kl), batch)
        theirs, _ = verl("reinforce_plus_plus", batch, rewards, config=AlgoConfig(gamma=gamma))
        mine = ours(method, batch, logp_old=batch.logp_old, logp_ref=batch.logp_ref)
        assert_equal(mine, theirs, TOLERANCE, "advantages")


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8)])
@pytest.mark.parametrize("holes", [False, True], ids=["single-turn", "multi-turn"])
def test_gae_with_kl_in_the_reward(holes: bool, gamma: float, lam: float) -> None:
    method = METHODS["ppo"].vary({"advantage.gamma": gamma, "advantage.lam": lam, "advantage.reward_kl": 0.01})
    for seed in range(4):
        batch = random_batch(seed, holes=holes, empty_row=True)
        values = 0.5 * torch.randn(P * G, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rewards = inside(
            compute_rewards(at_the_end(batch.rewards, batch.mask), batch.logp_old, batch.logp_ref, 0.01), batch
        )
        theirs, returns = verl("gae", batch, rewards, values=inside(values, batch), gamma=gamma, lam=lam)
        logps = {"logp_old": batch.logp_old, "logp_ref": batch.logp_ref}
        mine = ours(method, batch, values=values, **logps)
        targets = method.value_targets(batch.rewards, batch.mask, values, **logps)
        assert_equal(mine, inside(theirs, batch), TOLERANCE, "advantages")
        assert_equal(targets, inside(returns, batch), TOLERANCE, "targets of the critic")


def small(rewards: list[float], groups: list[int], dtype: torch.dtype = torch.float32) -> Batch:
    """Responses of one token with these rewards and groups."""
    batch = random_batch(0, dtype).rows(slice(0, len(rewards)))
    mask = (torch.arange(T) == 0).expand(len(rewards), T)
    return Batch(**{**vars(batch), "rewards": torch.tensor(rewards, dtype=dtype), "groups": torch.tensor(groups)} | {
        "mask": mask
    })  # fmt: skip


def group_of_one() -> None:
    """Of the two groups the second is alone with its reward, 1."""
    batch = small([0.0, 1.0, 1.0], [0, 0, 1])
    for name in ("grpo", "dr_grpo", "rloo"):
        estimator, arguments = BY_GROUP[name]
        theirs, _ = verl(estimator, batch, at_the_end(batch.rewards, batch.mask), **arguments)
        assert theirs[2, 0] == pytest.approx(1.0), name
        assert ours(METHODS[name], batch)[2, 0] == 0, name
        np.testing.assert_allclose(ours(METHODS[name], batch)[:2], theirs[:2], rtol=1e-5)


def equal_rewards() -> None:
    """Seven rewards of 0.7: their float32 mean is another number, and the spread is about 0."""
    batch = small([0.7] * 7, [0] * 7)
    theirs, _ = verl("grpo", batch, at_the_end(batch.rewards, batch.mask))
    assert theirs[:, 0].abs().max() > 0.01
    assert not ours(METHODS["grpo"], batch).any()


def one_token() -> None:
    """Whitening over a single token: a variance of one number."""
    batch = small([1.0], [0])
    with pytest.raises(ValueError, match="sum of the mask is one"):
        verl("reinforce_plus_plus", batch, at_the_end(batch.rewards, batch.mask), config=AlgoConfig(gamma=1.0))
    assert ours(METHODS["reinforce_pp"], batch).isfinite().all()


def empty_response() -> None:
    """A response without tokens in a group of two: where does its reward go?"""
    batch = small([0.0, 1.0], [0, 0])
    mask = batch.mask.clone()
    mask[1] = False
    batch = Batch(**{**vars(batch), "mask": mask})
    theirs, _ = verl("grpo", batch, at_the_end(batch.rewards, mask), norm_adv_by_std_in_grpo=False)
    assert theirs[0, 0] == 0
    assert ours(METHODS["dr_grpo"], batch)[0, 0] == -0.5


class Deviation(NamedTuple):
    """Where polarity differs from verl on purpose: asserted by `shows`, so that the list cannot go stale."""

    name: str
    reason: str
    shows: Callable[[], None]


DEVIATIONS = [
    Deviation(
        "group of one",
        "verl gives A = R; polarity 0: one response says nothing about better or worse than its group",
        group_of_one,
    ),
    Deviation(
        "equal rewards",
        "verl computes in float32 and divides rounding by a spread of about 0; polarity gives 0",
        equal_rewards,
    ),
    Deviation(
        "one token in all",
        "verl refuses to whiten a single token; polarity leaves the advantage as it is",
        one_token,
    ),
    Deviation(
        "empty response",
        "verl keeps rewards on tokens, so a response without tokens loses its reward; polarity's rewards are (N,)",
        empty_response,
    ),
]


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda deviation: deviation.name)
def test_known_deviations(deviation: Deviation) -> None:
    deviation.shows()
