"""`polarity data check`: duplicates, conflicting answers, and overlap with evaluation problems.

Texts are compared as their words in lower case, without space and punctuation: copies of a problem differ mostly in
LaTeX spacing and quotation marks. A text of fewer than 40 such characters is compared with its operators, too: `3 + 4`
is not `3 - 4`. Overlap is by text and by 13-grams of words; a Chinese, Japanese or Korean character is a word.

R training rows, B problems of a benchmark, K distinct 13-grams of a benchmark.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from polarity.data import Row, load_problems
from polarity.errors import UserError

GRAM = 13
SHORT = 40
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_SIGNED = re.compile(r"\w+|[-+*/=<>^|%]")


@dataclass(frozen=True)
class Overlap:
    """A training row that a benchmark contaminates, and the problem of it that the row shares most with.

    exact: same text as a problem. row_share: share of the row's distinct 13-grams that stand anywhere in the benchmark.
    problem_share: share of the problem's that stand in the row. Both are 0 for a text of fewer than 13 words.
    """

    id: str
    benchmark: str
    problem_id: str
    exact: bool
    row_share: float
    problem_share: float


@dataclass(frozen=True)
class Exposure:
    """What of a benchmark the training data holds: `exact`, problems whose text is there; `shared`, problems of whose
    13-grams more than the threshold are there; `rows`, the training rows that go because of it."""

    benchmark: str
    problems: int
    exact: int
    shared: int
    rows: int


@dataclass(frozen=True)
class Findings:
    """What `check_data` found; rows are named by id.

    duplicates: rows of the same text, the first of which stays. conflicts: rows of one text with several answers; all
    go. variants: rows whose texts differ in an operator and whose answers differ: other problems, which stay.
    """

    train: str
    rows: int
    distinct: int
    set_aside: dict[str, int]
    duplicates: list[list[str]]
    conflicts: list[list[str]]
    variants: list[list[str]]
    threshold: float
    exposures: list[Exposure]
    overlaps: list[Overlap]
    kept: list[str]

    def as_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)

    def table(self) -> str:
        """A readable account, for a terminal."""
        bad = ", ".join(f"{count:,} {reason}" for reason, count in self.set_aside.items())
        over = f"over {self.threshold:.0%} of 13-grams"
        account = [
            ("problems read", self.rows, f"{self.distinct:,} distinct texts"),
            ("rows set aside", sum(self.set_aside.values()), bad),
            ("duplicates", sum(len(group) - 1 for group in self.duplicates), "repeat the text of an earlier row"),
            ("conflicts", sum(map(len, self.conflicts)), f"{len(self.conflicts):,} texts with several answers"),
            ("variants", sum(map(len, self.variants)), "as other rows but for an operator and the answer; they stay"),
            ("contaminated", len({o.id for o in self.overlaps}), f"text of an evaluation problem, or {over}"),
            ("left", len(self.kept), ""),
        ]
        lines = [self.train, *(f"  {what:<15}{count:>8,}  {how}".rstrip() for what, count, how in account)]
        if self.exposures:
            head = ("against", "problems", "same text", over, "rows that go")
            body = [(e.benchmark, *(f"{n:,}" for n in (e.problems, e.exact, e.shared, e.rows))) for e in self.exposures]
            wide = [max(map(len, column)) for column in zip(head, *body, strict=True)]
            lines.append("")
            for row in (head, *body):
                numbers = "  ".join(text.rjust(w) for text, w in zip(row[1:], wide[1:], strict=True))
                lines.append(f"  {row[0]:<{wide[0]}}  {numbers}")
        return "\n".join(lines)


def check_data(
    train: str | Path,
    against: Sequence[str | Path] = (),
    *,
    threshold: float = 0.5,
    columns: Mapping[str, str] | None = None,
    out: Path | None = None,
    findings: Path | None = None,
) -> Findings:
    """Check the problems of `train`, and write what is left to `out` as JSONL (id, problem, answer, the other columns).

    train, against: what `polarity.data.load_problems` takes: files, directories, hub datasets, names of benchmarks.
    A row is contaminated by a benchmark where its text is that of one of its problems, where more than `threshold` of
    its 13-grams stand in the benchmark, or where it holds more than `threshold` of one problem's 13-grams.
    Bad rows of `train` are set aside, however many there are, in NAME.quarantine.jsonl next to `out`.
    findings: a JSON file that gets the result. Raises UserError where something cannot be read, or nothing is left.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"threshold {threshold:g} is not a share; give a number above 0 and at most 1")
    quarantine = out.with_suffix(".quarantine.jsonl") if out else None
    loaded = load_problems(train, columns, max_bad=1.0, quarantine=quarantine)
    rows, evaluation = loaded.rows, {str(spec): load_problems(spec).rows for spec in against}
    keys = [text_key(row["problem"]) for row in rows]
    groups: dict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    duplicates, conflicts, variants = _repeated(rows, groups.values())
    exposures: list[Exposure] = []
    overlaps: list[Overlap] = []
    grams = Grams([row["problem"] for row in rows] if evaluation else [])
    for name, problems in evaluation.items():
        exposure, found = _expose(name, problems, rows, keys, grams, threshold)
        exposures.append(exposure)
        overlaps += found
    gone = {i for group in duplicates for i in group[1:]} | {i for group in conflicts for i in group}
    contaminated = {overlap.id for overlap in overlaps}
    kept = [row for i, row in enumerate(rows) if i not in gone and row["id"] not in contaminated]

    def ids(found: list[list[int]]) -> list[list[str]]:
        return [[rows[i]["id"] for i in group] for group in found]

    result = Findings(
        str(train), len(rows), len(groups), loaded.reasons, ids(duplicates), ids(conflicts), ids(variants),
        threshold, exposures, overlaps, [row["id"] for row in kept],
    )  # fmt: skip
    if findings:
        _write(findings, [result.as_json()])
    if out:
        if not kept:
            raise UserError(f"{train}: nothing is left, so {out} was not written; see the account without --out")
        _write(out, (json.dumps(row, ensure_ascii=False, default=str) for row in kept))
    return result


