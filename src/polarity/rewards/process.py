"""A worker process as its parent sees it: started, written to and read from without blocking, killed with all it began.

A worker sits in a process group of its own with a keeper: a shell that waits for the end of a lifeline, a socket whose
other end only the parent holds. When the parent is gone, however it went, the keeper kills the group: the worker, even
one stuck in C code, and whatever the verifier started. A parent-death signal would miss the latter, would come when the
thread that started the worker ends, and exists on Linux only.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from polarity.rewards.worker import LENGTH

KEEPER = ["/bin/sh", "-c", "read _; kill -9 0"]
BOOT = "import sys; sys.path[:] = sys.argv[2:]; from polarity.rewards.worker import main; main(int(sys.argv[1]))"
READ_BYTES = 2**18
EXIT_S = 0.25  # how long a worker that closed its socket may take to leave an exit code
STRAY = "the verifier wrote to the worker's own socket"


class Closed(Exception):
    """The worker ended, or wrote what is no reply; the message says which."""


class WorkerProcess:
    """`since`: when the worker last showed progress (time.monotonic); what has not moved for the limit is killed."""

    def __init__(self, lifeline: socket.socket, path: list[str], directory: str):
        """lifeline: what the keeper reads from; path, directory: the worker's sys.path and working directory."""
        self.connection, theirs = socket.socketpair()
        self.connection.setblocking(False)
        self._outgoing, self._incoming = memoryview(b""), bytearray()
        self.since = time.monotonic()
        quiet = subprocess.DEVNULL
        self._keeper = subprocess.Popen(
            KEEPER, stdin=lifeline.fileno(), stdout=quiet, stderr=quiet, cwd="/", process_group=0
        )
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-c", BOOT, str(theirs.fileno()), *path],
                stdin=quiet,
                stdout=2,  # what a verifier prints must not end up in what its caller prints
                pass_fds=[theirs.fileno()],
                cwd=directory,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                process_group=self._keeper.pid,
            )
        except BaseException:
            self._keeper.kill()
            self._keeper.wait()
            self.connection.close()
            raise
        finally:
            theirs.close()

    @property
    def sending(self) -> bool:
        return bool(self._outgoing)

    def send(self, frame: bytes) -> None:
        """Begin to send; `flush` sends on what the socket does not take at once. Resets the clock."""
        self._outgoing = memoryview(LENGTH.pack(len(frame)) + frame)
        self.since = time.monotonic()
        self.flush()

    def flush(self) -> None:
        with suppress(BlockingIOError, ConnectionError):  # a worker that is gone shows when it is read from
            while self._outgoing:
                self._outgoing = self._outgoing[self.connection.send(self._outgoing) :]
                self.since = time.monotonic()

    def receive(self) -> list[list[Any]]:
        """The messages that came. Resets the clock. Raises Closed where the stream ends or holds something else."""
        try:
            data = self.connection.recv(READ_BYTES)
        except BlockingIOError:
            return []
        except ConnectionError:
            data = b""
        if not data:
            raise Closed(self._epitaph())
        self._incoming += data
        if b"\n" not in data:
            return []
        *lines, rest = self._incoming.split(b"\n")
        self._incoming = rest
        self.since = time.monotonic()
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as error:
            raise Closed(STRAY) from error
        if not all(isinstance(message, list) and message for message in messages):
            raise Closed(STRAY)
        return messages

    def _epitaph(self) -> str:
        try:
            code = self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            return "the verifier closed the worker's own socket"
        if code < 0:
            return f"the verifier's process was killed by signal {-code} ({signal.strsignal(-code)})"
        return f"the verifier's process exited with code {code}"

    def kill(self) -> None:
        """End the worker and all of its group; `gone` reaps them."""
        with suppress(ProcessLookupError, PermissionError):  # macOS: not permitted when all of the group is dead
            os.killpg(self._keeper.pid, signal.SIGKILL)
        self.connection.close()

    def gone(self) -> bool:
        """True once both are dead and reaped. Does not wait."""
        return all([self._process.poll() is not None, self._keeper.poll() is not None])


def search_path() -> list[str]:
    """sys.path of this process, for a worker: absolute, whatever directory the worker starts in."""
    return [str(Path(entry).absolute()) for entry in sys.path]
