"""METHODS: every method by name, each as its paper (or, where said, its code) defines it.

[A] "Sample polarity" (A3PO), [Z] Zhu et al. (PSR / NSR), [D] DAPO, [F] Fork Tokens, [G] GRPO.
Where text and code disagree the source says which one a preset follows.
"""

import re
from collections.abc import Callable, Iterator, Mapping

from polarity.errors import nearest
from polarity.methods.advantages import SignedAdvantage
from polarity.methods.fork_tokens import ForkTokens
from polarity.methods.method import Filter, Method
from polarity.methods.regularizers import KL
from polarity.methods.schedules import LinearDecay
from polarity.methods.shaping import Shaping, TokenWeights
from polarity.methods.surrogates import Clip

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


def _psr_nsr_group(name: str, polarity: str) -> Method:
    return _GRPO.vary(
        {
            "name": name,
            "source": f"[A]'s code: GRPO advantage on the full group, then only {polarity} samples",
            "surrogate.dual": 3.0,
            "filter.polarity": polarity,
        }
    )


_NAMED: dict[str, Method] = {
    "grpo": _GRPO,
    "grpo_zhu": _GRPO.vary(
        {
            "name": "grpo_zhu",
            "source": "[Z]'s baseline: GRPO with KL penalty 1e-3 and entropy bonus 1e-4",
            "kl": KL(coefficient=1e-3, estimator="k3"),
            "entropy_bonus": 1e-4,
        }
    ),
    "dapo": _DAPO,
    "psr": _REINFORCE.vary(
        {"name": "psr", "source": "[Z]: +1 on correct samples, wrong ones dropped", "filter.polarity": "positive"}
    ),
    "nsr": _REINFORCE.vary(
        {"name": "nsr", "source": "[Z]: -1 on wrong samples, correct ones dropped", "filter.polarity": "negative"}
    ),
    "psr_group": _psr_nsr_group("psr_group", "positive"),
    "nsr_group": _psr_nsr_group("nsr_group", "negative"),
    "w_reinforce": _REINFORCE.vary(
        {"name": "w_reinforce", "source": "[Z]: +0.1 on correct, -1 on wrong samples", "advantage.positive": 0.1}
    ),
    "reinforce": _REINFORCE,
    "fork_tokens": _DAPO.vary(
        {
            "name": "fork_tokens",
            "source": "[F]: DAPO on the fifth of tokens with the highest entropy; denominator as in the paper",
            "token_mask": ForkTokens(),
        }
    ),
    "a3po": _A3PO,
    "a3po_no_pl": _A3PO.vary(
        {"name": "a3po_no_pl", "source": "[A] Table 3, without positive tokens", "shaping.positive": None}
    ),
    "a3po_no_nh": _A3PO.vary(
        {"name": "a3po_no_nh", "source": "[A] Table 3, without negative tokens", "shaping.negative": None}
    ),
    "a3po_no_adaptive": _A3PO.vary(
        {
            "name": "a3po_no_adaptive",
            "source": "[A] Table 3, without decay: constant weight 2",
            "shaping.positive.scale": 2.0,
            "shaping.negative.scale": 2.0,
        }
    ),
}


def _polarity_weights(name: str, positive: str, negative: str) -> Method:
    return _DAPO.vary(
        {
            "name": name,
            "source": f"[A] section 4.1, on DAPO: positive advantages x{positive}, negative x{negative}",
            "shaping.positive_weight": float(positive),
            "shaping.negative_weight": float(negative),
        }
    )


def _token_weights(name: str, polarity: str, end: str, by: str) -> Method:
    return _DAPO.vary(
        {
            "name": name,
            "source": f"[A] section 4.2, on DAPO: x5 on the fifth of {polarity} tokens with the {end}est {by}",
            f"shaping.{polarity}": TokenWeights(end=end, by=by, ratio=0.2, scale=5.0),
        }
    )


# pattern of names -> what makes the method from a name and the pattern's groups
_FAMILIES: dict[re.Pattern[str], Callable[..., Method]] = {
    re.compile(r"polarity_p(\d*\.?\d+)n(\d*\.?\d+)"): _polarity_weights,
    re.compile(r"token_(positive|negative)_(high|low)_(entropy|prob)"): _token_weights,
}
_EXAMPLES = (
    "polarity_p0.5n1",
    *(
        "token_positive_high_entropy",
        "token_positive_low_entropy",
        "token_positive_high_prob",
        "token_positive_low_prob",
    ),
    *(
        "token_negative_high_entropy",
        "token_negative_low_entropy",
        "token_negative_high_prob",
        "token_negative_low_prob",
    ),
)
FAMILIES = ("polarity_p{X}n{Y}", "token_{positive|negative}_{high|low}_{entropy|prob}")


class Catalog(Mapping[str, Method]):
    """Read-only. `in` and indexing know families of names; iteration yields the literal names."""

    def __init__(self, named: Mapping[str, Method]) -> None:
        self._named = dict(named)

    def __getitem__(self, name: str) -> Method:
        if name in self._named:
            return self._named[name]
        for pattern, make in _FAMILIES.items():
            match = pattern.fullmatch(name)
            if match:
                return make(name, *match.groups())
        raise KeyError(f"unknown method {name!r}; {nearest(name, [*self._named, *_EXAMPLES])}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


METHODS = Catalog(_NAMED)
