"""The training loop: which rows are generated, kept and trained on, and what is written down about it."""

import copy
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polarity.config import RunConfig, load_config
from polarity.engines.embedded import policy as policy_module
from polarity.engines.embedded import prepare, train, train_step
from polarity.engines.embedded.trainer import Run
from polarity.engines.embedded.updater import Batch
from polarity.errors import UserError
from polarity.methods import Method
from polarity.rundir import RunReader

Plugins = Callable[[str], str]
SmallRun = Callable[..., RunConfig]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], list[Batch]]:
    """`trained(run)` -> the list that every batch handed to the learner is added to."""

    def watch(run: Run) -> list[Batch]:
        batches: list[Batch] = []
        update = run.learner.update

        def remember(method: Any, batch: Batch, *rest: Any) -> dict[str, float]:
            batches.append(batch)
            return update(method, batch, *rest)

        monkeypatch.setattr(run.learner, "update", remember)
        return batches

    return watch


def weights(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.policy.model.parameters()]


def solved_by_problem(plugins: Plugins) -> str:
    """Problems p0 to p4 are never solved; of the others about half of the responses are correct."""
    source = "def verify(response, gold, row=None):\n    return int(row['id'][1:]) >= 5 and len(response) % 2 == 0\n"
    return plugins(source) + ":verify"


def test_dynamic_sampling_goes_on_until_enough_groups_are_kept(
    small_run: SmallRun, plugins: Plugins, trained: Callable[[Run], list[Batch]]
):
    config = small_run(
        "dapo", data__verifier=solved_by_problem(plugins), rollout__prompts=4, rollout__max_rounds=9, rollout__group=6
    )
    run = prepare(config)
    batches = trained(run)
    rounds, surplus = [], 0
    for _ in range(6):
        cursor = run.cursor
        rollouts, _, row = train_step(run)
        groups = rollouts.correct.view(-1, 6)
        mixed = groups.any(1) & ~groups.all(1)
        kept = rollouts.keep.view(-1, 6)
        assert torch.equal(kept.any(1), kept.all(1))  # groups are kept whole
        first = mixed & (mixed.cumsum(0) <= 4)
        assert torch.equal(kept.all(1), first)  # the first P mixed ones; the surplus is dropped
        assert int(first.sum()) == 4
        assert int(mixed[: 4 * (rollouts.rounds - 1)].sum()) < 4  # no round too many
        assert len(rollouts.keep) == 24 * rollouts.rounds == row["rollouts/generated"]
        assert run.cursor - cursor == 4 * rollouts.rounds
        assert row["rollouts/kept"] == 24 == len(batches[-1].responses)
        assert row["update/count"] == 4
        assert row["accuracy/mean"] == pytest.approx(float(rollouts.correct.double().mean()))  # before any drop
        rounds.append(rollouts.rounds)
        surplus += int(mixed.sum()) - 4
    assert max(rounds) > 1
    assert surplus > 0


def test_rounds_have_a_cap_and_a_step_without_rows_makes_no_update(small_run: SmallRun, plugins: Plugins):
    wrong = plugins("def verify(response, gold, row=None):\n    return False\n") + ":verify"
    config = small_run("dapo", data__verifier=wrong, rollout__max_rounds=3)
    run = prepare(config)
    before = weights(run)
    for s in range(2):
        _, _, row = train_step(run)
        assert (row["step"], row["rollouts/rounds"], row["rollouts/kept"], row["update/count"]) == (s + 1, 3, 0, 0)
        assert row["accuracy/unsolved"] == 1
        assert all(math.isfinite(value) for value in row.values())
        assert not any(key.startswith("positive/") and key != "positive/share" for key in row)
    assert (run.step, run.cursor) == (2, 12)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))
    assert not run.learner.optimizer.state


def test_only_dynamic_sampling_resamples(small_run: SmallRun, plugins: Plugins):
    wrong = plugins("def verify(response, gold, row=None):\n    return 0.0\n") + ":verify"
    for method, kept, updates in ("grpo", 8, 2), ("psr", 0, 0), ("nsr", 8, 2):
        _, _, row = train_step(prepare(small_run(method, data__verifier=wrong)))
        assert (row["rollouts/rounds"], row["rollouts/kept"], row["update/count"]) == (1, kept, updates), method


