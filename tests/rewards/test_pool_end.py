"""Whoever uses a pool, and however that process ends: no worker, and nothing that a verifier started, outlives it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# A script as people write them: no main guard, everything on the top level, a pool that is never closed.
SCRIPT = """
import json, os, sys, threading, time
import psutil
from polarity.rewards import WorkerPool

pool = WorkerPool("own_verifier:check", workers=2, limit=60)
pool.start()
assert [o.correct for o in pool.check_many([("4", "4"), ("4", "5")] * 50)] == [True, False] * 50
for act in ("with a child", "in C"):
    threading.Thread(target=pool.check, args=(act, ""), daemon=True).start()
while not (os.path.exists("child") and os.path.exists("in C")):
    time.sleep(0.01)
print(json.dumps([child.pid for child in psutil.Process().children(recursive=True)]), flush=True)
input()
"""
VERIFIER = """
import subprocess, time


def check(response, gold, row=None):
    if response == "with a child":
        child = subprocess.Popen(["sleep", "60"])
        open("child", "w").close()
        time.sleep(60)
    if response == "in C":
        open("in C", "w").close()
        return 9**9**9**9
    return response == gold
"""
ENDS = {
    "killed": "time.sleep(60)",
    "terminated": "time.sleep(60)",
    "interrupted": "time.sleep(60)",
    "finished": "",
    "raised": "raise SystemError('of its own')",
    "hard exit": "os._exit(0)",
    "closed": "pool.close(); print(len(psutil.Process().children(recursive=True)), flush=True); time.sleep(60)",
    "forked": "os._exit(0) if os.fork() else time.sleep(3)",  # the fork lives on, with copies of the parent's sockets
}
SIGNALS = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM, "interrupted": signal.SIGINT}


def alive(process: psutil.Process) -> bool:
    """A zombie is not: it is only not yet reaped."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left(end: str, tmp_path: Path):
    (tmp_path / "own_verifier.py").write_text(VERIFIER)
    (tmp_path / "script.py").write_text(SCRIPT + ENDS[end])
    with subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as script:
        assert script.stdin
        assert script.stdout
        left = [psutil.Process(pid) for pid in json.loads(script.stdout.readline())]
        assert len(left) >= 5  # two workers with a keeper each, a child
        script.stdin.write("\n")
        script.stdin.flush()
        if end == "closed":
            assert script.stdout.readline() == "0\n"
            script.kill()
        elif end in SIGNALS:
            script.send_signal(SIGNALS[end])
        script.wait(10)
    end_of_wait = time.monotonic() + 2
    while any(map(alive, left)) and time.monotonic() < end_of_wait:
        time.sleep(0.01)
    assert not [process for process in left if alive(process)]


def test_in_a_notebook(tmp_path: Path):
    """Cells run inside an event loop, there is no file, and the verifier was written a moment ago."""
    cells = """
import asyncio, pathlib
pathlib.Path("later.py").write_text("def check(response, gold, row=None): return response == gold")
from polarity.rewards import resolve_verifier
async def cell():
    verifier = resolve_verifier("later:check", limit=1.0)
    here = verifier("4", "4")
    there = await asyncio.to_thread(verifier.check_many, [("4", "4"), ("4", "5")])
    print(here.correct, [o.correct for o in there])

asyncio.run(cell())
"""
    done = subprocess.run(
        [sys.executable, "-i", "-"], input=cells, cwd=tmp_path, capture_output=True, text=True, timeout=20,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    assert "True [True, False]" in done.stdout, done.stderr


def test_a_worker_that_is_killed_from_outside_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from polarity.rewards import WorkerPool

    (tmp_path / "named_verifier.py").write_text("def check(response, gold, row=None): return response == gold")
    monkeypatch.syspath_prepend(tmp_path)
    with WorkerPool("named_verifier:check", workers=1) as pool:
        pool.start()
        for child in psutil.Process().children(recursive=True):
            if "polarity.rewards.worker" in " ".join(child.cmdline()):
                child.kill()
        time.sleep(0.2)
        assert pool.check("4", "4").correct
