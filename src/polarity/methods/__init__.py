"""Training methods as data and pure tensor functions; no engine, no I/O. Start with catalog.py, then method.py."""

from polarity.methods.catalog import FAMILIES, METHODS, SOURCES
from polarity.methods.configure import build_method
from polarity.methods.inputs import Denominators, LossInputs, LossOutput, Metrics, Selection
from polarity.methods.method import Method
from polarity.methods.phases import SEQUENCE, Phase, Phases
from polarity.methods.surrogates import PolicyTokens, TokenLoss
from polarity.methods.table import method_table

__all__ = [
    "FAMILIES",
    "METHODS",
    "SEQUENCE",
    "SOURCES",
    "Denominators",
    "LossInputs",
    "LossOutput",
    "Method",
    "Metrics",
    "Phase",
    "Phases",
    "PolicyTokens",
    "Selection",
    "TokenLoss",
    "build_method",
    "method_table",
]
