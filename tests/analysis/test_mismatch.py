"""Train-inference mismatch against loops over tokens, and what it says when a side says impossible."""

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from polarity.analysis import mismatch
from polarity.errors import UserError

NAMES = {
    "mean", "max", "std", "correlation", "k1", "k3", "chi_square", "sequence_chi_square", "ess", "weight_max",
    "weight_min", "log_ppl_difference",
}  # fmt: skip
BY_POLARITY = {"mean", "max", "correlation", "k1", "k3", "chi_square"}


def by_hand(rollout: Tensor, old: Tensor, mask: Tensor) -> dict[str, float]:
    """Every number from its definition, one token at a time; log-ratios here stay within 20."""
    tokens, rows = [], []
    for i in range(len(mask)):
        own = [(float(rollout[i, t]), float(old[i, t])) for t in range(mask.shape[1]) if mask[i, t]]
        tokens += own
        if own:
            rows.append(own)
    n = len(tokens)
    if n == 0:
        return {}
    distance = [abs(math.exp(a) - math.exp(b)) for a, b in tokens]
    weights = [math.exp(b - a) for a, b in tokens]
    mean = sum(distance) / n
    found = {
        "mean": mean,
        "max": max(distance),
        "k1": sum(a - b for a, b in tokens) / n,
        "k3": sum(w - 1 - math.log(w) for w in weights) / n,
        "chi_square": sum(w * w for w in weights) / n - 1,
        "ess": sum(weights) ** 2 / (n * sum(w * w for w in weights)),
        "weight_max": max(weights),
        "weight_min": min(weights),
        "sequence_chi_square": sum(math.exp(sum(b - a for a, b in row)) ** 2 for row in rows) / len(rows) - 1,
        "log_ppl_difference": sum(sum(a - b for a, b in row) / len(row) for row in rows) / len(rows),
    }
    if n > 1:
        found["std"] = math.sqrt(sum((d - mean) ** 2 for d in distance) / (n - 1))
        p, q = [math.exp(a) for a, _ in tokens], [math.exp(b) for _, b in tokens]
        p, q = [x - sum(p) / n for x in p], [x - sum(q) / n for x in q]
        found["correlation"] = sum(map(lambda x, y: x * y, p, q)) / math.sqrt(
            sum(x * x for x in p) * sum(x * x for x in q)
        )
    return found


