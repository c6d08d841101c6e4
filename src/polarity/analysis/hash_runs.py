"""A growing set of 64-bit words in sorted runs that merge, on disk where memory is short (a log-structured merge).

A word is a 63-bit hash with a flag in its lowest bit; a hash that was added with the flag once has it for good. A run
is one array of uint64 and never changes: its words in order, then an index of them,

    words    (n,)         ascending, one for each hash
    bitmap   (cells,)     64 slots a cell, 4 to 8 slots a word; a hash's slot is its upper bits; set where a word lies
    starts   (cells,)     uint32, two in each uint64: how many words lie before the cell

so a word is found, or not, next to where the bits before its slot say. A Bloom filter in memory answers for most hashes
that are in no run. All in all 9.75 to 11.5 bytes a word. FAN_IN runs of one level merge into one of the next, so what
is added in s steps is copied about log(s) / log(FAN_IN) times, and the more runs are looked through. Hashes must be
uniform: work is cut into blocks of equal width that fit a core's cache.
"""

import mmap
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from polarity.errors import UserError

Words = NDArray[np.uint64]
FAN_IN = 8
BLOCK = 1 << 16  # words that are worked on together: a few such arrays fit a core's cache
INDEX_BITS = 2  # a bitmap has at least 2**INDEX_BITS slots a word
CELL = 8  # hashes a cell of the filter holds at most, on average
MAPPED = 4  # times the memory limit: so much of spilled runs may stay mapped
MAX_WORDS = 2**32 - 1  # of a run: `starts` are 32-bit
PATTERN = "run_*.npy*"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Run:
    """Immutable. data: words and index as above; `mapped` from `path`, or neither is set. name: never used twice."""

    data: Words
    count: int
    level: int
    name: str
    path: Path | None = None
    mapped: mmap.mmap | None = None

    @classmethod
    def of_file(cls, path: Path, count: int, level: int) -> "Run":
        """ValueError where the file is not whole."""
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            np.lib.format.read_magic(file)
            (length,), _, _ = np.lib.format.read_array_header_1_0(file)
            data = np.frombuffer(mapped, "<u8", length, file.tell())
        return cls(data, count, level, path.stem, path, mapped)

    def forget(self) -> None:
        """Let go of the pages that were read; they are read again, or taken from the system's cache, when needed."""
        if self.mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)

    @property
    def words(self) -> Words:
        return self.data[: self.count]

    def find(self, needles: Words) -> tuple[NDArray[np.intp], NDArray[np.uint8]]:
        """Which of `needles` (k,), ascending and without flags, are here, as positions (h,); and their flags (h,)."""
        cells = (len(self.data) - self.count) * 2 // 3
        bitmap = self.data[self.count : self.count + cells]
        starts = self.data[self.count + cells :].view(np.uint32)
        slots = (needles >> np.uint64(64 - 6 - (cells.bit_length() - 1))).view(np.int64)
        taken = bitmap.view(np.uint8)[slots >> 3]
        taken >>= (slots & 7).astype(np.uint8)
        where = np.flatnonzero((taken & np.uint8(1)).view(bool))
        wanted, slots = needles[where], slots[where]
        cell = slots >> 6
        below = bitmap[cell] & ((np.uint64(1) << (slots & 63).view(np.uint64)) - np.uint64(1))
        # not past the word: a set bit below is one word at least, and several where a slot holds more than one
        at = starts[cell] + np.bitwise_count(below).astype(np.int64)
        found = self.data[at]
        behind = np.flatnonzero((found | np.uint64(1)) < wanted)
        while len(behind):
            at[behind] += 1
            behind = behind[at[behind] < self.count]
            found[behind] = self.data[at[behind]]
            behind = behind[(found[behind] | np.uint64(1)) < wanted[behind]]
        hits = np.flatnonzero((found ^ wanted) <= np.uint64(1))
        return where[hits], (found[hits] & np.uint64(1)).astype(np.uint8)


