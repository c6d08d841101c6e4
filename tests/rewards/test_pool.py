"""The worker pool: what a verifier does to itself costs the item it was on, and nobody else anything."""

import contextlib
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil
import pytest

from polarity.errors import UserError
from polarity.rewards import Outcome, WorkerPool, resolve_verifier, verify_all

LIMIT = 0.7
SLACK = 1.0  # seconds, for a machine that is busy with other tests

VERIFIERS = r"""
import ctypes, os, re, signal, subprocess, sys, time
from polarity.rewards import Outcome


def endless():
    while True:
        pass


def power():  # in C, for years, without the interpreter
    return 9**9**9**9


def regex():
    return re.match(r"(a+)+$", "a" * 64 + "b")


def deaf():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
    while True:
        try:
            endless()
        except BaseException:
            pass


def hoard():
    return len(bytearray(2**33))


def hoard_slowly():
    held = []
    while True:
        held.append(bytearray(2**20))


def deep():
    return deep()


def fork_and_return():
    return (os.fork() + 1) > 0


def fork_and_stay():
    if os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    return True


def noise():
    print("printed\n" * 1000)
    os.write(1, b"written to 1\n")
    os.write(2, b"written to 2\n")
    sys.stderr.write("to stderr\n")
    sys.stdout.close()
    return True


def scribble():
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b"5\n")
        except OSError:
            pass
    return True


ACTS = {
    "endless": endless, "power": power, "regex": regex, "deaf": deaf, "hoard": hoard, "hoard slowly": hoard_slowly,
    "deep": deep, "fork and return": fork_and_return, "fork and stay": fork_and_stay, "noise": noise,
    "scribble": scribble, "raise": lambda: 1 / 0,
    "exit": lambda: sys.exit(3), "hard exit": lambda: os._exit(3), "interrupt": lambda: signal.raise_signal(2),
    "crash": lambda: ctypes.string_at(0), "abort": os.abort, "kill": lambda: os.kill(os.getpid(), 9),
    "none": lambda: None, "text": lambda: "yes", "nan": lambda: float("nan"),
    "odd status": lambda: Outcome(True, "fine", 1.0), "nan score": lambda: Outcome(True, "correct", float("nan")),
}


def check(response, gold, row=None):
    return ACTS[response]() if response in ACTS else response == gold


def slow(response, gold, row=None):
    time.sleep(0.02)
    return True


def full(response, gold, row=None):
    return Outcome(True, "correct", 0.25, extracted=response[::-1], strategy=row["hint"])


def score(response, gold, row=None):
    return float(response)


def size(response, gold, row=None):
    return Outcome(True, "correct", float(len(response)))


def process(response, gold, row=None):
    return Outcome(True, "correct", 1.0, extracted=str(os.getpid()))


def with_child(response, gold, row=None):
    child = subprocess.Popen(["sleep", "60"])
    open(gold, "w").write(str(child.pid))
    endless()


class Longer:
    def __init__(self, than=0):
        self.than = than

    def __call__(self, response, gold, row=None):
        return len(response) > self.than


text = "no verifier"
"""
TIMEOUTS = ("endless", "power", "regex", "deaf")
ERRORS = {
    "raise": "ZeroDivisionError: division by zero",
    "deep": "RecursionError: ",
    "hoard": "MemoryError: over the memory limit",
    "hoard slowly": "MemoryError: over the memory limit",
    "exit": "SystemExit: 3",
    "interrupt": "KeyboardInterrupt",
    "hard exit": "the verifier's process exited with code 3",
    "crash": "the verifier's process was killed by signal 11 (Segmentation fault)",
    "abort": "the verifier's process was killed by signal 6 (Aborted)",
    "kill": "the verifier's process was killed by signal 9 (Killed)",
    "scribble": "the verifier wrote to the worker's own socket",
    "none": "the verifier returned None; it must return an Outcome, a bool or a number",
    "text": "the verifier returned 'yes'",
    "nan": "the verifier returned nan",
    "odd status": "status='fine'",
    "nan score": "score=nan",
}


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A module of verifiers that workers can import."""
    folder = tmp_path_factory.mktemp("verifiers")
    (folder / "hostile_verifiers.py").write_text(VERIFIERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "hostile_verifiers"


@pytest.fixture(scope="module")
def pool(module: str) -> Iterator[WorkerPool]:
    with WorkerPool(f"{module}:check", workers=2, limit=LIMIT, memory_mb=96) as pool:
        pool.start()
        yield pool


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return done


def workers() -> list[psutil.Process]:
    """The processes of all pools of this process."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "polarity.rewards.worker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


