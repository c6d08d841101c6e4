"""How the papers sample when they evaluate. [A] A3PO's paper, appendix A; [Z] the NSR paper, section 3 and figure 4."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from polarity.errors import UserError, nearest


@dataclass(frozen=True)
class Protocol:
    """How responses are sampled. temperature 0 is greedy; top_p 1 and top_k None do not cut.

    max_new_tokens None: the paper gives no limit for evaluation, the run's own holds. source: where it comes from.
    """

    samples: int
    temperature: float
    top_p: float = 1.0
    top_k: int | None = None
    max_new_tokens: int | None = None
    source: str = ""


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        # [A] prints "top-k to 0.95", after DeepSeek-R1, whose paper has top-p 0.95. Its context is 16,384 tokens,
        # 4,096 for Qwen2.5-Math-7B.
        "a3po": Protocol(32, 0.6, 0.95, source="[A] appendix A"),
        "nsr": Protocol(256, 0.6, 0.95, max_new_tokens=4096, source="[Z] section 3, Qwen2.5-Math-7B"),
        "nsr_qwen3": Protocol(64, 0.7, 0.8, top_k=20, source="[Z] section 3, Qwen3-4B without thinking"),
        "greedy": Protocol(1, 0.0, source="[Z] figure 4"),
    }
)


def resolve_protocol(name: str) -> Protocol:
    """The protocol of that name; UserError names the nearest ones."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}; {nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