def text_key(text: str) -> str:
    """What two copies of a problem have in common: the module docstring's rule."""
    key = "".join(_WORD.findall(text.lower()))
    return key if len(key) >= SHORT else _signed(text) or text.strip()


def _signed(text: str) -> str:
    return "".join(_SIGNED.findall(text.lower()))


def _repeated(rows: Sequence[Row], groups: Iterable[list[int]]) -> tuple[list[list[int]], ...]:
    """(duplicates, conflicts, variants): groups of row numbers, of rows with the same `text_key`."""
    duplicates, conflicts, variants = [], [], []
    for group in groups:
        answers: dict[str, list[int]] = defaultdict(list)
        forms: dict[str, set[str]] = defaultdict(set)
        for i in group if len(group) > 1 else ():
            answer = rows[i]["answer"].strip()
            answers[answer].append(i)
            forms[_signed(rows[i]["problem"])].add(answer)
        if any(len(found) > 1 for found in forms.values()):
            conflicts.append(group)
            continue
        if len(answers) > 1:
            variants.append([same[0] for same in answers.values()])
        duplicates += [same for same in answers.values() if len(same) > 1]
    return duplicates, conflicts, variants


class Grams:
    """The distinct 13-grams of each text, as pairs (owner, hash), sorted; `sizes`: how many each text has."""

    def __init__(self, texts: Sequence[str]):
        values: list[int] = []
        lengths = []
        for text in texts:
            words = _WORD.findall(text.lower())
            values += map(hash, words)  # 64 bits, the same for a word throughout a process
            lengths.append(len(words))
        owner = np.repeat(np.arange(len(texts)), lengths)
        word = np.array(values, dtype=np.int64).view(np.uint64)
        starts = max(len(word) - GRAM + 1, 0)
        found = np.zeros(starts, dtype=np.uint64)
        for j in range(GRAM):  # a polynomial in an odd number, modulo 2**64: order matters
            found = found * np.uint64(0x9E3779B97F4A7C15) + word[j : j + starts]
        inside = owner[:starts] == owner[GRAM - 1 :]
        pairs = np.unique(np.stack([owner[:starts][inside].astype(np.uint64), found[inside]], axis=1), axis=0)
        self.owner, self.hash = pairs[:, 0].astype(np.int64), pairs[:, 1]
        self.sizes = np.bincount(self.owner, minlength=len(texts))

    def over(self, vocabulary: np.ndarray) -> Any:
        """Which of K sorted gram hashes each text holds: sparse (texts, K) int32 of 0 and 1."""
        at = np.searchsorted(vocabulary, self.hash)
        hit = vocabulary[np.minimum(at, len(vocabulary) - 1)] == self.hash if len(vocabulary) else at < 0
        ones = np.ones(int(hit.sum()), dtype=np.int32)
        return sparse.csr_matrix((ones, (self.owner[hit], at[hit])), shape=(len(self.sizes), len(vocabulary)))


def _expose(
    name: str, problems: Sequence[Row], rows: Sequence[Row], keys: Sequence[str], grams: Grams, threshold: float
) -> tuple[Exposure, list[Overlap]]:
    """What the training rows (R, with their text keys and 13-grams) hold of one benchmark (B problems)."""
    theirs = Grams([row["problem"] for row in problems])
    vocabulary = np.unique(theirs.hash)
    held, wanted = grams.over(vocabulary), theirs.over(vocabulary)  # (R, K), (B, K)
    row_share = np.asarray(held.sum(1)).ravel() / np.maximum(grams.sizes, 1)
    sizes = np.maximum(theirs.sizes, 1)
    there = wanted @ (np.asarray(held.sum(0)).ravel() > 0).astype(np.int32) / sizes
    common = (held @ wanted.T).tocsr()  # (R, B): how many 13-grams a row and a problem share
    common.data = common.data / sizes[common.indices]
    by_key: dict[str, int] = {}
    for b, row in enumerate(problems):
        by_key.setdefault(text_key(row["problem"]), b)
    best = np.asarray(common.max(1).todense()).ravel()
    exact = np.array([key in by_key for key in keys], dtype=bool)
    overlaps = []
    for i in np.flatnonzero(exact | (row_share > threshold) | (best > threshold)).tolist():
        here = slice(common.indptr[i], common.indptr[i + 1])
        closest = by_key[keys[i]] if exact[i] else int(common.indices[here][common.data[here].argmax()])
        share = round(float(common[i, closest]), 4)
        overlaps.append(
            Overlap(rows[i]["id"], name, problems[closest]["id"], bool(exact[i]), round(float(row_share[i]), 4), share)
        )
    known = set(keys)
    same = sum(text_key(row["problem"]) in known for row in problems)
    return Exposure(name, len(problems), same, int((there > threshold).sum()), len(overlaps)), overlaps


def _write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
