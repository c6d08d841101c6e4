"""Which metric stands where on the page: the sections of line figures, top to bottom.

A section is left out when no run has any of its metrics; within one, so is a figure. Where only some runs have a
metric, the figure (or the section, when it is the same for all of it) says which lack it.
"""

from collections.abc import Sequence
from dataclasses import replace

from polarity.report.attribution import METRICS as ATTRIBUTION
from polarity.report.curves import Panel, in_units, lines, on_one_scale, pair, pass_at_k
from polarity.report.figures import SIDES, Block, Section
from polarity.report.runs import Runs, metrics_of, splits_of

LEARNING = (
    Panel("accuracy/mean", "Train accuracy", "share of all generated rollouts that are correct"),
    Panel("entropy/mean", "Entropy", "of the policy, nats per token"),
    Panel("length/mean", "Response length", "tokens"),
    Panel("reward/mean", "Reward", "mean over all generated rollouts, after the method's penalties"),
    Panel("accuracy/fully_solved", "Problems fully solved", "share of groups in which every response is correct"),
    Panel("accuracy/unsolved", "Problems unsolved", "share of groups in which no response is correct"),
    Panel("length/truncated", "Truncated", "share of responses that hit the length limit"),
)
VERIFIER = (
    Panel("verifier/unparsed", "No answer found", "share of responses"),
    Panel("verifier/timeout", "Verifier timeouts", "share of responses"),
    Panel("verifier/error", "Verifier failures", "share of responses"),
    Panel("rollouts/generated", "Rollouts generated", "responses a step"),
    Panel("rollouts/kept", "Rollouts kept", "responses left after the method's drop"),
    Panel("rollouts/rounds", "Generation rounds", "more than 1 where dropped groups are sampled again"),
    Panel("length/max", "Longest response", "tokens"),
)
# Metrics under positive/ and negative/: correct and wrong rollouts in two figures with one scale.
POLARITY = (
    Panel("share", "Share of rollouts", "of all generated rollouts"),
    Panel("entropy", "Entropy", "nats per token"),
    Panel("length", "Length", "tokens"),
    Panel("probability", "Probability of sampled tokens", "mean over all generated tokens"),
    Panel("reward", "Reward", "mean, after the method's penalties"),
    Panel("gradient_share", "Share of gradient mass", "its part of the sum of |shaped advantage| x (1 - p)"),
    Panel("shaped_share", "Shaped tokens", "share of trained tokens whose advantage the method reweights"),
    Panel("shaped_gradient_share", "Gradient mass on shaped tokens", "share of this polarity's gradient mass"),
    Panel("weight", "Weight of shaped tokens", "factor in force; absent where a method has none"),
    Panel("clip_fraction", "Clipped tokens", "share of tokens whose gradient the clip removes"),
)
SHARPENING = tuple(
    Panel(f"{name}/n{n}", f"{title}, {n}-grams", about)
    for name, title, about in (
        ("sharpening", "Sharpening", "share of a rollout's n-grams seen before in correct rollouts"),
        ("discovery", "Discovery", "share of a rollout's n-grams never seen before in any rollout"),
    )
    for n in (3, 4)
)
SHARPENING_PAIRS = tuple(replace(panel, metric=panel.metric.replace("/", "_")) for panel in SHARPENING)
BANDS = {
    "unsolved": "no response correct",
    "hard": "fewer than half correct",
    "easy": "half or more correct",
    "solved": "all correct",
}
DIFFICULTY = (
    Panel("share", "Share of problems"),
    Panel("entropy", "Entropy, nats per token"),
    Panel("length", "Length, tokens"),
)
MORE_DIFFICULTY = (
    Panel("reward", "Reward"),
    Panel("positive/entropy", "Entropy, nats per token: correct responses"),
    Panel("negative/entropy", "Entropy, nats per token: wrong responses"),
    Panel("positive/length", "Length, tokens: correct responses"),
    Panel("negative/length", "Length, tokens: wrong responses"),
)
# p: the sampler's probability of a sampled token; q: the trainer's.
MISMATCH = (
    Panel("mean", "Mean difference", "mean of |p - q|, probability"),
    Panel("max", "Largest difference", "largest |p - q|, probability"),
    Panel("std", "Spread of the difference", "standard deviation of |p - q|"),
    Panel("correlation", "Correlation of p and q", "Pearson, over tokens"),
    Panel("k1", "KL, k1 estimate", "mean of log p - log q, nats"),
    Panel("k3", "KL, k3 estimate", "mean of q/p - 1 - log(q/p), nats"),
    Panel("chi_square", "Chi-square of tokens", "mean of (q/p)² - 1"),
    Panel("sequence_chi_square", "Chi-square of responses", "the same with the ratio of whole responses"),
    Panel("ess", "Effective sample size", "share of the tokens"),
    Panel("weight_max", "Largest ratio", "largest q/p"),
    Panel("weight_min", "Smallest ratio", "smallest q/p"),
    Panel("log_ppl_difference", "Log-perplexity difference", "trainer's less sampler's, nats"),
)
MISMATCH_PAIRS = tuple(
    replace(panel, metric=f"mismatch_{panel.metric}")
    for panel in MISMATCH
    if panel.metric in ("mean", "max", "correlation", "k1", "k3", "chi_square")
)
UPDATE = (
    Panel("update/loss", "Loss", "mean over updates"),
    Panel("update/grad_norm", "Gradient norm", "before clipping"),
    Panel("update/ratio", "Importance ratio", "mean over tokens"),
    Panel("update/clip_fraction", "Clipped tokens", "share of all tokens"),
    Panel("update/dual_clip_fraction", "Tokens at the dual clip", "share of all tokens"),
    Panel("update/entropy", "Entropy in training", "nats per token"),
    Panel("update/kl", "KL to the reference policy", "the method's estimate, nats"),
    Panel("update/count", "Updates", "optimiser updates a step"),
    Panel("update/learning_rate", "Learning rate"),
)
OWN = (
    Panel("update/penalty", "Token penalty", "nats, coefficient included"),
    Panel("update/penalised_share", "Penalised tokens", "share of tokens"),
    Panel(
        "update/off_policy_share", "Tokens out of the loss", "share; of responses that the off-policy mask takes out"
    ),
    Panel("update/clip_floor", "Lower clip bound", "importance ratio, as found for the mini-batch"),
    Panel("update/clip_ceiling", "Upper clip bound", "importance ratio, as found for the mini-batch"),
)
CRITIC = (
    Panel("value/mean", "Value", "the critic's estimate of the return, mean over tokens"),
    Panel("value/explained_variance", "Explained variance", "of the returns by the values: 1 knows all, 0 their mean"),
    Panel("value/error", "Value error", "mean squared distance of value and return"),
    Panel("value/clip_fraction", "Clipped values", "share of tokens"),
    Panel("update/critic_grad_norm", "Critic's gradient norm", "before clipping"),
)
TIMES = (
    Panel("time/step", "Step", "seconds"),
    Panel("time/rollout", "Sampling and verifying", "seconds"),
    Panel("time/update", "Updates", "seconds"),
    Panel("time/evaluation", "Evaluation", "seconds, at steps that have one"),
)


