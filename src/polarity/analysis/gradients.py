"""What PSR, NSR and an entropy bonus do to the logits behind one token (Zhu et al., the NSR paper: 4.2 and App. B).

M response tokens, V vocabulary, c tokens of a piece, R = RANKS. z (M,V) are the logits at the rollout temperature,
pi = softmax(z), y the token that was sampled. A *direction* (M,V) is the negative gradient of a loss with respect to z:
where gradient descent would move the logits if they were free. Model weights are shared by all tokens, so what an
update then really does is another question.

PSR reinforces tokens of correct responses, NSR suppresses those of wrong ones; each has two forms:
  as written   the loss is -pi_y, or +pi_y (eq. 6): directions carry a factor pi_y (eq. 7 and 8)
  as trained   the loss is -r, or +r, with r = pi_y / pi_old(y): that factor is r, which is 1 on-policy
"""

from collections.abc import Iterator

import torch
from torch import Tensor

RANKS = 10  # alternatives of rank 1 to RANKS are told apart, those beyond are one
EDGES = (0.01, 0.1, 0.5, 0.9, 0.99)  # of the sampled token's probability; classes are [low, high)
DIRECTIONS = ("as_written", "as_trained", "entropy_bonus")
# float64 numbers in one (c,V) tensor of a piece; about a dozen of them are held at a time.
PIECE = 2**21


def psr(logits: Tensor, tokens: Tensor, ratio: Tensor | None = None) -> Tensor:
    """Direction (M,V) of positive sample reinforcement: up at the sampled token, down at the others as their pi_v.

    w (1 - pi_y) at y and -w pi_v elsewhere; w = pi_y as written (eq. 7), for `ratio` None, or as trained w = ratio
    (M,). logits (M,V), tokens (M,) int64. 1 - pi_y is summed up from the others: it keeps its digits as pi_y -> 1.
    """
    sampled = tokens[:, None]
    pi = logits.softmax(-1)
    others = pi.scatter(1, sampled, 0.0)
    factor = pi.gather(1, sampled) if ratio is None else ratio[:, None]
    return factor * (-others).scatter(1, sampled, others.sum(1, keepdim=True))


def nsr(logits: Tensor, tokens: Tensor, ratio: Tensor | None = None) -> Tensor:
    """Direction (M,V) of negative sample reinforcement (eq. 8, or as trained): that of `psr`, reversed."""
    return -psr(logits, tokens, ratio)


def entropy_bonus(logits: Tensor) -> Tensor:
    """Direction (M,V) that raises the entropy: -pi_v (log pi_v - sum_u pi_u log pi_u) (App. B).

    The same in both forms, times the bonus's coefficient. A token of probability 0 is not moved.
    """
    logp = logits.log_softmax(-1)
    pi = logp.exp()
    surprise = torch.where(pi > 0, -pi * logp, 0.0)
    return surprise - pi * surprise.sum(1, keepdim=True)


def mass_change(logits: Tensor, direction: Tensor) -> Tensor:
    """(M,V): d pi_v for a small step of the logits along `direction` g (M,V), per unit of step.

    pi_v (g_v - sum_u pi_u g_u); each row adds up to 0. For NSR that is w pi_v (pi_v + pi_y - sum_u pi_u^2) at an
    alternative v: all their logits go up, but where y is less likely than a token of this position is on average
    (pi_y < sum_u pi_u^2), the unlikely alternatives lose probability all the same, and the likely ones gain it.
    """
    pi = logits.softmax(-1)
    return pi * (direction - (pi * direction).sum(1, keepdim=True))


