"""The process that runs a verifier for `polarity.rewards.pool`, which starts it; nothing else imports it.

It speaks over one socket of its own, so that what the verifier prints goes to standard error and nowhere else. In come
frames (8 bytes of length, then a pickle): first a Hello, then chunks, lists of (response, gold, row). Out go lines of
JSON, which cannot make the parent run anything: ["ready"] or ["failed", reason], then one reply for each item,
[then, correct, status, score, extracted, strategy], where `then` says what the worker does next:

    more     the next item of the chunk
    idle     waits for another chunk; items without a reply were not begun, and are the parent's again
    spent    the same, but it ran out of memory and is to be replaced
"""

import json
import os
import pickle
import socket
import struct
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polarity.errors import UserError
from polarity.plugins import load_plugin
from polarity.rewards.outcome import Outcome, Verifier, as_outcome

LENGTH = struct.Struct("<Q")
QUANTUM_S = 0.05  # a worker does not begin another item of its chunk after this time: somebody else may be waiting
REASON_CHARS = 500


@dataclass(frozen=True)
class Hello:
    """What a worker is told first. target: module:NAME; memory_mb: what a check may allocate, on top of the modules."""

    target: str
    settings: Mapping[str, Any]
    memory_mb: int


def main(descriptor: int) -> None:
    """Serve the parent at the other end of this socket until it is gone. Does not return."""
    del sys.argv[1:]  # modules read it
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    os.register_at_fork(after_in_child=connection.close)  # a verifier that forks: only this process may answer
    code = 1
    try:
        _run(connection)
        code = 0
    except OSError:
        code = 0  # the parent is gone, or this is a fork of the worker
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # exit handlers and threads of the verifier's do not keep it


def _run(connection: socket.socket) -> None:
    hello: Hello = pickle.loads(_read_frame(connection))
    try:
        verifier = load_verifier(hello.target, hello.settings)
        limit_memory(hello.memory_mb)
    except BaseException as error:  # a module that calls sys.exit, too
        why = str(error) if isinstance(error, UserError) else f"verifier {hello.target!r}: {reason(error)}"
        connection.sendall(_line("failed", why))
        return
    connection.sendall(_line("ready"))
    while True:
        _serve(connection, verifier, pickle.loads(_read_frame(connection)))


def load_verifier(target: str, settings: Mapping[str, Any]) -> Verifier:
    """What `module:NAME` names, ready to call; a class is instantiated with `settings`."""
    found = load_plugin(target, "verifier")
    if isinstance(found, type):
        found = found(**settings)
    elif settings:
        raise UserError(f"verifier {target!r} takes no settings: it is not a class")
    if not callable(found):
        raise UserError(f"verifier {target!r} is not callable; write a function (response, gold, row=None)")
    return found


def limit_memory(memory_mb: int) -> None:
    """Let this process allocate so much address space from here on (Linux), and leave no core files."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        limit, hard = now + memory_mb * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def judge(verifier: Verifier, response: str, gold: str, row: Mapping[str, Any] | None) -> tuple[Outcome, bool]:
    """The verdict, and whether memory ran out. Whatever the verifier raises or returns, it fails on this item only."""
    try:
        return _plain(as_outcome(verifier(response, gold, row=row))), False
    except MemoryError:
        pass  # the message is made below, where the frames that hold the memory are gone
    except BaseException as error:
        return Outcome(False, "error", 0.0, extracted=reason(error)), False
    return Outcome(False, "error", 0.0, extracted="MemoryError: over the memory limit"), True


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:REASON_CHARS]


def _plain(outcome: Outcome) -> Outcome:
    """With the types that JSON keeps."""
    extracted, strategy = (None if text is None else str(text) for text in (outcome.extracted, outcome.strategy))
    return Outcome(bool(outcome.correct), outcome.status, float(outcome.score), extracted, strategy)


def _serve(connection: socket.socket, verifier: Verifier, items: list[tuple[Any, ...]]) -> None:
    stop = time.monotonic() + QUANTUM_S
    last = len(items) - 1
    for i, item in enumerate(items):
        found, spent = judge(verifier, *item)
        then = "spent" if spent else "idle" if i == last or time.monotonic() > stop else "more"
        reply = _line(then, found.correct, found.status, found.score, found.extracted, found.strategy)
        connection.sendall(reply)
        if then != "more":
            return


def _line(*values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _read_frame(connection: socket.socket) -> bytearray:
    (length,) = LENGTH.unpack(_read(connection, LENGTH.size))
    return _read(connection, length)


def _read(connection: socket.socket, length: int) -> bytearray:
    """Exactly `length` bytes. Raises ConnectionError at the end of the stream."""
    data = bytearray(length)
    rest = memoryview(data)
    while rest:
        count = connection.recv_into(rest)
        if not count:
            raise ConnectionError("the parent closed the socket")
        rest = rest[count:]
    return data
