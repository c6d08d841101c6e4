"""Numbers from rollouts; knows no engine."""

from polarity.analysis.mismatch import mismatch
from polarity.analysis.ngrams import NGramHistory, NGramMetrics
from polarity.analysis.pass_at_k import pass_at_k
from polarity.analysis.patterns import accuracy_pattern
from polarity.analysis.rollout_metrics import credit_metrics, rollout_metrics

__all__ = [
    "NGramHistory", "NGramMetrics", "accuracy_pattern", "credit_metrics", "mismatch", "pass_at_k", "rollout_metrics",
]  # fmt: skip
