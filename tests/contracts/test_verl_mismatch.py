"""Train-inference mismatch equals verl's metrics of it: utils/debug/metrics.py and trainer/ppo/rollout_corr_helper.py.

n responses, T padded length. Runs in the environment that holds verl (`make test`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from batches import Batch, T, random_batch
from verl import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_offpolicy_metrics, compute_rollout_correction_weights
from verl.utils.debug.metrics import calculate_debug_metrics

from polarity.analysis import mismatch

# verl's name -> ours
DEBUG = {
    "training/rollout_probs_diff_mean": "mean",
    "training/rollout_probs_diff_max": "max",
    "training/rollout_probs_diff_std": "std",
    "training/rollout_actor_probs_pearson_corr": "correlation",
}
OFF_POLICY = {
    "kl": "k1", "k3_kl": "k3", "chi2_token": "chi_square", "chi2_seq": "sequence_chi_square",
    "log_ppl_diff": "log_ppl_difference",
}  # fmt: skip
WEIGHTS = {"rollout_is_eff_sample_size": "ess", "rollout_is_max": "weight_max", "rollout_is_min": "weight_min"}


def theirs(batch: Batch) -> dict[str, float]:
    """verl's numbers under our names. The threshold of the weights is beyond verl's own bound, so nothing is cut."""
    rollout, old, mask = batch.logp_rollout, batch.logp_old, batch.mask
    data = DataProto.from_dict(
        tensors={
            "rollout_log_probs": rollout, "old_log_probs": old, "response_mask": mask, "responses": mask.long(),
        }
    )  # fmt: skip
    debug = calculate_debug_metrics(data)
    off = compute_offpolicy_metrics(old, rollout, mask)
    _, weights = compute_rollout_correction_weights(old - rollout, mask, "token", 1e9)
    pairs = ((debug, DEBUG), (off, OFF_POLICY), (weights, WEIGHTS))
    return {f"mismatch/{ours}": found[name] for found, names in pairs for name, ours in names.items()}


def ours(batch: Batch) -> dict[str, float]:
    return mismatch(batch.logp_rollout, batch.logp_old, batch.mask)


def changed(batch: Batch, **tensors: torch.Tensor) -> Batch:
    return Batch(**{**vars(batch), **tensors})


@pytest.mark.parametrize("holes", [False, True], ids=["single-turn", "multi-turn"])
@pytest.mark.parametrize("seed", range(4))
def test_every_metric(seed: int, holes: bool):
    batch = random_batch(seed, holes=holes)
    expected = theirs(batch)
    assert ours(batch).keys() == expected.keys()
    assert ours(batch) == pytest.approx(expected, rel=1e-7)


class Deviation(NamedTuple):
    """Where polarity differs from verl on purpose: asserted by `shows`, so that the list cannot go stale."""

    name: str
    reason: str
    shows: Callable[[], None]


def ratios_beyond_the_bound() -> None:
    batch = random_batch(1)
    gap = torch.zeros_like(batch.logp_old)
    gap[0, 0], gap[1, 0] = 30.0, -30.0
    batch = changed(batch, logp_rollout=batch.logp_old - gap)
    expected, found = theirs(batch), ours(batch)
    held = (math.expm1(20) - 20) + (math.expm1(-20) + 20)
    assert found.pop("mismatch/k3") == pytest.approx(held / int(batch.mask.sum()), rel=1e-7)
    assert expected.pop("mismatch/k3") == pytest.approx(math.exp(30) / int(batch.mask.sum()), rel=1e-7)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["mismatch/weight_max"] == pytest.approx(math.exp(20))


def empty_responses() -> None:
    batch = random_batch(2, empty_row=True)
    share = float(batch.mask.any(1).double().mean())
    assert share < 1
    expected, found = theirs(batch), ours(batch)
    for name in ("mismatch/sequence_chi_square", "mismatch/log_ppl_difference"):
        assert expected.pop(name) == pytest.approx(found.pop(name) * share, rel=1e-7)
    assert found == pytest.approx(expected, rel=1e-7)


def undefined_values() -> None:
    batch = random_batch(3)
    nothing = changed(batch, mask=torch.zeros_like(batch.mask))
    with pytest.raises(AssertionError):
        theirs(nothing)
    assert ours(nothing) == {}
    first = batch.rows(slice(0, 1))
    one = changed(first, mask=torch.arange(T)[None] == 0)
    constant = changed(batch, logp_old=torch.full_like(batch.logp_old, -1.0))
    expected = theirs(one)
    undefined = {name for name, value in expected.items() if not math.isfinite(value)}
    assert undefined == {"mismatch/std", "mismatch/correlation"}
    assert ours(one) == pytest.approx({k: v for k, v in expected.items() if k not in undefined}, rel=1e-7)
    expected = theirs(constant)
    expected.pop("mismatch/correlation")
    assert ours(constant) == pytest.approx(expected, rel=1e-7)


DEVIATIONS = [
    Deviation(
        "ratios beyond e^20",
        "verl's k3 exponentiates the log-ratio as it is; polarity holds it within 20, as both do in chi_square",
        ratios_beyond_the_bound,
    ),
    Deviation(
        "responses without a token",
        "verl counts them as responses on which both sides agree; to polarity they are none",
        empty_responses,
    ),
    Deviation(
        "undefined values",
        "verl fails without a token, gives NaN for the spread of one, and for the correlation of a constant NaN or "
        "what rounding makes of it; polarity leaves these out",
        undefined_values,
    ),
]


@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")
@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda deviation: deviation.name)
def test_known_deviations(deviation: Deviation) -> None:
    deviation.shows()
