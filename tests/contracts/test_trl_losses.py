"""Losses and advantages equal those of TRL's GRPOTrainer, in value and in gradient.

n responses (P groups of G), T padded length. The trainer is a real one with a tiny model; for losses only its forward
pass is replaced, by log-probabilities and entropies of ours. Of TRL's loss types vespo has no counterpart here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from batches import TOLERANCE, Batch, G, P, T, assert_equal, assert_same_loss, polarity_loss, random_batch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from polarity import worlds
from polarity.methods import METHODS, Denominators, Method

# What TRL does not promise to keep. An upgrade that breaks the contract fails in `test_private_names` first.
PRIVATE = (
    "_compute_loss",
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
)
MODEL = Path(worlds.__file__).parent / "bases" / "ledger-general-small"
LIMIT = 50
DTYPES = [torch.float32, torch.float64]
Trainer = Callable[..., GRPOTrainer]
# TRL's own default trips over a name that transformers has retired.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    """`trainer(reward=None, **options)`: a GRPOTrainer in training mode, at the first micro-batch of a step."""

    def make(reward: Callable[..., list[float]] | None = None, **options: Any) -> GRPOTrainer:
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        defaults = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": P * G, "num_generations": G,
            "max_completion_length": LIMIT, "use_cpu": True, "bf16": False, "report_to": "none",
        }  # fmt: skip
        built = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
            reward_funcs=reward or (lambda completions, **kwargs: [0.0] * len(completions)),
            args=GRPOConfig(**(defaults | options)), processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": "A7 ?"}] * P),
        )  # fmt: skip
        built.model.train()
        built.current_gradient_accumulation_steps = built.args.gradient_accumulation_steps
        return built

    return make


def trl_loss(trainer: GRPOTrainer, batch: Batch, whole: Batch | None = None, **more: Tensor) -> Callable[..., Tensor]:
    """TRL's loss of a micro-batch as a function of logp (and entropy); `whole` is the generation batch it is from."""
    n = len(batch.mask)
    inputs = {
        "prompt_ids": torch.zeros((n, 1), dtype=torch.long), "prompt_mask": torch.ones((n, 1), dtype=torch.long),
        "completion_ids": torch.zeros((n, T), dtype=torch.long), "completion_mask": batch.mask.long(),
        "advantages": batch.advantages, "old_per_token_logps": batch.logp_old, "ref_per_token_logps": batch.logp_ref,
        "sampling_per_token_logps": batch.logp_rollout, "num_items_in_batch": (whole or batch).mask.sum(), **more,
    }  # fmt: skip

    def loss(logp: Tensor, entropy: Tensor = batch.entropy) -> Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logp, entropy, None)
        return trainer._compute_loss(trainer.model, inputs)

    return loss


class Pair(NamedTuple):
    """A method of polarity and the options of TRL that it must equal."""

    method: Method
    options: dict[str, Any]
    token_advantages: bool = True


def vary(name: str, **changes: Any) -> Method:
    """METHODS[name] with changes whose dots are written as double underscores."""
    return METHODS[name].vary({key.replace("__", "."): value for key, value in changes.items()})