# --- one item


@pytest.mark.parametrize("act", TIMEOUTS)
def test_what_hangs_times_out(pool: WorkerPool, act: str):
    started = time.monotonic()
    assert pool.check(act, "") == Outcome(False, "timeout", 0.0)
    assert time.monotonic() - started < LIMIT + SLACK
    assert pool.check("4", "4") == Outcome(True, "correct", 1.0)


@pytest.mark.parametrize(("act", "why"), ERRORS.items())
def test_what_fails_is_an_error(pool: WorkerPool, act: str, why: str):
    outcome = pool.check(act, "")
    assert (outcome.correct, outcome.status, outcome.score) == (False, "error", 0.0)
    assert outcome.extracted
    assert why in outcome.extracted
    assert pool.check("4", "4") == Outcome(True, "correct", 1.0)


def test_output_does_not_disturb_and_goes_to_standard_error(module: str, capfd: pytest.CaptureFixture[str]):
    with WorkerPool(f"{module}:check", workers=1) as pool:
        assert [pool.check(text, "4").status for text in ("noise", "4", "5")] == ["correct", "correct", "wrong"]
    out, err = capfd.readouterr()
    assert out == ""
    assert all(text in err for text in ("printed\n", "written to 1\n", "written to 2\n", "to stderr\n"))


@pytest.mark.parametrize("act", ["fork and return", "fork and stay"])
def test_only_the_worker_itself_answers(pool: WorkerPool, act: str):
    items = [(act, "")] * 5 + [("4", "4"), ("4", "5")] * 20
    assert [o.correct for o in pool.check_many(items)] == [True] * 5 + [True, False] * 20


def test_verdicts(module: str):
    with WorkerPool(f"{module}:full", workers=1) as pool:
        found = pool.check("ab\n\x00\ud800 \N{SNOWMAN}", "", {"hint": "backwards"})
        assert found == Outcome(True, "correct", 0.25, extracted="\N{SNOWMAN} \ud800\x00\nba", strategy="backwards")
    with WorkerPool(f"{module}:score", workers=1) as pool:
        assert pool("0.75", "") == Outcome(True, "correct", 0.75)
        assert pool("-1", "") == Outcome(False, "wrong", -1.0)
    with WorkerPool(f"{module}:Longer", settings={"than": 2}, workers=1) as pool:
        assert [o.correct for o in pool.check_many([("ab", ""), ("abc", "", {"id": "1"})])] == [False, True]


def test_very_long_responses(module: str):
    with WorkerPool(f"{module}:size", workers=1, limit=5.0) as pool:
        lengths = [3, 10**8, 5, 2 * 10**6, 2 * 10**6, 7]
        assert [o.score for o in pool.check_many([("x" * n, "") for n in lengths])] == lengths


# --- many items


def test_in_order_whatever_the_size(pool: WorkerPool):
    assert pool.check_many([]) == []
    items = [(str(i), str(i - i % 3)) for i in range(5000)]
    assert [o.correct for o in pool.check_many(iter(items))] == [i % 3 == 0 for i in range(5000)]


