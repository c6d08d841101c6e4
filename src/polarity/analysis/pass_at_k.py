"""What k tries give, from n sampled responses to one problem: pass@k, verl's best@k, and majority voting.

n responses, c of them correct, k tries. pass@k and maj@k draw the k without replacement and are unbiased: their
expectation is that of k fresh responses. best@k draws with replacement and is biased low.
"""

import math
from collections.abc import Sequence

import numpy as np

# The counts of subsets below are float64; C(1000, 500) is the last round number that fits.
LARGEST_VOTE = 1000


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k responses at least is correct: k drawn without replacement from n, c of them correct.

    1 - C(n-c, k) / C(n, k), as a product so that large n stays exact (Chen et al., 2021, Evaluating Large Language
    Models Trained on Code). Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / j for j in range(n - c + 1, n + 1))


def biased_best_at_k(n: int, c: int, k: int) -> float:
    """The same with replacement, 1 - (1 - c/n)^k: what verl logs as `best@k/mean`, for scores of 0 and 1.

    verl estimates this number by 1000 seeded draws; here it is exact. It is not pass@k: with c = 1 of n = k = 32 it
    says 0.638 where the truth is 1. Raises ValueError unless 0 <= c <= n and k >= 1.
    """
    if not (0 <= c <= n and n >= 1 and k >= 1):
        raise ValueError(f"best@k needs 0 <= c <= n and k >= 1, got n={n}, c={c}, k={k}")
    return 1.0 - (1.0 - c / n) ** k


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], ks: Sequence[int]) -> list[float]:
    """For each k: probability that the most frequent answer among k responses is correct.

    answers: n extracted answers, None where a response has none; correct: n verdicts on them. The k responses are
    drawn without replacement from n, and this is the exact mean over all C(n, k) subsets. Responses without an answer
    do not vote; if none votes, the majority is wrong. A tie is settled by a fair draw among the tied answers. Answers
    that are written differently vote apart, even if a verifier takes both for correct: no reference answer is looked
    at before the vote. Should a verifier judge one answer both ways, its vote counts by the share judged correct.

    Raises ValueError unless 1 <= k <= n <= 1000.
    """
    n = len(answers)
    if n != len(correct) or not all(1 <= k <= n <= LARGEST_VOTE for k in ks):
        raise ValueError(f"maj@k needs 1 <= k <= n <= {LARGEST_VOTE} and n verdicts, got n={n}, k={list(ks)}")
    votes: dict[str, list[bool]] = {}
    for answer, verdict in zip(answers, correct, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(verdict)
    found = np.zeros(len(ks))
    for answer, verdicts in votes.items():
        if any(verdicts):
            others = [len(v) for other, v in votes.items() if other != answer]
            silent = n - len(verdicts) - sum(others)
            won = _subsets_won(len(verdicts), others, silent, n)
            found += sum(verdicts) / len(verdicts) * np.array([won[k] / math.comb(n, k) for k in ks])
    return [min(1.0, float(value)) for value in found]


def _subsets_won(own: int, others: Sequence[int], silent: int, n: int) -> np.ndarray:
    """(n + 1,) float64: for each k the number of k-subsets that an answer with `own` votes wins, a t-fold tie as 1/t.

    For each number v of own votes, the other responses are counted by a polynomial in x (drawn responses) for each
    number of answers that tie at v: an answer with m votes gives sum_{j<v} C(m,j) x^j without a tie and C(m,v) x^v
    with one.
    """
    won = np.zeros(n + 1)
    for v in range(1, own + 1):
        rivals = [m for m in others if m >= v]
        free = silent + sum(m for m in others if m < v)  # these can neither win nor tie
        ways = np.zeros((len(rivals) + 1, n + 1))  # (ties, drawn)
        ways[0, : free + 1] = _binomials(free)
        drawn = free
        for i, m in enumerate(rivals, start=1):
            fewer = np.zeros_like(ways)
            for j, coefficient in enumerate(_binomials(m)[:v]):
                fewer[:i, j : j + drawn + 1] += coefficient * ways[:i, : drawn + 1]
            fewer[1 : i + 1, v : v + drawn + 1] += math.comb(m, v) * ways[:i, : drawn + 1]
            ways, drawn = fewer, drawn + v
        shares = (ways / np.arange(1, len(rivals) + 2)[:, None]).sum(0)
        won[v:] += math.comb(own, v) * shares[: n + 1 - v]
    return won


def _binomials(m: int) -> list[float]:
    return [float(math.comb(m, j)) for j in range(m + 1)]
