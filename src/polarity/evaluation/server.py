"""Responses from a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, or a provider.

`completions` sends the prompt as the template makes it, which is what reproduces a paper's prompt; `chat` sends it as
the user's message, and the server puts its own chat template around it. Requests are made by plain threads and the
standard library, so nothing has to be installed, and Ctrl-C need not wait for an answer that takes an hour.

What a server does not say stays unknown: entropies always; lengths where it reports no usage. For several responses in
one call it reports their total, and each is given their mean, so that mean lengths are exact.
"""

import http.client
import json
import os
import queue
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polarity.errors import UserError
from polarity.evaluation.metrics import Generation
from polarity.evaluation.run import Stream, Task
from polarity.seeds import seed_for

# Worth another try: the server is busy, restarting, or behind a proxy that is.
RETRY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Server:
    """Where, and how patiently. url ends in /v1; the API key, if one is needed, is in the variable `key_variable`.

    concurrency: calls under way at the same time; timeout: seconds without an answer; retries: after the first try,
    with pauses of `backoff`, twice that, and so on up to a minute, or what the server asks for.
    """

    url: str
    model: str
    chat: bool = False
    concurrency: int = 32
    timeout: float = 3600.0
    retries: int = 6
    backoff: float = 1.0
    key_variable: str = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Request:
    """Sampling settings of a call. top_k is no part of OpenAI's protocol: vLLM and SGLang take it, others refuse it."""

    temperature: float
    top_p: float
    max_new_tokens: int
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, order=True)
class _Call:
    """`count` responses to row `index` of the task, from number `first` on. Calls are made in this order, so that what
    one problem still lacks comes before the next problem."""

    index: int
    first: int
    count: int


_LAST = _Call(-1, 0, 0)


class _Refused(Exception):
    """The server answered, and another try would get the same: HTTP status and its message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


def server_stream(server: Server, request: Request) -> Stream:
    """A stream (polarity.evaluation.run) of what the server generates; problems come as they are complete.

    All responses to a problem are asked for in one call; where the server gives one only, or refuses more, each is a
    call of its own. Every call has a seed of its own, which depends on the request's, the problem and the response's
    number. Raises UserError, one line, when the server refuses or stays away.
    """

    if urllib.parse.urlsplit(server.url).scheme not in ("http", "https"):
        raise UserError(f"{server.url!r} is no address of a server; write for example http://localhost:8000/v1")

    def stream(task: Task, indices: Sequence[int], samples: int) -> Iterator[Mapping[int, Sequence[Generation]]]:
        several = samples > 1 and request.temperature > 0  # greedy responses are all alike, and vLLM refuses n > 1
        calls = [call for index in indices for call in _calls(index, 0, samples, samples if several else 1)]
        got: dict[int, list[Generation]] = {index: [] for index in indices}
        with _Workers(server, request, task) as workers:
            workers.ask(calls)
            while got:
                call, answer = workers.answers.get()
                if isinstance(answer, _Refused) and call.count > 1 and answer.status in (400, 422):
                    workers.ask(_calls(call.index, call.first, call.count, 1))
                    continue
                if isinstance(answer, Exception):
                    raise _user_error(server, answer, task.rows[call.index]["id"]) from answer
                got[call.index] += answer[: call.count]
                missing = call.count - len(answer)
                if missing > 0:
                    workers.ask(_calls(call.index, call.first + len(answer), missing, 1))
                if len(got[call.index]) == samples:
                    yield {call.index: got.pop(call.index)}

    return stream


def _calls(index: int, first: int, count: int, each: int) -> list[_Call]:
    return [_Call(index, i, min(each, first + count - i)) for i in range(first, first + count, each)]


@dataclass
class _Workers:
    """Threads that make calls and put down what came of each: responses, or the exception."""

    server: Server
    request: Request
    task: Task
    answers: "queue.SimpleQueue[tuple[_Call, Any]]" = field(default_factory=queue.SimpleQueue)
    calls: "queue.PriorityQueue[_Call]" = field(default_factory=queue.PriorityQueue)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "_Workers":
        for _ in range(self.server.concurrency):
            threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopped.set()
        for _ in range(self.server.concurrency):
            self.calls.put(_LAST)

    def ask(self, calls: Sequence[_Call]) -> None:
        for call in calls:
            self.calls.put(call)

    def _work(self) -> None:
        while (call := self.calls.get()) is not _LAST:
            try:
                body = _body(self.server, self.request, self.task, call)
                self.answers.put((call, _read(self.server, _post(self.server, body, self.stopped))))
            except Exception as error:  # handed to the thread that waits for the answer, which raises it
                self.answers.put((call, error))


def _body(server: Server, request: Request, task: Task, call: _Call) -> dict[str, Any]:
    row = task.rows[call.index]
    prompt = task.prompt(row)
    body: dict[str, Any] = {
        "model": server.model,
        **({"messages": [{"role": "user", "content": prompt}]} if server.chat else {"prompt": prompt}),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_new_tokens,
        "n": call.count,
        "seed": seed_for(request.seed, task.name, row["id"], call.first) % 2**31,
    }
    if request.top_k is not None:
        body["top_k"] = request.top_k
    if request.stop:
        body["stop"] = list(request.stop)
    return body


def _read(server: Server, answer: Any) -> list[Generation]:
    """The responses in an answer."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    content = "message" if server.chat else "text"
    if not isinstance(choices, list) or not choices or not all(content in choice for choice in choices):
        raise _Refused(200, f"no choices with {content!r} in {json.dumps(answer)[:200]}")
    tokens = (answer.get("usage") or {}).get("completion_tokens")
    length = None if tokens is None else tokens / len(choices)
    made = []
    for choice in choices:
        # A chat message of a reasoning model may have no content: it was cut off while it thought.
        text = (choice["message"].get("content") if server.chat else choice["text"]) or ""
        reason = choice.get("finish_reason")
        made.append(Generation(text, length, None, None if reason is None else reason == "length"))
    return made


