"""`study_gradients` on a tiny real run, against the whole model's logits, one response at a time."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from polarity.analysis.gradients import token_effects
from polarity.config import load_config
from polarity.engines.embedded import train
from polarity.errors import UserError
from polarity.rundir import RunReader
from polarity.studies.gradients import study_gradients

TEMPERATURE = 1.3


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps in the default world, rollouts and a checkpoint at each; every third response counts as right."""
    path = tmp_path_factory.mktemp("gradients") / "run"
    settings = {
        "method": "dapo", "steps": 3, "rollout.prompts": 4, "rollout.group": 4, "rollout.max_new_tokens": 30,
        "rollout.max_rounds": 1, "rollout.temperature": TEMPERATURE, "update.mini_batch_prompts": 4,
        "update.learning_rate": 1e-3, "evaluation.every": 0, "checkpoint.every": 1, "checkpoint.keep": 3,
        "log.rollouts_every": 1, "decay_until": 0.5, "device": "cpu",
    }  # fmt: skip
    train(load_config(None, settings), path, progress=False)
    for step in (1, 2, 3):
        verdicts = itertools.cycle([True, False, False])
        rewrite(path, step, lambda row, verdicts=verdicts: {**row, "correct": next(verdicts)})
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def numbers(run: Path, tmp_path: Path, step: int | None = None) -> dict[str, Any]:
    study_gradients(run, step, tmp_path / "numbers.json")
    found: dict[str, Any] = json.loads((tmp_path / "numbers.json").read_text())
    return found


