"""What a loss reports about itself: sums and counts over the very tokens that it trains on.

n responses, T padded length. Everything is added up on the device and read once.
"""

import torch
from torch import Tensor

from polarity.methods.inputs import Metrics
from polarity.methods.surrogates import PolicyTokens, TokenLoss


@torch.no_grad()
def loss_metrics(
    tokens: PolicyTokens, token: TokenLoss, trained: Tensor, correct: Tensor | None, extra: dict[str, Tensor]
) -> Metrics:
    """ratio, clip_fraction, dual_clip_fraction, positive/clip_fraction, negative/clip_fraction, and `extra`.

    trained: (n, T) bool, the tokens of the policy loss; correct: (n,) bool (None: polarity by the sign of A);
    extra: name -> (n, T) values, zero outside the mask; their means are over the whole mask.
    """
    if correct is None:
        positive, negative = tokens.advantages > 0, tokens.advantages < 0
    else:
        positive, negative = correct[:, None], ~correct[:, None]
    clipped = token.clipped & trained
    dual_clipped = torch.zeros_like(clipped) if token.dual_clipped is None else token.dual_clipped & trained
    flags = torch.stack(
        (
            *(tokens.mask, trained, trained & positive, trained & negative),
            *(clipped, clipped & positive, clipped & negative, dual_clipped),
        )
    )
    values = torch.stack([torch.where(trained, tokens.ratio, 0.0), *extra.values()])
    sums = torch.cat([flags.sum((1, 2)).double(), values.sum((1, 2), dtype=torch.float64)]).tolist()
    n, n_trained, n_positive, n_negative, n_clipped, clipped_positive, clipped_negative, n_dual, ratio, *rest = sums
    return {
        "ratio": (ratio, n_trained),
        "clip_fraction": (n_clipped, n_trained),
        "dual_clip_fraction": (n_dual, n_trained),
        "positive/clip_fraction": (clipped_positive, n_positive),
        "negative/clip_fraction": (clipped_negative, n_negative),
        **{name: (total, n) for name, total in zip(extra, rest, strict=True)},
    }
