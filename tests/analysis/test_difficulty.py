"""Numbers of a step's rollouts, by polarity and difficulty, against loops over groups, responses and tokens."""

import itertools
import math
import random
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from polarity.analysis import rollout_metrics


def rollouts(seed: int, sizes: tuple[int, int] = (2, 9)) -> dict[str, Tensor]:
    """Groups of uneven size under scattered numbers, rows shuffled, holes in the mask, a row without a token.

    How often a group is solved goes from never to always. Log-probs reach down to -1e4 (probability 0).
    """
    rng = random.Random(seed)
    rows = []
    for number in rng.sample(range(1000), rng.randint(1, 12)):
        rate = rng.choice([0, 0.2, 0.5, 0.8, 1])
        rows += [(number, rng.random() < rate) for _ in range(rng.randint(*sizes))]
    rng.shuffle(rows)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(rows), 7, generator=generator) > 0.3
    mask[0] = False
    mask[1] = torch.arange(7) == 0
    entropy = torch.where(mask, torch.rand(len(rows), 7, generator=generator), math.nan)
    logp = torch.where(mask, -torch.rand(len(rows), 7, generator=generator) * 3, math.nan)
    logp[1, 0] = -1e4
    return {
        "correct": torch.tensor([c for _, c in rows]),
        "rewards": torch.tensor([rng.choice([-1.0, 0.0, 0.3, 1.0]) for _ in rows]),
        "groups": torch.tensor([g for g, _ in rows]),
        "truncated": torch.tensor([rng.random() < 0.2 for _ in rows]),
        "logp": logp,
        "entropy": entropy,
        "mask": mask,
    }


def band(share: float) -> str:
    if share in (0, 1):
        return "solved" if share else "unsolved"
    return "hard" if share < 0.5 else "easy"


def by_hand(correct: Tensor, rewards: Tensor, groups: Tensor, entropy: Tensor, mask: Tensor, logp: Tensor, **_: Tensor):
    """The metrics of polarity, difficulty and several tries, from their definitions."""
    verdicts, values = defaultdict(list), defaultdict(list)
    for g, c in zip(groups.tolist(), correct.tolist(), strict=True):
        verdicts[g].append(c)
    for k in (2, 4, 8):
        if k <= min(map(len, verdicts.values())):
            for own in verdicts.values():
                tries = list(itertools.combinations(own, k))
                values[f"accuracy/pass@{k}"].append(sum(map(any, tries)) / len(tries))
    found_bands = {g: band(sum(own) / len(own)) for g, own in verdicts.items()}
    for name in ("unsolved", "hard", "easy", "solved"):
        values[f"difficulty/{name}/share"] += [float(b == name) for b in found_bands.values()]
    for i, (g, c) in enumerate(zip(groups.tolist(), correct.tolist(), strict=True)):
        polarity, prefix = ("positive" if c else "negative"), f"difficulty/{found_bands[g]}"
        values[f"{polarity}/reward"].append(float(rewards[i]))
        values[f"{prefix}/reward"].append(float(rewards[i]))
        for where in (polarity, prefix, f"{prefix}/{polarity}"):
            values[f"{where}/length"].append(float(mask[i].sum()))
            values[f"{where}/entropy"] += [float(entropy[i, t]) for t in range(7) if mask[i, t]]
        values[f"{polarity}/probability"] += [math.exp(float(logp[i, t])) for t in range(7) if mask[i, t]]
        values["positive/share"].append(float(c))
        values["negative/share"].append(float(not c))
        values["accuracy/mean"].append(float(c))
    for own in verdicts.values():
        values["accuracy/fully_solved"].append(float(all(own)))
        values["accuracy/unsolved"].append(float(not any(own)))
    return {name: sum(own) / len(own) for name, own in values.items() if own}


@pytest.mark.parametrize("seed", range(40))
def test_every_number_is_the_loops(seed: int):
    data = rollouts(seed, (1, 9) if seed % 4 == 0 else (2, 9))
    found, expected = rollout_metrics(**data), by_hand(**data)
    others = ("reward/", "length/", "entropy/")
    assert {n for n in found if not n.startswith(others)} == expected.keys()
    assert {n: found[n] for n in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert all(math.isfinite(value) for value in found.values())


def test_the_loops_have_seen_every_band_and_every_number_of_tries():
    seen = set().union(*(rollout_metrics(**rollouts(seed)).keys() for seed in range(40)))
    assert {f"difficulty/{b}/reward" for b in ("unsolved", "hard", "easy", "solved")} <= seen
    assert {"difficulty/hard/positive/entropy", "difficulty/easy/negative/length", "accuracy/pass@8"} <= seen
    assert not seen & {"difficulty/unsolved/positive/length", "difficulty/solved/negative/length"}


def test_a_half_solved_group_is_easy_whatever_its_size():
    """And bands are by counts: 49 of 98 is a half although 49 * (1 / 98) is less than one half in floating point."""
    for size in (2, 4, 10, 98):
        n = torch.zeros(size)
        found = rollout_metrics(
            torch.arange(size) < size // 2, n, n.long(), n.bool(), n[:, None], n[:, None], n[:, None].bool()
        )
        assert found["difficulty/easy/share"] == 1
        assert "difficulty/easy/entropy" not in found  # no token at all
        assert found["difficulty/easy/length"] == 0


def test_group_of_one_has_no_second_try():
    data = rollouts(3, (1, 1))
    found = rollout_metrics(**data)
    assert not any("pass@" in name for name in found)
    assert found["difficulty/solved/share"] == found["accuracy/mean"]
    assert found["difficulty/hard/share"] == found["difficulty/easy/share"] == 0


def test_numbers_of_groups_do_not_matter():
    data = rollouts(5)
    _, dense = data["groups"].unique(return_inverse=True)
    assert rollout_metrics(**{**data, "groups": dense}) == rollout_metrics(**data)
