"""Sharpening and discovery: how much of a rollout was seen before (A3PO, arXiv 2512.21625, appendix C, eq. 9 and 10).

For a rollout phi of step t, G(phi) is the set of its distinct n-grams; C and H are the correct and all rollouts of
earlier steps:

    sharpening S = |G & grams(C)| / |G|        discovery D = |G - grams(H)| / |G|        S + D <= 1

The rest, 1 - S - D, was seen in wrong rollouts only. At the first step S = 0 and D = 1. The paper leaves open what an
n-gram is made of, and whether all problems share a history: here `unit` and `history` say so (docs/sharpening.md).

N rollouts; an n-gram is a hash of 63 bits, kept in polarity.analysis.hash_runs.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polarity.analysis.hash_runs import BLOCK, PATTERN, HashRuns, Words, changes, ordered
from polarity.errors import UserError
from polarity.seeds import seed_for

Floats = NDArray[np.float64]
Rollouts = Sequence[Sequence[int]] | Sequence[str]
Unit = Literal["token", "word"]
Scope = Literal["global", "problem"]

MEMORY = 2 * 2**30
MANIFEST = "ngrams.json"
CHUNK = 1 << 20  # n-grams that are sorted and looked up together
ROWS = 1 << 12  # rollouts in such a chunk: their numbers take the lower bits of a word
WORDS = 1 << 20  # distinct words whose hashes are remembered
LONG = 64  # characters; longer words (text without spaces) are hashed anew each time, so that memory has a bound


class NGramHistory:
    """The n-grams of all earlier steps, and which of them were in a correct rollout.

    n: length of an n-gram. unit: "token" (rollouts are sequences of ids from 0 to 2**32 - 1) or "word" (rollouts are
    strings, words are `str.split()`). history: "global", or "problem": a rollout is compared with those of its own
    problem. sample_rate: the share of n-grams, chosen by their hash and `seed`, that are measured and added; others
    do not exist, so S and D of a rollout with sampled n-grams are unbiased, and time and space shrink with it.
    directory: a folder of this history alone, emptied at the start, for what does not fit into `memory` bytes; without
    one, everything stays in memory. 9.75 to 11.5 bytes a distinct n-gram, in memory and on disk together; 1 to 2 of
    them stay in memory, beyond the limit; and one that was first wrong and then correct counts twice until it merges.

    Exact but for hash collisions. An n-gram that is new passes for one of m known with probability m / 2**63 (3e-10
    at m = 2.4 billion). Rollouts are counted together in chunks of up to 4096, and there the upper 52 bits tell
    n-grams apart: in a chunk of 2**20, two are mixed up with probability 1e-4, which moves S or D by one n-gram, or
    says of one of the two that it was correct. Results depend on nothing else: neither on the platform nor on threads
    (as many as torch has), memory or interruptions.
    """

    def __init__(
        self, n: int = 3, *, unit: Unit = "token", history: Scope = "global", sample_rate: float = 1.0, seed: int = 0,
        directory: Path | str | None = None, memory: int = MEMORY,
    ):  # fmt: skip
        if not isinstance(n, int) or n < 1:
            raise UserError(f"n-grams of {n!r}: n is a whole number, 1 or more")
        if unit not in ("token", "word") or history not in ("global", "problem"):
            raise UserError(f"unit {unit!r}, history {history!r}: unit is token or word, history is global or problem")
        if not 0 < sample_rate <= 1:
            raise UserError(f"sample_rate {sample_rate}: it is a share, above 0 and at most 1")
        self.settings: dict[str, Any] = {
            "n": n, "unit": unit, "history": history, "sample_rate": sample_rate, "seed": seed,
        }  # fmt: skip
        self.n, self.unit, self.history, self.sample_rate, self.seed = n, unit, history, sample_rate, seed
        if directory is not None and (Path(directory) / MANIFEST).exists():
            raise UserError(f"{directory} holds a saved history and would be emptied; choose another directory")
        self.runs = HashRuns(None if directory is None else Path(directory).resolve(), memory)

    def measure(self, rollouts: Rollouts, problems: Sequence[str] | None = None) -> tuple[Floats, Floats]:
        """S and D, (N,) each, against what was added so far; NaN where a rollout has no n-gram (none sampled).

        problems: the rollouts' problem ids (N,), needed with history "problem". UserError: rollouts of another type
        than `unit` says, token ids out of range, lists of other lengths than N.
        """
        return self.step_encoded(encode(rollouts, self.unit), None, problems)

    def add(self, rollouts: Rollouts, correct: ArrayLike, problems: Sequence[str] | None = None) -> None:
        """Add the n-grams of a step's rollouts. correct: (N,) bool. Errors as in `measure`."""
        self.step(rollouts, correct, problems)

    def step(
        self, rollouts: Rollouts, correct: ArrayLike, problems: Sequence[str] | None = None
    ) -> tuple[Floats, Floats]:
        """`measure`, then `add`, in one pass: rollouts of one step are not compared with each other."""
        return self.step_encoded(encode(rollouts, self.unit), correct, problems)

    def save(self, directory: Path | str) -> None:
        """Write the history into `directory`, which may hold an older state: it has the old one or the new one at any
        time. Runs on disk are linked, not copied, where `directory` is on their file system."""
        _save([self], Path(directory))

    @classmethod
    def load(cls, saved: Path | str, *, directory: Path | str | None = None, memory: int = MEMORY) -> "NGramHistory":
        """The history that was saved in `saved`, which is not needed afterwards. directory, memory: as above."""
        (entry,) = _saved(Path(saved))
        loaded = cls(**entry["settings"], directory=directory, memory=memory)
        loaded.runs.load(Path(saved), entry["runs"])
        return loaded

    def step_encoded(
        self, rows: list[Words], correct: ArrayLike | None, problems: Sequence[str] | None
    ) -> tuple[Floats, Floats]:
        """`step` with rollouts as `encode` gives them; `measure` where correct is None."""
        polarity = np.zeros(len(rows), bool) if correct is None or not len(rows) else np.asarray(correct)
        if polarity.shape != (len(rows),) or polarity.dtype != bool:
            raise UserError(f"correct is {polarity.dtype} {polarity.shape}; it is one bool a rollout ({len(rows)},)")
        seeds = self._seeds(len(rows), problems)
        chunks = _pieces([len(row) for row in rows], CHUNK, ROWS)
        shares, new = [np.empty((2, 0))], []
        for share, words in ordered(lambda c: self._chunk(rows[c], polarity[c], seeds[c]), chunks):
            shares.append(share)
            new.append(words)
        if correct is not None:
            self.runs.add(new)
        sharpening, discovery = np.concatenate(shares, 1)
        return sharpening, discovery

    def _seeds(self, count: int, problems: Sequence[str] | None) -> Words:
        """Where the hash of each rollout's n-grams starts (count,)."""
        if self.history == "global":
            return np.full(count, seed_for("n-grams", self.seed), np.uint64)
        if problems is None or len(problems) != count:
            raise UserError(f"history 'problem' needs the problem ids of all {count} rollouts: give problems")
        # As text, whatever they came as: "1", 1 and an array's 1 are one problem.
        names = [str(problem) for problem in (problems.tolist() if hasattr(problems, "tolist") else problems)]
        own = {name: seed_for("n-grams", self.seed, name) for name in set(names)}
        return np.array([own[name] for name in names], np.uint64)

    def _chunk(self, rows: list[Words], correct: NDArray[np.bool_], seeds: Words) -> tuple[Floats, Words]:
        """S and D of some rows (2, rows), and the words to add, ascending."""
        wrong = len(rows) - int(correct.sum())
        number = np.empty(len(rows), np.uint64)  # of the rows, correct ones last
        number[np.argsort(correct, kind="stable")] = np.arange(len(rows), dtype=np.uint64)
        low = np.uint64((1 << (len(rows) - 1).bit_length()) - 1)
        hashes, tagged = self._hashes(rows, seeds, number, low)
        # Two sorts that put the same n-grams to the same places: one has the hashes, one the rows that have them.
        # Several times as fast as one that returns its indices.
        hashes.sort()
        tagged.sort()
        counts, new = np.zeros(4 * len(rows), np.int64), [hashes[:0]]
        edges = np.unique(np.searchsorted(hashes, hashes[::BLOCK])).tolist()
        for edge, end in pairwise([*edges, len(hashes)]):
            block, row = hashes[edge:end], tagged[edge:end] & low
            first = changes(block)
            ends = np.append(np.flatnonzero(first)[1:], len(block))
            distinct = block[first]
            state = self.runs.find(distinct)
            cell = (row << np.uint64(2)) | np.repeat(state, np.diff(ends, prepend=0))
            cell = cell[changes(tagged[edge:end])]  # an n-gram counts once a row
            counts += np.bincount(cell.view(np.int64), minlength=len(counts))
            flag = row[ends - 1] >= np.uint64(wrong)
            fresh = state <= flag  # unseen, or seen in wrong rollouts and now in a correct one
            new.append(distinct[fresh] | flag[fresh])
        self.runs.forget()  # blocks ascend: what this chunk has read, it read once
        by_state = counts.reshape(-1, 4)[number.view(np.int64)]
        with np.errstate(invalid="ignore"):
            return (by_state[:, [2, 0]] / by_state.sum(1, keepdims=True)).T, np.concatenate(new)

    def _hashes(self, rows: list[Words], seeds: Words, number: Words, low: np.uint64) -> tuple[Words, Words]:
        """Hashes of all n-grams that exist, the lowest bit 0; and the same with the row numbers as their `low` bits."""
        hashes = np.empty(sum(map(len, rows)), np.uint64)
        tagged, count = np.empty_like(hashes), 0
        for piece in _pieces([len(row) for row in rows], BLOCK, len(rows)):
            found, row = ngram_hashes(rows[piece], self.n, seeds[piece], number[piece])
            if self.sample_rate < 1:  # by lower bits: the upper ones stay uniform
                chosen = (found & np.uint64(2**32 - 1)) < np.uint64(self.sample_rate * 2**32)
                found, row = found[chosen], row[chosen]
            place = slice(count, count + len(found))
            np.bitwise_and(found, ~np.uint64(1), out=hashes[place])
            np.bitwise_or(found & ~low, row, out=tagged[place])
            count += len(found)
        return hashes[:count], tagged[:count]


