"""`polarity report --live`: what it answers and refuses, that it outlives its runs, and the page in a real browser."""

import http.client
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from test_report_browser import browser, wait_for  # noqa: F401

from polarity.cli import main
from polarity.errors import UserError
from polarity.report import live
from polarity.report.live import CSP, LivePage, fingerprint, start_server
from polarity.rundir import RunWriter


@pytest.fixture
def start(monkeypatch):
    """`start(paths or LivePage)` -> (server, get); get(path, ...) -> (status, headers, body). No rest between pages."""
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(live, "REST_SECONDS", 0.0)
    monkeypatch.setattr(live, "REST_SHARE", 0.0)
    servers = []

    def start(page: LivePage | Path):
        server = start_server(page if isinstance(page, LivePage) else LivePage([page]))
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

        def get(path: str = "/", method: str = "GET", host: str | None = "127.0.0.1:{port}", body: bytes = b""):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
            connection.putrequest(method, path, skip_host=True)
            if host is not None:
                connection.putheader("Host", host.format(port=server.server_port))
            if body:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()

        return server, get

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def until(true: Callable[[], object]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("never true")


def row(step: int) -> dict[str, float]:
    return {"step": step, "accuracy/mean": 0.5, "reward/mean": 0.5, "entropy/mean": 0.2, "time/step": 1.0}


def is_report(text: str) -> bool:
    return "<title>polarity: dapo</title>" in text


# ---- what is answered ----


def test_the_page_is_served_and_follows_its_run(start, make_run, tmp_path):
    run = make_run(tmp_path / "run", "dapo", 0, steps=20, done=5)
    _, get = start(run)
    assert "The report is being made" in get()[2]  # at once, while the first page is made
    until(lambda: is_report(get()[2]))
    revision, page = get("/revision")[2], get()[2]
    assert f'data-revision="{revision}"' in page
    assert "5 of 20" in page
    assert get("/revision")[2] == revision
    RunWriter(run).metrics(row(6))
    until(lambda: get("/revision")[2] != revision)
    assert "6 of 20" in get()[2]
    assert f'data-revision="{get("/revision")[2]}"' in get()[2]


def test_answers_carry_their_headers(start, make_run, tmp_path):
    _, get = start(make_run(tmp_path / "run"))
    until(lambda: is_report(get()[2]))
    for path, kind in (("/", "text/html; charset=utf-8"), ("/revision", "text/plain; charset=utf-8")):
        status, headers, body = get(path)
        assert (status, headers["Content-Type"]) == (200, kind)
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Security-Policy"] == CSP
        assert "Python" not in str(headers)
        head = get(path, method="HEAD")
        assert (head[0], head[2]) == (200, "")
        assert int(head[1]["Content-Length"]) == len(body.encode())


@pytest.mark.parametrize("host", [None, "", "evil.example", "evil.example:{port}", "127.0.0.1", "localhost:1", "[::1]"])
def test_other_hosts_are_refused(start, host, tmp_path):
    page = LivePage([tmp_path], make=lambda revision: "secret")
    server, get = start(page)
    until(lambda: get()[2] == "secret")
    for path in ("/", "/revision"):
        status, headers, body = get(path, host=host)
        assert status == 421
        assert body == f"open http://127.0.0.1:{server.server_port}/\n"
        assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}"])
def test_this_machine_is_answered(start, host, tmp_path):
    _, get = start(LivePage([tmp_path], make=lambda revision: "page"))
    assert get("/", host=host)[0] == 200


def test_nothing_else_is_served(start, make_run, tmp_path):
    run = make_run(tmp_path / "run")
    server, get = start(run)
    for path in (
        "/config.yaml", "/report.html", "/../config.yaml", "/..%2fconfig.yaml", "//etc/passwd", "/revision/", "*",
        f"/{run}/config.yaml", f"http://127.0.0.1:{server.server_port}/config.yaml", "/index.html", "/favicon.ico",
    ):  # fmt: skip
        status, _, body = get(path)
        assert (status, body) == (404, "there are / and /revision\n"), path
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"):
        status, headers, body = get("/", method=method, body=b"GET / HTTP/1.1\r\n\r\n")
        assert (status, headers["Allow"], body) == (405, "GET, HEAD", "GET or HEAD\n"), method
        assert headers["Connection"] == "close"  # the body is not taken for a request


