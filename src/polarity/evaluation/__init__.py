"""Evaluation on splits and benchmarks; takes a `generate` callable and knows no engine."""

from polarity.evaluation.evaluate import Generate, Generation, evaluate

__all__ = ["Generate", "Generation", "evaluate"]
