"""Verifiers in worker processes that are killed when they hang, whatever they hang in.

A verifier is somebody's code run on a model's text: it loops, eats memory, exits, crashes. None of that may cost more
than the one item it happened on. So verifiers run in persistent processes (`polarity.rewards.worker`), and the parent
holds the clock: a worker that gives no reply within the limit is killed, its item has timed out, and the rest of what
it had been sent goes to another worker.

One thread of the pool's own (`polarity.rewards.dispatcher`) does all of that; threads that call only wait for it.

POSIX only. Memory is limited on Linux only.
"""

import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from polarity.errors import UserError
from polarity.rewards.dispatcher import SPAWN, Dispatcher, Job
from polarity.rewards.outcome import Item, Outcome
from polarity.rewards.worker import Hello

DAY_S = 86400.0


class WorkerPool:
    """A verifier, `(response, gold, row=None) -> Outcome`, that runs in worker processes and cannot hang.

    target: `module:NAME`, imported in the workers; a function or other callable is used as it is, a class is
    instantiated with `settings`. workers: how many check at a time, by default one for each core, from 2 to 8, and one
    more where a thread would have none; they start when they are needed, or with `start`. limit: seconds of wall-clock
    time for one item. memory_mb: what a worker may allocate on top of its modules (Linux).

    An item over the limit has status timeout. One whose verifier raises, runs out of memory, exits or crashes has
    status error, with what happened in `extracted`. Results are in the order of the items. Calls may come from several
    threads. A fork of the process has its own workers. Workers end with the pool, or with the process, however it ends.
    """

    def __init__(
        self,
        target: str,
        *,
        settings: Mapping[str, Any] | None = None,
        workers: int | None = None,
        limit: float = 3.0,
        memory_mb: int = 2048,
    ):
        if target.startswith("__main__:"):
            raise UserError(f"verifier {target!r}: a worker cannot import __main__; put it in a file of its own")
        if not 0 < limit <= DAY_S:
            raise UserError(f"the limit of verifier {target!r} is {limit} s; give more than 0, and at most a day")
        if memory_mb < 1 or (workers is not None and workers < 1):
            raise UserError(f"memory_mb is {memory_mb} and workers {workers}; both are at least 1")
        self.target, self.limit, self.memory_mb = target, limit, memory_mb
        self.workers = workers or min(8, max(2, _cores()))
        self._hello = Hello(target, dict(settings or {}), memory_mb)
        self._lock = threading.Lock()
        self._dispatcher: Dispatcher | None = None
        self._stop: weakref.finalize[..., Any] | None = None
        _POOLS.add(self)

    def check_many(self, items: Iterable[Item]) -> list[Outcome]:
        """One Outcome an item, (response, gold) or (response, gold, row), in order.

        Raises UserError when the verifier cannot be loaded, RuntimeError when the pool is closed meanwhile.
        """
        job = Job([(item[0], item[1], item[2] if len(item) > 2 else None) for item in items])
        self._run(job)
        return [outcome for outcome in job.outcomes if outcome is not None]

    def check(self, response: str, gold: str, row: Mapping[str, Any] | None = None) -> Outcome:
        return self.check_many([(response, gold, row)])[0]

    __call__ = check

    def start(self, workers: int | None = None) -> None:
        """Start this many workers (default: all) and wait until they have loaded the verifier."""
        self._run(Job([], wanted=min(workers or self.workers, self.workers)))

    def close(self) -> None:
        """Kill the workers. Checks in progress in other threads raise RuntimeError; a later check starts anew."""
        with self._lock:
            if self._stop is not None:
                self._stop()
            self._dispatcher = self._stop = None

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its settings: a copy in another process has workers of its own."""
        options: dict[str, Any] = {
            "settings": self._hello.settings,
            "workers": self.workers,
            "limit": self.limit,
            "memory_mb": self.memory_mb,
        }
        return partial(WorkerPool, self.target, **options), ()

    def _run(self, job: Job) -> None:
        with self._lock:
            if self._dispatcher is None or not self._dispatcher.alive:
                self._dispatcher = Dispatcher(self._hello, self.workers, self.limit)
                self._stop = weakref.finalize(self, self._dispatcher.stop)  # also when the interpreter exits
            dispatcher = self._dispatcher
            dispatcher.submit(job)
        try:
            while not job.finished.wait(1.0):
                if not dispatcher.alive and not job.finished.is_set():
                    raise RuntimeError("the thread of the worker pool has died")
        finally:
            job.finished.set()  # after Ctrl-C, nobody waits any more
        if job.error is not None:
            raise job.error

    def _forked(self) -> None:
        """In the child of a fork: the workers are the parent's; forget them, with our copies of their sockets."""
        self._lock = threading.Lock()
        if self._dispatcher is not None and self._stop is not None:
            self._stop.detach()
            self._dispatcher.abandon()
        self._dispatcher = self._stop = None


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_POOLS: "weakref.WeakSet[WorkerPool]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    SPAWN.release()
    for pool in list(_POOLS):
        pool._forked()


os.register_at_fork(before=SPAWN.acquire, after_in_parent=SPAWN.release, after_in_child=_after_fork_in_child)
