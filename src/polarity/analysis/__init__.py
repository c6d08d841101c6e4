"""Numbers from rollouts; knows no engine."""

from polarity.analysis.mismatch import mismatch
from polarity.analysis.pass_at_k import pass_at_k
from polarity.analysis.rollout_metrics import credit_metrics, rollout_metrics

__all__ = ["credit_metrics", "mismatch", "pass_at_k", "rollout_metrics"]
