"""Losses equal verl's registered policy losses, value loss and KL estimators, in value and in gradient.

n responses, T padded length. Runs in the environment that holds verl (`make test`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from batches import TOLERANCE, Batch, T, assert_equal, assert_same_loss, polarity_loss, random_batch, share
from batches import value_and_gradient as evaluated
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, compute_value_loss, get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig, PolicyLossConfig

from polarity.methods import METHODS, Denominators, Method
from polarity.methods.regularizers import kl_estimate

SEEDS = range(3)
DTYPES = [torch.float32, torch.float64]
AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "seq_mean_token_mean",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "token_sum_const",
}
# verl's vanilla loss always has a dual clip; polarity's null is a constant that no ratio reaches.
NO_DUAL = {"clip_ratio_c": 1e12}


class Verl(NamedTuple):
    """One of verl's policy losses with its settings."""

    loss: str
    aggregation: str = "token-mean"
    actor: Mapping[str, Any] = {}
    policy: Mapping[str, Any] = {}

    def __call__(
        self, batch: Batch, logp: Tensor, weights: Tensor | None = None, info: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics; info: the counts of the whole mini-batch, as verl's engine passes them."""
        config = ActorConfig(
            strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=self.aggregation,
            policy_loss=PolicyLossConfig(loss_mode=self.loss, **self.policy), **self.actor,
        )  # fmt: skip
        config.global_batch_info.update(info or {})
        return get_policy_loss_fn(self.loss)(
            old_log_prob=batch.logp_old, log_prob=logp, advantages=batch.advantages, response_mask=batch.mask,
            loss_agg_mode=self.aggregation, config=config, rollout_is_weights=weights,
        )  # fmt: skip


class Pair(NamedTuple):
    """A method of polarity and the loss of verl that it must equal."""

    method: Method
    verl: Verl
    token_advantages: bool = True


def clip(low: float, high: float, **more: float) -> dict[str, float]:
    return {"clip_ratio_low": low, "clip_ratio_high": high, **more}


SEQUENCES = "seq-mean-token-mean"
PAIRS = {
    "grpo": Pair(METHODS["grpo"], Verl("vanilla", SEQUENCES, clip(0.2, 0.2, **NO_DUAL))),
    "psr_group": Pair(METHODS["psr_group"], Verl("vanilla", SEQUENCES, clip(0.2, 0.2, clip_ratio_c=3.0))),
    "dapo": Pair(METHODS["dapo"], Verl("vanilla", "token-mean", clip(0.2, 0.28, clip_ratio_c=10.0))),
    "dr_grpo": Pair(METHODS["dr_grpo"], Verl("vanilla", "seq-mean-token-sum-norm", clip(0.2, 0.2, **NO_DUAL))),
    "gspo": Pair(METHODS["gspo"], Verl("gspo", SEQUENCES, clip(3e-4, 4e-4)), token_advantages=False),
    "gspo_token": Pair(METHODS["gspo_token"], Verl("gspo", SEQUENCES, clip(3e-4, 4e-4))),
    "sapo": Pair(METHODS["sapo"], Verl("sapo", SEQUENCES, {"tau_pos": 1.0, "tau_neg": 1.05})),
    "cispo": Pair(METHODS["cispo"], Verl("cispo", "token-mean", clip(10.0, 0.2))),
    "cispo with a lower bound": Pair(
        METHODS["cispo"].vary({"surrogate.low": 0.1}), Verl("cispo", "token-mean", clip(0.1, 0.2))
    ),
    "gmpo": Pair(METHODS["gmpo"], Verl("geo_mean", SEQUENCES, clip(0.4, 0.4))),
    "kl_cov": Pair(
        METHODS["kl_cov"].vary({"token_penalty.ratio": 0.05, "token_penalty.coefficient": 0.7}),
        Verl("kl_cov", "token-mean", {}, {"kl_cov_ratio": 0.05, "ppo_kl_coef": 0.7}),
    ),
    "clip_cov, every candidate": Pair(
        METHODS["clip_cov"].vary({"token_mask.ratio": 1.0, "token_mask.lower": 0.5, "token_mask.upper": 2.0}
                                 | {"surrogate.low": 0.2, "surrogate.high": 0.2}),
        Verl("clip_cov", "token-mean", clip(0.2, 0.2),
             {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.5, "clip_cov_ub": 2.0}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", PAIRS)
def test_policy_losses(name: str, dtype: torch.dtype) -> None:
    method, verl, token_advantages = PAIRS[name]
    for seed in SEEDS:
        batch = random_batch(seed, dtype, holes=seed == 1, token_advantages=token_advantages and seed == 2)
        assert_same_loss(polarity_loss(method, batch), lambda logp, b=batch: verl(b, logp)[0], batch.logp)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("theirs", AGGREGATIONS)
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "kl_cov"])
def test_every_aggregation(name: str, theirs: str, dtype: torch.dtype) -> None:
    method, verl, _ = PAIRS[name]
    method, verl = method.vary({"aggregation": AGGREGATIONS[theirs]}), verl._replace(aggregation=theirs)
    for seed in SEEDS:
        batch = random_batch(seed, dtype, holes=seed == 1, empty_row=True)
        assert_same_loss(polarity_loss(method, batch), lambda logp, b=batch: verl(b, logp)[0], batch.logp)


@pytest.mark.parametrize("theirs", AGGREGATIONS)
@pytest.mark.parametrize("name", ["dapo", "gspo", "sapo", "cispo"])
def test_micro_batches_on_two_ranks(name: str, theirs: str) -> None:
    """Micro-batches of two ranks, given the mini-batch's counts; verl multiplies by the ranks that it averages over."""
    method, verl, _ = PAIRS[name]
    theirs = SEQUENCES if name == "sapo" else theirs
    method, verl = method.vary({"aggregation": AGGREGATIONS[theirs]}), verl._replace(aggregation=theirs)
    batch = random_batch(5, holes=True)
    n, tokens = len(batch.mask), int(batch.mask.sum())
    denominators = Denominators(tokens=tokens, sequences=n, max_length=50)
    info = {"dp_size": 2, "batch_num_tokens": tokens, "global_batch_size": n, "loss_scale_factor": 50}
    parts = [slice(0, 3), slice(3, 10), slice(10, 11), slice(11, n)]

    def ours(logp: Tensor) -> Tensor:
        return sum(polarity_loss(method, batch.rows(p), denominators=denominators)(logp[p]) for p in parts)

    assert_same_loss(ours, lambda logp: sum(verl(batch.rows(p), logp[p], info=info)[0] for p in parts) / 2, batch.logp)
    assert_same_loss(ours, polarity_loss(method, batch, denominators=denominators), batch.logp)


@pytest.mark.parametrize(
    ("correction", "threshold"),
    [({"kind": "truncated", "cap": 1.2}, 1.2), ({"kind": "masked", "low": 0.7, "high": 1.5}, "0.7_1.5")],
    ids=["truncated", "masked"],
)
@pytest.mark.parametrize(
    ("level", "name"),
    [
        *(("token", name) for name in ("grpo", "dapo", "gspo_token", "sapo", "cispo")),
        *(("sequence", name) for name in ("grpo", "dapo", "gspo", "gspo_token", "sapo", "cispo", "gmpo")),
    ],
)
def test_importance_weights(name: str, level: str, correction: dict[str, Any], threshold: float | str) -> None:
    method, verl, _ = PAIRS[name]
    method = method.vary({"correction": correction | {"level": level}})
    for seed in SEEDS:
        batch = random_batch(seed, holes=seed == 1)
        weights, _ = compute_rollout_correction_weights(
            batch.logp_old - batch.logp_rollout, batch.mask, rollout_is=level, rollout_is_threshold=threshold
        )
        theirs = lambda logp, b=batch, w=weights: verl(b, logp, weights=w)[0]  # noqa: E731
        assert_same_loss(polarity_loss(method, batch), theirs, batch.logp)


@pytest.mark.parametrize("name", ["grpo", "psr_group", "dapo", "gspo", "gspo_token", "cispo"])
def test_clip_fractions(name: str) -> None:
    """They agree, and the random batches do lie on both sides of each bound."""
    method, verl, _ = PAIRS[name]
    batch = random_batch(3, holes=True)
    output = method.loss(batch.inputs())
    _, metrics = verl(batch, batch.logp)
    assert 0 < share(output, "clip_fraction") < 1
    assert share(output, "clip_fraction") == pytest.approx(metrics["actor/pg_clipfrac"])
    assert share(output, "dual_clip_fraction") == pytest.approx(metrics["actor/pg_clipfrac_lower"])
    assert (share(output, "dual_clip_fraction") > 0) == (name in ("psr_group", "dapo"))


def test_clip_cov_takes_as_many_tokens() -> None:
    """The choice is random on both sides; how many are chosen, and of which tokens, is not."""
    settings = {"clip_cov_ratio": 0.05, "clip_cov_lb": 0.1, "clip_cov_ub": 5.0}
    verl = Verl("clip_cov", "token-mean", clip(0.2, 0.2), settings)
    method = METHODS["clip_cov"].vary(
        {"token_mask.ratio": 0.05, "token_mask.lower": 0.1, "token_mask.upper": 5.0}
        | {"surrogate.low": 0.2, "surrogate.high": 0.2}
    )
    for seed in SEEDS:
        batch = random_batch(seed)
        torch.manual_seed(seed)
        _, metrics = verl(batch, batch.logp)
        kept = method.select(batch.inputs(), torch.Generator().manual_seed(seed)).tokens
        dropped = int((batch.mask & ~kept).sum())
        assert dropped == round(metrics["actor/pg_clipfrac"] * int(batch.mask.sum())) > 1


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k1+", "k3+"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_kl_estimators(estimator: str, dtype: torch.dtype) -> None:
    batch = random_batch(0, dtype)
    wide = batch.logp_old + 4 * (batch.logp_ref - batch.logp_old)  # far enough for k3's clamp
    ours = lambda logp: kl_estimate(logp, wide, batch.mask, estimator).sum()  # noqa: E731
    theirs = lambda logp: (kl_penalty(logp, wide, estimator) * batch.mask).sum()  # noqa: E731
    assert_same_loss(ours, theirs, batch.logp_old)


@pytest.mark.parametrize("theirs", AGGREGATIONS)
def test_kl_penalty_and_entropy_bonus(theirs: str) -> None:
    """The whole actor loss, composed as verl's worker composes it; the entropy's gradient too."""
    method = METHODS["grpo_zhu"].vary(
        {"kl.coefficient": 0.2, "entropy_bonus": 0.3, "aggregation": AGGREGATIONS[theirs]}
    )
    verl = PAIRS["grpo"].verl._replace(aggregation=theirs)
    batch = random_batch(1, empty_row=True)

    def composed(logp: Tensor, entropy: Tensor) -> Tensor:
        kl = kl_penalty(logp, batch.logp_ref, "low_var_kl")
        terms = [agg_loss(x, batch.mask, theirs) for x in (kl, entropy)]
        return verl(batch, logp)[0] + 0.2 * terms[0] - 0.3 * terms[1]

    assert_same_loss(polarity_loss(method, batch), lambda logp: composed(logp, batch.entropy), batch.logp)
    by_entropy = lambda entropy: method.loss(batch.inputs(entropy=entropy)).loss  # noqa: E731
    assert_same_loss(by_entropy, lambda entropy: composed(batch.logp, entropy), batch.entropy)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_value_loss(dtype: torch.dtype) -> None:
    method = METHODS["ppo"]
    for seed in SEEDS:
        batch = random_batch(seed, dtype, holes=True)
        old, targets, values = batch.logp_ref, batch.logp_rollout, batch.logp_ref + 0.6 * batch.advantages
        theirs = lambda v, b=batch, o=old, t=targets: compute_value_loss(v, t, o, b.mask, 0.5)  # noqa: E731
        output = method.value_loss(values, old, targets, batch.mask)
        assert share(output, "value/clip_fraction") == pytest.approx(float(theirs(values)[1]))
        assert_same_loss(
            lambda v, b=batch, o=old, t=targets: method.value_loss(v, o, t, b.mask).loss,
            lambda v, f=theirs: f(v)[0],
            values,
        )


# The places where polarity differs from verl on purpose, each shown on its smallest example.


def one_response(log_ratio: float, advantage: float, tokens: int = 1) -> Batch:
    """A batch of one response whose tokens all have this log-ratio and advantage."""
    batch = random_batch(0).rows(slice(0, 1))
    mask = (torch.arange(T) < tokens)[None]
    values = {"logp": batch.logp_old + log_ratio, "advantages": torch.where(mask, advantage, 0.0).double()}
    return Batch(**{**vars(batch), **values, "mask": mask})


def always_dual() -> None:
    batch = one_response(2.0, -1.0)
    theirs, _ = Verl("vanilla", SEQUENCES)(batch, batch.logp)
    assert float(theirs) == pytest.approx(3.0)
    assert float(polarity_loss(METHODS["grpo"], batch)(batch.logp)) == pytest.approx(torch.tensor(2.0).exp().item())


def empty_rows_counted() -> None:
    batch = random_batch(0, empty_row=True)
    n = len(batch.mask)
    full = PAIRS["grpo"].verl(batch, batch.logp, info={"dp_size": 1, "global_batch_size": n})[0]
    ours = polarity_loss(METHODS["grpo"], batch)(batch.logp)
    assert_equal(full * n / (n - 1), ours, TOLERANCE[torch.float64], "value")


def constant_length_without_a_limit() -> None:
    batch = random_batch(0, holes=True)
    longest = int(batch.mask.sum(1).max())
    assert longest < T
    theirs, _ = PAIRS["dr_grpo"].verl(batch, batch.logp)
    ours = METHODS["dr_grpo"].loss(batch.inputs(batch.logp)).loss
    assert_equal(ours * longest, theirs * T, TOLERANCE[torch.float64], "value")


def gmpo_counts_empty_rows() -> None:
    batch = random_batch(0, empty_row=True)
    n = len(batch.mask)
    theirs, _ = PAIRS["gmpo"].verl(batch, batch.logp)
    ours = polarity_loss(METHODS["gmpo"], batch)(batch.logp)
    assert_equal(theirs * n / (n - 1), ours, TOLERANCE[torch.float64], "value")


def gmpo_averages_micro_batches() -> None:
    batch = random_batch(0)
    info = {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": len(batch.mask)}
    verl, parts = PAIRS["gmpo"].verl, [batch.rows(slice(0, 8)), batch.rows(slice(8, None))]
    whole = verl(batch, batch.logp)[0]
    assert float(sum(verl(part, part.logp, info=info)[0] for part in parts)) != pytest.approx(float(whole))
    denominators = Denominators.of(batch.mask)
    ours = sum(polarity_loss(METHODS["gmpo"], part, denominators=denominators)(part.logp) for part in parts)
    assert_equal(ours, whole, TOLERANCE[torch.float64], "value")


def gspo_clamp() -> None:
    batch = one_response(12.0, -1.0)
    theirs, gradient = evaluated(lambda logp: PAIRS["gspo"].verl(batch, logp)[0], batch.logp)
    ours, our_gradient = evaluated(polarity_loss(METHODS["gspo"], batch), batch.logp)
    assert theirs.log().item() == pytest.approx(10.0)
    assert not gradient.any()
    assert ours.log().item() == pytest.approx(12.0)
    assert our_gradient.any()


def unclamped_ratios() -> None:
    batch = one_response(25.0, -1.0)
    for name in ("kl_cov", "clip_cov, every candidate"):
        theirs, _ = PAIRS[name].verl(batch, batch.logp)
        assert theirs.log().item() >= 25, name
        assert polarity_loss(PAIRS[name].method, batch)(batch.logp).log().item() < 23, name


def unweighted_penalty() -> None:
    batch = one_response(0.5, 0.0)
    method, verl, _ = PAIRS["kl_cov"]
    method = method.vary({"correction": {"kind": "truncated"}})
    theirs, _ = verl(batch, batch.logp, weights=torch.full_like(batch.logp, 0.1))
    assert float(theirs) == pytest.approx(0.1 * 0.7 * 0.5)
    assert float(polarity_loss(method, batch)(batch.logp)) == pytest.approx(0.7 * 0.5)


def statistics_of_a_micro_batch() -> None:
    batch = random_batch(0)
    method, verl, _ = PAIRS["kl_cov"]
    denominators = Denominators.of(batch.mask)
    info = {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum())}
    selection = method.select(batch.inputs())
    ours, theirs = 0.0, 0.0
    for rows in (slice(0, 8), slice(8, None)):
        part = batch.rows(rows)
        chosen = type(selection)(selection.tokens[rows], selection.values, selection.count)
        ours += float(polarity_loss(method, part, select=chosen, denominators=denominators)(part.logp))
        theirs += float(verl(part, part.logp, info=info)[0])
    whole = float(verl(batch, batch.logp)[0])
    assert ours == pytest.approx(whole)
    assert theirs != pytest.approx(whole)


class Deviation(NamedTuple):
    """Where polarity differs from verl on purpose: asserted by `shows`, so that the list cannot go stale."""

    name: str
    reason: str
    shows: Callable[[], None]


DEVIATIONS = [
    Deviation("dual clip", "verl's vanilla loss always has one (3 by default); polarity's grpo has none", always_dual),
    Deviation(
        "empty responses in the sequence mean",
        "verl's engine divides by the configured mini-batch size; polarity by the responses that have tokens",
        empty_rows_counted,
    ),
    Deviation(
        "constant length without a limit",
        "where no response limit is given verl takes the padded length, so more padding changes the loss; polarity the "
        "longest response",
        constant_length_without_a_limit,
    ),
    Deviation(
        "gmpo, empty responses",
        "verl's geo_mean averages over all rows, also those without tokens; polarity leaves them out",
        gmpo_counts_empty_rows,
    ),
    Deviation(
        "gmpo, micro-batches",
        "verl's geo_mean ignores the mini-batch's counts, so its sum over micro-batches depends on the split",
        gmpo_averages_micro_batches,
    ),
    Deviation(
        "gspo, largest ratio",
        "verl caps the log-ratio at +10, and its gradient with it; polarity at +-20 as for all ratios",
        gspo_clamp,
    ),
    Deviation(
        "kl_cov and clip_cov, largest ratio",
        "verl clamps log-ratios at +-20 in every loss but these two; polarity in all",
        unclamped_ratios,
    ),
    Deviation(
        "kl_cov, importance weights",
        "verl multiplies the penalty by them, too; polarity the policy loss only, a penalty being no off-policy term",
        unweighted_penalty,
    ),
    Deviation(
        "kl_cov and clip_cov, scope",
        "verl takes means, ranks and counts within a micro-batch; polarity over the whole mini-batch",
        statistics_of_a_micro_batch,
    ),
]


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda deviation: deviation.name)
def test_known_deviations(deviation: Deviation) -> None:
    deviation.shows()
