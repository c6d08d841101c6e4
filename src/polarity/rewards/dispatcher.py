"""The thread that owns the workers of a pool: it hands out the work, holds the clock, kills and replaces.

It sends a worker a chunk of items at a time; the worker hands back what it has not begun after a while (worker.py), so
the workers are shared fairly: the job that has had the least of their time comes first. One worker beyond the pool's
size is there for jobs that have none, so that nobody waits for what others hang in. An item over half its limit has a
replacement started beside it, which is ready when the worker is killed.
"""

import os
import pickle
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from polarity.errors import UserError
from polarity.rewards.outcome import Outcome
from polarity.rewards.process import Closed, WorkerProcess, search_path
from polarity.rewards.worker import Hello

CHUNK_ITEMS = 256
CHUNK_BYTES = 2**20  # an item with more is sent alone
START_LIMIT_S = 120.0  # for the imports of a verifier
START_TRIES = 3
REAP_S = 0.02
CLOSE_S = 5.0

SPAWN = threading.Lock()  # no fork while a worker is started: the child would keep sockets it does not know of


class Job:
    """The items of one call; with `wanted`, it is finished when so many workers are up."""

    def __init__(self, items: Sequence[tuple[Any, ...]], wanted: int = 0):
        self.items, self.wanted = items, wanted
        self.outcomes: list[Outcome | None] = [None] * len(items)
        self.todo = deque(range(len(items)))  # not sent to any worker
        self.missing = len(items)  # without an outcome
        self.used = 0.0  # seconds of workers' time
        self.error: Exception | None = None
        self.finished = threading.Event()

    def settle(self, index: int, outcome: Outcome) -> None:
        self.outcomes[index] = outcome
        self.missing -= 1

    def fail(self, error: Exception) -> None:
        self.error = error
        self.finished.set()


class _Worker(WorkerProcess):
    """A worker process and what it works on; `job` is None while it starts or waits."""

    ready = False
    job: Job | None = None
    begun = 0.0  # when the chunk was sent
    late = False  # over half the limit with one item
    chunk: deque[int] = deque()  # items sent that have no reply; the first is being worked on


