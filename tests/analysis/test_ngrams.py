"""Sharpening and discovery against sets of tuples, through merges, spills, checkpoints and a killed process."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from polarity.analysis import hash_runs, ngrams
from polarity.analysis.hash_runs import HashRuns
from polarity.analysis.ngrams import NGramHistory, NGramMetrics, encode, ngram_hashes
from polarity.errors import UserError

WORDS = ["so", "the", "x", "=", "12", "é", "\ud800", "we", "have"]
SPACES = [" ", "\n", "\u2003", "  \t"]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch):
    """Blocks, chunks and merges of a size that a few n-grams fill."""

    def shrink(block: int = 16, chunk: int = 40, rows: int = 5, fan_in: int = 3) -> None:
        for module, name, value in (
            (hash_runs, "BLOCK", block), (ngrams, "BLOCK", block), (ngrams, "CHUNK", chunk), (ngrams, "ROWS", rows),
            (hash_runs, "FAN_IN", fan_in),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, value)

    shrink()
    return shrink


def some_steps(rng: random.Random, unit: str, count: int, alphabet: int = 20):
    """Steps of rollouts, verdicts and problems; short alphabets, so that much repeats; some rollouts empty."""
    for _ in range(count):
        rows = [
            [rng.randrange(alphabet) for _ in range(rng.choice([0, 1, 2, 5, 30]))] for _ in range(rng.randrange(14))
        ]
        if unit == "word":
            rows = ["".join(f"{WORDS[t % 9]}{t // 9}{rng.choice(SPACES)}" for t in row) for row in rows]
        correct = np.array([rng.random() < 0.4 for _ in rows], bool)
        yield rows, correct, [str(rng.randrange(3)) for _ in rows]


class Reference:
    """The definition, with sets of tuples."""

    def __init__(self, n: int, unit: str, history: str):
        self.n, self.unit, self.history = n, unit, history
        self.correct, self.all = set(), set()

    def step(self, rows, correct, problems):
        grams = []
        for row, problem in zip(rows, problems, strict=True):
            units = row.split() if self.unit == "word" else row
            own = problem if self.history == "problem" else None
            grams.append({(own, *units[i : i + self.n]) for i in range(len(units) - self.n + 1)})
        found = [(len(g & self.correct) / len(g), len(g - self.all) / len(g)) if g else (math.nan,) * 2 for g in grams]
        for g, good in zip(grams, correct, strict=True):
            self.all |= g
            self.correct |= g if good else set()
        return np.array(found).reshape(-1, 2).T


@pytest.mark.parametrize("history", ["global", "problem"])
@pytest.mark.parametrize("unit", ["token", "word"])
def test_any_history_equals_sets_of_tuples(small, tmp_path, threads, unit, history):
    rng = random.Random(f"{unit}{history}")
    spilled = merged = 0
    for trial in range(24):
        small(
            block=rng.choice([4, 16, 1000]), chunk=rng.choice([1, 50, 1000]), rows=rng.choice([1, 4, 100]),
            fan_in=rng.choice([2, 3, 8]),
        )  # fmt: skip
        n, memory = 1 + trial % 4, rng.choice([0, 2000, 10**6])
        directory = rng.choice([None, tmp_path / str(trial)])
        ours = NGramHistory(n, unit=unit, history=history, directory=directory, memory=memory, seed=trial)
        reference = Reference(n, unit, history)
        for rows, correct, problems in some_steps(rng, unit, 25, rng.choice([2, 6, 40])):
            expected = reference.step(rows, correct, problems)
            assert np.array_equal(ours.measure(rows, problems), expected, equal_nan=True)
            found = ours.step(rows, correct, problems)
            assert np.array_equal(found, expected, equal_nan=True)
            assert not (sum(found) > 1).any()
        spilled += ours.runs.sizes()[1] > 0
        merged += max(run.level for run in ours.runs.runs)
        known = set().union(*(set((run.words >> np.uint64(1)).tolist()) for run in ours.runs.runs))
        assert len(known) == len(reference.all)
        if directory is not None:
            on_disk = [run.path for run in ours.runs.runs if run.path is not None]
            assert sorted(on_disk) == sorted(directory.iterdir())  # what was merged is gone
        else:
            assert ours.runs.sizes()[1] == 0
    assert spilled > 3
    assert merged > 12


def test_add_is_a_step_without_its_numbers():
    rng, one, other = random.Random(1), NGramHistory(2), NGramHistory(2)
    for rows, correct, problems in some_steps(rng, "token", 20):
        assert np.array_equal(one.measure(rows), other.step(rows, correct, problems), equal_nan=True)
        one.add(rows, correct)


def test_by_hand():
    history = NGramHistory(3)
    first = history.step([[1, 2, 3, 4], [1, 2, 3, 5], [7, 7]], np.array([True, False, False]))
    assert np.array_equal(first, [[0, 0, math.nan], [1, 1, math.nan]], equal_nan=True)  # siblings do not count
    assert np.array_equal(history.measure([[2, 3, 5, 1]]), [[0], [0.5]])  # 2 3 5: in a wrong rollout only
    assert np.array_equal(history.measure([[1, 2, 3, 4, 1, 2, 3]]), [[0.5], [0.5]])  # 1 2 3 once
    history.add([[9, 2, 3, 5]], np.array([True]))
    assert np.array_equal(history.measure([[2, 3, 5, 1]]), [[0.5], [0.5]])  # wrong first, correct later
    history.add([[2, 3, 5]], np.array([False]))
    assert np.array_equal(history.measure([[2, 3, 5, 1]]), [[0.5], [0.5]])  # and stays correct


def test_rollouts_may_be_any_sequence_of_integers():
    history = NGramHistory(2)
    history.add([[1, 2, 2**32 - 1]], np.array([True]))
    for kind in (list, tuple, np.array, torch.tensor, lambda row: np.array(row, np.uint32)):
        sharpening, discovery = history.measure([kind([1, 2, 2**32 - 1, 5])])
        assert (sharpening[0], discovery[0]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
        assert np.isnan(history.measure([kind([])])).all()


# Saving


def same_from_here(one, other, steps) -> None:
    for rows, correct, problems in steps:
        found = one.step(rows, correct, problems)
        assert np.array_equal(found, other.step(rows, correct, problems), equal_nan=True)


@pytest.mark.parametrize("memory", [0, 3000, 10**6])
@pytest.mark.parametrize("spill_again", [True, False])
def test_a_loaded_history_goes_on_the_same(small, tmp_path, memory, spill_again):
    rng = random.Random(memory)
    for at in range(0, 30, 3):
        steps = list(some_steps(rng, "token", 30))
        spill, saved, again = (tmp_path / f"{name}{at}" for name in ("spill", "saved", "again"))
        settings = {"history": "problem", "sample_rate": 0.9, "seed": 5}
        straight = NGramHistory(3, directory=spill, memory=memory, **settings)
        for step in steps[:at]:
            straight.step(*step)
        straight.save(saved)
        links = [run for run in straight.runs.runs if run.path is not None]
        assert all((saved / run.path.name).samefile(run.path) for run in links)
        loaded = NGramHistory.load(saved, directory=again if spill_again else None, memory=memory)
        assert loaded.settings == straight.settings
        shutil.rmtree(saved)  # checkpoints come and go
        same_from_here(straight, loaded, steps[at:])


def test_where_links_are_not_possible_runs_are_copied(small, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("another file system")

    steps = list(some_steps(random.Random(0), "token", 20))
    straight = NGramHistory(2, directory=tmp_path / "spill", memory=0)
    for step in steps[:10]:
        straight.step(*step)
    monkeypatch.setattr(os, "link", refuse)
    straight.save(tmp_path / "saved")
    loaded = NGramHistory.load(tmp_path / "saved", directory=tmp_path / "again", memory=0)
    assert not any((tmp_path / "saved" / path.name).samefile(path) for path in (tmp_path / "spill").iterdir())
    same_from_here(straight, loaded, steps[10:])


@pytest.mark.parametrize("memory", [0, 10**6])
def test_a_save_that_is_interrupted_anywhere_leaves_the_old_one(small, tmp_path, monkeypatch, memory):
    small(fan_in=8)
    steps = list(some_steps(random.Random(2), "token", 40))
    history, calls, failing_call = NGramHistory(3, directory=tmp_path / "spill", memory=memory), 0, 0
    for step in steps[:10]:
        history.step(*step)
    history.save(tmp_path / "0")
    later = [row for rows, _, _ in steps[30:] for row in rows]
    before = history.measure(later)
    for step in steps[10:30]:
        history.step(*step)
    after = history.measure(later)
    assert not np.array_equal(before, after, equal_nan=True)

    def failing(function):
        def call(*given, **named):
            nonlocal calls
            calls += 1
            if calls == failing_call:
                raise OSError("no space left on device")
            return function(*given, **named)

        return call

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (json, "dump")):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    found, failed = [], True
    while failed:
        saved = tmp_path / str(len(found) + 1)
        shutil.copytree(tmp_path / "0", saved)
        calls, failing_call = 0, len(found) + 1
        with contextlib.suppress(OSError):
            history.save(saved)
        failed = calls == failing_call
        found.append(NGramHistory.load(saved).measure(later))
        if failed:
            history.save(saved)  # after a failure as before one
            names = {f"{run.name}.npy" for run in history.runs.runs}
            assert {file.name for file in saved.iterdir()} == names | {ngrams.MANIFEST}
            assert np.array_equal(NGramHistory.load(saved).measure(later), after, equal_nan=True)
    old = [np.array_equal(measured, before, equal_nan=True) for measured in found]
    new = [np.array_equal(measured, after, equal_nan=True) for measured in found]
    assert old == sorted(old, reverse=True)
    assert new == [not is_old for is_old in old]
    assert sum(old) > 5
    assert sum(new) > 1


CHILD = """
import random, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_ngrams as t
t.hash_runs.FAN_IN = 2
folder = Path({folder!r})
metrics = t.NGramMetrics(directory=folder / "spill", memory=2000)
for i, (rows, correct, problems) in enumerate(t.some_steps(random.Random(4), "token", 400), 1):
    metrics.step(rows, [], correct, problems)
    metrics.save(folder / "partial")
    (folder / "partial").rename(folder / f"step_{{i:03d}}")
    print(i, flush=True)