TOKEN, SEQUENCE = "token_mean", "seq_mean_token_mean"
PAIRS = {
    "grpo": Pair(METHODS["grpo"], {"loss_type": "grpo"}),
    "bnpo": Pair(vary("grpo", aggregation=TOKEN), {"loss_type": "bnpo"}),
    "dr_grpo": Pair(METHODS["dr_grpo"], {"loss_type": "dr_grpo"}),
    "dapo": Pair(vary("dapo", surrogate__dual=None), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "cispo": Pair(vary("cispo", surrogate__high=4.0), {"loss_type": "cispo", "epsilon_high": 5.0}),
    # TRL holds the temperatures in float32, whatever the precision of the rest
    "sapo": Pair(vary("sapo", surrogate__negative=torch.tensor(1.05).item()), {"loss_type": "sapo"}),
    "gspo": Pair(
        METHODS["gspo"],
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        token_advantages=False,
    ),
    "luspo": Pair(
        vary("gspo", aggregation="seq_mean_token_sum"),
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        token_advantages=False,
    ),
    "two_sided": Pair(
        vary("two_sided", aggregation=TOKEN, surrogate__low=0.2, surrogate__high=0.2, surrogate__dual=4.0),
        {"loss_type": "dapo", "delta": 4.0},
    ),
    "opsm": Pair(
        vary("opsm", aggregation=SEQUENCE, surrogate__low=0.2, surrogate__high=0.2, off_policy_mask__delta=0.05),
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
        token_advantages=False,
    ),
    "fork_tokens": Pair(
        vary("fork_tokens", surrogate__dual=None),
        {"loss_type": "dapo", "epsilon_high": 0.28, "top_entropy_quantile": 0.2},
    ),
    "entropy bonus": Pair(
        vary("grpo", aggregation=TOKEN, entropy_bonus=0.3), {"loss_type": "bnpo", "entropy_coef": 0.3}
    ),
    "KL penalty": Pair(
        vary("grpo", kl__coefficient=0.4, kl__estimator="k3"),
        {"loss_type": "grpo", "beta": 0.4, "use_bias_correction_kl": False},
    ),
}  # fmt: skip


def test_private_names() -> None:
    missing = [name for name in PRIVATE if not hasattr(GRPOTrainer, name)]
    assert not missing, f"this TRL no longer has {missing}"


def example(seed: int, dtype: torch.dtype = torch.float64, **options: bool) -> Batch:
    """A random mini-batch with k3 below polarity's clamp, and entropies in float32, in which TRL takes its quantile."""
    batch = random_batch(seed, dtype, **options)
    near = batch.logp + (batch.logp_ref - batch.logp_old).clamp(-2, 2)
    return Batch(**{**vars(batch), "logp_ref": near, "entropy": batch.entropy.float().to(dtype)})


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", PAIRS)
def test_policy_losses(name: str, dtype: torch.dtype, trainer: Trainer) -> None:
    method, options, token_advantages = PAIRS[name]
    built = trainer(**options)
    for seed in range(3):
        batch = example(seed, dtype, holes=seed == 1, token_advantages=token_advantages and seed == 2)
        denominators = Denominators.of(batch.mask, LIMIT)
        ours = polarity_loss(method, batch, denominators=denominators, select=selection(method, batch))
        by_row = {} if token_advantages else {"advantages": batch.advantages[:, 0]}
        assert_same_loss(ours, trl_loss(built, batch, **by_row), batch.logp)


def selection(method: Method, batch: Batch) -> Any:
    return method.select(batch.inputs()) if "select" in method.needs else None


def test_gradient_of_the_entropy_bonus(trainer: Trainer) -> None:
    method, options, _ = PAIRS["entropy bonus"]
    batch, built = example(0, holes=True), trainer(**options)
    ours = lambda entropy: method.loss(batch.inputs(entropy=entropy)).loss  # noqa: E731
    theirs = trl_loss(built, batch)
    assert_same_loss(ours, lambda entropy: theirs(batch.logp, entropy), batch.entropy)


@pytest.mark.parametrize("name", ["dapo", "cispo", "grpo", "dr_grpo", "sapo"])
def test_micro_batches(name: str, trainer: Trainer) -> None:
    """Two micro-batches of equal size make one update: the sums agree with polarity's whole mini-batch."""
    method, options, _ = PAIRS[name]
    built = trainer(**options, gradient_accumulation_steps=2, per_device_train_batch_size=P * G // 2)
    batch = example(3)
    parts = [slice(0, P * G // 2), slice(P * G // 2, None)]

    def theirs(logp: Tensor) -> Tensor:
        return sum(trl_loss(built, batch.rows(rows), whole=batch)(logp[rows]) for rows in parts)

    def ours(logp: Tensor) -> Tensor:
        denominators = Denominators.of(batch.mask, LIMIT)
        return sum(polarity_loss(method, batch.rows(rows), denominators=denominators)(logp[rows]) for rows in parts)

    assert_same_loss(ours, theirs, batch.logp)


def test_importance_weights_against_the_rollout_engine(trainer: Trainer) -> None:
    """TRL computes the weights inline while it generates with vLLM: here they come from its definition."""
    batch = example(0)
    built = trainer(**PAIRS["dapo"].options)
    built.use_vllm, built.vllm_importance_sampling_correction = True, True
    ratio = (batch.logp_old - batch.logp_rollout).exp()
    weights = {"truncated": ratio.clamp(max=1.3), "masked": ratio.masked_fill((ratio < 0.8) | (ratio > 1.3), 0.0)}
    for kind, weight in weights.items():
        bounds = {"cap": 1.3} if kind == "truncated" else {"low": 0.8, "high": 1.3}
        method = PAIRS["dapo"].method.vary({"correction": {"kind": kind, **bounds}})
        theirs = trl_loss(built, batch, importance_sampling_ratio=weight)
        assert_same_loss(polarity_loss(method, batch), theirs, batch.logp)


@pytest.mark.parametrize(("scale", "name"), [("group", "grpo"), ("none", "dr_grpo")])
def test_advantages(scale: str, name: str, trainer: Trainer) -> None:
    """Generated and scored by TRL with rewards of ours: 0/1, graded, and all equal."""
    torch.manual_seed(0)
    rewards = torch.cat([(torch.rand(G * (P - 2)) > 0.5).float(), torch.rand(G), torch.full((G,), 0.7)])
    built = trainer(lambda completions, **kwargs: rewards.tolist(), scale_rewards=scale, max_completion_length=4)
    theirs = built._generate_and_score_completions([{"prompt": "A7 ?"} for _ in range(P * G)])["advantages"]
    method = METHODS[name].vary({"advantage.eps": 1e-4}) if scale == "group" else METHODS[name]
    ours = method.advantages(rewards, torch.arange(P * G) // G, rewards > 0.5)
    assert_equal(ours, theirs, TOLERANCE[torch.float32], "advantages")


# The places where polarity differs from TRL on purpose, each shown on its smallest example.


def one_response(log_ratio: float, advantage: float) -> Batch:
    """A batch of one response of one token."""
    batch = example(0).rows(slice(0, 1))
    values = {"logp": batch.logp_old + log_ratio, "advantages": torch.where(batch.mask, advantage, 0.0).double()}
    return Batch(**{**vars(batch), **values})


def dual_clip(trainer: Trainer) -> None:
    batch = one_response(3.0, -1.0)
    theirs = trl_loss(trainer(**PAIRS["dapo"].options), batch)(batch.logp)
    assert theirs.log().item() == pytest.approx(3.0)
    assert polarity_loss(METHODS["dapo"], batch)(batch.logp).item() == pytest.approx(10.0)


def ratios_without_clamp(trainer: Trainer) -> None:
    batch = one_response(25.0, -1.0)
    theirs = trl_loss(trainer(**PAIRS["grpo"].options), batch)(batch.logp)
    assert theirs.log().item() == pytest.approx(25.0)
    assert polarity_loss(METHODS["grpo"], batch)(batch.logp).log().item() == pytest.approx(20.0)


def empty_responses(trainer: Trainer) -> None:
    batch = example(0, empty_row=True)
    n = len(batch.mask)
    for name in ("grpo", "dr_grpo", "sapo"):
        method, options, _ = PAIRS[name]
        theirs = trl_loss(trainer(**options), batch)(batch.logp)
        ours = polarity_loss(method, batch, denominators=Denominators.of(batch.mask, LIMIT))(batch.logp)
        assert_equal(theirs * n / (n - 1), ours, TOLERANCE[torch.float64], name)


def bnpo_micro_batches(trainer: Trainer) -> None:
    method, options, _ = PAIRS["bnpo"]
    built = trainer(**options, gradient_accumulation_steps=2, per_device_train_batch_size=P * G // 2)
    batch = example(3)
    parts = [batch.rows(slice(0, P * G // 2)), batch.rows(slice(P * G // 2, None))]
    assert parts[0].mask.sum() != parts[1].mask.sum()
    theirs = sum(float(trl_loss(built, part, whole=batch)(part.logp)) for part in parts)
    assert theirs != pytest.approx(float(polarity_loss(method, batch)(batch.logp)))


def dapo_normaliser(trainer: Trainer) -> None:
    """Two updates in a generation batch: each is divided by the average token count of the two."""
    method, options, _ = PAIRS["dapo"]
    built = trainer(**options, steps_per_generation=2, per_device_train_batch_size=P * G // 2)
    batch = example(3)
    part = batch.rows(slice(0, P * G // 2))
    tokens, average = part.mask.sum(), batch.mask.sum() / 2
    assert tokens != average
    theirs = trl_loss(built, part, whole=batch)(part.logp)
    ours = polarity_loss(method, part)(part.logp)
    assert_equal(theirs * average / tokens, ours, TOLERANCE[torch.float64], "value")


def cispo_cap(trainer: Trainer) -> None:
    """The same number means ratio <= 5 in TRL and ratio <= 1 + 5 in verl and here."""
    batch = one_response(3.0, -1.0)
    theirs = trl_loss(trainer(**PAIRS["cispo"].options), batch)(batch.logp)
    assert float(theirs / batch.logp[0, 0]) == pytest.approx(5.0)
    ours = polarity_loss(vary("cispo", surrogate__high=5.0), batch)(batch.logp)
    assert float(ours / batch.logp[0, 0]) == pytest.approx(6.0)


def fork_tokens_count(trainer: Trainer) -> None:
    """Four tokens, 30 %: a quantile keeps one, ceil(1.2) two; with equal entropies a quantile keeps all."""
    built = trainer(**PAIRS["fork_tokens"].options)
    mask = torch.ones((1, 4), dtype=torch.bool)
    part = METHODS["fork_tokens"].vary({"token_mask.ratio": 0.3}).token_mask
    for entropy, trl, polarity in [([4.0, 1.0, 3.0, 2.0], 1, 2), ([1.0, 1.0, 1.0, 1.0], 4, 2)]:
        given = torch.tensor([entropy])
        assert int(built.get_high_entropy_mask(given, mask, 1 - 0.3).sum()) == trl
        assert int(part.kept(given, mask).sum()) == polarity


def kl_clamp(trainer: Trainer) -> None:
    batch = one_response(0.0, 0.0)
    batch = Batch(**{**vars(batch), "logp_ref": batch.logp + 4.0})
    theirs = trl_loss(trainer(**PAIRS["KL penalty"].options), batch)(batch.logp)
    assert float(theirs) == pytest.approx(0.4 * (torch.tensor(4.0).exp().item() - 5))
    assert float(polarity_loss(PAIRS["KL penalty"].method, batch)(batch.logp)) == pytest.approx(0.4 * 10)


def kl_ratio(trainer: Trainer) -> None:
    batch = one_response(1.0, 0.0)
    options = PAIRS["KL penalty"].options | {"use_bias_correction_kl": GRPOConfig.use_bias_correction_kl}
    theirs = trl_loss(trainer(**options), batch)(batch.logp)
    ours = polarity_loss(PAIRS["KL penalty"].method, batch)(batch.logp)
    assert float(theirs / ours) == pytest.approx(torch.tensor(1.0).exp().item())


def entropy_by_sequence(trainer: Trainer) -> None:
    method, options, _ = PAIRS["entropy bonus"]
    batch = example(0)
    batch = Batch(**{**vars(batch), "advantages": torch.zeros_like(batch.advantages)})
    theirs = trl_loss(trainer(**options | {"loss_type": "grpo"}), batch)(batch.logp)
    assert_equal(theirs, polarity_loss(method, batch)(batch.logp), TOLERANCE[torch.float64], "by token")
    by_sequence = polarity_loss(method.vary({"aggregation": SEQUENCE}), batch)(batch.logp)
    assert float(theirs) != pytest.approx(float(by_sequence))


class Deviation(NamedTuple):
    """Where polarity differs from TRL on purpose: asserted by `shows`, so that the list cannot go stale."""

    name: str
    reason: str
    shows: Callable[[Trainer], None]


DEVIATIONS = [
    Deviation("dual clip", "TRL's dapo has none; polarity's has DAPO's, 10", dual_clip),
    Deviation("ratios", "TRL does not clamp log-ratios; polarity at +-20, as verl", ratios_without_clamp),
    Deviation("empty responses", "TRL counts them in the mean over responses; polarity does not", empty_responses),
    Deviation("bnpo", "TRL averages tokens within a micro-batch; polarity over the mini-batch", bnpo_micro_batches),
    Deviation("dapo", "TRL divides by the generation batch's average mini-batch; polarity by its own", dapo_normaliser),
    Deviation("cispo", "TRL's epsilon_high is the cap itself; here, as in verl, its distance from 1", cispo_cap),
    Deviation("fork tokens", "TRL takes a quantile of entropies; polarity exactly ceil(ratio * n)", fork_tokens_count),
    Deviation("k3", "TRL does not clamp it; polarity at 10, as verl", kl_clamp),
    Deviation("KL and ratio", "TRL multiplies the KL by the ratio unless told not to; polarity does not", kl_ratio),
    Deviation("entropy bonus", "TRL's is a token mean whatever the loss; polarity's follows it", entropy_by_sequence),
]


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda deviation: deviation.name)
def test_known_deviations(deviation: Deviation, trainer: Trainer) -> None:
    deviation.shows(trainer)