class Dispatcher:
    """Other threads only put jobs into its inbox, or stop it; all else is its own thread's."""

    def __init__(self, hello: Hello, size: int, limit: float):
        self.target, self.size, self.limit = hello.target, size, limit
        self._hello = pickle.dumps(hello)
        self._path, self._directory = search_path(), os.getcwd()
        self._inbox: SimpleQueue[Job] = SimpleQueue()
        self._jobs: list[Job] = []
        self._workers: list[_Worker] = []
        self._dying: list[_Worker] = []
        self._level = 0  # workers to keep up: as many as there was work for so far
        self._failed_starts = 0
        self._stopping = False
        self._lifeline, self._keepers = socket.socketpair()
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._selector = selectors.PollSelector()  # epoll's set would be shared with forks
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._loop, name=f"pool of {hello.target}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        self._inbox.put(job)
        self._poke()

    def stop(self) -> None:
        """End the thread and the workers. Callers that still wait get a RuntimeError."""
        self._stopping = True
        self._poke()
        if threading.current_thread() is not self._thread:  # the garbage collector calls from any thread
            self._thread.join(2 * CLOSE_S)

    def abandon(self) -> None:
        """In the child of a fork, where the thread does not run: close our copies of what is the parent's."""
        for worker in (*self._workers, *self._dying):
            worker.connection.close()
        for end in (self._lifeline, self._keepers, self._woken, self._wake):
            end.close()

    def _poke(self) -> None:
        with suppress(OSError):  # full: it is awake already; closed: it has ended
            self._wake.send(b"!")

    def _loop(self) -> None:
        error: Exception = RuntimeError("the worker pool was closed")
        try:
            while not self._stopping:
                self._take_jobs()
                self._assign()
                self._start_workers()
                self._listen()
                self._expire()
        except Exception as broken:  # no process can be started, say: whoever waits must hear of it
            error = broken
        self._stopping = True
        for worker in list(self._workers):
            self._drop(worker)
        self._take_jobs()
        self._fail_all(error)
        until = time.monotonic() + CLOSE_S
        while not all(worker.gone() for worker in self._dying) and time.monotonic() < until:
            time.sleep(0.002)
        for end in (self._lifeline, self._keepers, self._woken, self._wake):
            end.close()

    def _take_jobs(self) -> None:
        """Let new jobs in, finished ones out."""
        with suppress(Empty):
            while True:
                job = self._inbox.get_nowait()
                job.used = min((other.used for other in self._jobs), default=0.0)  # a newcomer is not owed the past
                self._jobs.append(job)
        up = sum(worker.ready for worker in self._workers)
        for job in self._jobs:
            if not job.missing and up >= job.wanted:
                job.finished.set()
        self._jobs = [job for job in self._jobs if not job.finished.is_set()]

    def _assign(self) -> None:
        """Send chunks to the idle workers. Of these there may be more than may work: replacements for late ones."""
        for worker in [worker for worker in self._workers if worker.ready and worker.job is None]:
            at_work = [worker.job for worker in self._workers if worker.job is not None]
            full = len(at_work) >= self.size
            waiting = [job for job in self._jobs if job.todo and not (full and job in at_work)]
            if not waiting or len(at_work) > self.size:
                return
            job = min(waiting, key=lambda job: job.used)  # of equals, the first that came
            try:
                chunk, frame = self._cut(job)
            except Exception as error:  # pickle raises what the rows' classes raise
                job.fail(UserError(f"verifier {self.target!r}: an item cannot be sent to its process: {error}"))
                continue
            worker.job, worker.chunk = job, chunk
            worker.send(frame)
            worker.begun = worker.since
            self._watch(worker)

    def _cut(self, job: Job) -> tuple[deque[int], bytes]:
        """The next items of a job, as many as one message should hold, and the message."""
        most, size = min(CHUNK_ITEMS, -(-len(job.todo) // self.size)), 0
        chunk: deque[int] = deque()
        while job.todo and len(chunk) < most and size < CHUNK_BYTES:
            size += len(job.items[job.todo[0]][0])
            if chunk and size > CHUNK_BYTES:
                break
            chunk.append(job.todo.popleft())
        while True:
            frame = pickle.dumps([job.items[i] for i in chunk], protocol=pickle.HIGHEST_PROTOCOL)
            if len(frame) <= CHUNK_BYTES or len(chunk) == 1:
                return chunk, frame
            for _ in range(len(chunk) // 2):  # the rows are large, too
                job.todo.appendleft(chunk.pop())

    def _start_workers(self) -> None:
        """As many as there is work for, not counting those that will probably be killed soon."""
        at_work = [worker.job for worker in self._workers if worker.job is not None]
        wanted = min(self.size, len(at_work) + sum(len(job.todo) for job in self._jobs))
        if len(at_work) >= self.size and any(job.todo and job not in at_work for job in self._jobs):
            wanted = self.size + 1
        self._level = max(self._level, wanted, *(job.wanted for job in self._jobs))
        sound = sum(not worker.late for worker in self._workers)
        for _ in range(self._level - sound):
            with SPAWN:
                worker = _Worker(self._keepers, self._path, self._directory)
                self._workers.append(worker)
            self._selector.register(worker.connection, selectors.EVENT_READ, worker)
            worker.send(self._hello)
            self._watch(worker)

    def _watch(self, worker: _Worker) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.sending else 0)
        self._selector.modify(worker.connection, events, worker)

    def _listen(self) -> None:
        """Wait for a message, a new job, or the next moment at which a worker is late."""
        self._dying = [worker for worker in self._dying if not worker.gone()]
        moments = [moment for worker in self._workers if (moment := self._moment(worker)) is not None]
        now = time.monotonic()
        if self._dying:
            moments.append(now + REAP_S)
        for key, events in self._selector.select(max(0.0, min(moments) - now) if moments else None):
            if key.data is None:
                self._woken.recv(4096)
                continue
            if key.data not in self._workers:  # dropped with another of these events
                continue
            if events & selectors.EVENT_WRITE:
                key.data.flush()
                self._watch(key.data)
            if events & selectors.EVENT_READ:
                self._hear(key.data)

    def _moment(self, worker: _Worker) -> float | None:
        if not worker.ready:
            return worker.since + START_LIMIT_S
        return worker.since + (self.limit if worker.late else self.limit / 2) if worker.job else None

    def _hear(self, worker: _Worker) -> None:
        try:
            for then, *rest in worker.receive():
                if worker.job is not None:
                    worker.job.settle(worker.chunk.popleft(), Outcome(*rest))
                    if then != "more":
                        self._release(worker)
                    if then == "spent":
                        self._drop(worker)
                        return
                elif then == "ready":
                    worker.ready, self._failed_starts = True, 0
                else:
                    self._fail_all(UserError(rest[0]))
                    return
        except Closed as closed:
            self._lost(worker, str(closed))

    def _release(self, worker: _Worker) -> None:
        """The worker's job gets back what of the chunk was not begun."""
        if worker.job is not None:
            worker.job.used += time.monotonic() - worker.begun
            worker.job.todo.extendleft(reversed(worker.chunk))
            worker.job, worker.chunk = None, deque()

    def _lost(self, worker: _Worker, why: str) -> None:
        if worker.job is not None:
            worker.job.settle(worker.chunk.popleft(), Outcome(False, "error", 0.0, extracted=why))
            self._release(worker)
        elif worker.ready:
            self._level -= 1  # died of something else than an item: not replaced before there is work
        else:
            self._failed_starts += 1
            if self._failed_starts == START_TRIES:
                self._fail_all(UserError(f"verifier {self.target!r} cannot be loaded: {why}"))
                return
        self._drop(worker)

    def _expire(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            worker.late = worker.job is not None and now - worker.since >= self.limit / 2
            if worker.job is not None and now - worker.since >= self.limit:
                worker.job.settle(worker.chunk.popleft(), Outcome(False, "timeout", 0.0))
                self._release(worker)
                self._drop(worker)
            elif not worker.ready and now - worker.since > START_LIMIT_S:
                self._fail_all(UserError(f"verifier {self.target!r} was not loaded within {START_LIMIT_S:.0f} s"))
                return

    def _drop(self, worker: _Worker) -> None:
        self._selector.unregister(worker.connection)
        self._workers.remove(worker)
        worker.kill()
        self._dying.append(worker)

    def _fail_all(self, error: Exception) -> None:
        """All jobs end with this error; workers that have not started would only repeat it."""
        for job in self._jobs:
            job.fail(error)
        self._level = self._failed_starts = 0
        for worker in [worker for worker in self._workers if not worker.ready]:
            self._drop(worker)
