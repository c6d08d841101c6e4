"""Answers made to hang a grader: judged within the limit, from any thread, and nothing is left running."""

import threading
import time

import psutil
import pytest
from hostile_answers import HOSTILE

from polarity.rewards import MathVerifier

LIMIT, SLACK = 1.0, 1.0  # seconds; the default limit is 3


@pytest.fixture(scope="module")
def verifier():
    made = MathVerifier(limit=LIMIT, workers=2)
    made.start()
    yield made
    made.close()


def workers():
    """The worker processes that are there."""
    children = psutil.Process().children(recursive=True)
    return [process for process in children if "rewards.worker" in " ".join(process.cmdline())]


def judge(verifier, name, gold, found):
    started = time.monotonic()
    outcome = verifier(HOSTILE[name], gold)
    found[name] = outcome, time.monotonic() - started


def test_there_are_enough():
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize("thread", ["main", "another"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_never_right_and_never_late(verifier, name, thread):
    found = {}
    if thread == "main":
        judge(verifier, name, "7", found)
    else:
        other = threading.Thread(target=judge, args=(verifier, name, "7", found))
        other.start()
        other.join(LIMIT + SLACK + 5)
        assert not other.is_alive()
    outcome, seconds = found[name]
    assert not outcome.correct
    assert outcome.status in ("wrong", "unparsed", "timeout", "error")
    assert seconds < LIMIT + SLACK


def test_others_are_not_held_up_and_nothing_is_left_running(verifier):
    before = set(workers())
    verifier = MathVerifier(limit=LIMIT, workers=2, cache=False)
    verifier.start()
    batch = threading.Thread(target=verifier.check_many, args=([(text, "x+1") for text in HOSTILE.values()],))
    batch.start()
    slowest = 0.0
    for x in "abcdhjklmnopqrstuvwxyz":  # pairs that take a worker
        started = time.monotonic()
        assert verifier(f"\\boxed{{1-\\cos^2 {x}}}", f"\\sin^2 {x}").correct
        slowest = max(slowest, time.monotonic() - started)
    batch.join(60)
    assert not batch.is_alive()
    assert slowest < LIMIT + SLACK
    verifier.close()
    until = time.monotonic() + 5
    while set(workers()) - before and time.monotonic() < until:
        time.sleep(0.05)
    assert not set(workers()) - before
