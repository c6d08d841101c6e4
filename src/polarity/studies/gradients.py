"""The NSR paper's gradient analysis on logged rollouts: how far tokens are pulled, and where the probability goes.

The directions are analysis/gradients.py's; this file finds rollouts and checkpoint, runs the model and says the result.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from torch import Tensor

from polarity.analysis.gradients import EDGES, RANKS, GradientSums
from polarity.config import RunConfig, load_config
from polarity.engines.embedded.policy import Policy, load_policy, token_logp
from polarity.errors import UserError
from polarity.rundir import Record, RunReader

# log r is held within this, as in the losses.
LARGEST_LOG_RATIO = 20.0
NAMES = {"positive": "correct (PSR)", "negative": "wrong (NSR)"}


def study_gradients(run: Path, step: int | None = None, out: Path | None = None) -> str:
    """Measure the directions of PSR, NSR and an entropy bonus on a run's logged rollouts; returns text to print.

    run: a run directory. step: which logged rollouts; None = the latest step that has a checkpoint as well, else the
    latest. Their responses go through that step's checkpoint, or the nearest one, at the run's rollout temperature;
    tokens of correct responses are under PSR, those of wrong ones under NSR, all of them under an entropy bonus. The
    checkpoint of a step is the policy after its updates, so the ratio r is measured against the logged `logp_old`.
    out: gets the numbers as JSON (docs/gradients.md). Deterministic.

    Raises UserError where there are no rollouts, no such step, no checkpoint, or no token ids in the rollouts.
    """
    reader = RunReader(run)
    step, checkpoint = _choose(reader, step)
    rows = _rows(reader, step)
    config = load_config(run / "config.yaml")
    policy = load_policy(reader.checkpoints[checkpoint], bfloat16=config.dtype == "bfloat16")
    found = {
        "run": str(run),
        "step": step,
        "checkpoint": checkpoint,
        "temperature": config.rollout.temperature,
        "responses": len(rows),
        "ratio_measured": all(row.get("logp_old") for row in rows),
        "ranks": RANKS,
        "edges": list(EDGES),
        "polarities": measure(policy, rows, config),
    }
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found, indent=1), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out") from error
    return _text(found)


@torch.no_grad()
def measure(policy: Policy, rows: Sequence[Record], config: RunConfig) -> dict[str, Any]:
    """`GradientSums.means` over all tokens of the rows (of a rollouts file, each with a token) under the policy."""
    sums = GradientSums()
    prompts: list[list[int]] = policy.tokenizer([row["prompt"] for row in rows], add_special_tokens=False)["input_ids"]
    responses: list[list[int]] = [row["token_ids"] for row in rows]
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    if max(max(r) for r in responses) >= vocabulary:
        raise UserError(f"the rollouts have token ids beyond the checkpoint's {vocabulary}; they are of another model")
    known = all(row.get("logp_old") for row in rows)
    for part in _micro_batches([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], config):
        correct = [row["correct"] for row in rows[part] for _ in row["token_ids"]]
        logp_old = [x for row in rows[part] for x in row["logp_old"]] if known else None
        hook = _Hook(sums, torch.tensor(correct), None if logp_old is None else torch.tensor(logp_old))
        token_logp(policy, prompts[part], responses[part], temperature=config.rollout.temperature, proxy=hook)
    return sums.means()


class _Hook:
    """Stands where a proxy does in `token_logp`: it is shown all logits, chunk by chunk, row after row."""

    def __init__(self, sums: GradientSums, correct: Tensor, logp_old: Tensor | None):
        self.sums, self.correct, self.logp_old = sums, correct, logp_old
        self.seen = 0

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        own = slice(self.seen, self.seen + len(tokens))
        self.seen = own.stop
        logp = -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
        ratio = None
        if self.logp_old is not None:
            log_ratio = logp.double() - self.logp_old[own].to(logp.device)
            ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
        self.sums.add(logits, tokens, self.correct[own].to(logits.device), ratio)
        return logp


def _choose(reader: RunReader, step: int | None) -> tuple[int, int]:
    """The step whose rollouts are read, and that of the checkpoint: the same where there is one, else the nearest."""
    logged, kept = reader.rollout_steps, list(reader.checkpoints)
    if not logged:
        raise UserError(f"{reader.path} has no logged rollouts; train with log.rollouts_every above 0")
    if not kept:
        raise UserError(f"{reader.path} has no checkpoint to compute gradients with; a run writes one at its end")
    if step is None:
        step = max(set(logged) & set(kept), default=logged[-1])
    elif step not in logged:
        raise UserError(f"{reader.path} has no rollouts of step {step}; logged: {', '.join(map(str, logged))}")
    return step, min(kept, key=lambda k: (abs(k - step), k))


def _rows(reader: RunReader, step: int) -> list[Record]:
    rows = reader.rollouts(step)
    if any("token_ids" not in row for row in rows):
        raise UserError(
            f"the rollouts of step {step} in {reader.path} have no token ids, which gradients need; "
            f"give a run whose rollouts files have the key token_ids"
        )
    rows = [row for row in rows if row["token_ids"]]
    if not rows:
        raise UserError(f"the rollouts of step {step} in {reader.path} have no response with a token; choose another")
    return rows


def _micro_batches(lengths: Sequence[int], config: RunConfig) -> Iterator[slice]:
    """Consecutive rows whose padded tokens are update.micro_batch_tokens at most, or one row."""
    start, longest = 0, 0
    for end, length in enumerate(lengths):
        longest = max(longest, length)
        if end > start and longest * (end + 1 - start) > config.update.micro_batch_tokens:
            yield slice(start, end)
            start, longest = end, length
    yield slice(start, len(lengths))


def _text(found: dict[str, Any]) -> str:
    """The numbers as a short table, and what they say about each polarity."""
    kept: dict[str, dict[str, Any]] = found["polarities"]
    lines = [
        f"{found['run']}: rollouts of step {found['step']} ({found['responses']} responses), "
        f"checkpoint of step {found['checkpoint']}, temperature {found['temperature']:g}",
    ]
    if found["checkpoint"] != found["step"]:
        lines.append(f"there is no checkpoint of step {found['step']}: this is the nearest one")
    if not found["ratio_measured"]:
        lines.append("no logp_old is logged: as trained is as on-policy, with ratio 1")
    lines += ["", _line("", *(NAMES[p] for p in kept))]
    columns = [_column(own) for own in kept.values()]
    lines += [_line(row[0][0], *(cell for _, cell in row)) for row in zip(*columns, strict=True)]
    ranks = ["1", "2", "3", f"4-{RANKS}", f">{RANKS}"]
    lines += ["", _line("share of the alternatives' total, by rank", *ranks)]
    for polarity, own in kept.items():
        for kind, name in (("logit", "logits"), ("mass", "probability")):
            shares = _few(own[f"as_trained/{kind}/alternatives"])
            lines.append(_line(f"{NAMES[polarity]}, {name}", *(_percent(x, sum(shares)) for x in shares)))
    lines += ["", _line("entropy bonus: probability, all tokens by rank", *ranks)]
    lines += [_line(NAMES[p], *(f"{x:+.4f}" for x in _few(kept[p]["entropy_bonus/mass/ranks"]))) for p in kept]
    return "\n".join([*lines, "", *(fill(_sentence(p, own), 110) for p, own in kept.items())])


def _column(m: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The first table's rows for one polarity: name and number."""
    half = EDGES.index(0.5) + 1
    rare, sure = slice(0, EDGES.index(0.1) + 1), slice(EDGES.index(0.9) + 1, None)
    slopes = m["as_trained/entropy_by_class"]

    def part(form: str, classes: slice) -> str:
        return _percent(sum(m[f"{form}/size_by_class"][classes]), m[f"{form}/size"])

    return [
        ("tokens", f"{m['tokens']:,.0f}"),
        ("probability of the sampled token", f"{m['probability']:.4f}"),
        ("ratio r, this policy to the old one", f"{m['ratio']:.4f}"),
        ("size of a token's gradient, as written", f"{m['as_written/size']:.4f}"),
        ("    as trained", f"{m['as_trained/size']:.4f}"),
        ("    as trained, on the sampled token", f"{abs(m['as_trained/logit/sampled']):.4f}"),
        ("    as trained, on the rest", f"{m['as_trained/rest']:.4f}"),
        ("    of an entropy bonus", f"{m['entropy_bonus/size']:.4f}"),
        ("tokens of probability below 0.1", _percent(sum(m["class"][rare]), 1)),
        ("    their part of the size, as written", part("as_written", rare)),
        ("    their part of the size, as trained", part("as_trained", rare)),
        ("tokens of probability 0.9 or more", _percent(sum(m["class"][sure]), 1)),
        ("    their part of the size, as written", part("as_written", sure)),
        ("    their part of the size, as trained", part("as_trained", sure)),
        ("nats of entropy a unit step, as written", f"{m['as_written/entropy']:+.4f}"),
        ("    as trained", f"{m['as_trained/entropy']:+.4f}"),
        ("    as trained, by tokens below 0.5", f"{sum(slopes[:half]):+.4f}"),
        ("    as trained, by the other tokens", f"{sum(slopes[half:]):+.4f}"),
        ("    by an entropy bonus", f"{m['entropy_bonus/entropy']:+.4f}"),
    ]


def _sentence(polarity: str, m: Mapping[str, Any]) -> str:
    alternatives = m["as_trained/mass/alternatives"]
    first = _percent(alternatives[0], sum(alternatives))
    unlikely = (
        f"{_percent(m['unlikely'], 1)} of the tokens are less likely than average at their position and carry "
        f"{_percent(m['as_trained/size_unlikely'], m['as_trained/size'])} of the gradient "
        f"({_percent(m['as_written/size_unlikely'], m['as_written/size'])} as written)"
    )
    if polarity == "positive":
        return (
            f"PSR, as trained: {first} of the probability that correct tokens gain comes from the most likely "
            f"alternative. {unlikely}: there unlikely alternatives gain as well."
        )
    return (
        f"NSR, as trained: {first} of the probability that wrong tokens lose goes to the most likely alternative. "
        f"{unlikely}: there unlikely alternatives lose as well."
    )


def _few(by_rank: Sequence[float]) -> list[float]:
    """Ranks 1, 2, 3, 4 to R, beyond."""
    return [*by_rank[:3], sum(by_rank[3:RANKS]), by_rank[RANKS]]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "-"


def _line(name: str, *cells: str) -> str:
    return f"{name:46s}" + "".join(f"{cell:>14s}" for cell in cells)