class NGramMetrics:
    """Sharpening and discovery for n = 3 and 4, as metrics of a step.

    unit, history, sample_rate: as in NGramHistory. directory: where runs go that do not fit into `memory` bytes, for
    each n; a folder in the run directory, say. Whatever an earlier process left there is removed: the state of a run
    is what `save` wrote into its checkpoint.
    """

    def __init__(
        self, unit: Unit = "token", history: Scope = "global", directory: Path | str | None = None, *,
        sample_rate: float = 1.0, memory: int = MEMORY,
    ):  # fmt: skip
        self.unit: Unit = unit
        self.histories = [
            NGramHistory(
                n, unit=unit, history=history, sample_rate=sample_rate, memory=memory,
                directory=None if directory is None else Path(directory) / f"n{n}",
            )
            for n in (3, 4)
        ]  # fmt: skip

    def step(
        self, token_ids: Sequence[Sequence[int]], texts: Sequence[str], correct: ArrayLike, problems: Sequence[str]
    ) -> dict[str, float]:
        """Measure and add a step's N rollouts: `{sharpening,discovery}/n{3,4}`, means over rollouts with n-grams, and
        `{positive,negative}/{sharpening,discovery}_n{3,4}`. Without such rollouts a name is left out."""
        rows, polarity = encode(texts if self.unit == "word" else token_ids, self.unit), np.asarray(correct)
        found = {}
        for history in self.histories:
            measured = history.step_encoded(rows, polarity, problems)
            for name, values in zip(("sharpening", "discovery"), measured, strict=True):
                for place, chosen in (("", True), ("positive", polarity), ("negative", ~polarity)):
                    kept = values[~np.isnan(values) & chosen]
                    if len(kept):
                        key = f"{place}/{name}_n{history.n}" if place else f"{name}/n{history.n}"
                        found[key] = float(kept.mean())
        return found

    def save(self, directory: Path | str) -> None:
        """Write both histories into `directory`, as `NGramHistory.save` does."""
        _save(self.histories, Path(directory))

    def load(self, directory: Path | str) -> None:
        """Go on from what was saved in `directory`, with the same settings."""
        saved = _saved(Path(directory))
        for key, ours in self.histories[0].settings.items():
            theirs = saved[0]["settings"][key]
            if theirs != ours:
                raise UserError(f"{directory} was saved with {key} {theirs!r}, not {ours!r}; go on with {theirs!r}")
        for history, entry in zip(self.histories, saved, strict=True):
            history.runs.load(Path(directory), entry["runs"])