def test_what_is_no_http_is_refused_and_does_no_harm(start, tmp_path):
    server, get = start(LivePage([tmp_path], make=lambda revision: "page"))
    for sent in (
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"x" * 70_000,
        b"GET",
        b"\r\n" * 9,
    ):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            assert b"page" not in connection.recv(10_000)
    until(lambda: get()[2] == "page")


def test_only_this_machine_can_reach_it(start, tmp_path):
    server, _ = start(LivePage([tmp_path], make=lambda revision: "page"))
    assert server.socket.getsockname()[0] == "127.0.0.1"
    others = {"127.0.0.2", *(info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET))}
    for address in others - {"127.0.0.1"}:
        with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
            socket.create_connection((address, server.server_port), timeout=2)


# ---- pages are made in the background, seldom, and whatever happens to the runs ----


def test_the_former_page_is_served_while_the_next_is_made_and_one_page_is_made_at_a_time(start, tmp_path):
    file, go_on, made = tmp_path / "metrics.jsonl", threading.Event(), []
    go_on.set()

    def make(revision: str) -> str:
        made.append(revision)
        text = file.read_text()
        assert go_on.wait(20)
        return text

    file.write_text("one")
    _, get = start(LivePage([tmp_path], make=make))
    until(lambda: get()[2] == "one")
    first = get("/revision")[2]
    go_on.clear()
    file.write_text("two.")
    until(lambda: (get("/revision"), len(made))[1] == 2)
    for _ in range(20):
        assert get()[2] == "one"
        assert get("/revision")[2] == first
    assert len(made) == 2
    go_on.set()
    until(lambda: get()[2] == "two.")
    assert get("/revision")[2] == made[1] != first
    for _ in range(20):  # nothing has changed: nothing is made
        get("/revision")
    assert len(made) == 2


def test_pages_are_made_no_more_often_than_they_may(monkeypatch, tmp_path):
    now, made = [100.0], []
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])

    def make(revision: str) -> str:
        made.append(now[0])
        now[0] += 2.0  # a page takes two seconds
        return "page"

    page = LivePage([tmp_path], make=make)
    for i in range(300):
        (tmp_path / "metrics.jsonl").write_text("x" * i)
        page.current()
        if thread := page.thread:
            thread.join()
        now[0] += 0.1
    assert len(made) == 4  # 30 seconds, 2 of them busy, and then 8 of rest
    assert min(b - a for a, b in pairwise(made)) >= (1 + live.REST_SHARE) * 2.0


def test_runs_without_steps_half_written_deleted_and_started_again_are_waited_for(start, make_run, tmp_path, capsys):
    run = tmp_path / "run"
    writer = RunWriter.create(run, "method: {name: dapo, base: dapo}\nsteps: 9\nseed: 0\n", seed=0)
    _, get = start(run)
    until(lambda: "has completed a step yet" in get()[2])
    waiting = get("/revision")[2]
    assert waiting in get()[2]

    (run / "metrics.jsonl").write_text('{"step": 1, "accu')
    until(lambda: get("/revision")[2] == waiting)
    (run / "metrics.jsonl").unlink()
    for step in range(1, 4):
        writer.metrics(row(step))
    until(lambda: "3 of 9" in get()[2])
    report = get("/revision")[2]

    (run / "evaluations").mkdir()
    (run / "evaluations" / "step_000003.json").write_text('{"step": 3, "resu')  # no writer of ours does this
    until(lambda: "step_000003.json line 1 is no JSON" in get()[2])
    assert get("/revision")[2] != report
    (run / "evaluations" / "step_000003.json").unlink()
    until(lambda: is_report(get()[2]))

    shutil.rmtree(run)
    until(lambda: "does not exist" in get()[2])
    make_run(run, "psr", 0)
    until(lambda: "<title>polarity: psr</title>" in get()[2])


def test_names_in_the_waiting_page_are_text(start, tmp_path):
    run = tmp_path / "<script>alert(1)</script>"
    RunWriter.create(run, "method: {name: dapo}\nsteps: 9\n", seed=0)
    _, get = start(run)
    until(lambda: "has completed a step yet" in get()[2])
    assert "&lt;script&gt;alert(1)" in get()[2]
    assert "<script>alert" not in get()[2]


