"""Problem rows, their readers, prompt templates and the papers' benchmarks."""

from polarity.data.benchmarks import BENCHMARKS, Benchmark, load_benchmark, load_problems
from polarity.data.columns import Row, last_boxed
from polarity.data.problems import MAX_BAD, BadRow, Loaded, load_rows, read_problems
from polarity.data.templates import TEMPLATES, apply_template, load_template

__all__ = [
    "BENCHMARKS",
    "MAX_BAD",
    "TEMPLATES",
    "BadRow",
    "Benchmark",
    "Loaded",
    "Row",
    "apply_template",
    "last_boxed",
    "load_benchmark",
    "load_problems",
    "load_rows",
    "load_template",
    "read_problems",
]
