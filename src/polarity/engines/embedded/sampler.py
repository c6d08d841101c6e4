"""Sampling: own decoding loop, with log-probs and entropy captured on the way.

P prompts, G responses for each, N = P*G rows (row i answers prompt i // G), B rows decoded at the same time, T padded
response length, S tokens seen so far, V vocabulary.

What it does that a general `generate` does not: each prompt is prefilled once and its cache shared out to its G rows;
keys and values are written into a buffer in place (a growing cache copies everything for every token); finished rows
leave the batch; log-probs and entropy are kept, in float32 at the sampling temperature, so no second pass is needed.

Random numbers are drawn for all rows of a batch at every token, finished or not, so that what one row gets never
depends on when another one ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from polarity.engines.embedded.policy import Policy
from polarity.errors import UserError

# A batch is compacted when this share of its rows has finished: each time costs one copy of the cache.
FINISHED_SHARE = 0.1


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; `stop` are strings that end a response beside the end-of-sequence token.

    top_k, None = all, is cut before top_p, which is then a share of what is left, as in vLLM and transformers.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    batch_rows: int = 512


@dataclass(frozen=True)
class Samples:
    """tokens (N,T) int64; logp, entropy (N,T) float32 under the policy at the sampling temperature, before any cut;
    mask (N,T) bool, True up to and with the end-of-sequence token; truncated (N,) bool: hit the limit. On the CPU."""

    tokens: Tensor
    logp: Tensor
    entropy: Tensor
    mask: Tensor
    truncated: Tensor

    def responses(self) -> list[list[int]]:
        lengths = self.mask.sum(1).tolist()
        return [row[:n] for row, n in zip(self.tokens.tolist(), lengths, strict=True)]


class BufferLayer(DynamicLayer):
    """One layer's keys and values in a buffer that is written in place and doubles when it is full."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states))
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            self._resize(max(64, 2 * end))
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]  # free columns too: one copy, not two

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.keys, self.values = (
            x[:, :, : self.length].repeat_interleave(repeats, 0) for x in (self.keys, self.values)
        )

    def _resize(self, capacity: int) -> None:
        def grow(old: Tensor) -> Tensor:
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            return new

        self.keys, self.values = grow(self.keys), grow(self.values)


def new_cache(model: Any) -> DynamicCache:
    """A cache for `model`: buffers where a layer attends to everything, the library's own layers elsewhere."""
    cache = DynamicCache(config=model.config)
    cache.layers = [BufferLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.no_grad()
def sample(policy: Policy, prompts: Sequence[Sequence[int]], group: int, sampling: Sampling, seed: int) -> Samples:
    """G = `group` responses to each of P tokenised prompts, N = P*G rows in the order of the prompts."""
    per_batch = max(1, sampling.batch_rows // group)
    batches = [
        _sample_batch(policy, prompts[i : i + per_batch], group, sampling, seed + i)
        for i in range(0, len(prompts), per_batch)
    ]
    width = max(b.tokens.shape[1] for b in batches)

    def join(name: str) -> Tensor:
        parts = [getattr(b, name) for b in batches]
        return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts])

    truncated = torch.cat([b.truncated for b in batches])
    return Samples(join("tokens"), join("logp"), join("entropy"), join("mask"), truncated)


