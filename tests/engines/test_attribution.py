"""Attribution of the entropy change: against separate gradients of every cell, and against the change that happened."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_learner import make_batch, make_learner
from torch import Tensor

from polarity.analysis.attribution import CELLS, cell_bounds, cells_of
from polarity.config import RunConfig
from polarity.engines.embedded import train
from polarity.engines.embedded.attribution import Attribution
from polarity.engines.embedded.learner import Learner
from polarity.engines.embedded.policy import Policy
from polarity.engines.embedded.updater import Batch
from polarity.methods import METHODS, Method
from polarity.rundir import RunReader


def watched(learner: Learner, method: Method, batch: Batch, rows: int) -> dict[str, float]:
    watch = learner.watch = Attribution(learner, batch, batch.mask)
    learner.update(method, batch, rows, 0, 0)
    learner.watch = None
    return watch.metrics()


def mean_entropy(learner: Learner, batch: Batch) -> float:
    _, entropy, _ = learner.score(batch, entropy=True)
    assert entropy is not None
    return float(entropy[batch.mask].double().mean())


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def expected_cells(learner: Learner, method: Method, batch: Batch, gradient: list[Tensor]) -> dict[str, float]:
    """One update without momentum: lr / (sqrt(v) + eps) x the clipped gradient of each cell's own tokens."""
    group = learner.optimizer.param_groups[0]
    seconds = [learner.optimizer.state[p]["exp_avg_sq"] / (1 - group["betas"][1]) for p in learner.parameters]
    inverse = [1 / (second.sqrt() + group["eps"]) for second in seconds]
    bounds = cell_bounds(batch.logp_old, batch.entropy_old, batch.mask)
    cells = cells_of(batch.logp_old, batch.entropy_old, batch.correct, bounds)
    learner.gradient(method, batch)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in learner.parameters]))
    clip = min(1.0, learner.config.grad_clip / (norm + 1e-6))
    assert clip < 1
    found = {}
    for i, name in enumerate(CELLS):
        chosen = (cells == i) & batch.mask
        if chosen.any():
            learner.gradient(method, dataclasses.replace(batch, advantages=batch.advantages * chosen))
            step = [g * k for g, k in zip((p.grad for p in learner.parameters), inverse, strict=True)]
            found[name] = -group["lr"] * clip * float(flat(gradient) @ flat(step))
    return found


@pytest.mark.parametrize("name", ["a3po", "dapo", "aspo"])
def test_cells_are_their_own_gradients(policy: Policy, name: str):
    method = METHODS[name]
    batch = make_batch(policy, method)
    learner = make_learner(policy, learning_rate=1e-5, beta1=0.0, weight_decay=0.0, grad_clip=0.1)
    before = [p.detach().clone() for p in learner.parameters]
    watch = learner.watch = Attribution(learner, batch, batch.mask)
    learner.update(method, batch, len(batch.responses), 0, 0)
    learner.watch = None
    found = watch.metrics()
    with torch.no_grad():
        for p, start in zip(learner.parameters, before, strict=True):
            p.copy_(start)
    expected = expected_cells(learner, method, batch, watch.gradient)
    assert expected.keys() == {key for key in found if key in CELLS}
    largest = max(map(abs, expected.values()))
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=0.02, abs=0.01 * largest), key
    assert found["attribution/momentum"] == 0
    assert abs(found["attribution/rest"]) < 0.02 * largest


def test_predicted_is_measured_for_a_small_step(policy: Policy):
    method = METHODS["dapo"]
    batch = make_batch(policy, method)
    learner = make_learner(policy, learning_rate=2e-5, weight_decay=0.0)
    for _ in range(3):  # second moments settle
        learner.update(method, batch, 4, 0, 0)
    entropy = mean_entropy(learner, batch)
    found = watched(learner, method, batch, 4)
    assert found["attribution/measured"] == pytest.approx(mean_entropy(learner, batch) - entropy, abs=1e-6)
    assert found["attribution/predicted"] == pytest.approx(found["attribution/measured"], rel=0.1)
    assert abs(found["attribution/momentum"]) > 0
    parts = [value for key, value in found.items() if key not in ("attribution/measured", "attribution/predicted")]
    assert sum(parts) == pytest.approx(found["attribution/predicted"], rel=1e-6)
    assert abs(found["attribution/rest"]) < 0.1 * sum(map(abs, parts))