"""


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path):
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) == 30:
                child.kill()
                break
    assert child.returncode == -signal.SIGKILL
    assert list((tmp_path / "spill").rglob("*.npy"))
    resumed, straight = NGramMetrics(directory=tmp_path / "spill", memory=2000), NGramMetrics()
    assert not list((tmp_path / "spill").rglob("*.npy"))  # what the killed process left
    last = max(tmp_path.glob("step_*"))
    resumed.load(last)
    for i, step in enumerate(some_steps(random.Random(4), "token", 400), 1):
        row = straight.step(step[0], [], *step[1:])
        if i > int(last.name[5:]):
            assert resumed.step(step[0], [], *step[1:]) == row
    assert row["sharpening/n3"] > 0


# Sampling, hashes, size


def test_a_sample_of_ngrams_is_measured_as_it_is_added():
    rng = np.random.default_rng(0)
    phrases = rng.integers(0, 50_000, (400, 5))
    steps = [(phrases[rng.integers(0, 400, (40, 40))].reshape(40, -1), rng.random(40) < 0.5) for _ in range(6)]
    whole, again = NGramHistory(4), NGramHistory(4, sample_rate=0.2, seed=1)
    sampled = [NGramHistory(4, sample_rate=0.2, seed=seed) for seed in range(30)]
    for rows, correct in steps:
        exact = np.mean(whole.step(list(rows), correct), 1)
        found = [np.mean(history.step(list(rows), correct), 1) for history in sampled]
        assert np.mean(found, 0) == pytest.approx(exact, abs=0.015)  # not biased
        assert np.array_equal(np.mean(again.step(list(rows), correct), 1), found[1])  # and seeded
    counts = [sum(run.count for run in history.runs.runs) for history in (whole, *sampled)]
    assert np.array(counts[1:]) == pytest.approx(0.2 * counts[0], rel=0.05)
    assert len(set(counts[1:])) > 1
    once = NGramHistory(4, sample_rate=0.2)
    once.add(list(steps[0][0]), np.ones(40, bool))
    assert np.array_equal(once.measure(list(steps[0][0])), [np.ones(40), np.zeros(40)])  # each n-gram or none
    few, nothing = NGramHistory(4, sample_rate=0.001).measure([range(9)])
    assert np.isnan([few, nothing]).all()


def hashes_of(grams: np.ndarray, seed: int = 0) -> np.ndarray:
    """The hash of each row of (k, n)."""
    count, n = grams.shape
    return ngram_hashes(
        list(grams.astype(np.uint64)), n, np.full(count, seed, np.uint64), np.zeros(count, np.uint64)
    )[0]  # fmt: skip


def test_structured_ngrams_do_not_collide():
    # every (a, b, c) of a cube of 128 ids, as one rollout of 2 million trigrams would have them
    a, b, c = np.meshgrid(*[np.arange(128, dtype=np.uint64)] * 3, indexing="ij")
    tokens = np.stack([a, b, c], -1).reshape(-1)
    hashes = ngram_hashes([tokens], 3, np.zeros(1, np.uint64), np.zeros(1, np.uint64))[0][::3]
    assert len(np.unique(hashes >> np.uint64(1))) == 128**3
    for shift in (56, 1, 30):  # any byte of it is uniform: chi-square of 255 degrees of freedom
        counts = np.bincount(((hashes >> np.uint64(shift)) & np.uint64(255)).astype(np.int64), minlength=256)
        assert (((counts - 8192) ** 2) / 8192).sum() < 400
    counts = np.arange(500_000, dtype=np.uint64)  # one rollout that counts, near both ends of the ids
    for start in (0, 2**32 - len(counts)):
        found = ngram_hashes([counts + np.uint64(start)], 2, np.zeros(1, np.uint64), np.zeros(1, np.uint64))[0]
        assert len(np.unique(found >> np.uint64(1))) == len(counts) - 1


def test_every_bit_of_an_ngram_moves_half_of_the_hash():
    grams = np.random.default_rng(0).integers(0, 2**32, (200, 4)).astype(np.uint64)
    before = hashes_of(grams)
    for place in range(4):
        for bit in range(32):
            flipped = grams.copy()
            flipped[:, place] ^= np.uint64(1 << bit)
            moved = np.bitwise_count(before ^ hashes_of(flipped))
            assert 29 < moved.mean() < 35
            assert moved.min() > 8
    assert (before != hashes_of(grams[:, ::-1])).all()
    assert (before != hashes_of(grams, seed=1)).all()


def test_hashes_are_the_same_everywhere():
    rows = encode([[0, 1, 2, 3, 2**32 - 1], [7]], "token")
    hashes, row = ngram_hashes(rows, 3, np.array([5, 6], np.uint64), np.array([0, 1], np.uint64))
    state, expected = 0, []
    for start in range(3):
        state = 5
        for token in rows[0][start : start + 3].tolist():  # splitmix64, in Python's integers
            state = (state + (token + 1) * 0x9E3779B97F4A7C15) % 2**64
            state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
            state ^= state >> 31
        expected.append(state)
    assert hashes.tolist() == expected
    assert row.tolist() == [0, 0, 0]
    words = [f"{h:016x}" for h in encode(["a  b\na"], "word")[0].tolist()]
    assert words == ["2f42665b399ef840", "754f854de3c27284", "2f42665b399ef840"]  # blake2b


def test_the_hashes_of_words_are_forgotten_and_made_again(monkeypatch):
    text, other = (" ".join(f"{letter}{i}" for i in range(100)) for letter in "ab")
    (before,) = encode([text], "word")
    monkeypatch.setattr(ngrams, "WORDS", 10)
    assert len(np.intersect1d(before, encode([other], "word")[0])) == 0
    assert len(ngrams._WORDS) <= 10
    assert np.array_equal(encode([text], "word")[0], before)


@pytest.mark.parametrize("directory", [None, "spill"])
def test_bytes_of_a_distinct_ngram(tmp_path, directory):
    rng = np.random.default_rng(0)
    runs, total = HashRuns(directory and tmp_path / directory, 2**20), 0
    for _ in range(40):
        words = np.sort(rng.integers(0, 2**63, 30_000, np.uint64) << np.uint64(1))
        runs.add([words])
        total += len(words)
        assert sum(runs.sizes()) < 12 * total
    written = sum(file.stat().st_size for file in (tmp_path / "spill").glob("*"))
    headers = 128 * sum(run.path is not None for run in runs.runs)
    assert written == runs.sizes()[1] + headers
    assert runs.sizes()[1] > 0 or directory is None


# Metrics


@pytest.mark.parametrize("unit", ["token", "word"])
def test_metrics_are_means_over_rollouts_that_have_ngrams(unit):
    metrics, references = NGramMetrics(unit, "problem"), {n: Reference(n, unit, "problem") for n in (3, 4)}
    names = set()
    for rows, correct, problems in some_steps(random.Random(3), unit, 30):
        given = ([], rows) if unit == "word" else (rows, [])
        found, expected = metrics.step(*given, correct, problems), {}
        for n, reference in references.items():
            for name, values in zip(("sharpening", "discovery"), reference.step(rows, correct, problems), strict=True):
                has = ~np.isnan(values)
                for key, of in (
                    (f"{name}/n{n}", has), (f"positive/{name}_n{n}", has & correct),
                    (f"negative/{name}_n{n}", has & ~correct),
                ):  # fmt: skip
                    if of.any():
                        expected[key] = values[of].mean()
        assert found == pytest.approx(expected)
        names |= found.keys()
    assert len(names) == 12


def test_metrics_of_nothing_are_absent():
    assert NGramMetrics().step([[1], []], ["", ""], torch.tensor([True, False]), ["a", "b"]) == {}
    assert NGramMetrics().step([], [], np.zeros(0, bool), []) == {}
    found = NGramMetrics().step([[1, 2, 3]], [""], torch.tensor([True]), ["a"])
    assert found == {
        "sharpening/n3": 0, "discovery/n3": 1, "positive/sharpening_n3": 0, "positive/discovery_n3": 1,
    }  # fmt: skip


# Mistakes


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: NGramHistory(0), "n is a whole number, 1 or more"),
        (lambda: NGramHistory(unit="letter"), "unit is token or word"),
        (lambda: NGramHistory(history="run"), "history is global or problem"),
        (lambda: NGramHistory(sample_rate=0), "above 0"),
        (lambda: NGramHistory(sample_rate=1.5), "at most 1"),
        (lambda: NGramHistory().measure(["a b c d"]), "sequences of token ids"),
        (lambda: NGramHistory(unit="word").measure([[1, 2, 3]]), "rollouts are strings"),
        (lambda: NGramHistory().measure([[1, -2, 3]]), "integers from 0"),
        (lambda: NGramHistory().measure([np.array([1, -2, 3])]), "integers from 0"),
        (lambda: NGramHistory().measure([[1, 2**32, 3]]), "integers from 0"),
        (lambda: NGramHistory().measure([[1.0, 2.0, 3.0]]), "integers from 0"),
        (lambda: NGramHistory().measure([np.array([1.0, 2.0])]), "integers from 0"),
        (lambda: NGramHistory().measure([[[1, 2], [3, 4]]]), "flat sequence"),
        (lambda: NGramHistory().measure([np.ones((2, 2), int)]), "flat sequence"),
        (lambda: NGramHistory().add([[1, 2, 3]], np.array([1])), "one bool a rollout"),
        (lambda: NGramHistory().add([[1, 2, 3]], np.array([True, False])), "one bool a rollout"),
        (lambda: NGramHistory(history="problem").measure([[1, 2, 3]]), "give problems"),
        (lambda: NGramHistory(history="problem").measure([[1, 2, 3]], ["a", "b"]), "give problems"),
    ],
)
def test_mistakes_are_named(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_a_mistake_leaves_the_history_as_it_was():
    metrics = NGramMetrics(history="problem")
    with pytest.raises(UserError):
        metrics.step([[1, 2, 3, 4]], [""], np.array([True]), [])
    assert metrics.step([[1, 2, 3, 4]], [""], np.array([True]), ["a"])["discovery/n3"] == 1


def test_directories_that_would_be_lost_are_refused(small, tmp_path):
    history = NGramHistory(2, directory=tmp_path / "spill", memory=0)
    history.add([[1, 2, 3]], np.array([True]))
    with pytest.raises(UserError, match="another directory"):
        history.save(tmp_path / "spill")
    history.save(tmp_path / "saved")
    with pytest.raises(UserError, match="holds a saved history"):
        NGramHistory(2, directory=tmp_path / "saved")
    with pytest.raises(UserError, match="holds a saved history"):
        NGramHistory.load(tmp_path / "saved", directory=tmp_path / "saved")
    with pytest.raises(UserError, match="no n-gram history was saved"):
        NGramHistory.load(tmp_path / "spill")
    (tmp_path / "spill" / "notes.txt").write_text("mine")
    NGramHistory(2, directory=tmp_path / "spill")
    assert [file.name for file in (tmp_path / "spill").iterdir()] == ["notes.txt"]  # only its own files


def test_what_was_saved_with_other_settings_or_is_damaged_is_refused(tmp_path):
    metrics = NGramMetrics("token", "problem")
    metrics.step([[1, 2, 3, 4]], [""], np.array([True]), ["a"])
    metrics.save(tmp_path)
    with pytest.raises(UserError, match="was saved with history 'problem', not 'global'"):
        NGramMetrics().load(tmp_path)
    file = next(tmp_path.glob("*.npy"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read"):
        NGramMetrics("token", "problem").load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        NGramMetrics("token", "problem").load(tmp_path)
