"""A small server that speaks OpenAI's protocol, and can be told to misbehave."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LocalServer:
    """Answers `reply(prompt, j)` for the j-th choice of a call, of 3 + j tokens; text "CUT" ends for its length.

    fail: HTTP statuses (0: the connection is dropped; -1: no JSON), one for each call until they are used up;
    single: "refuse" answers 400 to n > 1, "ignore" gives one choice; usage: whether tokens are reported;
    delay: seconds before an answer; key: what the Authorization header must hold; broken: a prompt that begins so gets
    HTTP 500; broken_answer: sent instead of choices.
    """

    def __init__(self, reply: Callable[[str, int], str]):
        self.reply = reply
        self.fail: list[int] = []
        self.single: str | None = None
        self.usage, self.delay = True, 0.0
        self.key: str | None = None
        self.broken = ""
        self.broken_answer: dict[str, Any] | None = None
        self.headers: dict[str, str] = {}
        self.requests: list[dict[str, Any]] = []
        self.active = self.most_active = 0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self.server = Listener(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.requests.append({"path": handler.path, **request})
            self.active += 1
            self.most_active = max(self.most_active, self.active)
            fault = self.fail.pop(0) if self.fail else None
        try:
            time.sleep(self.delay)
            status, body = self.outcome(handler, request, fault)
        finally:
            with self.lock:
                self.active -= 1
        if fault == 0:
            handler.connection.close()
            return
        payload = b"<html>" if fault == -1 else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), **self.headers}.items():
            handler.send_header(name, value)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that did not wait
            handler.end_headers()
            handler.wfile.write(payload)

    def outcome(
        self, handler: BaseHTTPRequestHandler, request: dict[str, Any], fault: int | None
    ) -> tuple[int, dict[str, Any]]:
        if fault is not None and fault > 0:
            return fault, {"error": {"message": f"fault {fault}\non purpose"}}
        if self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": {"message": "Incorrect API key"}}
        if self.single == "refuse" and request["n"] > 1:
            return 400, {"object": "error", "message": "n must be 1"}
        chat = handler.path.endswith("/chat/completions")
        prompt = request["messages"][-1]["content"] if chat else request["prompt"]
        if self.broken_answer is not None:
            return 200, self.broken_answer
        if self.broken and prompt.startswith(self.broken):
            return 500, {"error": {"message": "broken"}}
        count = 1 if self.single == "ignore" else request["n"]
        choices: list[dict[str, Any]] = []
        for j in range(count):
            text = self.reply(prompt, j)
            content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append({"index": j, "finish_reason": "length" if text == "CUT" else "stop", **content})
        tokens = sum(3 + j for j in range(count))
        return 200, {"choices": choices, "usage": {"completion_tokens": tokens} if self.usage else None}