def rewrite(run: Path, step: int, change) -> None:
    """Change the rows of a rollouts file."""
    path = run / "rollouts" / f"step_{step:06d}.jsonl"
    rows = [change(row) for row in RunReader(run).rollouts(step)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def without(key: str):
    return lambda row: {k: v for k, v in row.items() if k != key}


@torch.no_grad()
def by_hand(run: Path, step: int, checkpoint: int) -> dict[str, dict[str, list]]:
    """polarity -> name -> a list of the tokens' effects; the model is run whole on each response."""
    path = RunReader(run).checkpoints[checkpoint]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    found: dict[str, dict[str, list]] = {"positive": {}, "negative": {}}
    for row in RunReader(run).rollouts(step):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        tokens = torch.tensor(row["token_ids"])
        logits = model(torch.tensor([prompt + row["token_ids"]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        logp = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
        ratio = (logp - torch.tensor(row["logp_old"])).exp()
        effects = token_effects(logits, tokens, torch.full((len(tokens),), row["correct"]), ratio)
        for name, values in effects.items():
            found["positive" if row["correct"] else "negative"].setdefault(name, []).extend(values.tolist())
    return found


def test_numbers_are_those_of_the_whole_model(trained: Path, tmp_path: Path):
    found = numbers(trained, tmp_path)
    rows = RunReader(trained).rollouts(3)
    assert (found["step"], found["checkpoint"], found["responses"]) == (3, 3, len(rows))
    assert found["temperature"] == TEMPERATURE
    expected = {polarity: own for polarity, own in by_hand(trained, 3, 3).items() if own}
    assert found["polarities"].keys() == expected.keys() == {"positive", "negative"}
    for polarity, own in expected.items():
        correct = polarity == "positive"
        means = found["polarities"][polarity]
        assert means.pop("tokens") == sum(len(row["token_ids"]) for row in rows if row["correct"] == correct)
        assert means.keys() == own.keys()
        for name, values in own.items():
            assert means[name] == pytest.approx(torch.tensor(values).double().mean(0).tolist(), rel=1e-3, abs=1e-6)


def test_the_policy_that_sampled_has_ratio_one(run: Path, tmp_path: Path):
    """The checkpoint of the step before is what a step's rollouts were drawn from: with it r is 1 at every token."""
    shutil.rmtree(run / "checkpoints" / "step_000003")
    shutil.rmtree(run / "checkpoints" / "step_000001")
    found = numbers(run, tmp_path, step=3)
    assert (found["step"], found["checkpoint"]) == (3, 2)
    on_policy = by_hand(run, 3, 2)
    for polarity, own in found["polarities"].items():
        assert own["ratio"] == pytest.approx(1, abs=2e-5)
        assert on_policy[polarity]["ratio"] == pytest.approx([1] * len(on_policy[polarity]["ratio"]), abs=1e-4)
    assert "no checkpoint of step 3: this is the nearest one" in study_gradients(run, 3)
    assert numbers(run, tmp_path)["step"] == 2  # the latest step that has both
    shutil.rmtree(run / "checkpoints" / "step_000002")
    with pytest.raises(UserError, match="no checkpoint"):
        study_gradients(run)


def test_default_without_a_common_step(run: Path, tmp_path: Path):
    """The latest rollouts, and of two checkpoints equally near the earlier one."""
    (run / "rollouts" / "step_000003.jsonl").unlink()
    shutil.rmtree(run / "checkpoints" / "step_000002")
    assert [numbers(run, tmp_path)[key] for key in ("step", "checkpoint")] == [1, 1]
    (run / "rollouts" / "step_000001.jsonl").unlink()
    assert [numbers(run, tmp_path)[key] for key in ("step", "checkpoint")] == [2, 1]


def test_the_split_into_micro_batches_does_not_matter(run: Path, tmp_path: Path):
    whole = numbers(run, tmp_path)["polarities"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["update"]["micro_batch_tokens"] = 60
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    split = numbers(run, tmp_path)["polarities"]
    for polarity, own in whole.items():
        for name, value in own.items():
            assert split[polarity][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_text(trained: Path, tmp_path: Path):
    text = study_gradients(trained, None, tmp_path / "deep" / "numbers.json")
    assert text == study_gradients(trained)
    assert (tmp_path / "deep" / "numbers.json").read_text() == json.dumps(numbers(trained, tmp_path), indent=1)
    assert max(map(len, text.replace(str(trained), "runs/a3po").splitlines())) <= 120
    wrong = json.loads((tmp_path / "numbers.json").read_text())["polarities"]["negative"]
    first, *others = wrong["as_trained/mass/alternatives"]
    assert f"{100 * first / (first + sum(others)):.2f}% of the probability that wrong tokens lose goes" in text
    assert f"{wrong['tokens']:,.0f}" in text
    assert "rollouts of step 3" in text
    assert "nearest" not in text


def test_one_polarity_and_no_old_log_probs(run: Path, tmp_path: Path):
    rewrite(run, 3, lambda row: {**without("logp_old")(row), "correct": False})
    found = numbers(run, tmp_path)
    assert found["polarities"].keys() == {"negative"}
    assert found["ratio_measured"] is False
    assert found["polarities"]["negative"]["ratio"] == 1
    text = study_gradients(run)
    assert "with ratio 1" in text
    assert "PSR" not in text


def test_what_cannot_be_measured_says_how_to_mend_it(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="logged: 1, 2, 3"):
        study_gradients(run, 9)
    with pytest.raises(UserError, match="not a run directory"):
        study_gradients(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --out"):
        study_gradients(run, None, tmp_path / "file" / "numbers.json")
    rewrite(run, 1, without("token_ids"))
    with pytest.raises(UserError, match="no token ids"):
        study_gradients(run, 1)
    rewrite(run, 2, lambda row: {**row, "token_ids": [10**6] * len(row["token_ids"])})
    with pytest.raises(UserError, match="another model"):
        study_gradients(run, 2)
    rewrite(run, 3, lambda row: {**row, "token_ids": []})
    with pytest.raises(UserError, match="no response with a token"):
        study_gradients(run, 3)
    shutil.rmtree(run / "rollouts")
    with pytest.raises(UserError, match="rollouts_every"):
        study_gradients(run)
