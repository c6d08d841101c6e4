"""Pretraining: repeatable to the bit, complete or absent, and open to a user's own world."""

import hashlib
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polarity.errors import UserError
from polarity.worlds import pretrain as pretraining
from polarity.worlds import resolve_world
from polarity.worlds.ledger import BASES, Ledger
from polarity.worlds.pretrain import IGNORE, build, draw_batches, pad


class Short(Ledger):
    """The ledger world with bases that are pretrained for a moment."""

    bases = {
        "tiny": replace(BASES["general"], steps=20, hidden=32, layers=1, heads=2, mlp=64, tokens_per_batch=512),
        "narrow": replace(BASES["general"], steps=20, longest=1),
    }


def test_the_same_run_gives_the_same_weights(tmp_path):
    torch.manual_seed(1)
    build(Short(), "tiny", tmp_path / "a", progress=False)
    torch.manual_seed(2)  # the caller's generator plays no part, and is left as it was
    before = torch.random.get_rng_state()
    build(Short(), "tiny", tmp_path / "b", progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    digests = [hashlib.sha256((tmp_path / d / "model.safetensors").read_bytes()).hexdigest() for d in "ab"]
    assert digests[0] == digests[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "a"),
        AutoTokenizer.from_pretrained(tmp_path / "a"),
    )
    assert model.config.tie_word_embeddings
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    made = json.loads((tmp_path / "a" / "pretraining.json").read_text())
    assert made["steps"] == 20
    assert made["parameters"] == sum(p.numel() for p in model.parameters())
    assert made["response_tokens"] > made["documents"] > 20


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining.json, "dumps", interrupt)  # model and tokenizer are already on disk by then
    with pytest.raises(KeyboardInterrupt):
        build(Short(), "tiny", tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        build(Short(), "tinny", tmp_path / "out")
    with pytest.raises(UserError, match="exists"):
        build(Short(), "tiny", tmp_path)
    with pytest.raises(UserError, match="raise `longest`"):
        build(Short(), "narrow", tmp_path / "out", progress=False)


def test_batches_hold_the_loss_on_responses_and_stay_within_their_size():
    world = Short()
    tokenizer = world.tokenizer()
    batches = draw_batches(world, "tiny", tokenizer, random.Random(0), 0.5)
    assert len(batches) > 10
    for batch in batches:
        ids, labels = pad(batch, tokenizer.pad_token_id)
        assert ids.shape == labels.shape
        assert ids.numel() <= 512
        for row, row_labels in zip(ids, labels, strict=True):
            with_loss = row[row_labels != IGNORE]
            assert torch.equal(with_loss, row_labels[row_labels != IGNORE])
            assert with_loss[-1] == tokenizer.eos_token_id
            assert "?" not in tokenizer.decode(with_loss)


def test_the_world_of_the_documentation_works_as_printed(tmp_path, monkeypatch):
    docs = (Path(__file__).parents[2] / "docs" / "worlds.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", docs, re.DOTALL) if "# my_world.py" in block]
    assert len(blocks) == 1
    (tmp_path / "my_world.py").write_text(blocks[0])
    monkeypatch.chdir(tmp_path)
    world = resolve_world("my_world:Mirror")
    rows = world.problems("id", 20)
    assert all(world.verify(row["answer"], row["answer"], row).correct for row in rows)
    assert not world.verify("", rows[0]["answer"], rows[0]).correct
    (base, spec), *_ = world.bases.items()
    monkeypatch.setattr(type(world), "bases", {base: replace(spec, steps=80)})
    assert world.base_path(base) == tmp_path / "bases" / f"mirror-{base}"
    build(world, base, world.base_path(base), progress=False)
    tokenizer = AutoTokenizer.from_pretrained(world.base_path(base))
    ids = tokenizer(rows[0]["problem"], add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == rows[0]["problem"]
    assert json.loads((world.base_path(base) / "pretraining.json").read_text())["final_loss"] < math.log(len(tokenizer))