@pytest.mark.parametrize(("method", "polarity"), [("psr", True), ("nsr", False), ("psr_group", True)])
def test_one_polarity_is_trained_on(
    small_run: SmallRun, trained: Callable[[Run], list[Batch]], method: str, polarity: bool
):
    run = prepare(small_run(method, rollout__prompts=4, update__mini_batch_prompts=1))
    batches = trained(run)
    rollouts, _, row = train_step(run)
    assert batches[0].correct.tolist() == [polarity] * int((rollouts.correct == polarity).sum())
    assert row["update/count"] == math.ceil(len(batches[0].responses) / 4)
    if method != "psr_group":
        assert batches[0].advantages[batches[0].mask].unique().tolist() == [1.0 if polarity else -1.0]
    assert row["positive/share"] == pytest.approx(float(rollouts.correct.double().mean()))  # of all that was generated
    assert ("positive/gradient_share" in row, "negative/gradient_share" in row) == (True, True)
    assert row[f"{'positive' if polarity else 'negative'}/gradient_share"] == 1.0


RECORDER = """
from polarity.methods import METHODS, Method

STEPS = []


class Recorder(Method):
    def shape(self, advantages, logp_old, entropy_old, mask, *, correct=None, step=0, state=None):
        STEPS.append((step, state))
        return super().shape(advantages, logp_old, entropy_old, mask, correct=correct, step=step, state=state)

    def update_state(self, state, metrics):
        return {"accuracy": metrics["accuracy/mean"], "steps": (state or {"steps": 0})["steps"] + 1}


recorder = Recorder.build_on(METHODS["dapo"], name="recorder")
"""


def test_shape_sees_the_rollout_step_also_after_a_resume(small_run: SmallRun, plugins: Plugins, tmp_path: Path):
    module = plugins(RECORDER)
    train(small_run(f"{module}:recorder", steps=2, checkpoint__every=1), tmp_path / "run", progress=False)
    train(small_run(f"{module}:recorder", steps=4, checkpoint__every=1), tmp_path / "run", resume=True, progress=False)
    seen = importlib.import_module(module).STEPS
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    states = [state for _, state in seen]
    assert states[0] is None  # the first step has no state; then what update_state made of the step before
    accuracy = [row["accuracy/mean"] for row in RunReader(tmp_path / "run").metrics]
    assert states[1:] == [{"accuracy": a, "steps": i + 1} for i, a in enumerate(accuracy[:3])]


def test_truncated_responses(small_run: SmallRun, trained: Callable[[Run], list[Batch]]):
    """Scored as they are, or penalised by their length, or masked out of the update but not out of the group."""
    found = {}
    for how in ("scored", "penalised", "masked"):
        extra = {"method.overlong.buffer": 4} if how == "penalised" else {}
        run = prepare(small_run("grpo", rollout__truncated=how, **extra))
        batches = trained(run)
        rollouts, credit, row = train_step(run)
        found[how] = rollouts
        cut = rollouts.samples.truncated
        assert 0 < int(cut.sum()) < len(cut)
        assert row["length/truncated"] == pytest.approx(float(cut.double().mean()))
        assert row["length/mean"] == pytest.approx(float(rollouts.samples.mask.sum(1).double().mean()))
        scores = torch.tensor([o.score for o in rollouts.outcomes])
        lengths = rollouts.samples.mask.sum(1)
        if how == "penalised":  # from 0 at 10 - 4 tokens down to -1 at 10
            torch.testing.assert_close(rollouts.rewards, scores - ((lengths - 6) / 4).clamp(min=0))
            assert float(rollouts.rewards[cut].max()) <= 0.0
        else:
            assert torch.equal(rollouts.rewards, scores)
        assert torch.equal(batches[0].mask.any(1), ~cut if how == "masked" else torch.ones_like(cut))
        assert (credit["shaped"][~rollouts.mask] == 0).all()
    assert found["scored"].responses == found["masked"].responses == found["penalised"].responses
    assert torch.equal(found["scored"].correct, found["penalised"].correct)  # polarity is not the reward's sign


def test_evaluation_does_not_disturb_training(small_run: SmallRun, tmp_path: Path):
    rows = {}
    for every in (0, 1):
        train(small_run("a3po", evaluation__every=every), tmp_path / str(every), progress=False)
        rows[every] = [
            {k: v for k, v in row.items() if not k.startswith(("time/", "eval/"))}
            for row in RunReader(tmp_path / str(every)).metrics
        ]
    assert rows[0] == rows[1][1:]
    models = [RunReader(tmp_path / str(every)).checkpoints[3] / "model.safetensors" for every in (0, 1)]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_recomputed_old_log_probs(small_run: SmallRun):
    """In float32 sampler and learner agree, so the mismatch is rounding; in bfloat16 it is real, and measured."""
    for dtype, low, high in ("float32", 0.0, 1e-5), ("bfloat16", 1e-6, 0.05):
        run = prepare(small_run("a3po", rollout__logp_old="recomputed", dtype=dtype))
        rollouts, credit, row = train_step(run)
        apart = (credit["logp_old"] - rollouts.samples.logp)[rollouts.mask].exp().sub(1).abs().max()
        assert low <= row["mismatch/mean"] <= row["mismatch/max"] <= high
        assert float(apart) < (1e-4 if dtype == "float32" else 0.5)
        assert row["mismatch/k3"] >= 0
        assert row["update/count"] == 2
        assert next(run.policy.model.parameters()).dtype == torch.float32


