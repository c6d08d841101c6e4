"""pass@k, unbiased (Chen et al., 2021, Evaluating Large Language Models Trained on Code)."""

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k responses at least is correct: k drawn without replacement from n, c of them correct.

    1 - C(n-c, k) / C(n, k), as a product so that large n stays exact. Raises ValueError unless 0 <= c <= n and
    1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / j for j in range(n - c + 1, n + 1))
