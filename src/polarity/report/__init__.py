"""Run directories in, one self-contained HTML page out. Imports no engine."""

from polarity.report.page import write_report

__all__ = ["write_report"]
