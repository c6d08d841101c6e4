"""`polarity report --live`: the page of runs that go on, from a port of this machine, made anew when they have moved.

Only 127.0.0.1 is listened on, and only requests that name it as their host are answered, so that a web page elsewhere
cannot reach the server through the reader's browser under a name of its own (DNS rebinding). There are two addresses:
`/`, the page, and `/revision`, a short text that the page asks for and that is another one when a newer page is ready.

A page is made when somebody asks, by one thread, and never so often that it would hold up the training beside it. Until
it is ready the former one is served. Runs that have no step yet, or are half written, or deleted and started again, are
waited for.
"""

import ctypes
import errno
import hashlib
import html
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from polarity.errors import UserError
from polarity.report.page import render
from polarity.report.runs import load_runs

PORT, PORTS = 8765, 50  # the first that is tried when none is asked for, and how many
LOOK_SECONDS = 1.0  # between two looks at the run directories
REST_SECONDS, REST_SHARE = 3.0, 4.0  # between two pages: this long, and this many times what the last one took
OTHERS = ("checkpoints", "logs", "ngrams", "tensorboard", "trackio", "wandb")  # folders that no page shows
CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; font-src data:; "
    "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": CSP,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
WAITING = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>polarity: waiting</title><link rel="icon" href="data:,">
<style>:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }} body {{ max-width: 40em; margin: 4em auto; padding: 0 1em; }}</style></head>
<body><h1>{title}</h1><p>{text}</p><p>This page shows the report as soon as there is one.</p>
<script>
setInterval(async () => {{
  const answer = await fetch("/revision", {{ cache: "no-store" }}).catch(() => null);
  if (answer?.ok && await answer.text() !== "{revision}") location.reload();
}}, 1000);
</script></body></html>
"""  # noqa: E501


def serve(paths: Sequence[Path], *, port: int | None = None, reference: str | None = None) -> None:
    """Serve the page of the runs at or below `paths` until Ctrl-C.

    port: None takes the first free one from PORT on. Raises UserError when a path does not exist or the port is taken.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; give a run directory or a folder of runs")
    server = start_server(LivePage(paths, reference), port)
    port = server.server_port
    print(f"live: http://127.0.0.1:{port}/ (Ctrl-C ends it)")
    if os.environ.get("SSH_CONNECTION"):
        print(f"from the machine you sit at: ssh -N -L {port}:127.0.0.1:{port} {socket.gethostname()}")
    sys.stdout.flush()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
        server.page.stop()


@dataclass(frozen=True)
class Page:
    """A page that is ready. of: the fingerprint of the files it was made of; None to try again."""

    revision: str
    html: bytes
    of: str | None


class LivePage:
    """The newest page that is ready, and the thread that makes the next.

    make: (revision) -> the page; taken from the report. Raises UserError for runs that are not there yet.
    """

    def __init__(self, paths: Sequence[Path], reference: str | None = None, make: Callable[[str], str] | None = None):
        self.paths = list(paths)
        self.make = make or (lambda revision: render(load_runs(self.paths, reference), live=True, revision=revision))
        self.page = waiting("The report is being made", "This takes some seconds.")
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.not_before = 0.0
        self.said = ""

    def current(self) -> Page:
        """The newest page. Has the next one made, in the background, when the runs have moved since."""
        with self.lock:
            if self.thread is None and time.monotonic() >= self.not_before:
                self.not_before = time.monotonic() + LOOK_SECONDS
                found = fingerprint(self.paths)
                if found != self.page.of:
                    self.thread = threading.Thread(target=self._next, args=(found,), daemon=True)
                    self.thread.start()
            return self.page

    def stop(self) -> None:
        """End the thread that makes a page: what it has in hand is tidied up, and a thread that the interpreter's end
        finds inside C++ code would take the process down with an abort."""
        while (thread := self.thread) and thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
            thread.join(0.1)

    def _next(self, found: str) -> None:
        """`except Exception`: whatever a half-written file does to its readers, the server must outlive it."""
        started, page = time.monotonic(), None
        try:
            page = Page(found, self.make(found).encode(), found)
        except UserError as error:
            page = waiting("Nothing to show yet", str(error), of=found)
        except Exception as error:
            line = f"{type(error).__name__}: {error}"
            if self.page.of is None:
                page = waiting("The runs cannot be read just now", line)
            if line != self.said:  # the former page stays
                self.said = line
                print(f"warning: the page could not be made; trying again ({line})", file=sys.stderr)
        ended = time.monotonic()
        with self.lock:
            self.page = page or self.page
            self.thread = None
            self.not_before = ended + max(REST_SECONDS, REST_SHARE * (ended - started))


def waiting(title: str, text: str, of: str | None = None) -> Page:
    """What is shown while there is no report."""
    revision = "waiting-" + _digest([title, text])
    page = WAITING.format(title=html.escape(title), text=html.escape(text), revision=revision)
    return Page(revision, page.encode(), of)


def fingerprint(paths: Sequence[Path]) -> str:
    """16 hexadecimal digits that change when a file at or below `paths` is written, renamed or removed.

    It goes by sizes and times, no deeper than METHOD/seed_K/rollouts/FILE, and leaves out what a page does not show.
    """
    return _digest(line for path in paths for line in (str(path), *_states(path, 4)))


def _states(path: Path, depth: int) -> Iterator[str]:
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name) if path.is_dir() else [path]
    except OSError:  # it was deleted meanwhile
        return
    for entry in entries:
        try:
            if entry.is_dir():
                if depth > 1 and entry.name not in OTHERS and not entry.name.startswith((".", "checkpoint-")):
                    yield from _states(Path(entry), depth - 1)
            elif entry.name != "report.html":
                state = entry.stat()
                yield f"{os.fspath(entry)} {state.st_ino} {state.st_size} {state.st_mtime_ns}"
        except OSError:
            continue


def _digest(lines: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for line in lines:
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


# ---- HTTP ----


class LiveServer(ThreadingHTTPServer):
    def __init__(self, port: int, page: LivePage):
        super().__init__(("127.0.0.1", port), Handler)
        self.page = page
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost", "[::1]")}

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's asks for the host's name, perhaps over the network
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):  # a browser that leaves is no event
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: LiveServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            self._send(421, "text/plain", f"open http://127.0.0.1:{self.server.server_port}/\n".encode())
            return
        path = urlsplit(self.path).path
        if path not in ("/", "/revision"):
            self._send(404, "text/plain", b"there are / and /revision\n")
            return
        page = self.server.page.current()
        if path == "/":
            self._send(200, "text/html", page.html)
        else:
            self._send(200, "text/plain", page.revision.encode())

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Of http.server: what is no HTTP, and every other method. No page of its own, and the same headers."""
        self._send(405 if code == 501 else code, "text/plain", b"GET or HEAD\n")

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if code != 200:
            self.send_header("Connection", "close")  # a body that came with the request is not read
        if code == 405:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "polarity"

    def log_message(self, *_: Any) -> None:
        pass


def start_server(page: LivePage, port: int | None = None) -> LiveServer:
    """A server that listens. port: None takes the first free one from PORT on."""
    for candidate in range(PORT, PORT + PORTS) if port is None else [port]:
        try:
            return LiveServer(candidate, page)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"port {candidate}: {error.strerror}; choose another --port") from None
    if port is None:
        raise UserError(f"ports {PORT} to {PORT + PORTS - 1} are all taken; choose another --port")
    raise UserError(f"port {port} is taken; choose another --port, or leave it out")
