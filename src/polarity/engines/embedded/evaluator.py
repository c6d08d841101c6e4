"""The embedded engine's side of evaluation: problems in, sampled responses out, results in the run's format."""

from collections.abc import Sequence
from typing import Any

from polarity.config import RunConfig
from polarity.data import Row
from polarity.engines.embedded.policy import Policy
from polarity.engines.embedded.rollout import decode, tokenize
from polarity.engines.embedded.sampler import Sampling, sample
from polarity.engines.embedded.source import Source
from polarity.evaluation import Generation, evaluate
from polarity.seeds import seed_for


def evaluate_policy(policy: Policy, source: Source, config: RunConfig, samples: int) -> dict[str, Any]:
    """Results and samples of every configured split.

    The problems are the same for every run; sampling is seeded by run seed and split, not by step, so that two
    evaluations of the same weights agree.
    """
    wanted = config.evaluation
    sampling = Sampling(
        max_new_tokens=config.evaluation_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        stop=source.stop,
        batch_rows=config.rollout.batch_rows,
    )

    def generate(rows: Sequence[Row], samples: int, split: str) -> list[Generation]:
        return respond(policy, source, rows, samples, sampling, seed_for(config.seed, "evaluation", split))

    splits = source.splits(wanted.splits, wanted.problems)
    found = evaluate(generate, splits, source.verifier, samples)
    return {**found, "settings": {**wanted.model_dump(), "samples": samples, "seed": config.seed}}


def respond(
    policy: Policy, source: Source, rows: Sequence[Row], samples: int, sampling: Sampling, seed: int
) -> list[Generation]:
    """`samples` responses in a row to each problem of `rows`, under the source's prompt."""
    prompts = tokenize(policy, source, list(rows), sampling.max_new_tokens)
    made = sample(policy, prompts, samples, sampling, seed)
    lengths = made.mask.sum(1)
    entropy = (made.entropy * made.mask).sum(1) / lengths.clamp(min=1)
    columns = (lengths.tolist(), entropy.tolist(), made.truncated.tolist())
    texts = decode(policy, made.responses())
    return [Generation(text, n, h, cut) for text, n, h, cut in zip(texts, *columns, strict=True)]