def _save(histories: Sequence[NGramHistory], directory: Path) -> None:
    """The runs, then the list of them, then away with what is not on it: the last list is whole at any time."""
    if any(history.runs.directory == directory.resolve() for history in histories):
        raise UserError(f"{directory} is where the history's runs are; save into another directory")
    directory.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = [
        {"settings": history.settings, "runs": history.runs.save(directory)} for history in histories
    ]
    aside = directory / f"{MANIFEST}.partial"
    with aside.open("w") as file:
        json.dump(entries, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(directory / MANIFEST)
    listed = {run["file"] for entry in entries for run in entry["runs"]}
    for file_ in directory.glob(PATTERN):
        if file_.name not in listed:
            file_.unlink()


def _saved(directory: Path) -> list[dict[str, Any]]:
    """One entry a history: its settings and its runs."""
    try:
        entries: list[dict[str, Any]] = json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError:
        raise UserError(f"{directory} has no {MANIFEST}: no n-gram history was saved there") from None
    return entries


def encode(rollouts: Rollouts, unit: Unit) -> list[Words]:
    """Each rollout as an array of integers: its token ids, or hashes of its words."""
    if any(isinstance(row, str) != (unit == "word") for row in rollouts):
        raise UserError(f"with unit {unit!r}, rollouts are {'strings' if unit == 'word' else 'sequences of token ids'}")
    if unit == "word":
        split = [row.split() for row in rollouts]  # type: ignore[union-attr]
        return [np.fromiter(map(_WORDS.__getitem__, words), np.uint64, len(words)) for words in split]
    rows = [_token_ids(row) for row in rollouts]
    if any(len(row) and row.max() >= 2**32 for row in rows):
        raise UserError("token ids are integers from 0 to 2**32 - 1; give the ids that the tokenizer made")
    return rows


def _token_ids(row: Any) -> Words:
    try:
        ids = (
            np.asarray(row)
            if hasattr(row, "dtype")
            else np.array(array("Q", row if isinstance(row, list) else list(row)))
        )
    except (TypeError, OverflowError):
        ids = np.empty((0, 0))
    if ids.ndim == 1 and not len(ids):
        return np.empty(0, np.uint64)  # of any type: empty arrays and tensors are floats by default
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.dtype.kind == "i" and len(ids) and ids.min() < 0):
        raise UserError("a rollout is a flat sequence of token ids, integers from 0 to 2**32 - 1")
    return ids.astype(np.uint64, copy=False)