def sections(runs: Runs) -> list[Section]:
    """All sections of line figures. Metrics that none of them names (a user's method may report its own) come last."""
    band = "line: mean over seeds; band: lowest and highest seed" if len(runs.seeds) > 1 else "one seed, so no band"
    beside = "correct rollouts (+) beside wrong ones (−), on one scale"
    named = {panel.metric for panel in (*LEARNING, *VERIFIER, *SHARPENING, *UPDATE, *OWN, *CRITIC, *TIMES)}
    named |= {f"{side}/{panel.metric}" for side in SIDES for panel in (*POLARITY, *SHARPENING_PAIRS, *MISMATCH_PAIRS)}
    named |= {f"difficulty/{band}/{panel.metric}" for band in BANDS for panel in (*DIFFICULTY, *MORE_DIFFICULTY)}
    named |= {f"mismatch/{panel.metric}" for panel in MISMATCH} | set(ATTRIBUTION)
    rest = [metric for metric in metrics_of(runs.runs) if metric not in named and not metric.startswith("eval/")]
    in_training = [metric for metric in rest if metric.startswith("accuracy/pass@")]
    at_k = [Panel(m, f"Train pass@{m.split('@')[1]}", "over the responses of a group") for m in in_training]
    other = [Panel(metric, metric) for metric in sorted(rest) if metric not in in_training]
    found = [
        Section(
            "learning", "Learning", f"Over rollout steps; {band}.",
            [Block("", lines(runs, _learning(runs))), Block("pass@k in training", lines(runs, at_k), folded=True),
             Block("Verifier and sampling", lines(runs, VERIFIER), folded=True)],
        ),
        _evaluation(runs, band),
        Section("polarity", "Polarity", f"Over rollout steps: {beside}; {band}.", [_pairs(runs, POLARITY)]),
        Section(
            "sharpening", "Sharpening and discovery",
            "Does the policy reuse what was correct before, or try what it never wrote? Over rollout steps.",
            [Block("", lines(runs, SHARPENING), "fours"),
             _pairs(runs, SHARPENING_PAIRS, "By polarity")],
        ),
        Section(
            "difficulty", "Difficulty",
            "Problems of a step, by the share of their responses that are correct; rows have one scale.",
            [*_bands(runs, DIFFICULTY), *_bands(runs, MORE_DIFFICULTY, folded=True)],
        ),
        Section(
            "mismatch", "Train-inference mismatch",
            "How far the sampler's token probabilities p are from the trainer's q, before any update of the step.",
            [Block("", lines(runs, [replace(p, metric=f"mismatch/{p.metric}") for p in MISMATCH])),
             _pairs(runs, MISMATCH_PAIRS, "By polarity", folded=True)],
        ),
        Section(
            "update", "Update", f"{band[0].upper()}{band[1:]}.",
            [Block("", lines(runs, (*UPDATE, *OWN))), Block("Critic", lines(runs, CRITIC)),
             Block("Seconds", lines(runs, TIMES), folded=True)],
        ),
        Section("other", "Other metrics", "As named in metrics.jsonl.", [Block("", lines(runs, other))]),
    ]  # fmt: skip
    kept = [replace(section, blocks=[block for block in section.blocks if block.figures]) for section in found]
    return [_with_lacks(section) for section in kept if section.blocks]