def test_the_proxy_of_lp_reg(
    small_run: SmallRun, trained: Callable[[Run], list[Batch]], monkeypatch: pytest.MonkeyPatch
):
    """From chunks of the old policy's logits, what its definition gives on all of them at once: the logits filtered at
    kappa times the largest probability, and the sampled token's log-probability renormalised over what is left."""
    run = prepare(small_run("lp_reg", **{"method.token_penalty.kappa": 0.3, "rollout.temperature": 0.8}))
    monkeypatch.setattr(policy_module, "LOGITS_IN_A_CHUNK", 7 * 384)
    chunks: list[int] = []
    proxy = type(run.method).logp_proxy

    def watch(method: Method, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        chunks.append(len(logits))
        return proxy(method, logits, tokens)

    monkeypatch.setattr(type(run.method), "logp_proxy", watch)
    batches = trained(run)
    old = copy.deepcopy(run.policy.model)
    train_step(run)
    assert max(chunks) == 7
    (batch,) = batches
    assert batch.logp_proxy is not None
    seen = {True: 0, False: 0}
    for i, (prompt, response) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        with torch.no_grad():
            whole = old(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
        logits = whole[len(prompt) - 1 : -1] / 0.8
        p = logits.softmax(-1)
        kept = p >= 0.3 * p.amax(-1, keepdim=True)
        n = torch.arange(len(response))
        wanted = (p[n, response] / (p * kept).sum(-1)).log()
        for t in n.tolist():
            inside = bool(kept[t, response[t]])
            seen[inside] += 1
            found = float(batch.logp_proxy[i, t])
            assert found == pytest.approx(float(wanted[t]), abs=1e-4) if inside else found < -100
    assert min(seen.values()) > 0


def test_gradient_checkpointing_trains_the_same(small_run: SmallRun):
    rows = [train_step(prepare(small_run("a3po", update__gradient_checkpointing=on)))[2] for on in (False, True)]
    for key in rows[0]:
        if not key.startswith("time/"):
            assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4), key


def test_a_run_directory_is_complete(small_run: SmallRun, tmp_path: Path):
    config = small_run("a3po", evaluation__every=2, log__rollouts_every=2, log__rollout_groups=1)
    out = tmp_path / "deep" / "run"
    train(config, out, progress=False)
    reader = RunReader(out)
    assert sorted(p.name for p in out.iterdir()) == [
        *("checkpoints", "config.yaml", "environment.json", "evaluations", "metrics.jsonl", "rollouts")
    ]
    assert not list(out.rglob("*partial*"))
    assert load_config(out / "config.yaml") == config
    assert [row["step"] for row in reader.metrics] == [0, 1, 2, 3]
    assert reader.rollout_steps == [1, 2, 3]
    assert sorted(reader.evaluations) == [0, 2, 3]
    assert [("eval/held/pass@1" in row) for row in reader.metrics] == [True, False, True, True]
    for step in reader.rollout_steps:
        rows = reader.rollouts(step)
        assert [row["group"] for row in rows] == [rows[0]["group"]] * 4  # one whole group: its best and worst are there
        for row in rows:
            assert row.keys() == {
                *("step", "problem_id", "group", "prompt", "response", "gold", "correct", "status", "strategy"),
                *("reward", "truncated", "kept", "token_ids", "tokens", "logp_old", "logp_rollout", "entropy"),
                *("advantage", "weight"),
            }
            assert row["step"] == step
            n = len(row["token_ids"])
            assert all(len(row[k]) == n for k in ("tokens", "logp_old", "logp_rollout", "entropy", "weight"))
            assert all(value <= 0 for value in row["logp_old"])
            assert row["status"] == ("correct" if row["correct"] else "wrong")
            assert row["strategy"] == ("even" if row["correct"] else None)
    weighted = [row for row in reader.rollouts(1) if row["advantage"]]
    assert weighted  # mixed groups are logged before uniform ones, and the first step weighs a fifth of their tokens
    for row in weighted:
        low = row["advantage"] > 0
        k = max(1, math.floor(0.2 * len(row["tokens"]) + 1e-9))
        chosen = [p for p, w in zip(row["logp_old"], row["weight"], strict=True) if w == 2.0]
        assert len(chosen) == k
        assert sorted(chosen) == sorted(row["logp_old"], reverse=not low)[:k][:: 1 if low else -1]
        assert set(row["weight"]) <= {1.0, 2.0}


def test_metrics_fit_each_other(small_run: SmallRun):
    run = prepare(small_run("a3po", rollout__prompts=4))
    rollouts, _, row = train_step(run)
    mask, correct = rollouts.samples.mask, rollouts.correct
    assert row["positive/share"] + row["negative/share"] == pytest.approx(1)
    assert row["positive/gradient_share"] + row["negative/gradient_share"] == pytest.approx(1)
    assert row["reward/mean"] == row["accuracy/mean"] == row["positive/share"]
    for key, rows in ("positive", correct), ("negative", ~correct):
        chosen = mask & rows[:, None]
        assert row[f"{key}/entropy"] == pytest.approx(float(rollouts.samples.entropy[chosen].mean()), rel=1e-5)
        assert row[f"{key}/probability"] == pytest.approx(float(rollouts.samples.logp[chosen].exp().mean()), rel=1e-5)
        assert row[f"{key}/length"] == pytest.approx(float(mask[rows].sum(1).double().mean()))
        assert 0.1 < row[f"{key}/shaped_share"] < 0.5
        assert 0 <= row[f"{key}/clip_fraction"] <= 1
    whole = row["positive/length"] * row["positive/share"] + row["negative/length"] * row["negative/share"]
    assert row["length/mean"] == pytest.approx(whole)
    assert row["time/step"] >= row["time/rollout"] + row["time/update"] - 1e-6
    assert row["update/grad_norm"] > 0


def test_a_verifier_that_fails(small_run: SmallRun, plugins: Plugins):
    """On one odd response: status error, score 0. On every response: the run stops and says why."""
    module = plugins(
        "def some(response, gold, row=None):\n    return 1 / (len(response) % 2)\n"
        "def none(response, gold):\n    return True\n"
        "def text(response, gold, row=None):\n    return 'yes'\n"
    )
    rollouts, _, _ = train_step(prepare(small_run(data__verifier=f"{module}:some")))
    assert {o.status for o in rollouts.outcomes} == {"correct", "error"}
    assert all(o.score == 0 and not o.correct for o in rollouts.outcomes if o.status == "error")
    with pytest.raises(UserError, match=r"failed on every response.*unexpected keyword argument 'row'"):
        train_step(prepare(small_run(data__verifier=f"{module}:none")))
    with pytest.raises(UserError, match=r"returned 'yes'; it must return"):
        train_step(prepare(small_run(data__verifier=f"{module}:text")))


def test_problems_come_in_seeded_epochs(small_run: SmallRun):
    run, other = prepare(small_run()), prepare(small_run(seed=1))
    stream = [row["id"] for row in run.source.train(0, 30)]
    assert sorted(stream[:12]) == sorted(stream[12:24]) == sorted(f"p{i}" for i in range(12))
    assert stream[:12] != stream[12:24]
    assert [row["id"] for start in range(0, 30, 5) for row in run.source.train(start, 5)] == stream
    assert [row["id"] for row in other.source.train(0, 30)] != stream
    assert [row["id"] for row in run.source.split("held", 3)] == ["p0", "p1", "p2"]


def test_a_token_beyond_the_vocabulary(small_run: SmallRun, problems: Path):
    problems.write_text(json.dumps({"id": "odd", "problem": "<|beyond|>", "answer": "1"}) + "\n")
    run = prepare(small_run())
    run.policy.tokenizer.add_tokens(["<|beyond|>"])
    with pytest.raises(UserError, match=r"'odd': the tokenizer's '<\|beyond\|>' is beyond the model's vocabulary"):
        train_step(run)


def test_a_prompt_beyond_learned_positions(small_run: SmallRun, problems: Path, make_model: Callable[..., Path]):
    """Refused before the run starts; rotary positions have no end, so the same prompt trains there."""
    problems.write_text(json.dumps({"id": "odd", "problem": "1" * 1200, "answer": "1"}) + "\n")
    with pytest.raises(UserError, match=r"'odd': its \d+ tokens and a response of 10 are more than the model's"):
        prepare(small_run(model=str(make_model("gpt2"))))
    assert train_step(prepare(small_run()))[2]["length/max"] <= 10


def test_a_prompt_without_tokens(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch):
    run = prepare(small_run())
    monkeypatch.setattr(run.source, "prompt", lambda row: "")
    with pytest.raises(UserError, match=r"the prompt has no tokens"):
        train_step(run)


def test_one_token_responses_and_group_of_one(small_run: SmallRun):
    _, _, row = train_step(prepare(small_run("grpo", rollout__max_new_tokens=1)))
    assert row["length/max"] == 1
    rollouts, _, row = train_step(prepare(small_run("reinforce", rollout__group=1, rollout__batch_rows=1)))
    assert len(rollouts.keep) == 2
    assert row["update/count"] == 2
