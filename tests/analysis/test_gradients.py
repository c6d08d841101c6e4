"""Closed-form logit gradients against autograd in float64, their summaries against loops, chunks against the whole."""

import math

import pytest
import torch
from torch import Tensor

from polarity.analysis import gradients
from polarity.analysis.gradients import DIRECTIONS, EDGES, RANKS, GradientSums, entropy_bonus, nsr, psr, token_effects


def positions(seed: int, m: int = 30, v: int = 17) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits from flat to sharp (some shares are below 1e-300), drawn and unlikely tokens, polarities, ratios."""
    generator = torch.Generator().manual_seed(seed)
    sharp = torch.tensor([0.0, 0.5, 3.0, 30.0, 300.0], dtype=torch.float64)[torch.arange(m) % 5, None]
    logits = sharp * torch.randn(m, v, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, v, (m,), generator=generator)
    drawn = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    tokens = torch.where(torch.arange(m) % 3 == 0, tokens, drawn)
    correct = torch.rand(m, generator=generator) > 0.4
    ratio = torch.exp(0.5 * torch.randn(m, generator=generator, dtype=torch.float64))
    return logits, tokens, correct, ratio


def descent(loss, logits: Tensor) -> Tensor:
    """The negative gradient of loss(logits), by autograd."""
    leaf = logits.clone().requires_grad_()
    loss(leaf).backward()
    return -leaf.grad


def entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("v", [2, 3, 50])
def test_closed_forms_are_autograds(seed: int, v: int):
    logits, tokens, _, ratio = positions(seed, v=v)
    index = tokens[:, None]
    logp_old = logits.log_softmax(1).gather(1, index) - ratio[:, None].log()

    def probability(z: Tensor) -> Tensor:
        return z.softmax(1).gather(1, index)

    def importance(z: Tensor) -> Tensor:
        return (z.log_softmax(1).gather(1, index) - logp_old).exp()

    assert_close(psr(logits, tokens), descent(lambda z: -probability(z).sum(), logits))
    assert_close(nsr(logits, tokens), descent(lambda z: probability(z).sum(), logits))
    assert_close(psr(logits, tokens, ratio), descent(lambda z: -importance(z).sum(), logits))
    assert_close(nsr(logits, tokens, ratio), descent(lambda z: importance(z).sum(), logits))
    assert_close(entropy_bonus(logits), descent(lambda z: -entropy(z).sum(), logits))


def test_the_papers_equations():
    """Eq. 7 and 8, and appendix B's ascent direction, term by term; R * r * (1 - pi_y) and -R * r * pi_v as trained."""
    logits, tokens, _, ratio = positions(1)
    pi = logits.softmax(1)
    log_pi = logits.log_softmax(1)
    for i, y in enumerate(tokens.tolist()):
        mean = sum(float(p * l) for p, l in zip(pi[i], log_pi[i], strict=True) if p > 0)
        for v in range(logits.shape[1]):
            p, q = float(pi[i, v]), float(pi[i, y])
            written = q * (1 - q) if v == y else -p * q
            trained = float(ratio[i]) * ((1 - q) if v == y else -p)
            bonus = -p * (float(log_pi[i, v]) - mean)
            assert float(psr(logits, tokens)[i, v]) == pytest.approx(written, rel=1e-8, abs=1e-14)
            assert float(nsr(logits, tokens)[i, v]) == pytest.approx(-written, rel=1e-8, abs=1e-14)
            assert float(psr(logits, tokens, ratio)[i, v]) == pytest.approx(trained, rel=1e-8, abs=1e-14)
            assert float(entropy_bonus(logits)[i, v]) == pytest.approx(bonus, rel=1e-8, abs=1e-14)


def test_a_certain_token_keeps_its_digits():
    """1 - pi_y is e^-60, far below what 1 - softmax can tell from 0."""
    logits = torch.tensor([[60.0, 0.0]], dtype=torch.float64)
    found = nsr(logits, torch.tensor([0]), torch.ones(1))
    assert found[0].tolist() == pytest.approx([-math.exp(-60), math.exp(-60)], rel=1e-12, abs=0)