def test_predicted_is_the_covariance_of_log_prob_and_change_of_logits(policy: Policy):
    """-Cov(log pi, change of the logits), averaged over states: the same number by way of the logits."""
    method = METHODS["dapo"]
    batch = make_batch(policy, method)
    learner = make_learner(policy, learning_rate=2e-6, weight_decay=0.0)

    def logits() -> list[Tensor]:
        kept = []

        def keep(chunk: Tensor, tokens: Tensor) -> Tensor:
            kept.append(chunk.double())
            return tokens.float()

        learner.score(batch, entropy=False, proxy=keep)
        return kept

    before = logits()
    found = watched(learner, method, batch, len(batch.responses))
    total, states = 0.0, 0
    for old, new in zip(before, logits(), strict=True):
        logp, change = old.log_softmax(-1), new - old
        mean = (logp.exp() * change).sum(-1, keepdim=True)
        entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
        total -= float((logp.exp() * (logp + entropy) * (change - mean)).sum())
        states += len(old)
    assert found["attribution/predicted"] == pytest.approx(total / states, rel=0.06)


def test_entropy_bonus_is_apart(policy: Policy):
    """With rewards that teach nothing, only the bonus moves the policy, and it raises the entropy."""
    method = METHODS["psr"].vary({"entropy_bonus": 0.1})
    batch = make_batch(policy, method)
    batch = dataclasses.replace(batch, advantages=torch.zeros_like(batch.advantages))
    found = watched(make_learner(policy, learning_rate=1e-5, weight_decay=0.0), method, batch, len(batch.responses))
    assert found["attribution/regularizer"] > 0
    assert found["attribution/regularizer"] == pytest.approx(found["attribution/predicted"], rel=0.02)
    assert all(found[cell] == 0 for cell in CELLS if cell in found)


def test_watching_changes_nothing(small_run: Callable[..., RunConfig], tmp_path: Path):
    rows = []
    for every in (0, 1):
        config = small_run(
            "a3po", steps=3, log__attribution_every=every, rollout__logp_old="recomputed", dtype="bfloat16"
        )
        train(config, tmp_path / str(every), progress=False)
        rows.append(RunReader(tmp_path / str(every)).metrics)
    for plain, row in zip(*rows, strict=True):
        kept = {key: value for key, value in row.items() if not key.startswith(("attribution/", "time/"))}
        assert kept == {key: value for key, value in plain.items() if not key.startswith("time/")}
    assert any("attribution/measured" in row for row in rows[1])


def test_steps_that_are_attributed(small_run: Callable[..., RunConfig], tmp_path: Path):
    train(small_run("reinforce", steps=7, log__attribution_every=3), tmp_path / "run", progress=False)
    steps = [row["step"] for row in RunReader(tmp_path / "run").metrics if "attribution/predicted" in row]
    assert steps == [1, 3, 6, 7]


def test_cells_by_hand():
    g = torch.Generator().manual_seed(0)
    logp, entropy = -torch.rand(5, 9, generator=g), torch.rand(5, 9, generator=g)
    mask = torch.rand(5, 9, generator=g) < 0.7
    correct = torch.tensor([True, False, True, False, False])
    bounds = cell_bounds(logp, entropy, mask)
    fifth = -(-int(mask.sum()) // 5)
    low = sorted(logp[mask].tolist())[:fifth]
    high = sorted(entropy[mask].tolist())[-fifth:]
    cells = cells_of(logp, entropy, correct, bounds)
    for i, j in mask.nonzero().tolist():
        polarity = "positive" if correct[i] else "negative"
        probability = "low" if logp[i, j].item() in low else "high"
        uncertainty = "high" if entropy[i, j].item() in high else "low"
        assert CELLS[cells[i, j]] == f"attribution/{polarity}/{probability}_prob_{uncertainty}_entropy"
    with pytest.raises(ValueError, match="one token"):
        cell_bounds(logp, entropy, torch.zeros_like(mask))


@pytest.mark.parametrize("settings", [{"update__learning_rate": 1e-30}, {"rollout__max_new_tokens": 1}])
def test_a_step_that_moves_nothing(small_run: Callable[..., RunConfig], tmp_path: Path, settings: dict[str, float]):
    """Weights that stay where they are: there is nothing to take apart, and the run goes on."""
    config = small_run("grpo", steps=2, log__attribution_every=1, update__weight_decay=0.0, **settings)
    train(config, tmp_path / "run", progress=False)
    rows = RunReader(tmp_path / "run").metrics
    assert len(rows) == 2
    still = [row for row in rows if row.get("attribution/predicted") == 0]
    assert all(cell not in row for row in still for cell in CELLS)