class Filter:
    """A Bloom filter of hashes: says "not in the set" of most that are not, at one memory access each.

    One cell of 64 bits for every CELL to CELL / 2 hashes, by their upper bits, so that ascending hashes read it in
    order; three bits of the cell for each, by lower bits. 1 to 2 bytes a hash; 1 % to 4 % of unknown ones pass.
    """

    def __init__(self, capacity: int):
        self.bits = max(1, ((capacity - 1) // CELL).bit_length())
        self.cells = np.zeros(1 << self.bits, np.uint64)
        self.capacity = CELL << self.bits

    def _places(self, words: Words) -> tuple[NDArray[np.int64], Words]:
        marks = np.uint64(1) << ((words >> np.uint64(1)) & np.uint64(63))
        marks |= np.uint64(1) << ((words >> np.uint64(7)) & np.uint64(63))
        marks |= np.uint64(1) << ((words >> np.uint64(13)) & np.uint64(63))
        return (words >> np.uint64(64 - self.bits)).view(np.int64), marks

    def passing(self, words: Words) -> NDArray[np.intp]:
        """Positions of the `words` that may be in the set."""
        cell, marks = self._places(words)
        return np.flatnonzero((self.cells[cell] & marks) == marks)

    def add(self, words: Words) -> None:
        """Ascending words; on several threads only where these have no cell in common."""
        cell, marks = self._places(words)
        starts = np.flatnonzero(changes(cell))
        self.cells[cell[starts]] |= np.bitwise_or.reduceat(marks, starts)


class HashRuns:
    """The set. Spills into `directory`, which it empties of runs first, when runs in memory exceed `memory` bytes."""

    def __init__(self, directory: Path | None, memory: int):
        self.directory, self.memory = directory, memory
        self._clear()

    def _clear(self) -> None:
        self.runs: list[Run] = []
        self.filter = Filter(0)
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            for stale in self.directory.glob(PATTERN):
                stale.unlink()

    def sizes(self) -> tuple[int, int]:
        """Bytes in memory and bytes on disk."""
        sizes = [(run.data.nbytes, run.path is not None) for run in self.runs]
        held = sum(size for size, spilled in sizes if not spilled)
        return held + self.filter.cells.nbytes, sum(size for size, spilled in sizes if spilled)

    def find(self, needles: Words) -> NDArray[np.uint8]:
        """(k,) for distinct hashes, ascending and without flags: 0 not in the set, 1 in it, 2 in it with the flag."""
        state, places = np.zeros(len(needles), np.uint8), self.filter.passing(needles)
        left = needles[places]
        for run in self.runs:
            hits, flags = run.find(left)
            where = places[hits]
            state[where] = np.maximum(state[where], flags + np.uint8(1))
            if 8 * np.count_nonzero(flags) > len(left):  # what is in with its flag needs no further run
                places = places[state[places] < 2]
                left = needles[places]
        return state

    def forget(self) -> None:
        """Let go of what `find` has read of spilled runs, where they are much larger than the memory limit: each page
        that it reads stays mapped, with its neighbours, and counts as this process's memory."""
        if self.sizes()[1] > MAPPED * self.memory:
            for run in self.runs:
                run.forget()

    def add(self, parts: Sequence[Words]) -> None:
        """Add all words of `parts`, each ascending. Merges what is due, and spills the largest runs beyond `memory`."""
        sources, level, merged = [part for part in parts if len(part)], 0, list[Run]()
        if not sources:
            return
        self.forget()
        self._mark(sources)
        while len(full := [run for run in self.runs if run.level == level]) >= FAN_IN - 1:
            if sum(run.count for run in merged + full) + sum(map(len, parts)) > MAX_WORDS:
                break
            merged, level = merged + full, level + 1
        run = self._write(sources + [run.words for run in merged], level)
        kept = [old for old in self.runs if old not in merged]
        self.runs = sorted([*kept, run], key=lambda run: -run.count)  # most is found in the first
        for old in merged:
            if old.path is not None:
                old.path.unlink()
        while self.directory is not None and sum(r.data.nbytes for r in self.runs if r.path is None) > self.memory:
            largest = max((run for run in self.runs if run.path is None), key=lambda run: run.count)
            path = self.directory / f"{largest.name}.npy"
            _save(path, largest.data)
            self.runs[self.runs.index(largest)] = Run.of_file(path, largest.count, largest.level)

    def _mark(self, sources: list[Words]) -> None:
        """Put words into the filter, and all others into a new one where it has become too small."""
        total = sum(run.count for run in self.runs) + sum(map(len, sources))
        if total > self.filter.capacity:
            self.filter = Filter(total)
            sources = sources + [run.words for run in self.runs]
        bits = min(self.filter.bits, 4)  # blocks without common cells, for the threads
        bounds = [_bounds(source, bits) for source in sources]

        def block(i: int) -> None:
            for source, b in zip(sources, bounds, strict=True):
                for first in range(b[i], b[i + 1], BLOCK):
                    self.filter.add(source[first : min(first + BLOCK, b[i + 1])])

        deque(ordered(block, range(1 << bits)), maxlen=0)

    def _write(self, sources: list[Words], level: int) -> Run:
        """The run of all words of `sources`: in memory, or, where it may take half of the limit, in a file."""
        name, most = f"run_{uuid.uuid4().hex}", sum(map(len, sources))
        if self.directory is None or 11 * most <= self.memory // 2:
            data = np.empty(most + _cells(most) * 3 // 2, np.uint64)
            count = _merge_into(data, sources)
            index = _index(data[:count])
            data[count : count + len(index)] = index
            data.resize(count + len(index), refcheck=False)
            return Run(data, count, level, name)
        path = self.directory / f"{name}.npy"
        with path.open("w+b") as file:
            _header(file, 0)
            offset, count = file.tell(), 0
            block, offsets = merged_blocks(sources)
            for i, words in enumerate(ordered(block, range(len(offsets)))):
                file.write(words)  # type: ignore[arg-type]
                count += len(words)
                if i % 1024 == 0:
                    for run in self.runs:
                        run.forget()
            file.flush()
            index = _index(np.asarray(np.memmap(file, np.uint64, "r", offset, (count,))))
            file.seek(0, os.SEEK_END)
            file.write(index)  # type: ignore[arg-type]
            file.seek(0)
            _header(file, count + len(index))
        return Run.of_file(path, count, level)

    def save(self, directory: Path) -> list[dict[str, Any]]:
        """Put all runs into `directory`, flushed to disk: links to those on disk (copies where it is on another file
        system). Returns what `load` needs; files that are there already stay, so an older list stays good."""
        for run in self.runs:
            target = directory / f"{run.name}.npy"
            if target.exists():
                continue
            aside = directory / f"{run.name}.npy.partial"
            aside.unlink(missing_ok=True)
            if run.path is None:
                _save(aside, run.data)
            else:
                _link(run.path, aside)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.rename(target)
        return [
            {"file": f"{run.name}.npy", "count": run.count, "level": run.level, "spilled": run.path is not None}
            for run in self.runs
        ]

    def load(self, directory: Path, saved: Iterable[dict[str, Any]]) -> None:
        """Replace the set by the one that was saved in `directory`, which is not needed afterwards."""
        self._clear()
        runs = []
        for entry in saved:
            source, count, level = directory / entry["file"], entry["count"], entry["level"]
            try:
                if entry["spilled"] and self.directory is not None:
                    _link(source, self.directory / source.name)
                    runs.append(Run.of_file(self.directory / source.name, count, level))
                else:
                    runs.append(Run(np.load(source), count, level, source.stem))
            except (OSError, ValueError) as error:
                raise UserError(f"{source} cannot be read ({error}); load another checkpoint") from error
        self._mark([run.words for run in runs])
        self.runs = runs


def ordered(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`map` on as many threads as torch has, in order, and no more than twice as many results ahead."""
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def merged_blocks(sources: Sequence[Words]) -> tuple[Callable[[int], Words], list[int]]:
    """A merge of `sources` (each ascending) in blocks: a function that gives one, ascending, one word for each hash,
    with the flag where any has it; and, for each block, how many words there are before it at most.

    numpy's vectorised sort takes a block of many runs as fast as one of two, and faster than a merge in a loop.
    """
    bits = (sum(map(len, sources)) // BLOCK).bit_length()
    bounds = [_bounds(source, bits) for source in sources]

    def block(i: int) -> Words:
        words = np.concatenate([source[b[i] : b[i + 1]] for source, b in zip(sources, bounds, strict=True)])
        words.sort()
        last = np.ones(len(words), bool)
        np.greater(words[1:] ^ words[:-1], np.uint64(1), out=last[:-1])
        return words if last.all() else words[last]

    return block, [sum(starts) for starts in zip(*bounds, strict=True)][:-1]


def _merge_into(data: Words, sources: Sequence[Words]) -> int:
    """Merge `sources` into the front of `data`, which has room for all of their words. Returns how many there are."""
    block, offsets = merged_blocks(sources)

    def place(i: int) -> int:
        words = block(i)
        data[offsets[i] : offsets[i] + len(words)] = words  # by the threads: new memory costs as much as the merge
        return len(words)

    count = 0
    for offset, length in zip(offsets, ordered(place, range(len(offsets))), strict=True):
        if count < offset:
            data[count : count + length] = data[offset : offset + length]
        count += length
    return count


def _bounds(words: Words, bits: int) -> list[int]:
    """Where each of 2**bits blocks of equal width begins in ascending words; and their end."""
    edges = np.arange(1, 1 << bits, dtype=np.uint64) << np.uint64(64 - bits) if bits else np.empty(0, np.uint64)
    return [0, *np.searchsorted(words, edges).tolist(), len(words)]


def changes(words: NDArray[Any]) -> NDArray[np.bool_]:
    """True at the first of equal neighbours."""
    first = np.ones(len(words), bool)
    np.not_equal(words[1:], words[:-1], out=first[1:])
    return first


def _cells(count: int) -> int:
    """Cells of the index of a run of `count` words: two at least, a power of two."""
    return 1 << max(1, ((count << INDEX_BITS) - 1).bit_length() - 6)


def _index(words: Words) -> Words:
    """The index of a run: bitmap and starts, see the top of the file."""
    cells = _cells(len(words))
    slot_bits = cells.bit_length() + 5
    index = np.empty(cells + cells // 2, np.uint64)
    bitmap, starts = index[:cells], index[cells:].view(np.uint32)
    bits = min(slot_bits - 6, (len(words) // BLOCK).bit_length())
    width = cells >> bits
    bounds = _bounds(words, bits)

    def block(i: int) -> None:
        slots = (words[bounds[i] : bounds[i + 1]] >> np.uint64(64 - slot_bits)).view(np.int64) - (i * width << 6)
        taken = np.zeros(width << 6, bool)
        taken[slots] = True
        cell = slice(i * width, (i + 1) * width)
        bitmap[cell] = np.packbits(taken, bitorder="little").view("<u8")
        before = np.cumsum(np.bincount(slots >> 6, minlength=width))
        starts[cell] = bounds[i]
        starts[cell][1:] += before[:-1].astype(np.uint32)

    deque(ordered(block, range(1 << bits)), maxlen=0)
    return index


def _header(file: Any, length: int) -> None:
    """The header of a .npy file; numpy pads it, so that it is as long for any length."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<u8", "fortran_order": False, "shape": (length,)})


def _save(path: Path, data: Words) -> None:
    with path.open("wb") as file:
        _header(file, len(data))
        data.tofile(file)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
