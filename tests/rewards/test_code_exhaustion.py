"""Programs that take all they can get: processes, memory, disk, output, time; with the filter and without it."""

import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from sandbox_watch import Watch

from polarity.rewards import sandbox
from polarity.rewards.sandbox_runner import THREADS

pytestmark = pytest.mark.usefixtures("bubblewrap")

MEBIBYTE = 1 << 20


FORK_BOMB = """
import os, time
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.001)
"""


def test_fork_bomb(watch: Watch, layers: str) -> None:
    run = watch.run(FORK_BOMB, seconds=0.7)
    assert run.ended == "timeout"
    assert 1 <= watch.processes <= (6 if layers == "filter" else THREADS + 6)  # + setpriv, bubblewrap and its init


def test_thread_bomb(watch: Watch, layers: str) -> None:
    code = """
import threading, time
while True:
    try:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    except (RuntimeError, MemoryError):
        time.sleep(0.1)
"""
    run = watch.run(code, seconds=0.7, memory_mb=1024)
    assert run.ended == "timeout"
    assert 1 < watch.threads <= THREADS


@pytest.mark.parametrize(
    "code",
    [
        "x = b'x' * (3 << 30)",
        "x = []\nwhile True:\n    x.append(b'x' * (1 << 20))",
        "import mmap\nx = []\nwhile True:\n    x.append(mmap.mmap(-1, 1 << 20))\n    x[-1].write(b'x' * (1 << 20))",
        "x = 'x'\nwhile True:\n    x += x",
    ],
    ids=["3 GB at once", "bit by bit", "shared maps", "doubling"],
)
def test_memory(watch: Watch, layers: str, code: str) -> None:
    run = watch.run(code, memory_mb=256)
    assert run.code != 0
    assert watch.resident < 400 * MEBIBYTE


@pytest.mark.parametrize(
    "code",
    [
        "import os\nx = [os.memfd_create(str(i)) for i in range(50)]\nfor f in x:\n    os.write(f, b'x' * (60 << 20))",
        "import ctypes\nprint(ctypes.CDLL(None).shmget(0, 3 << 30, 0o1666))\nraise SystemExit",
        "import os\nwhile True:\n    if os.fork() == 0:\n        x = b'x' * (200 << 20)\n        input()",
    ],
    ids=["memfd", "System V", "processes"],
)
def test_memory_outside_the_address_space(watch: Watch, code: str) -> None:
    run = watch.run(code, memory_mb=256)
    assert run.code != 0 or run.stdout.strip() == b"-1"
    assert watch.resident < 400 * MEBIBYTE


def test_disk(watch: Watch, layers: str) -> None:
    name = f"polarity-attack-{uuid.uuid4().hex}"
    code = f"""
import os
total = 0
for folder in ("/tmp", "/", "/dev", "/dev/shm", "/usr/lib", "/packages", "/root", "/var/tmp"):
    for i in range(100):
        try:
            with open(f"{{folder}}/{name}-{{i}}", "wb", buffering=0) as file:
                while total < 3 << 30:
                    total += file.write(b"x" * (1 << 20))
        except OSError:
            break
print(total)
"""
    run = watch.run(code)
    assert 0 < int(run.stdout) <= sandbox.TMPFS_BYTES
    assert not list(Path("/tmp").glob(name + "*"))


def test_one_large_file(watch: Watch, layers: str) -> None:
    code = """
import os, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = os.open("large", os.O_CREAT | os.O_RDWR)
for grow in (lambda: os.truncate(file, 10 << 30), lambda: os.posix_fallocate(file, 0, 10 << 30)):
    try:
        grow()
    except OSError:
        pass
print(os.fstat(file).st_size)
"""
    assert int(watch.run(code).stdout) <= sandbox.TMPFS_BYTES


@pytest.mark.parametrize("file", [1, 2])
def test_output_flood(watch: Watch, layers: str, file: int) -> None:
    run = watch.run(f"import os\nwhile True:\n    os.write({file}, b'x' * 65536)", seconds=20.0)
    assert run.ended == "flood"
    assert len(run.stdout) + len(run.stderr) <= 2 * MEBIBYTE


@pytest.mark.parametrize(
    "code",
    [
        "import time\ntime.sleep(1000)",
        "while True:\n    pass",
        "import signal\nfor n in range(1, 65):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    signal.pause()",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)",
        "import os\nos.close(0)\nos.close(1)\nos.close(2)\nwhile True:\n    pass",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
        "import atexit, time\natexit.register(time.sleep, 1000)",
        "10 ** 10 ** 9",
        "import re\nre.match('(a+)+$', 'a' * 50 + 'b')",
    ],
    ids=["sleep", "loop", "no signals", "stopped", "stopped parent", "closed files", "thread", "at exit", "C", "regex"],
)
def test_a_program_that_does_not_end(watch: Watch, code: str) -> None:
    assert watch.run(code, seconds=0.3).ended in ("timeout", "exit")  # 10 ** 10 ** 9 may run into the memory limit


DAEMON = """
import os, time
for _ in range(2):
    try:
        if os.fork():
            break
    except OSError as error:
        print(error)
    os.setsid() if os.getpid() != os.getsid(0) else None
else:
    time.sleep(1000)
"""


def test_daemons_do_not_outlive_the_run(watch: Watch, layers: str) -> None:
    watch.run(DAEMON, seconds=0.5)
    assert watch.processes > 0  # the fixture sees that they are gone


def test_the_sandbox_dies_with_its_parent(watch: Watch) -> None:
    """A trainer that is killed leaves nothing behind, not even while a program runs."""
    mark = watch.mark.decode().partition("=")[2]
    parent = f"""
from polarity.rewards import sandbox
sandbox.ENVIRONMENT["POLARITY_TEST_MARK"] = {mark!r}
with sandbox.Session(sandbox.find_sandbox(), sandbox.Program("import time; time.sleep(1000)", seconds=60)) as session:
    session.run(b"", 1)
"""
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        deadline = time.monotonic() + 30.0
        while len(watch.marked()) < 4 and time.monotonic() < deadline:  # bubblewrap, its init, the runner, the program
            time.sleep(0.01)
        assert len(watch.marked()) >= 4
        process.kill()
    assert process.returncode == -signal.SIGKILL
