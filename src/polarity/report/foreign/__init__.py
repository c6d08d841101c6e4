"""Rollouts that other trainers logged, as run directories: verl's dumps, TRL's completions, JSON lines of anybody's.

find: what is at a path; convert: one source into a run directory; converted, adopt: the same for the time it is read.
docs/foreign.md says key by key what is read, what is inferred and what is left out.
"""

from polarity.report.foreign.convert import adopt, convert, converted
from polarity.report.foreign.find import Source, find, nothing_at

__all__ = ["Source", "adopt", "convert", "converted", "find", "nothing_at"]