class _WordHashes(dict[str, int]):
    """64 bits for each word, the same everywhere; forgotten when there are too many, and made again."""

    def __missing__(self, word: str) -> int:
        if len(self) >= WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = int.from_bytes(digest, "little")
        if len(word) <= LONG:
            self[word] = value
        return value


_WORDS = _WordHashes()


def ngram_hashes(rows: Sequence[Words], n: int, seeds: Words, number: Words) -> tuple[Words, Words]:
    """64-bit hashes of all n-grams (M,) of rows of integers, and the `number` of the row of each (M,).

    n rounds of splitmix64's mixing, each after adding an integer times an odd constant to what the last one gave,
    `seeds` at first: one-to-one in each integer, and every bit depends on all of them.
    """
    lengths = np.array([len(row) for row in rows])
    grams = np.maximum(lengths - n + 1, 0)
    total = int(lengths.sum())
    if not grams.any():
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    integers = np.concatenate(rows)
    integers += np.uint64(1)
    integers *= np.uint64(0x9E3779B97F4A7C15)
    state = np.repeat(seeds, lengths)[: total - n + 1]
    spare = np.empty_like(state)
    for i in range(n):
        state += integers[i : i + len(state)]
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
            np.right_shift(state, np.uint64(shift), out=spare)
            state ^= spare
            if factor:
                state *= np.uint64(factor)
    inside = np.ones(total, bool)
    for i in range(1, n):  # where a row is shorter than i, this falls on an end of the row before: false already
        inside[np.cumsum(lengths) - i] = False
    return state[inside[: len(state)]], np.repeat(number, grams)


def _pieces(lengths: Sequence[int], size: int, count: int) -> list[slice]:
    """Rows in pieces of at most `count` rows and `size` integers, but for a row that is longer alone."""
    pieces, start, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and (total + length > size or i - start == count):
            pieces.append(slice(start, i))
            start, total = i, 0
        total += length
    return [*pieces, slice(start, len(lengths))] if lengths else []