def test_impossible_tokens_are_not_moved():
    logits = torch.tensor([[0.0, 1.0, -math.inf], [0.0, -math.inf, -math.inf]], dtype=torch.float64)
    tokens = torch.tensor([0, 0])
    for direction in (psr(logits, tokens), nsr(logits, tokens, torch.ones(2)), entropy_bonus(logits)):
        assert direction.isfinite().all()
        assert direction[0, 2] == 0
        assert not direction[1].any()
    found = token_effects(logits, tokens, torch.tensor([True, False]))
    assert all(values.isfinite().all() for values in found.values())


def test_on_policy_mean_of_both_forms():
    """Over tokens drawn from pi, PSR as trained does nothing; as written it sharpens by pi_v (pi_v - sum pi^2)."""
    pi_logits = 2 * torch.randn(1, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pi = pi_logits.softmax(1)[0]
    every = torch.arange(9)
    rows = pi_logits.expand(9, 9)
    assert_close(pi @ psr(rows, every, torch.ones(9)), torch.zeros(9, dtype=torch.float64))
    assert_close(pi @ psr(rows, every), pi * (pi - pi.square().sum()))
    slope = pi @ token_effects(rows, every, torch.ones(9).bool())["as_written/entropy"]
    assert slope < -1e-3


@pytest.mark.parametrize("seed", range(3))
def test_mass_and_entropy_are_directional_derivatives(seed: int):
    logits, tokens, correct, ratio = positions(seed)
    found = token_effects(logits, tokens, correct, ratio)
    trained = torch.where(correct[:, None], psr(logits, tokens, ratio), nsr(logits, tokens, ratio))
    written = torch.where(correct[:, None], psr(logits, tokens), nsr(logits, tokens))
    for name, direction in zip(DIRECTIONS, (written, trained, entropy_bonus(logits)), strict=True):
        _, mass = torch.autograd.functional.jvp(lambda z: z.softmax(1), logits, direction)
        assert_close(gradients.mass_change(logits, direction), mass)
        assert_close(found[f"{name}/mass/sampled"], mass.gather(1, tokens[:, None])[:, 0])
        assert_close(found[f"{name}/entropy"], (descent(lambda z: -entropy(z).sum(), logits) * direction).sum(1))


def test_where_the_sampled_token_is_unlikely_nsr_takes_from_unlikely_alternatives_too():
    logits, tokens, _, ratio = positions(4, m=60)
    wrong = torch.zeros(60).bool()
    unlikely = token_effects(logits, tokens, wrong, ratio)["unlikely"].bool()
    assert unlikely.any()
    assert (~unlikely).any()
    direction = nsr(logits, tokens, ratio)
    others = gradients.mass_change(logits, direction).scatter(1, tokens[:, None], 0.0)
    assert (direction.scatter(1, tokens[:, None], 0.0) >= 0).all()
    assert (others[~unlikely] >= 0).all()
    limit = logits.softmax(1).square().sum(1) - logits.softmax(1).gather(1, tokens[:, None])[:, 0]
    below = (logits.softmax(1) > 1e-250) & (logits.softmax(1) < 0.9 * limit[:, None])
    below = below.scatter(1, tokens[:, None], False)
    assert below[unlikely].any()
    assert (others[below] < 0).all()


def by_hand(logits: Tensor, token: int, correct: bool, ratio: float) -> dict[str, float | list[float]]:
    """token_effects of one position, one vocabulary entry after another."""
    pi = logits.softmax(0).tolist()
    v = len(pi)
    ranks = sorted(range(v), key=lambda u: (-float(logits[u]), u != token))
    above = sum(float(x) > float(logits[token]) for x in logits)
    edges = sum(pi[token] >= edge for edge in EDGES)
    bonus = entropy_bonus(logits[None])[0].tolist()
    index, factor = torch.tensor([token]), torch.tensor([ratio], dtype=torch.float64)
    force = psr if correct else nsr
    found = {
        "probability": pi[token],
        "ratio": ratio,
        "rank": [float(k == min(above, RANKS)) for k in range(RANKS + 1)],
        "class": [float(k == edges) for k in range(len(EDGES) + 1)],
        "unlikely": float(pi[token] < sum(p * p for p in pi)),
    }
    directions = (force(logits[None], index)[0].tolist(), force(logits[None], index, factor)[0].tolist(), bonus)
    for name, g in zip(DIRECTIONS, directions, strict=True):
        size, slope = math.sqrt(sum(x * x for x in g)), sum(x * h for x, h in zip(g, bonus, strict=True))
        mean = sum(p * x for p, x in zip(pi, g, strict=True))
        found |= {
            f"{name}/size": size,
            f"{name}/rest": math.sqrt(sum(x * x for u, x in enumerate(g) if u != token)),
            f"{name}/entropy": slope,
            f"{name}/size_by_class": [size * c for c in found["class"]],
            f"{name}/entropy_by_class": [slope * c for c in found["class"]],
            f"{name}/size_unlikely": size * found["unlikely"],
        }
        for kind, values in (("logit", g), ("mass", [p * (x - mean) for p, x in zip(pi, g, strict=True)])):
            found[f"{name}/{kind}/sampled"] = values[token]
            for part, order in (("alternatives", [u for u in ranks if u != token]), ("ranks", ranks)):
                own = [values[u] for u in order[:RANKS]] + [0.0] * max(0, RANKS - len(order))
                found[f"{name}/{kind}/{part}"] = [*own, sum(values[u] for u in order[RANKS:])]
    return found


@pytest.mark.parametrize("v", [2, 3, 10, 11, 12, 40])
def test_effects_are_the_loops(v: int):
    logits, tokens, correct, ratio = positions(v, v=v)
    found = token_effects(logits, tokens, correct, ratio)
    for i in range(len(tokens)):
        expected = by_hand(logits[i], int(tokens[i]), bool(correct[i]), float(ratio[i]))
        assert found.keys() == expected.keys()
        average = float(logits[i].softmax(0).square().sum())
        for name, value in expected.items():
            if "unlikely" in name and math.isclose(expected["probability"], average):
                continue  # as likely as the average: rounding decides
            assert found[name][i].tolist() == pytest.approx(value, rel=1e-8, abs=1e-13), name


def test_effects_balance():
    """What one token gains the others lose, in logits and in probability, whichever way it is split."""
    found = token_effects(*positions(6))
    for name in DIRECTIONS:
        for kind in ("logit", "mass"):
            whole = found[f"{name}/{kind}/sampled"] + found[f"{name}/{kind}/alternatives"].sum(1)
            assert_close(whole, torch.zeros_like(whole))
            assert_close(found[f"{name}/{kind}/ranks"].sum(1), torch.zeros_like(whole))
    rest = found["as_trained/logit/alternatives"].abs().sum(1)
    assert_close(rest, found["as_trained/logit/sampled"].abs())  # equal L1 norms


def test_the_two_forms_differ_by_probability_over_ratio():
    logits, tokens, correct, ratio = positions(7)
    found = token_effects(logits, tokens, correct, ratio)
    for part in ("size", "rest", "entropy", "mass/sampled"):
        assert_close(found[f"as_trained/{part}"] * found["probability"], found[f"as_written/{part}"] * ratio)
    on_policy = token_effects(logits, tokens, correct)
    assert (on_policy["ratio"] == 1).all()
    assert_close(on_policy["as_trained/size"] * ratio, found["as_trained/size"])


@pytest.mark.parametrize("piece", [1, 40, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_sums_are_the_whole(piece: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gradients, "PIECE", piece)
    logits, tokens, correct, ratio = positions(8)
    logits = logits.to(dtype)
    whole = token_effects(logits, tokens, correct, ratio)
    sums = GradientSums()
    for chunk in torch.arange(30).split(7):
        sums.add(logits[chunk], tokens[chunk], correct[chunk], ratio[chunk])
    found = sums.means()
    for polarity, rows in (("positive", correct), ("negative", ~correct)):
        own = found[polarity]
        assert own["tokens"] == int(rows.sum())
        assert own.keys() == {"tokens"} | whole.keys()
        for name, values in whole.items():
            assert own[name] == pytest.approx(values[rows].mean(0).tolist(), rel=1e-10, abs=1e-15)


def test_a_polarity_without_tokens_is_left_out():
    logits, tokens, _, _ = positions(9)
    sums = GradientSums()
    assert sums.means() == {}
    sums.add(logits, tokens, torch.zeros(30).bool())
    found = sums.means()
    assert found.keys() == {"negative"}
    assert found["negative"]["ratio"] == 1
    sums.add(logits[:0], tokens[:0], torch.zeros(0).bool())
    assert sums.means() == found
