"""Generation by a server, against a small one in this process that speaks the protocol and misbehaves when told to."""

import threading
import time
from collections.abc import Iterator

import pytest
from local_server import LocalServer

from polarity.errors import UserError
from polarity.evaluation import Request, Server, Task, server_stream
from polarity.rewards import exact

ROWS = [{"id": f"p{i}", "problem": f"{i}?", "answer": str(i)} for i in range(3)]
TASK = Task("test", ROWS, exact, "exact", "Q: {problem} A:")
WARM = Request(temperature=0.6, top_p=0.95, max_new_tokens=50)


@pytest.fixture
def server() -> Iterator[LocalServer]:
    made = LocalServer(lambda prompt, j: f"{prompt} {j}")
    yield made
    made.close()


def client(server: LocalServer, **settings: object) -> Server:
    return Server(**{"url": server.url, "model": "m", "backoff": 0.001, "retries": 3, **settings})  # type: ignore[arg-type]


def ask(server: Server, request: Request = WARM, samples: int = 4, task: Task = TASK, indices=(0, 1, 2)):
    found = {}
    for part in server_stream(server, request)(task, indices, samples):
        found |= part
    return found


def test_completions(server: LocalServer):
    found = ask(client(server), Request(0.6, 0.95, 50, top_k=20, stop=("\n\n",), seed=7))
    assert sorted(found) == [0, 1, 2]
    assert [g.text for g in found[1]] == [f"Q: 1? A: {j}" for j in range(4)]
    assert [g.length for g in found[1]] == [4.5] * 4  # 3 + 4 + 5 + 6 tokens in one call: the mean is what is known
    assert all(g.entropy is None and g.truncated is False for g in found[1])
    sent = server.requests[0]
    assert sent["path"] == "/v1/completions"
    wanted = {"model": "m", "temperature": 0.6, "top_p": 0.95, "max_tokens": 50, "n": 4, "top_k": 20, "stop": ["\n\n"]}
    assert {key: sent[key] for key in wanted} == wanted
    seeds = {r["seed"] for r in server.requests}
    assert len(seeds) == 3  # one for each call
    assert all(0 <= s < 2**31 for s in seeds)
    ask(client(server), Request(0.6, 0.95, 50, top_k=20, stop=("\n\n",), seed=7))
    assert {r["seed"] for r in server.requests[3:]} == seeds


def test_what_is_not_set_is_not_sent(server: LocalServer):
    ask(client(server), samples=1)
    assert {"top_k", "stop"} & server.requests[0].keys() == set()


def test_chat(server: LocalServer):
    found = ask(client(server, chat=True), samples=1)
    assert found[2][0].text == "Q: 2? A: 0"
    assert server.requests[0]["path"] == "/v1/chat/completions"
    assert server.requests[0]["messages"][0]["role"] == "user"


def test_cut_responses_are_truncated_and_unknown_lengths_absent(server: LocalServer):
    server.usage, server.reply = False, lambda prompt, j: "CUT" if j else "done"
    made = ask(client(server), samples=2)[0]
    assert [g.truncated for g in made] == [False, True]
    assert [g.length for g in made] == [None, None]


@pytest.mark.parametrize("single", ["refuse", "ignore"])
def test_servers_that_give_one_response_a_call(server: LocalServer, single: str):
    server.single = single
    found = ask(client(server), samples=5)
    assert [len(found[i]) for i in range(3)] == [5, 5, 5]
    assert found[0][0].length == 3  # exact, for a call of one
    ones = [r for r in server.requests if r["n"] == 1]
    assert len({r["seed"] for r in server.requests if r["prompt"].startswith("Q: 0")}) >= 5
    assert len(ones) == (15 if single == "refuse" else 12)


def test_greedy_responses_are_asked_for_one_by_one(server: LocalServer):
    ask(client(server), Request(0.0, 1.0, 50), samples=2)
    assert [r["n"] for r in server.requests] == [1] * 6


@pytest.mark.parametrize("fault", [429, 500, 503, 0, -1])
def test_passing_faults_are_tried_again(server: LocalServer, fault: int):
    server.fail = [fault] * 3
    assert sorted(ask(client(server, concurrency=1))) == [0, 1, 2]
    assert len(server.requests) == 6


def test_the_server_says_how_long_to_wait(server: LocalServer):
    server.fail, server.headers = [429], {"Retry-After": "1"}
    started = time.monotonic()
    ask(client(server, concurrency=1), indices=[0])
    assert time.monotonic() - started >= 1


def fails(server: Server, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        ask(server, **settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_faults_that_stay_are_one_line(server: LocalServer):
    server.fail = [503] * 99
    assert "answered HTTP 503: fault 503 on purpose (problem 'p" in fails(client(server))
    server.fail = [404] * 99
    assert "is 'm' a model it serves?" in fails(client(server))
    server.fail = [400] * 99
    assert "HTTP 400: fault 400" in fails(client(server))
    server.fail = [0] * 99
    assert "no answer from" in fails(client(server))


def test_a_refusal_is_not_tried_again(server: LocalServer):
    server.fail = [400] * 99
    fails(client(server, concurrency=1), samples=1, indices=[0])
    assert len(server.requests) == 1


def test_answers_that_are_none(server: LocalServer):
    server.broken_answer = {"object": "list"}
    assert "HTTP 200: no choices with 'text' in" in fails(client(server))
    server.broken_answer = {"choices": [{"message": {"content": "x"}}]}
    assert "no choices with 'text'" in fails(client(server))


def test_an_address_without_a_scheme():
    assert "write for example http://localhost:8000/v1" in fails(Server("localhost:8000/v1", "m"))


def test_a_server_that_is_not_there():
    said = fails(Server("http://127.0.0.1:9/v1", "m", retries=1, backoff=0.001))
    assert "no answer from http://127.0.0.1:9/v1 after 2 tries" in said
    assert "refused" in said


def test_a_server_that_is_too_slow(server: LocalServer):
    server.delay = 0.5
    assert "after 2 tries" in fails(client(server, timeout=0.05, retries=1))


def test_the_key_comes_from_the_environment(server: LocalServer, monkeypatch: pytest.MonkeyPatch):
    server.key = "secret"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "Incorrect API key; put the API key into the environment variable OPENAI_API_KEY" in fails(client(server))
    monkeypatch.setenv("MY_KEY", "secret")
    assert len(ask(client(server, key_variable="MY_KEY"))) == 3


def test_calls_are_made_at_the_same_time_but_not_too_many(server: LocalServer):
    server.delay = 0.05
    many = Task("many", [{**ROWS[0], "id": str(i)} for i in range(12)], exact, "exact")
    ask(client(server, concurrency=4), task=many, indices=range(12), samples=2)
    assert server.most_active == 4


def test_problems_come_as_they_are_complete(server: LocalServer):
    """One slow problem holds nobody up; leaving early stops the calls that are not made yet."""
    release = threading.Event()

    def reply(prompt: str, j: int) -> str:
        if prompt.startswith("Q: 0"):
            release.wait(10)
        return "x"

    server.reply = reply
    parts = server_stream(client(server, concurrency=2), WARM)(TASK, [0, 1, 2], 2)
    assert [list(next(parts)), list(next(parts))] == [[1], [2]]
    release.set()
    assert list(next(parts)) == [0]
    made = len(server.requests)
    again = server_stream(client(server, concurrency=1), WARM)(TASK, [0, 1, 2], 2)
    next(again)
    again.close()
    time.sleep(0.1)
    assert len(server.requests) <= made + 2