def _post(server: Server, body: Mapping[str, Any], stopped: threading.Event) -> Any:
    """The server's answer, after as many tries as it is allowed. Raises _Refused, or the last try's error."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(server.key_variable):
        headers["Authorization"] = f"Bearer {key}"
    path = "/chat/completions" if server.chat else "/completions"
    request = urllib.request.Request(server.url.rstrip("/") + path, json.dumps(body).encode(), headers)
    for attempt in range(server.retries + 1):
        pause = min(LONGEST_PAUSE, server.backoff * 2**attempt) * random.uniform(0.5, 1.0)
        try:
            with _opener(server.url).open(request, timeout=server.timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            refusal = _Refused(error.code, _message(error))
            if error.code not in RETRY or attempt == server.retries:
                raise refusal from error
            wished = error.headers.get("Retry-After", "")
            pause = min(LONGEST_PAUSE, float(wished)) if wished.isdigit() else pause
        except (OSError, http.client.HTTPException, ValueError):
            if attempt == server.retries:
                raise
        if stopped.wait(pause):
            break
    raise TimeoutError("the evaluation was stopped")


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Proxies as the environment says, but none to this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    local = host == "localhost" or host == "::1" or host.startswith("127.")
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says of its refusal, on one line."""
    text = error.read().decode("utf-8", "replace")
    try:
        found = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        text = found.get("message") or text if isinstance(found, dict) else str(found)
    except ValueError:
        pass
    return " ".join(str(text).split())[:300] or str(error.reason)


def _user_error(server: Server, error: Exception, problem: str) -> UserError:
    """The one line a user can act on."""
    if not isinstance(error, _Refused):
        reason = getattr(error, "reason", None) or error
        return UserError(
            f"no answer from {server.url} after {server.retries + 1} tries: {type(error).__name__}: {reason}; "
            f"is the server up, and does its address end in /v1?"
        )
    said = f"{server.url} answered HTTP {error.status}: {error.message}"
    if error.status in (401, 403):
        return UserError(f"{said}; put the API key into the environment variable {server.key_variable}")
    if error.status == 404:
        return UserError(f"{said}; does the address end in /v1, and is {server.model!r} a model it serves?")
    return UserError(f"{said} (problem {problem!r})")
