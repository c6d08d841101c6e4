"""One step's rollouts: sample, verify, reward, keep; again while the method wants more groups than were kept.

P prompts, G responses for each, N rows in all rounds together, T padded response length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polarity.config import RolloutConfig
from polarity.data import Row
from polarity.engines.embedded.policy import Policy
from polarity.engines.embedded.sampler import Samples, Sampling, sample
from polarity.engines.embedded.source import Source
from polarity.errors import UserError
from polarity.methods import Method
from polarity.rewards import Outcome, verify_all
from polarity.seeds import seed_for


@dataclass(frozen=True)
class Rollouts:
    """All rows generated in a step."""

    problems: list[Row]  # one for each group
    prompts: list[list[int]]  # (N) token ids
    responses: list[list[int]]  # (N) token ids
    texts: list[str]  # (N)
    outcomes: list[Outcome]  # (N)
    samples: Samples
    mask: Tensor  # (N,T) bool: what may be trained on; samples.mask is what was generated
    rewards: Tensor  # (N,) float32, after the method's penalties
    correct: Tensor  # (N,) bool
    groups: Tensor  # (N,) int64
    keep: Tensor  # (N,) bool
    rounds: int


def collect(
    policy: Policy, source: Source, method: Method, config: RolloutConfig, *, cursor: int, seed: int
) -> tuple[Rollouts, int]:
    """The rollouts of one step, and the cursor of the training stream after it.

    Rounds of P prompts go on until P groups are kept, or `max_rounds` are done; a method that does not resample takes
    one round. Groups kept beyond the first P are dropped again, like DAPO's surplus.
    """
    sampling = Sampling(config.max_new_tokens, config.temperature, stop=source.stop, batch_rows=config.batch_rows)
    parts: list[Rollouts] = []
    while True:
        rows = source.train(cursor, config.prompts)
        cursor += config.prompts
        parts.append(_round(policy, source, method, config, rows, sampling, seed_for(seed, "round", len(parts))))
        kept = sum(int(part.keep.view(-1, config.group).any(1).sum()) for part in parts)
        if kept >= config.prompts or "resample" not in method.needs or len(parts) == config.max_rounds:
            return _join(parts, config.prompts, config.group), cursor


def tokenize(policy: Policy, source: Source, rows: list[Row], max_new_tokens: int) -> list[list[int]]:
    """Prompt token ids. Special tokens come from the template's text alone, so there never is a second BOS.

    Raises UserError that names the problem whose prompt is empty, knows a token that the model does not, or leaves
    less than max_new_tokens of a model's learned positions (rotary ones have no end).
    """
    texts = [source.prompt(row) for row in rows]
    if not texts:
        return []
    prompts: list[list[int]] = policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    config = policy.model.config.get_text_config()
    learned = getattr(config, "rope_parameters", None) is None and getattr(config, "max_position_embeddings", None)
    positions = learned or float("inf")
    for row, prompt in zip(rows, prompts, strict=True):
        if not prompt:
            raise UserError(f"problem {row['id']!r}: the prompt has no tokens; mend data.template or the problem")
        if max(prompt) >= vocabulary:
            token = policy.tokenizer.convert_ids_to_tokens(max(prompt))
            raise UserError(
                f"problem {row['id']!r}: the tokenizer's {token!r} is beyond the model's vocabulary of {vocabulary}; "
                f"take the text out, or give the model and its tokenizer the same size"
            )
        if len(prompt) + max_new_tokens > positions:
            raise UserError(
                f"problem {row['id']!r}: its {len(prompt)} tokens and a response of {max_new_tokens} are more than the "
                f"model's {positions} positions; lower rollout.max_new_tokens (evaluation.max_new_tokens), or drop it"
            )
    return prompts


def decode(policy: Policy, responses: list[list[int]]) -> list[str]:
    texts: list[str] = policy.tokenizer.batch_decode(
        responses, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts


def _round(
    policy: Policy,
    source: Source,
    method: Method,
    config: RolloutConfig,
    rows: list[Row],
    sampling: Sampling,
    seed: int,
) -> Rollouts:
    group = config.group
    prompts = tokenize(policy, source, rows, config.max_new_tokens)
    samples = sample(policy, prompts, group, sampling, seed)
    responses = samples.responses()
    texts = decode(policy, responses)
    outcomes = verify_all(source.verifier, texts, [row for row in rows for _ in range(group)])
    correct = torch.tensor([o.correct for o in outcomes])
    groups = torch.arange(len(rows)).repeat_interleave(group)
    rewards = method.rewards(
        torch.tensor([o.score for o in outcomes], dtype=torch.float32),
        samples.mask.sum(1),
        samples.truncated,
        max_length=config.max_new_tokens,
    )
    mask = samples.mask
    if config.truncated == "masked":
        mask = mask & ~samples.truncated[:, None]
    return Rollouts(
        problems=rows,
        prompts=[p for p in prompts for _ in range(group)],
        responses=responses,
        texts=texts,
        outcomes=outcomes,
        samples=samples,
        mask=mask,
        rewards=rewards,
        correct=correct,
        groups=groups,
        keep=method.keep(rewards, groups, correct),
        rounds=1,
    )


def _join(parts: list[Rollouts], prompts: int, group: int) -> Rollouts:
    width = max(p.mask.shape[1] for p in parts)

    def stack(tensors: list[Tensor]) -> Tensor:
        if tensors[0].dim() == 1:
            return torch.cat(tensors)
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors])

    names = ("tokens", "logp", "entropy", "mask", "truncated")
    samples = Samples(*(stack([getattr(p.samples, name) for p in parts]) for name in names))
    keep = stack([p.keep for p in parts])
    kept_groups = keep.view(-1, group).any(1)
    surplus = kept_groups & (kept_groups.cumsum(0) > prompts)
    return Rollouts(
        problems=[r for p in parts for r in p.problems],
        prompts=[x for p in parts for x in p.prompts],
        responses=[x for p in parts for x in p.responses],
        texts=[x for p in parts for x in p.texts],
        outcomes=[x for p in parts for x in p.outcomes],
        samples=samples,
        mask=stack([p.mask for p in parts]),
        rewards=stack([p.rewards for p in parts]),
        correct=stack([p.correct for p in parts]),
        groups=torch.arange(len(kept_groups)).repeat_interleave(group),
        keep=keep & ~surplus.repeat_interleave(group),
        rounds=len(parts),
    )