def test_a_bad_item_of_a_batch_costs_only_itself(pool: WorkerPool):
    items = [("4", "4")] * 600
    bad = {0: "endless", 130: "hard exit", 131: "hoard", 132: "raise", 350: "power", 599: "crash"}
    for index, act in bad.items():
        items[index] = (act, "4")
    found = pool.check_many(items)
    assert {i: o.status for i, o in enumerate(found) if o.status != "correct"} == {
        i: "timeout" if act in TIMEOUTS else "error" for i, act in bad.items()
    }
    assert until(lambda: len(workers()) >= 2)  # all replaced


def test_items_that_cannot_be_sent(pool: WorkerPool):
    with pytest.raises(UserError, match="an item cannot be sent to its process"):
        pool.check("4", "4", {"made by": lambda: None})
    with pytest.raises(UserError, match="an item cannot be sent to its process"):
        pool.check(None, "4")  # type: ignore[arg-type]
    assert pool.check("4", "4").correct


# --- several threads


@pytest.mark.parametrize("size", [1, 2])
def test_a_thread_does_not_wait_for_what_another_hangs_in(module: str, size: int):
    """Its checks are done before the first of the items that hang in all of the workers has timed out."""
    with WorkerPool(f"{module}:check", workers=size, limit=4.0) as pool:
        pool.start()

        def hang() -> None:
            with contextlib.suppress(RuntimeError):  # closed
                pool.check_many([("endless", "")] * (2 * size))

        before = set(workers())
        other = in_thread(hang)
        time.sleep(0.2)
        found = [*pool.check_many([("4", "4")] * 90), *(pool.check("4", "5") for _ in range(10))]
        assert before <= set(workers())
    other.join()
    assert [o.correct for o in found] == [True] * 90 + [False] * 10


def test_a_thread_does_not_wait_for_the_batch_of_another(module: str):
    """100 items of 20 ms are one chunk to the only worker; it hands back what it has not begun."""
    with WorkerPool(f"{module}:slow", workers=1) as pool:
        pool.start()
        finished = []
        other = in_thread(lambda: finished.append(len(pool.check_many([("", "")] * 100))))
        time.sleep(0.1)
        assert pool.check("", "").correct
        assert not finished
        other.join()
        assert finished == [100]


def test_many_threads(pool: WorkerPool):
    found: dict[int, list[bool]] = {}

    def run(number: int) -> None:
        items = [(str(i % number), "0") for i in range(200)]
        found[number] = [o.correct for o in pool.check_many(items)]

    for thread in [in_thread(lambda n=n: run(n)) for n in range(1, 13)]:  # type: ignore[misc]
        thread.join()
    assert found == {n: [i % n == 0 for i in range(200)] for n in range(1, 13)}


def test_a_replacement_starts_before_the_worker_is_killed(module: str):
    with WorkerPool(f"{module}:check", workers=1, limit=2.0) as pool:
        pool.start()
        before = set(workers())
        other = in_thread(lambda: pool.check("endless", ""))
        assert until(lambda: len(set(workers()) - before) == 1, 1.9)
        other.join()
        assert pool.check("4", "4").correct
        assert until(lambda: len(before - set(workers())) == 1)


def test_interrupted_while_it_waits(pool: WorkerPool):
    """Ctrl-C in the calling thread: the call ends at once, and the pool goes on."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            pool.check_many([("endless", "")] * 50)
    finally:
        signal.signal(signal.SIGALRM, previous)
    started = time.monotonic()
    assert pool.check("4", "4").correct
    assert time.monotonic() - started < LIMIT + SLACK


# --- start and end


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:check", "no module 'no_such_module'"),
        ("{}:chekc", "has no 'chekc'; did you mean 'check'"),
        ("{}:text", "is not callable; write a function"),
        ("__main__:check", "put it in a file of its own"),
    ],
)
def test_targets_that_are_refused(module: str, target: str, message: str):
    name = target.format(module)
    with pytest.raises(UserError, match=message):
        WorkerPool(name).start()
    with pytest.raises(UserError, match=message):
        resolve_verifier(name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", "importing bad_module failed: ZeroDivisionError"),
        ("import sys; sys.exit(1)", "SystemExit: 1"),
        ("import os; os._exit(7)", "cannot be loaded: the verifier's process exited with code 7"),
    ],
)
def test_modules_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str):
    """Every call says so, and one made after the module is mended works."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad_module.py").write_text(source)
    with WorkerPool("bad_module:check", workers=2) as pool:
        for _ in range(2):
            with pytest.raises(UserError, match=re.escape(message)):
                pool.check_many([("", "")] * 10)
        (tmp_path / "bad_module.py").write_text("def check(response, gold, row=None):\n    return True\n# mended")
        assert pool.check("", "").correct