def batch(seed: int, rows: int = 6, longest: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random log-probs, a mask with holes, an empty row and a row of one token, NaN outside, and verdicts."""
    generator = torch.Generator().manual_seed(seed)
    rollout = -3 * torch.rand(rows, longest, generator=generator, dtype=torch.float64)
    old = (rollout + 0.4 * torch.randn(rows, longest, generator=generator, dtype=torch.float64)).clamp(max=0)
    mask = torch.rand(rows, longest, generator=generator) > 0.4
    mask[0], mask[1] = False, torch.arange(longest) == 3
    correct = torch.rand(rows, generator=generator) > 0.5
    return torch.where(mask, rollout, math.nan), torch.where(mask, old, math.nan), mask, correct


@pytest.mark.parametrize("seed", range(20))
def test_every_number_is_the_loops(seed: int):
    rollout, old, mask, correct = batch(seed)
    expected = by_hand(rollout, old, mask)
    assert expected.keys() == NAMES
    whole = mismatch(rollout, old, mask)
    assert whole == pytest.approx({f"mismatch/{k}": v for k, v in expected.items()}, rel=1e-9, abs=1e-12)
    split = {}
    for polarity, rows in (("positive", correct), ("negative", ~correct)):
        own = by_hand(rollout, old, mask & rows[:, None])
        split |= {f"{polarity}/mismatch_{k}": v for k, v in own.items() if k in BY_POLARITY}
    assert mismatch(rollout, old, mask, correct) == pytest.approx(whole | split, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_measured_in_float64(dtype: torch.dtype):
    rollout, old, mask, _ = batch(3)
    rollout, old = rollout.to(dtype), old.to(dtype)
    assert mismatch(rollout, old, mask) == pytest.approx(
        {f"mismatch/{k}": v for k, v in by_hand(rollout, old, mask).items()}, rel=1e-9
    )


def test_rows_padding_and_polarity_do_not_mix():
    """More padding, another order of rows: the same numbers. All of one polarity: its numbers are the whole's."""
    rollout, old, mask, correct = batch(5)
    found = mismatch(rollout, old, mask, correct)
    order = torch.tensor(random.Random(0).sample(range(6), 6))
    padded = [torch.nn.functional.pad(x[order], (0, 3)) for x in (rollout, old, mask)]
    assert mismatch(*padded, correct[order]) == pytest.approx(found)
    found = mismatch(rollout, old, mask, torch.ones(6).bool())
    assert not any(name.startswith("negative/") for name in found)
    assert all(found[f"positive/mismatch_{name}"] == found[f"mismatch/{name}"] for name in BY_POLARITY)


def test_empty_sets_are_left_out():
    rollout, old, mask, correct = batch(7)
    assert mismatch(rollout, old, torch.zeros_like(mask), correct) == {}
    assert mismatch(rollout[:0], old[:0], mask[:0], correct[:0]) == {}
    one = torch.zeros_like(mask)
    one[1, 3] = True
    found = mismatch(rollout, old, one)
    assert found.keys() == {f"mismatch/{name}" for name in NAMES - {"std", "correlation"}}
    assert found["mismatch/ess"] == pytest.approx(1)


def test_equal_sides():
    rollout, _, mask, correct = batch(8)
    found = mismatch(rollout, rollout, mask, correct)
    for name in ("mean", "max", "std", "k1", "k3", "chi_square", "sequence_chi_square", "log_ppl_difference"):
        assert found[f"mismatch/{name}"] == 0
    for name in ("correlation", "ess", "weight_max", "weight_min"):
        assert found[f"mismatch/{name}"] == pytest.approx(1)


def test_constant_probabilities_have_no_correlation():
    constant = torch.full((40, 7), math.log(0.3), dtype=torch.float64)
    other = constant - torch.rand(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert "mismatch/correlation" not in mismatch(constant, other, torch.ones(40, 7).bool())


@pytest.mark.parametrize("impossible", [-math.inf, -1e30, -800.0])
@pytest.mark.parametrize("side", ["rollout", "old", "both"])
def test_every_value_stays_finite(side: str, impossible: float):
    """Ratios beyond e^20 count as e^20, infinite differences leave k1 out, and agreement on impossible is agreement."""
    rollout, old, mask, correct = batch(9)
    row, place = mask.nonzero()[5].tolist()
    for name, tensor in (("rollout", rollout), ("old", old)):
        if side in (name, "both"):
            tensor[row, place] = impossible
    found = mismatch(rollout, old, mask, correct)
    assert all(math.isfinite(value) for value in found.values())
    assert found["mismatch/weight_max"] <= math.exp(20)
    assert found["mismatch/weight_min"] >= math.exp(-20)
    if side == "rollout":
        assert found["mismatch/weight_max"] == pytest.approx(math.exp(20))
        assert found["mismatch/chi_square"] == pytest.approx(math.exp(40) / int(mask.sum()), rel=1e-6)
    if side == "old":
        assert found["mismatch/weight_min"] == pytest.approx(math.exp(-20))
    if side == "both":
        agreed = mask.clone()
        agreed[row, place] = False
        others = mismatch(rollout, old, agreed)
        assert found["mismatch/weight_max"] == others["mismatch/weight_max"]
        assert found["mismatch/k1"] * int(mask.sum()) == pytest.approx(others["mismatch/k1"] * int(agreed.sum()))
    else:
        assert ("mismatch/k1" in found) == math.isfinite(impossible)
        assert ("mismatch/log_ppl_difference" in found) == math.isfinite(impossible)


def test_long_responses_are_held_as_a_whole():
    """A small bias on each of many tokens: tokens hardly differ, responses do, and the largest ratio is e^20."""
    rollout = torch.full((3, 5000), -1.0)
    found = mismatch(rollout, rollout + 0.01, torch.ones(3, 5000).bool())
    assert found["mismatch/weight_max"] == pytest.approx(math.exp(0.01), rel=1e-5)
    assert found["mismatch/sequence_chi_square"] == pytest.approx(math.exp(40), rel=1e-9)
    assert found["mismatch/log_ppl_difference"] == pytest.approx(-0.01, rel=1e-5)


def test_nan_is_left_out():
    rollout, old, mask, _ = batch(11)
    rollout[tuple(mask.nonzero()[0])] = math.nan
    assert all(math.isfinite(value) for value in mismatch(rollout, old, mask).values())


def test_other_types_are_converted_or_refused():
    rollout, old = [[-1.0, -2.0], [-0.5, -0.1]], [[-1.1, -2.0], [-0.4, -0.1]]
    mask, correct = [[True, True], [True, False]], [True, False]
    expected = mismatch(torch.tensor(rollout), torch.tensor(old), torch.tensor(mask), torch.tensor(correct))
    assert mismatch(np.array(rollout), old, np.array(mask), correct) == pytest.approx(expected)
    with pytest.raises(UserError, match=r"correct is torch.int64; it is a boolean"):
        mismatch(torch.tensor(rollout), torch.tensor(old), torch.tensor(mask), torch.tensor([1, 0]))
    with pytest.raises(UserError, match=r"mask is torch.float32"):
        mismatch(torch.tensor(rollout), torch.tensor(old), torch.ones(2, 2))
