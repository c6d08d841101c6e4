"""METHODS: every method by name, each as its paper (or, where said, its code) defines it.

Where text and code disagree the source says which one a preset follows. Methods whose papers say nothing about the rest
stand on `grpo`. Each has a page in docs/methods/.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from polarity.errors import nearest
from polarity.methods.advantages import CentredAdvantage, LeaveOneOutAdvantage, ReturnsAdvantage, SignedAdvantage
from polarity.methods.corrections import OffPolicyMask
from polarity.methods.method import Method
from polarity.methods.regularizers import KL
from polarity.methods.samples import Filter
from polarity.methods.schedules import LinearDecay
from polarity.methods.shaping import EntropyTerm, ProbabilityWeight, Shaping, TokenWeights
from polarity.methods.surrogates import ASPO, BAPO, CISPO, GMPO, GSPO, SAPO, Clip, EntropyWidths
from polarity.methods.token_masks import ClipCov, ForkTokens
from polarity.methods.token_penalties import KLCov, LpReg
from polarity.methods.values import CriticAdvantage

SOURCES = {
    "A": "Rethinking Sample Polarity in RLVR (Tang et al.): the A3PO paper",
    "Z": "The Surprising Effectiveness of Negative Reinforcement in LLM Reasoning (Zhu et al. 2025): PSR and NSR",
    "D": "DAPO (Yu et al. 2025)",
    "F": "Fork Tokens: beyond the 80/20 rule (Wang et al. 2025)",
}

_GRPO = Method(
    name="grpo",
    source="[A]'s baseline: GRPO without KL penalty and entropy bonus",
    surrogate=Clip(low=0.2, high=0.2),
    aggregation="seq_mean_token_mean",
)
_DAPO = Method(
    name="dapo",
    source="[D]: clip-higher, token mean, dynamic sampling; overlong penalty optional",
    surrogate=Clip(low=0.2, high=0.28, dual=10.0),
    filter=Filter(dynamic_sampling=True),
)
_REINFORCE = Method(
    name="reinforce",
    source="[Z]: +1 / -1 on all samples; clip and entropy bonus as in PSR and NSR",
    advantage=SignedAdvantage(),
    surrogate=Clip(low=0.2, high=0.2),
    entropy_bonus=1e-4,
)
_DECAY = LinearDecay(start=2.0, per_step=0.005)
_A3PO = Method(
    name="a3po",
    source="[A] Eq. 1-2, on DAPO: low-probability positive and high-probability negative tokens, decaying weight",
    surrogate=_DAPO.surrogate,
    filter=_DAPO.filter,
    shaping=Shaping(
        positive=TokenWeights(end="low", ratio=0.2, scale=_DECAY),
        negative=TokenWeights(end="high", ratio=0.2, scale=_DECAY),
    ),
)


def _on(base: Method, name: str, source: str, **changes: Any) -> Method:
    """`base` under another name, with some parts changed; double underscores stand for dots."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return base.vary({"name": name, "source": source, **dotted})


# Baselines, and the methods of the two papers
_PAPERS = (
    _GRPO,
    _on(
        _GRPO, "grpo_zhu", "[Z]'s baseline: GRPO with KL penalty 1e-3 and entropy bonus 1e-4",
        kl=KL(coefficient=1e-3, estimator="k3"), entropy_bonus=1e-4,
    ),
    _DAPO,
    _on(
        _GRPO, "ppo", "[Z]'s baseline: PPO with a critic, GAE(1, 1), KL penalty 1e-3 in the reward",
        advantage=CriticAdvantage(), aggregation="token_mean", entropy_bonus=1e-4,
    ),
    _on(_REINFORCE, "psr", "[Z]: +1 on correct samples, wrong ones dropped", filter__polarity="positive"),
    _on(_REINFORCE, "nsr", "[Z]: -1 on wrong samples, correct ones dropped", filter__polarity="negative"),
    _on(
        _GRPO, "psr_group", "[A]'s code: GRPO advantage on the full group, then only positive samples",
        surrogate__dual=3.0, filter__polarity="positive",
    ),
    _on(
        _GRPO, "nsr_group", "[A]'s code: GRPO advantage on the full group, then only negative samples",
        surrogate__dual=3.0, filter__polarity="negative",
    ),
    _on(_REINFORCE, "w_reinforce", "[Z]: +0.1 on correct, -1 on wrong samples", advantage__positive=0.1),
    _REINFORCE,
    _on(
        _DAPO, "fork_tokens", "[F]: DAPO on the fifth of tokens with the highest entropy; denominator as in the paper",
        token_mask=ForkTokens(),
    ),
    Method(
        name="lp_reg",
        source="Lp-Reg (Huang et al. 2025): rare tokens of negative samples held up by a filtered old policy",
        surrogate=Clip(low=1.0, high=9.0),
        token_penalty=LpReg(),
    ),
    Method(
        name="aspo",
        source="ASPO (2025): the importance ratio of positive samples inverted; one clip width",
        surrogate=ASPO(),
        kl=KL(coefficient=1e-3, estimator="k3"),
    ),
    Method(
        name="aspo_archer",
        source="ASPO's code: as aspo, with wider bounds for tokens of high entropy",
        surrogate=ASPO(high_entropy=EntropyWidths()),
        kl=KL(coefficient=1e-3, estimator="k3"),
    ),
    _A3PO,
    _on(_A3PO, "a3po_no_pl", "[A] Table 3, without positive tokens", shaping__positive=None),
    _on(_A3PO, "a3po_no_nh", "[A] Table 3, without negative tokens", shaping__negative=None),
    _on(
        _A3PO, "a3po_no_adaptive", "[A] Table 3, without decay: constant weight 2",
        shaping__positive__scale=2.0, shaping__negative__scale=2.0,
    ),
)  # fmt: skip