def test_settings_are_for_classes(module: str):
    with pytest.raises(UserError, match="takes no settings"):
        WorkerPool(f"{module}:check", settings={"than": 2}).start()
    with pytest.raises(UserError, match="unexpected keyword argument 'then'"):
        WorkerPool(f"{module}:Longer", settings={"then": 2}).start()
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="more than 0, and at most a day"):
            WorkerPool(f"{module}:check", limit=limit)
    with pytest.raises(UserError, match="both are at least 1"):
        WorkerPool(f"{module}:check", workers=0)


def test_closed_while_in_use(module: str):
    pool = WorkerPool(f"{module}:check", workers=2, limit=30)
    pool.close()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            pool.check("endless", "")
        except RuntimeError as error:
            raised.append(error)

    other = in_thread(run)
    time.sleep(0.3)
    pool.close()
    other.join()
    assert "closed" in str(raised[0])
    assert pool.check("4", "4").correct  # starts anew
    pool.close()


def test_ends_with_the_last_reference_to_it(module: str):
    before = set(workers())
    pool = WorkerPool(f"{module}:check", workers=1)
    pool.start()
    started = set(workers()) - before
    assert len(started) == 1
    del pool
    assert until(lambda: started.isdisjoint(workers()))


def test_what_a_verifier_started_ends_with_its_worker(module: str, tmp_path: Path):
    note = tmp_path / "pid"
    with WorkerPool(f"{module}:with_child", workers=1, limit=LIMIT) as pool:
        assert pool.check("", str(note)).status == "timeout"
    assert until(lambda: gone(int(note.read_text())))


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[2] / "docs" / "verifiers.md").read_text()
    example = re.search(r"```python\n(# my_rewards\.py.*?)```", page, re.DOTALL)
    assert example
    (tmp_path / "my_rewards.py").write_text(example[1])
    monkeypatch.chdir(tmp_path)
    verifier = resolve_verifier("my_rewards:last_word", limit=10.0, rewards={"boxed_format": 0.5})
    row = {"id": "1", "problem": "2+2?", "answer": "4"}
    found = verify_all(verifier, ["it is 4", r"\boxed{4}, or 5", ""], [row] * 3)
    assert [(o.status, o.score) for o in found] == [("correct", 1.0), ("wrong", 0.5), ("wrong", 0.0)]


def test_pickled_as_its_settings(module: str):
    pool = WorkerPool(f"{module}:Longer", settings={"than": 2}, workers=1, limit=1.5)
    with pickle.loads(pickle.dumps(pool)) as copy:
        assert (copy.limit, copy.workers) == (1.5, 1)
        assert [copy.check(text, "").correct for text in ("ab", "abc")] == [False, True]


def test_a_fork_has_workers_of_its_own(module: str):
    with WorkerPool(f"{module}:process", workers=1) as pool:
        ours = pool.check("", "").extracted
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, str(pool.check("", "").extracted).encode())
            pool.close()
            os._exit(0)
        os.waitpid(child, 0)
        theirs = os.read(reading, 100).decode()
        assert theirs != ours
        assert pool.check("", "").extracted == ours
        assert until(lambda: gone(int(theirs)))
