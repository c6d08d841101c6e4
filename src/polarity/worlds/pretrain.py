"""Pretraining of the tiny base models: a seeded next-token run over a world's documents, on one CPU thread.

Shapes: B documents in a batch, T padded length, V vocabulary.
"""

import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from polarity.errors import UserError, nearest
from polarity.worlds.world import Base, World

WARMUP = 100  # steps
FLOOR = 0.03  # of the learning rate, reached at the last step
CHUNK = 512  # documents that are drawn and sorted by length together
IGNORE = -100  # label of a position without loss

Example = tuple[list[int], list[int]]  # token ids and labels, of one length


def build(world: World, base: str, out: Path, *, progress: bool = True) -> None:
    """Pretrain `base` of `world` and write it to the directory `out` (model, tokenizer, pretraining.json).

    The weights depend on the world, the base's settings and the library versions only: the run counts steps, never
    seconds. `out` is written aside and renamed, so it is complete or absent.
    Raises UserError when the world has no such base or `out` exists.
    """
    if base not in world.bases:
        raise UserError(f"world {world.name!r} has no base {base!r}; {nearest(base, world.bases)}")
    if out.exists():
        raise UserError(f"{out} exists; remove it or name another directory")
    tokenizer = world.tokenizer()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are split by thread, so another number of threads gives other last bits
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(world.bases[base].seed)
            model = fresh_model(world.bases[base], tokenizer)
            made = pretrain(model, tokenizer, world, base, progress=progress)
    finally:
        torch.set_num_threads(threads)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / "pretraining.json").write_text(json.dumps(made, indent=2) + "\n")
        for file in aside.iterdir():  # the library makes weights readable to their owner only
            file.chmod(0o644)
        aside.chmod(0o755)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def fresh_model(spec: Base, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A randomly initialised float32 Qwen3 of the base's shape (as many key-value heads as heads, tied embeddings)."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden,
        intermediate_size=spec.mlp,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        head_dim=spec.hidden // spec.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def pretrain(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World, base: str, *, progress: bool = True
) -> dict[str, Any]:
    """Train `model` in place for the base's number of steps; return how it was made (counts, final loss, seconds)."""
    spec = world.bases[base]
    rng = random.Random(f"{world.name}/pretraining/{spec.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    parameters = list(model.parameters())
    queue: list[list[Example]] = []
    losses: list[float] = []
    documents = response_tokens = 0
    start = time.perf_counter()
    model.train()
    bar = tqdm(range(spec.steps), desc=f"pretraining {world.name}-{base}", unit="step", disable=not progress)
    for step in bar:
        done = step / spec.steps
        if not queue:
            queue = draw_batches(world, base, tokenizer, rng, done)
        ids, labels = pad(queue.pop(), tokenizer.pad_token_id)
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * min(1.0, (step + 1) / WARMUP) * (1 - (1 - FLOOR) * done)
        # Padding is on the right and attention is causal, so no real token sees a pad and no mask is needed.
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        documents += len(ids)
        response_tokens += int((labels[:, 1:] != IGNORE).sum())
        if step % 50 == 49:
            bar.set_postfix(loss=f"{_mean(losses[-50:]):.4f}")
    model.eval()
    return {
        "world": world.name,
        "base": base,
        "parameters": sum(p.numel() for p in parameters),
        "steps": spec.steps,
        "documents": documents,
        "response_tokens": response_tokens,
        "final_loss": round(_mean(losses[-300:]), 4),
        "seconds": round(time.perf_counter() - start, 1),
        "seed": spec.seed,
    }


def draw_batches(
    world: World, base: str, tokenizer: PreTrainedTokenizerFast, rng: random.Random, progress: float
) -> list[list[Example]]:
    """Some hundred documents as batches of nearly one length, each of at most `tokens_per_batch` padded tokens."""
    spec = world.bases[base]
    drawn = [world.document(base, rng, progress) for _ in range(CHUNK)]
    prompts = tokenizer([d.prompt for d in drawn], add_special_tokens=False)["input_ids"]
    responses = tokenizer([d.response for d in drawn], add_special_tokens=False)["input_ids"]
    examples = [
        (prompt + response + [tokenizer.eos_token_id], [IGNORE] * len(prompt) + response + [tokenizer.eos_token_id])
        for prompt, response in zip(prompts, responses, strict=True)
        if len(prompt) + len(response) < spec.longest
    ]
    if not examples:
        raise UserError(
            f"base {base!r} of world {world.name!r}: no document has under {spec.longest} tokens; raise `longest`"
        )
    batches: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda e: len(e[0])):
        if batches[-1] and (len(batches[-1]) + 1) * len(example[0]) > spec.tokens_per_batch:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def pad(examples: list[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, each (B, T) int64, padded on the right."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in examples])
    return ids, labels


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
