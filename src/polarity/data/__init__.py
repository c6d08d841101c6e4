"""Problem rows and their readers."""

from polarity.data.problems import Row, apply_template, read_problems

__all__ = ["Row", "apply_template", "read_problems"]