def test_the_fingerprint_changes_with_what_a_page_shows(make_run, tmp_path):
    run = make_run(tmp_path / "five" / "dapo" / "seed_0")
    seen = [fingerprint([tmp_path / "five"])]

    def changed() -> bool:
        seen.append(fingerprint([tmp_path / "five"]))
        return seen[-1] != seen[-2]

    assert not changed()
    writer = RunWriter(run)
    for write in (
        lambda: writer.metrics(row(21)),
        lambda: writer.rollouts(21, [{"a": 1}]),
        lambda: writer.rollouts(21, [{"a": 2}]),  # as long as before
        lambda: writer.evaluation(21, {}),
        lambda: writer.rewind(20),
        lambda: make_run(tmp_path / "five" / "psr" / "seed_0"),
        lambda: shutil.rmtree(run),
    ):
        write()
        assert changed()
    other = tmp_path / "five" / "psr" / "seed_0"
    for folder in ("checkpoints/step_000003", "wandb", "tensorboard", "ngrams"):
        (other / folder).mkdir(parents=True)
        (other / folder / "file").write_text("x")
    (tmp_path / "five" / "report.html").write_text("x")
    assert not changed()
    assert fingerprint([tmp_path / "nowhere"]) == fingerprint([tmp_path / "nowhere"])


# ---- the command ----


def test_ports(monkeypatch, tmp_path):
    page = LivePage([tmp_path], make=lambda revision: "page")
    first = start_server(page)
    second = start_server(page)
    try:
        assert second.server_port > first.server_port >= live.PORT
        with pytest.raises(
            UserError, match=f"port {first.server_port} is taken; choose another --port, or leave it out"
        ):
            start_server(page, first.server_port)
        monkeypatch.setattr(live, "PORT", first.server_port)
        monkeypatch.setattr(live, "PORTS", 1)
        with pytest.raises(UserError, match="are all taken; choose another --port"):
            start_server(page)
    finally:
        first.server_close()
        second.server_close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "--live", "nowhere"], "nowhere does not exist"),
        (["report", "--live", ".", "--out", "x.html"], "--live serves the page and writes none; drop --out or --live"),
        (["report", ".", "--port", "8000"], "--port is of --live"),
        (["report", "--live", ".", "--port", "99999"], "expected a port, 1 to 65535"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_ctrl_c_ends_the_real_process_with_0_also_while_a_page_is_made(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    command = [sys.executable, "-m", "polarity", "report", "--live", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        address = said.split()[1].removeprefix("http://").rstrip("/")
        connection = http.client.HTTPConnection(address, timeout=20)  # kept open: it must not hold up the end
        connection.request("GET", "/")
        assert "The report is being made" in connection.getresponse().read().decode()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert said.startswith("live: http://127.0.0.1:")
    assert (process.returncode, out.strip(), error) == (0, "", "")


# ---- in a browser ----


def test_the_page_renews_itself_and_the_reader_keeps_the_place(browser, start, make_run, tmp_path):  # noqa: F811
    run = make_run(tmp_path / "run", "dapo", 0, steps=20, done=5)
    server, _ = start(run)
    browser.get_log("browser")
    browser.get(f"http://127.0.0.1:{server.server_port}/")  # the waiting page: it gives way to the report by itself
    wait_for(browser, "document.querySelector('.card') !== null")
    browser.execute_script("document.getElementById('theme').click()")
    browser.execute_script("document.getElementById('sample-step').selectedIndex = 0")
    browser.execute_script("document.getElementById('sample-step').dispatchEvent(new Event('change'))")
    browser.execute_script("scrollTo(0, 900); window.mark = 'former page'")
    place = "[scrollY, document.documentElement.dataset.theme, document.getElementById('sample-step').selectedIndex]"
    before = browser.execute_script(f"return {place}")
    assert before[0] > 0

    RunWriter(run).metrics(row(6))
    wait_for(browser, "window.mark === undefined && document.querySelector('.card') !== null")
    assert "6 of 20" in browser.execute_script("return document.getElementById('overview').textContent")
    wait_for(browser, f"JSON.stringify({place}) === '{str(before).replace(' ', '').replace(chr(39), chr(34))}'")

    shutil.rmtree(run)
    wait_for(browser, "document.title === 'polarity: waiting'")
    make_run(run, "psr", 0)
    wait_for(browser, "document.title === 'polarity: psr'")
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map((e) => new URL(e.name).pathname)"
    )
    assert set(loaded) <= {"/revision"}
