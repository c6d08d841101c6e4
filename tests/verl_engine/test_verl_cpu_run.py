"""verl's own trainer, end to end on the CPU support: real Ray, FSDP2 over gloo, our rollout, checkpoints."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def rollouts(folder: Path, step: int) -> list[tuple[str, str, float]]:
    """What verl dumped of a step: prompt, response and reward, sorted, because verl's order is left to chance."""
    rows = [json.loads(line) for line in (folder / f"{step}.jsonl").read_text().splitlines()]
    return sorted((row["input"], row["output"], row["score"]) for row in rows)


def test_two_ranks_with_critic_reference_and_validation(
    small_verl: Callable[..., Any], verl_model: Callable[..., Path]
):
    model = verl_model("qwen3", ends=20)
    run = small_verl(
        model,
        "algorithm.adv_estimator=gae",
        f"critic.model.path={model}",
        "critic.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
        "trainer.test_freq=2",
        ranks=2,
    )
    assert run.code == 0, run.output[-5000:]
    assert [row["training/global_step"] for row in run.metrics] == [1, 2]
    for row in run.metrics:
        assert row["training/rollout_probs_diff_max"] < 1e-4
        assert row["actor/grad_norm"] > 0
        assert row["critic/grad_norm"] > 0
    assert run.metrics[1]["actor/kl_loss"] > 0  # the second step's policy is no longer the reference
    assert 0 <= run.metrics[1]["val-core/sums/acc/mean@1"] <= 1


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    small_verl: Callable[..., Any], verl_model: Callable[..., Path], tmp_path: Path
):
    model = verl_model("qwen2", ends=20)
    # One update a step: which rows share a mini-batch is left to chance.
    settings = ["actor_rollout_ref.actor.ppo_mini_batch_size=4", "trainer.save_freq=2"]
    whole = small_verl(model, *settings, f"trainer.rollout_data_dir={tmp_path}/whole", steps=3)
    assert whole.code == 0, whole.output[-5000:]
    assert max(row["training/rollout_probs_diff_max"] for row in whole.metrics) < 1e-4
    first, second, third = (rollouts(tmp_path / "whole", step) for step in (1, 2, 3))
    assert len({*first, *second, *third}) > 40  # 16 responses a step, most of them unlike any other

    checkpoint = f"{tmp_path}/checkpoints/global_step_2"
    resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}"]
    rest = small_verl(model, *settings, *resume, f"trainer.rollout_data_dir={tmp_path}/rest", steps=3)
    assert rest.code == 0, rest.output[-5000:]
    assert rollouts(tmp_path / "rest", 3) == third
    (row,) = rest.metrics
    for name in ("actor/grad_norm", "actor/entropy", "critic/score/mean", "training/global_step"):
        assert row[name] == pytest.approx(whole.metrics[-1][name], rel=1e-3), name


def test_a_failed_generation_ends_the_run_with_its_message(
    small_verl: Callable[..., Any], verl_model: Callable[..., Path]
):
    run = small_verl(verl_model(max_position_embeddings=4))
    assert run.code != 0
    assert "leaves no room in a context of 4" in run.output.split("Traceback")[-1]
    assert run.metrics == []


def test_ranks_meet_without_a_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import ray
    import torch.distributed

    from polarity.engines.verl.cpu.platform import initialize_process_group

    nodes = [{"ObjectStoreSocketName": str(tmp_path / "sockets" / "plasma_store")}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1, "WG_PREFIX": "group"}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        initialize_process_group()
        try:
            torch.distributed.all_reduce(torch.ones(3))
        finally:
            torch.distributed.destroy_process_group()