def token_effects(logits: Tensor, tokens: Tensor, correct: Tensor, ratio: Tensor | None = None) -> dict[str, Tensor]:
    """Numbers of each token, (M,) or (M, classes), float64: what its polarity's force and an entropy bonus do to it.

    logits (M,V), tokens (M,) int64, correct (M,) bool: PSR where it holds, NSR elsewhere; ratio (M,), None = 1.
    `probability` of the sampled token; `ratio`; `rank` (M,R+1), one in the column of the sampled token's rank; `class`
    (M,len(EDGES)+1), one in the column of its probability; `unlikely`, one where that is below sum_u pi_u^2 (see
    `mass_change`). For each of DIRECTIONS, `NAME/`:
      size, rest                 L2 norms of the direction, and of it without the sampled token. (In L1, the two parts
                                 of PSR's and NSR's are equal: a direction adds up to 0)
      entropy                    slope of the position's entropy along it, in nats per unit of step
      {size,entropy}_by_class    (M,len(EDGES)+1), the number in the column of the token's class
      size_unlikely              the size where the sampled token is `unlikely`, else 0
      {logit,mass}/sampled       the direction, and `mass_change`, at the sampled token
      {logit,mass}/alternatives  (M,R+1), at the others, most probable first; all beyond R together
      {logit,mass}/ranks         (M,R+1), the same of all tokens, the sampled one first among its equals
    """
    logits = logits.double()
    ratio = torch.ones_like(logits[:, 0]) if ratio is None else ratio.double()
    sampled, right = tokens[:, None], correct[:, None]
    written, trained = psr(logits, tokens), psr(logits, tokens, ratio)
    bonus = entropy_bonus(logits)
    forces = (torch.where(right, written, -written), torch.where(right, trained, -trained), bonus)
    pi = logits.softmax(-1)
    chosen = pi.gather(1, sampled)[:, 0]
    unlikely = (chosen < pi.square().sum(1)).double()
    edges = torch.tensor(EDGES, dtype=chosen.dtype, device=chosen.device)
    classes = _one_hot(torch.bucketize(chosen, edges, right=True), len(EDGES) + 1)
    above = (logits > logits.gather(1, sampled)).sum(1)
    found = {
        "probability": chosen,
        "ratio": ratio,
        "rank": _one_hot(above.clamp(max=RANKS), RANKS + 1),
        "class": classes,
        "unlikely": unlikely,
    }
    others = logits.scatter(1, sampled, -torch.inf).topk(min(RANKS, logits.shape[1] - 1)).indices
    for name, force in zip(DIRECTIONS, forces, strict=True):
        size, slope = force.norm(dim=1), (force * bonus).sum(1)
        found |= {
            f"{name}/size": size,
            f"{name}/rest": force.scatter(1, sampled, 0.0).norm(dim=1),
            f"{name}/entropy": slope,
            f"{name}/size_by_class": classes * size[:, None],
            f"{name}/entropy_by_class": classes * slope[:, None],
            f"{name}/size_unlikely": unlikely * size,
        }
        for kind, values in (("logit", force), ("mass", mass_change(logits, force))):
            own = values.gather(1, sampled)
            alternatives = _by_rank(values.scatter(1, sampled, 0.0), others)
            found[f"{name}/{kind}/sampled"] = own[:, 0]
            found[f"{name}/{kind}/alternatives"] = alternatives
            found[f"{name}/{kind}/ranks"] = _with_sampled(alternatives, own, above[:, None])
    return found


class GradientSums:
    """`token_effects`, added up by polarity over any number of chunks of logits; holds sums only, no chunk."""

    def __init__(self) -> None:
        self.tokens = {"positive": 0, "negative": 0}
        self.sums: dict[str, dict[str, Tensor]] = {"positive": {}, "negative": {}}

    def add(self, logits: Tensor, tokens: Tensor, correct: Tensor, ratio: Tensor | None = None) -> None:
        """One chunk: logits (M,V), tokens (M,) int64, correct (M,) bool, ratio (M,) or None = 1."""
        for rows in _pieces(len(tokens), logits.shape[1]):
            own = correct[rows]
            effects = token_effects(logits[rows], tokens[rows], own, None if ratio is None else ratio[rows])
            for polarity, chosen in (("positive", own), ("negative", ~own)):
                self.tokens[polarity] += int(chosen.sum())
                sums = self.sums[polarity]
                for name, values in effects.items():
                    total = values[chosen].sum(0).cpu()
                    sums[name] = sums[name] + total if name in sums else total

    def means(self) -> dict[str, dict[str, float | list[float]]]:
        """Polarity -> `tokens`, how many there were, and the mean over them of each of `token_effects`.

        A polarity without tokens is left out. The lists of `_by_class` are sums over the class divided by all tokens.
        """
        return {
            polarity: {"tokens": float(count)}
            | {name: (total / count).tolist() for name, total in self.sums[polarity].items()}
            for polarity, count in self.tokens.items()
            if count
        }


def _one_hot(index: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(index, classes).double()


def _by_rank(values: Tensor, order: Tensor) -> Tensor:
    """(c,R+1): values (c,V) at the ranked tokens order (c,<=R), 0 where V has no more, and the sum of all others."""
    ranked = values.new_zeros(len(values), RANKS)
    ranked[:, : order.shape[1]] = values.gather(1, order)
    return torch.cat([ranked, values.scatter(1, order, 0.0).sum(1, keepdim=True)], 1)


def _with_sampled(alternatives: Tensor, own: Tensor, above: Tensor) -> Tensor:
    """(c,R+1): the sampled token's `own` (c,1) put in at rank `above` (c,1), before its equals; the others move on."""
    place = torch.arange(RANKS, device=above.device)
    ranked = alternatives[:, :RANKS]
    moved = torch.nn.functional.pad(ranked[:, :-1], (1, 0))
    within = torch.where(place < above, ranked, torch.where(place == above, own, moved))
    pushed = torch.where(above < RANKS, ranked[:, -1:], own)
    return torch.cat([within, alternatives[:, RANKS:] + pushed], 1)


def _pieces(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, PIECE // vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))
