"""Is it learning, is it collapsing: one run's series in, findings in words out. Pure; every threshold stands below.

A finding says what was measured and over which steps, and no more. Start and end of a series are means over a window:
a tenth of its steps, between 1 and END_STEPS. A change between two windows of w steps is `clear` when it is larger than
CLEAR standard errors, sd * sqrt(2 / w), with sd the noise of one step. That noise is estimated from the differences of
neighbouring steps (1.4826 times their median absolute deviation from their median, over sqrt 2), so that a trend does
not count as noise, nor a few spikes. It takes the noise of different steps as independent. Fewer than MIN_STEPS steps
are not judged.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Level = Literal["good", "plain", "warn", "bad"]
LEVELS: tuple[Level, ...] = ("bad", "warn", "good", "plain")

MIN_STEPS = 8
END_STEPS = 10
CLEAR = 4.0
LEARNS = 0.02  # of accuracy, from start to end; less is not called learning however clear it is
STILL_RISING = 0.01  # of accuracy, over the last quarter
CEILING = 0.95
FELL_BACK = 0.1  # of accuracy, from the best window to the end
COLLAPSED = 0.2  # of the entropy at the start
ENTROPY_ROSE = 1.5  # times the entropy at the start
TRUNCATED = 0.1  # share of responses at the limit at the end, and its rise
LENGTH_ROSE, LENGTH_FELL = 2.0, 0.5  # times the length at the start
SPIKE, SPIKE_STEPS = 5.0, 20  # times the median gradient norm of the steps before
VERIFIER_FAILS = 0.01  # share of responses at the end
UNPARSED = 0.2
AT_CAP = 0.5  # share of the last steps in which dynamic sampling used all its rounds
MISMATCH = 0.01  # k3, nats a token, at the end
WORSE_P = 0.01  # paired t test over problems

Series = tuple[Sequence[int], Sequence[float]]  # steps, values


@dataclass(frozen=True)
class Finding:
    """What was found of one `topic`. name: two or three words, the same for the same finding in every run. text: what
    was measured, with {a} for each of `numbers`, {steps} for `steps` and {over} for the steps measured, so that seeds
    that agree share a sentence; tail: its end, which may differ between them."""

    topic: str
    name: str
    level: Level
    text: str
    numbers: Mapping[str, float]
    over: str = ""
    steps: tuple[int, ...] = ()
    tail: str = ""


@dataclass(frozen=True)
class Verdict:
    """A finding over the seeds of a method. seeds: those it holds for; of: all that were judged."""

    name: str
    level: Level
    text: str
    seeds: tuple[int, ...]
    of: int

    @property
    def agreement(self) -> str:
        """Which seeds the finding holds for; empty with one seed."""
        if self.of == 1:
            return ""
        if len(self.seeds) == self.of:
            return "both seeds" if self.of == 2 else f"all {self.of} seeds"
        listed = ", ".join(map(str, self.seeds))
        return f"{len(self.seeds)} of {self.of} seeds: {listed}"


def judge(
    series: Mapping[str, Series],
    *,
    max_rounds: int | None = None,
    problems: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    length_unit: str = "tokens",
) -> list[Finding]:
    """Everything found in one run.

    series: metric -> steps and values (docs/metrics.md); metrics that a run lacks are not judged. max_rounds: the cap
    of dynamic sampling. problems: split -> accuracy of each evaluation problem before training, and at the last
    evaluation.
    """
    steps = max((len(s[0]) for s in series.values()), default=0)
    if steps < MIN_STEPS:
        return [Finding("progress", "too early", "plain", f"{steps} steps; from {MIN_STEPS} on they are judged", {})]
    found = [_progress(series), _entropy(series), _length(series, length_unit), _spikes(series)]
    found += [*_verifier(series), _sampling(series, max_rounds), _mismatch(series)]
    found += [_worse(split, before, after) for split, (before, after) in (problems or {}).items()]
    return [finding for finding in found if finding]


CHECKED = {
    "entropy/mean": "entropy",
    "length/mean": "length",
    "length/truncated": "truncation",
    "update/grad_norm": "gradient norm",
    "verifier/error": "verifier",
    "mismatch/k3": "train-inference mismatch",
}


def checked(series: Mapping[str, Series]) -> tuple[list[str], list[str]]:
    """What warning signs could be looked for, and for which the run has no numbers."""
    there = [word for metric, word in CHECKED.items() if len(series.get(metric, ((),))[0]) >= MIN_STEPS]
    return there, [word for word in CHECKED.values() if word not in there]


def combine(findings: Mapping[int, Sequence[Finding]]) -> list[Verdict]:
    """Seed -> its findings, to verdicts: the same finding of several seeds is said once, with the means of its numbers.

    Findings on progress first, then by level.
    """
    groups: dict[tuple[str, str, str], list[tuple[int, Finding]]] = {}
    for seed, own in findings.items():
        for finding in own:
            groups.setdefault((finding.topic, finding.name, finding.text), []).append((seed, finding))
    out = []
    for members in groups.values():
        first, found = members[0][1], [finding for _, finding in members]
        means = {name: float(np.mean([f.numbers[name] for f in found])) for name in first.numbers}
        said = {name: _percent(x) if name.startswith("percent") else words(x) for name, x in means.items()}
        spans = {f.over for f in found}
        said["over"] = spans.pop() if len(spans) == 1 else "the first and last steps of each run"
        said["steps"] = _list(sorted({step for f in found for step in f.steps}))
        tails = Counter(f.tail for f in found)
        tail = first.tail if len(tails) == 1 else ", ".join(f"{t} in {n} of {len(found)}" for t, n in tails.items())
        seeds = tuple(seed for seed, _ in members)
        text = first.text.format(**said) + (f", {tail}" if tail else "")
        out.append((first.topic, Verdict(first.name, first.level, text, seeds, len(findings))))
    out.sort(key=lambda pair: (pair[0] != "progress", LEVELS.index(pair[1].level)))
    return [verdict for _, verdict in out]


@dataclass(frozen=True)
class Trend:
    """Start and end of a series, each the mean of a window of `w` steps, and the standard error of their difference."""

    steps: np.ndarray
    values: np.ndarray
    w: int
    error: float

    @property
    def start(self) -> float:
        return float(self.values[: self.w].mean())

    @property
    def end(self) -> float:
        return float(self.values[-self.w :].mean())

    def clear(self, change: float) -> bool:
        return abs(change) > CLEAR * self.error

    @property
    def windows(self) -> np.ndarray:
        """Mean of every window of w steps, the first window first."""
        return np.convolve(self.values, np.ones(self.w) / self.w, "valid")

    @property
    def last(self) -> str:
        """The last window in words."""
        return f"steps {_range(self.steps[-self.w :])}"

    @property
    def over(self) -> str:
        """The two windows in words."""
        return f"steps {_range(self.steps[: self.w])} to {_range(self.steps[-self.w :])}"


def trend(series: Mapping[str, Series], metric: str) -> Trend | None:
    """None where the run has fewer than MIN_STEPS values of the metric."""
    steps, values = (np.asarray(column, dtype=float) for column in series.get(metric, ((), ())))
    if len(steps) < MIN_STEPS:
        return None
    w = min(END_STEPS, max(1, round(len(steps) / 10)))
    return Trend(steps.astype(int), values, w, noise(values) * (2 / w) ** 0.5)


def noise(values: np.ndarray) -> float:
    """Standard deviation of a single step around a trend, from the differences of neighbouring steps."""
    differences = np.diff(values)
    return float(1.4826 * np.median(np.abs(differences - np.median(differences))) / 2**0.5)


def _progress(series: Mapping[str, Series]) -> Finding:
    t = trend(series, "accuracy/mean")
    if t is None:
        return Finding("progress", "progress unknown", "plain", "no train accuracy in its metrics", {})
    numbers, said = {"start": t.start, "end": t.end}, "train accuracy {start} → {end} ({over})"
    best = int(t.windows.argmax())
    change, fall = t.end - t.start, float(t.windows[best]) - t.end
    if change <= -LEARNS and t.clear(change):
        return Finding("progress", "getting worse", "bad", said, numbers, t.over)
    if fall >= FELL_BACK and t.clear(fall):
        text, numbers["best"] = said + ", from {best} at its best around step {steps}", float(t.windows[best])
        return Finding("progress", "fell back", "bad", text, numbers, t.over, (int(t.steps[best + t.w // 2]),))
    if t.start >= CEILING:
        return Finding("progress", "solved from the start", "plain", said, numbers, t.over)
    if change < LEARNS or not t.clear(change):
        return Finding("progress", "stalled", "warn", f"no clear change: {said}", numbers, t.over)
    late = t.end - float(t.values[-(len(t.values) // 4) - t.w :][: t.w].mean())
    tail = "no clear change in the last quarter"
    if abs(late) >= STILL_RISING and t.clear(late):
        tail = "still rising" if late > 0 else "falling in the last quarter"
    return Finding("progress", "learning", "good", said, numbers, t.over, tail="near 1" if t.end >= CEILING else tail)


def _entropy(series: Mapping[str, Series]) -> Finding | None:
    t = trend(series, "entropy/mean")
    if t is None or t.start <= 0:
        return None
    numbers = {"start": t.start, "end": t.end, "percent": 100 * t.end / t.start}
    said = "{start} → {end} nats, {percent} % of its start ({over})"
    if t.end < COLLAPSED * t.start and t.clear(t.end - t.start):
        above = np.flatnonzero(t.windows >= COLLAPSED * t.start)  # the first window is among them
        text = f"below {100 * COLLAPSED:.0f} % of its start since step {{steps}}: {said}"
        return Finding("entropy", "entropy collapsed", "warn", text, numbers, t.over, (int(t.steps[above[-1] + 1]),))
    rose = t.end > ENTROPY_ROSE * t.start and t.clear(t.end - t.start)
    return Finding("entropy", "entropy rose" if rose else "entropy", "warn" if rose else "plain", said, numbers, t.over)


def _length(series: Mapping[str, Series], unit: str) -> Finding | None:
    length, numbers = trend(series, "length/mean"), {}
    said = ""
    if length is not None:
        numbers, said = {"start": length.start, "end": length.end}, f"length {{start}} → {{end}} {unit} ({{over}})"
    if (blown := _blow_up(series, said, numbers)) or length is None or length.start <= 0:
        return blown
    if length.clear(length.end - length.start):
        if length.end >= LENGTH_ROSE * length.start:
            return Finding("length", "much longer responses", "warn", said, numbers, length.over)
        if length.end <= LENGTH_FELL * length.start:
            return Finding("length", "much shorter responses", "warn", said, numbers, length.over)
    return None


def _blow_up(series: Mapping[str, Series], length: str, numbers: dict[str, float]) -> Finding | None:
    """Responses that run into their limit; with entropy that rises too, the picture of garbled text."""
    cut, entropy = trend(series, "length/truncated"), trend(series, "entropy/mean")
    if cut is None or cut.end < TRUNCATED or cut.end - cut.start < TRUNCATED or not cut.clear(cut.end - cut.start):
        return None
    numbers = numbers | {"cut_start": cut.start, "cut_end": cut.end}
    text = "truncated {cut_start} → {cut_end}" + (f", {length}" if length else " ({over})")
    rose = entropy is not None and entropy.end > ENTROPY_ROSE * entropy.start
    tail = "entropy rose with it, as in garbled text: read the rollouts" if rose else ""
    return Finding("length", "length blow-up", "bad", text, numbers, cut.over, tail=tail)


def _spikes(series: Mapping[str, Series]) -> Finding | None:
    steps, values = (np.asarray(column, dtype=float) for column in series.get("update/grad_norm", ((), ())))
    found = []
    for i in range(MIN_STEPS, len(values)):
        usual = float(np.median(values[max(0, i - SPIKE_STEPS) : i]))
        if usual > 0 and values[i] > SPIKE * usual:
            found.append((int(steps[i]), values[i] / usual))
    if not found:
        return None
    text = f"at step {{steps}}: up to {{times}} times the median gradient norm of the {SPIKE_STEPS} steps before"
    numbers, where = {"times": max(times for _, times in found)}, tuple(step for step, _ in found)
    return Finding("gradient", "gradient spikes", "warn", text, numbers, steps=where)


def _verifier(series: Mapping[str, Series]) -> list[Finding]:
    found = []
    for metric, what, name, bar in (
        ("verifier/error", "the verifier itself failed", "verifier failing", VERIFIER_FAILS),
        ("verifier/timeout", "the verifier was stopped at its time limit", "verifier timeouts", VERIFIER_FAILS),
        ("verifier/unparsed", "no answer was found", "no answer found", UNPARSED),
    ):
        t = trend(series, metric)
        if t is not None and t.end >= bar:
            text = f"{what} on {{percent}} % of responses ({{over}}; {{percent_start}} % at the start)"
            numbers = {"percent": 100 * t.end, "percent_start": 100 * t.start}
            level: Level = "warn" if metric == "verifier/unparsed" else "bad"
            found.append(Finding(metric, name, level, text, numbers, t.last))
    return found


def _sampling(series: Mapping[str, Series], max_rounds: int | None) -> Finding | None:
    t = trend(series, "rollouts/rounds")
    if t is None or max_rounds is None or max_rounds < 2:
        return None
    share = float((t.values[-t.w :] >= max_rounds).mean())
    if share < AT_CAP:
        return None
    text = f"all {max_rounds} rounds used in {{percent}} % of {{over}}: too few groups of both polarities"
    return Finding("sampling", "dynamic sampling at its cap", "warn", text, {"percent": 100 * share}, t.last)


def _mismatch(series: Mapping[str, Series]) -> Finding | None:
    t = trend(series, "mismatch/k3")
    if t is None or t.end < MISMATCH:
        return None
    text = "sampler and trainer differ by {end} nats a token (k3, {over}; {start} at the start)"
    return Finding("mismatch", "train-inference mismatch", "warn", text, {"start": t.start, "end": t.end}, t.last)


def _worse(split: str, before: Sequence[float], after: Sequence[float]) -> Finding | None:
    """A fall of accuracy on held-out problems since before training, by the paired t test over problems."""
    change = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    if len(change) < MIN_STEPS or float(np.ptp(change)) == 0 or change.mean() >= 0:
        return None
    p = float(stats.ttest_1samp(change, 0.0).pvalue)
    if p >= WORSE_P:
        return None
    text = f"pass@1 {{start}} before training → {{end}} at the end ({len(change)} problems, paired t test: p {{p}})"
    numbers = {"start": float(np.mean(before)), "end": float(np.mean(after)), "p": p}
    return Finding(f"worse {split}", f"worse on {split}", "bad", text, numbers)


def words(value: float) -> str:
    """A number as a sentence shows it: two or three digits."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.1g}"


def _percent(value: float) -> str:
    return f"{value:.0f}" if value >= 1 or value == 0 else words(value)


def _range(steps: np.ndarray) -> str:
    return f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}–{steps[-1]}"


def _list(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:5]))
    return f"{shown} and {len(steps) - 5} more" if len(steps) > 5 else shown