def _learning(runs: Runs) -> list[Panel]:
    """LEARNING; without the reward where it is the accuracy, which a verifier's 0 and 1 without penalties make it."""
    same = all(run.columns.get("reward/mean") == run.columns.get("accuracy/mean") for run in runs.runs)
    if not same:
        return list(LEARNING)
    accuracy = replace(LEARNING[0], about="share of generated rollouts; the reward is the same")
    return [accuracy, *(panel for panel in LEARNING[1:] if panel.metric != "reward/mean")]


def _pairs(runs: Runs, panels: Sequence[Panel], title: str = "", *, folded: bool = False) -> Block:
    return Block(title, [figure for panel in panels for figure in pair(runs, panel)], "pairs", folded)


def _bands(runs: Runs, panels: Sequence[Panel], *, folded: bool = False) -> list[Block]:
    """A row of four figures a quantity, unsolved to solved."""
    rows = []
    for quantity in panels:
        row = [Panel(f"difficulty/{band}/{quantity.metric}", band, about) for band, about in BANDS.items()]
        rows.append(Block(in_units(quantity.title, runs), on_one_scale(runs, row), "fours", folded))
    return rows


def _evaluation(runs: Runs, band: str) -> Section:
    """pass@1 and pass@k of each split first; every other number of an evaluation in a block of its own, folded."""
    splits = splits_of(runs.runs)
    names = {
        name: None
        for run in runs.runs
        for evaluation in run.evaluations.values()
        for values in evaluation.values()
        for name in values
    }
    blocks = [
        Block("", lines(runs, [Panel(f"eval/{split}/pass@1", f"pass@1, {split}") for split in splits])),
        Block("pass@k at the last evaluation", pass_at_k(runs, splits)),
    ]
    of_a_side = [name for name in names if name.split("/")[0] in SIDES]
    for name in (name for name in names if name != "pass@1" and name not in of_a_side):
        panels = [Panel(f"eval/{split}/{name}", split) for split in splits]
        title = name if "@" in name else name.replace("_", " ").capitalize()
        blocks.append(Block(title, lines(runs, panels), folded=True))
    for name in dict.fromkeys(name.split("/", 1)[1] for name in of_a_side):
        figures = []
        for split in splits:
            panels = [Panel(f"eval/{split}/{side}/{name}", split) for side in SIDES]
            scaled = on_one_scale(runs, panels)
            figures += [replace(figure, side=side) for figure, side in zip(scaled, SIDES, strict=bool(scaled))]
        blocks.append(Block(f"{name.capitalize()} of correct and wrong responses", figures, "pairs", folded=True))
    about = f"Over rollout steps, means over problems; step 0 is the model before training; {band}."
    return Section("evaluation", "Evaluation", about, blocks)


def _with_lacks(section: Section) -> Section:
    """What all figures of a section lack is said once."""
    drawn = [figure for block in section.blocks for figure in block.figures if figure.data]
    if len(drawn) < 2 or len({figure.lacks for figure in drawn}) > 1:
        return section
    blocks = [replace(b, figures=[replace(figure, lacks=()) for figure in b.figures]) for b in section.blocks]
    return replace(section, blocks=blocks, lacks=drawn[0].lacks)