@torch.inference_mode()  # `sample` joins the batches outside of it, so what it returns are ordinary tensors
def _sample_batch(
    policy: Policy, prompts: Sequence[Sequence[int]], group: int, sampling: Sampling, seed: int
) -> Samples:
    device, rows, limit = policy.device, len(prompts) * group, sampling.max_new_tokens
    generator = torch.Generator(device).manual_seed(seed)
    eos = torch.tensor(policy.eos, device=device)
    stopped = _stop_check(policy.tokenizer, sampling.stop)
    tokens = torch.zeros(rows, limit, dtype=torch.long, device=device)
    logp, entropy = torch.zeros(2, rows, limit, device=device)
    length = torch.full((rows,), limit, device=device)
    truncated = torch.ones(rows, dtype=torch.bool, device=device)

    policy.set_mode()
    cache, logits, attend, position = _prefill(policy, prompts, group, limit)
    seen = attend.shape[1] - limit
    index = torch.arange(rows, device=device)  # which row each row of the batch is
    running = torch.ones(rows, dtype=torch.bool, device=device)
    for t in range(limit):
        uniform = torch.rand(rows, generator=generator, device=device)[index]
        token, token_logp, token_entropy = _choose(logits, uniform, sampling)
        now = index[running]
        tokens[now, t] = token[running]
        logp[now, t] = token_logp[running]
        entropy[now, t] = token_entropy[running]
        ends = running & (torch.isin(token, eos) | stopped(tokens[index, : t + 1]))
        length[index[ends]] = t + 1
        truncated[index[ends]] = False
        running &= ~ends
        left = int(running.sum())
        if left == 0 or t == limit - 1:
            break
        if left <= (1 - FINISHED_SHARE) * len(index):
            keep = running.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            index, token, attend, position = index[keep], token[keep], attend[keep], position[keep]
            running = running[keep]
        with policy.autocast():
            logits = policy.model(
                input_ids=token[:, None],
                attention_mask=attend[:, : seen + t + 1],
                position_ids=(position + t)[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]

    if not logp.isfinite().all():
        raise UserError(
            "the model's logits are not finite any more; lower update.learning_rate and start again in another --out"
        )
    width = int(length.max())
    mask = torch.arange(width, device=device) < length[:, None]
    tokens, logp, entropy = (x[:, :width].cpu() for x in (tokens, logp, entropy))
    return Samples(tokens, logp, entropy, mask.cpu(), truncated.cpu())


def _prefill(
    policy: Policy, prompts: Sequence[Sequence[int]], group: int, limit: int
) -> tuple[DynamicCache, Tensor, Tensor, Tensor]:
    """Run the prompts, left-padded, once each; then one row for each response.

    Returns the cache, the first logits (B,V), the attention mask (B, S + limit) with the columns to come already
    True, and the position (B,) of the first token to come.
    """
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=policy.device)
    lengths = torch.tensor([len(p) for p in prompts], device=policy.device)
    attend = torch.arange(longest, device=policy.device) >= longest - lengths[:, None]
    cache = new_cache(policy.model)
    with policy.autocast():
        logits = policy.model(
            input_ids=padded,
            attention_mask=attend,
            position_ids=(attend.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
    cache.batch_repeat_interleave(group)
    attend, lengths, logits = (x.repeat_interleave(group, 0) for x in (attend, lengths, logits))
    return cache, logits, torch.nn.functional.pad(attend, (0, limit), value=True), lengths


def _choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Next token (B,), its log-prob and the entropy in nats, from logits (B,V) and uniform numbers (B,) in [0, 1)."""
    logits = logits.float()
    logp = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
    p = logp.exp()
    if sampling.temperature == 0:
        token = logits.argmax(-1)
    else:
        kept = p if sampling.top_k is None else _most_probable(p, sampling.top_k)
        cumulative = (kept if sampling.top_p == 1.0 else _nucleus(kept, sampling.top_p)).cumsum(-1)
        total = cumulative[:, -1]
        # Strictly below the total, which uniform * total can round up to: beyond it lie only tokens of probability 0.
        target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)  # NaN is beyond every token; its log-prob tells
    return token, logp.gather(1, token[:, None])[:, 0], torch.special.entr(p).sum(-1)


def _most_probable(p: Tensor, top_k: int) -> Tensor:
    """Zero all but the `top_k` most probable tokens, and those as probable as the last of them; sums to 1 again."""
    least = p.topk(min(top_k, p.shape[-1]), -1).values[..., -1:]
    kept = torch.where(p < least, 0.0, p)
    return kept / kept.sum(-1, keepdim=True)


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of most probable tokens whose mass reaches `top_p`."""
    ordered, order = p.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
    return torch.zeros_like(p).scatter(1, order, ordered)


def _stop_check(tokenizer: Any, stop: tuple[str, ...]) -> Callable[[Tensor], Tensor | bool]:
    """(B, t) tokens so far -> (B,) bool: the text ends with a stop string."""
    if not stop:
        return lambda tokens: False
    tail = max(len(s.encode()) for s in stop) + 8  # tokens: each is a byte at least, so they cover every stop string

    def check(tokens: Tensor) -> Tensor:
        texts = tokenizer.batch_decode(tokens[:, -tail:], skip_special_tokens=False)
        last = tokenizer.batch_decode(tokens[:, -1:], skip_special_tokens=False)
        ends = [any(s in x[max(0, len(x) - len(y) - len(s)) :] for s in stop) for x, y in zip(texts, last, strict=True)]
        return torch.tensor(ends, device=tokens.device)

    return check
