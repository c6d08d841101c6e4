"""Evaluation on splits and benchmarks; takes generators as callables and knows no engine."""

from polarity.evaluation.compare import compare_evaluations
from polarity.evaluation.evaluate import Generate, evaluate
from polarity.evaluation.lm_eval import step_results
from polarity.evaluation.metrics import Generation, Graded, measure
from polarity.evaluation.protocols import PROTOCOLS, Protocol, resolve_protocol
from polarity.evaluation.run import Stream, Task, in_batches, read_evaluation, run_evaluation
from polarity.evaluation.server import Request, Server, server_stream

__all__ = [
    "PROTOCOLS",
    "Generate",
    "Generation",
    "Graded",
    "Protocol",
    "Request",
    "Server",
    "Stream",
    "Task",
    "compare_evaluations",
    "evaluate",
    "in_batches",
    "measure",
    "read_evaluation",
    "resolve_protocol",
    "run_evaluation",
    "server_stream",
    "step_results",
]