# Methods that their readers will ask for next
_NEIGHBOURS = (
    _on(
        _GRPO, "dr_grpo", "Dr. GRPO (Liu et al. 2025): no division by the standard deviation, constant length",
        advantage=CentredAdvantage(), aggregation="token_sum_const",
    ),
    _on(
        _GRPO, "rloo", "RLOO (Ahmadian et al. 2024): baseline from the other responses; token mean as in verl",
        advantage=LeaveOneOutAdvantage(), aggregation="token_mean",
    ),
    _on(
        _GRPO, "reinforce_pp", "REINFORCE++ (Hu et al. 2025): token returns whitened over the step",
        advantage=ReturnsAdvantage(), aggregation="token_mean",
    ),
    _on(
        _GRPO, "reinforce_pp_baseline", "REINFORCE++-baseline: the group's mean taken off, then whitened over the step",
        advantage=ReturnsAdvantage(baseline="group"), aggregation="token_mean",
    ),
    _on(_GRPO, "gspo", "GSPO (Zheng et al. 2025): one length-normalised ratio a response", surrogate=GSPO()),
    _on(
        _GRPO, "gspo_token", "GSPO-token (Zheng et al. 2025): the same ratio, token advantages allowed",
        surrogate=GSPO(form="token"),
    ),
    _on(
        _GRPO, "cispo", "CISPO (MiniMax-M1, 2025) as in verl: clipped weights on log-probabilities, no lower bound",
        surrogate=CISPO(), aggregation="token_mean",
    ),
    _on(_GRPO, "gmpo", "GMPO (Zhao et al. 2025): geometric mean of ratios clipped in log space", surrogate=GMPO()),
    _on(_GRPO, "sapo", "SAPO (Gao et al. 2025): a smooth gate, steeper for negative samples", surrogate=SAPO()),
    _on(
        _GRPO, "bapo", "BAPO (Xi et al. 2025): clip bounds that give positive samples their share of the loss",
        surrogate=BAPO(), aggregation="token_mean",
    ),
    _on(
        _GRPO, "clip_cov", "Clip-Cov (Cui et al. 2025): a few tokens of high covariance lose their loss",
        surrogate=Clip(low=1.0, high=1.0), token_mask=ClipCov(), aggregation="token_mean",
    ),
    _on(
        _GRPO, "kl_cov", "KL-Cov (Cui et al. 2025): tokens of highest covariance held to the old policy, no clip",
        surrogate=Clip(low=None, high=None), token_penalty=KLCov(), aggregation="token_mean",
    ),
    _on(
        _GRPO, "entropy_advantage", "Cheng et al. 2025: advantages raised by the token's entropy",
        shaping__entropy_term=EntropyTerm(),
    ),
    _on(
        _GRPO, "ar", "Advantage reweighting (Yang et al. 2025): advantages of rare tokens damped",
        shaping__probability_weight=ProbabilityWeight(),
    ),
    _on(
        _GRPO, "opsm", "Off-policy sequence masking (DeepSeek-V3.2): negative samples that drifted are dropped",
        off_policy_mask=OffPolicyMask(),
    ),
    _on(
        _GRPO, "two_sided", "INTELLECT-2: the ratio of negative samples is bounded, too; the dual clip at 4",
        surrogate__dual=4.0,
    ),
)  # fmt: skip


def _polarity_weights(name: str, positive: str, negative: str) -> Method:
    return _on(
        _DAPO, name, f"[A] section 4.1, on DAPO: positive advantages x{positive}, negative x{negative}",
        shaping__positive_weight=float(positive), shaping__negative_weight=float(negative),
    )  # fmt: skip


def _token_weights(name: str, polarity: str, end: str, by: str) -> Method:
    weights = TokenWeights.model_validate({"end": end, "by": by, "scale": 5.0})
    source = f"[A] section 4.2, on DAPO: x5 on the fifth of {polarity} tokens with the {end}est {by}"
    return _on(_DAPO, name, source, **{f"shaping__{polarity}": weights})


# pattern of names -> what makes the method from a name and the pattern's groups
_FAMILIES: dict[re.Pattern[str], Callable[..., Method]] = {
    re.compile(r"polarity_p(\d*\.?\d+)n(\d*\.?\d+)"): _polarity_weights,
    re.compile(r"token_(positive|negative)_(high|low)_(entropy|prob)"): _token_weights,
}
_TOKEN_FAMILY = [
    f"token_{polarity}_{end}_{by}"
    for polarity in ("positive", "negative")
    for end in ("high", "low")
    for by in ("entropy", "prob")
]
FAMILIES = (
    "polarity_p{X}n{Y}",
    "token_{positive|negative}_{high|low}_{entropy|prob}",
)


class Catalog(Mapping[str, Method]):
    """Read-only. `in` and indexing know families of names; iteration yields the literal names."""

    def __init__(self, methods: Iterable[Method]) -> None:
        self._named = {method.name: method for method in methods}

    def __getitem__(self, name: str) -> Method:
        if name in self._named:
            return self._named[name]
        if not isinstance(name, str):
            raise KeyError(name)
        for pattern, make in _FAMILIES.items():
            match = pattern.fullmatch(name)
            if match:
                return make(name, *match.groups())
        raise KeyError(f"unknown method {name!r}; {nearest(name, [*self._named, 'polarity_p0.5n1', *_TOKEN_FAMILY])}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


METHODS = Catalog((*_PAPERS, *_NEIGHBOURS))
