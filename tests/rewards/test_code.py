"""CodeVerifier: verdicts on programs, and what is left behind."""

import base64
import json
import os
import pickle
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polarity.errors import UserError
from polarity.rewards import sandbox
from polarity.rewards.code import CodeVerifier, read_tests
from polarity.rewards.sandbox import find_sandbox


@pytest.fixture(scope="module")
def verifier() -> CodeVerifier:
    try:
        find_sandbox()
    except UserError as error:
        pytest.skip(str(error))
    return CodeVerifier(limit=5.0, memory_mb=512)


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


def stdin_tests(*pairs: tuple[str, str]) -> str:
    return json.dumps({"inputs": [p[0] for p in pairs], "outputs": [p[1] for p in pairs], "fn_name": None})


def function_tests(name: str, *pairs: tuple[str, str]) -> str:
    return json.dumps({"inputs": [p[0] for p in pairs], "outputs": [p[1] for p in pairs], "fn_name": name})


# Verdicts on standard input: read two numbers, print their sum

SUM = stdin_tests(("1 2", "3"), ("5\n7\n", "12\n"), ("-4 4", "0"))
RIGHT = [
    "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
    "import sys\nprint(sum(int(x) for line in sys.stdin for x in line.split()))",
    "print(sum(map(int, open(0).read().split())))",
    "import sys\nsys.stdout.write(str(sum(map(int, sys.stdin.buffer.read().split()))))",
    "import os\nos.write(1, b'%d' % sum(map(int, os.read(0, os.fstat(0).st_size).split())))",
    "def main():\n    print(sum(map(int, stdin.read().split())))\nif __name__ == '__main__':\n    main()",
    "s = sum(map(int, open(0).read().split()))\nprint(f'  {s}.00  \\n\\n')\nexit(1)",
    "import atexit\nout = []\natexit.register(lambda: print(*out))\nout.append(sum(map(int, open(0).read().split())))",
    "file = open(1, 'w')\nfile.write(str(sum(map(int, open(0).read().split()))))",
    "import threading\nthreading.stack_size(1 << 27)\n"
    "threading.Thread(target=lambda: print(sum(map(int, open(0).read().split())))).start()",
    "import asyncio\nasync def main():\n    print(sum(map(int, open(0).read().split())))\nasyncio.run(main())",
    "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    "print(A(sum(map(int, open(0).read().split()))).x)",
    "import numpy\nprint(numpy.array(open(0).read().split(), int).sum())",
    "import sys\nprint('x' * 500_000, file=sys.stderr)\nprint(sum(map(int, open(0).read().split())))",
]
WRONG = [
    ("print(3)", "test 2 of 3: expected '12', got '3'"),
    ("print(sum(map(int, input().split())))", "test 2 of 3: expected '12', got '5'"),
    ("", "test 1 of 3: expected '3', got ''"),
    ("print(sum(map(int, open(0).read().split())))\n1 / 0", "test 1 of 3: ZeroDivisionError: division by zero"),
    ("input();input()", "test 1 of 3: EOFError: EOF when reading a line"),
    ("print(", "test 1 of 3: SyntaxError: '(' was never closed"),
    ("\0", "test 1 of 3: SyntaxError: source code string cannot contain null bytes"),
    ("def f():\n    f()\nf()", "test 1 of 3: RecursionError: maximum recursion depth exceeded"),
    ("x = 'x' * (1 << 30)", "test 1 of 3: MemoryError"),
    ("import os\nos.abort()", "test 1 of 3: ended by signal 6 (Aborted)"),
    ("import os\nos.kill(os.getpid(), 40)", "test 1 of 3: ended by signal 40 (Real-time signal 6)"),
    ("import os\nos._exit(3)", "test 1 of 3: exit code 3"),
    ("while True:\n    print('x' * 9999)", "test 1 of 3: output limit"),
    ("raise ValueError('y' * 500)", "test 1 of 3: ValueError: " + "y" * 65 + "..."),
]


def test_right_programs_are_correct(verifier: CodeVerifier) -> None:
    """However they read, print and end; with one score, and the program as what was extracted."""
    outcomes = verifier.check_many([(fenced(code), SUM) for code in RIGHT])
    assert [o.extracted for o in outcomes] == RIGHT
    assert {(o.correct, o.status, o.score) for o in outcomes} == {(True, "correct", 1.0)}


def test_wrong_programs_are_wrong_with_the_reason(verifier: CodeVerifier) -> None:
    outcomes = verifier.check_many([(fenced(code), SUM, None) for code, _ in WRONG])
    reasons = [(o.extracted or "").replace("ValueError: source", "SyntaxError: source") for o in outcomes]
    assert reasons == [reason for _, reason in WRONG]
    assert {(o.correct, o.status, o.score) for o in outcomes} == {(False, "wrong", 0.0)}


def test_statuses_stay_apart_and_in_order(verifier: CodeVerifier) -> None:
    quick = CodeVerifier(limit=1.0)
    responses = [fenced(RIGHT[0]), "no program", fenced("while True: pass"), fenced("print(0)"), fenced(RIGHT[1])]
    items = [(response, SUM) for response in responses]
    outcomes = [*quick.check_many(items), *verifier.check_many([(fenced("print(0)"), "no tests")])]
    assert [o.status for o in outcomes] == ["correct", "unparsed", "timeout", "wrong", "correct", "error"]
    assert outcomes[2].extracted == "test 1 of 3: time limit"
    assert verifier.check_many([]) == []


def test_the_limit_is_one_for_each_test(verifier: CodeVerifier) -> None:
    code = "import time\ntime.sleep(0.3)\nprint(input())"
    tests = stdin_tests(*[(str(i), str(i)) for i in range(4)])
    assert CodeVerifier(limit=1.0)(fenced(code), tests).correct


def test_each_test_is_a_fresh_process(verifier: CodeVerifier) -> None:
    code = (
        "import builtins, os\n"
        "print(getattr(builtins, 'seen', 0), os.path.exists('file'))\n"
        "builtins.seen = 1\n"
        "os.path.exists('file') or print(0)\n"
    )
    assert verifier(fenced(code), stdin_tests(("", "0 False\n0"), ("", "0 False\n0"))).correct


def test_the_same_program_gets_the_same_verdict(verifier: CodeVerifier) -> None:
    code = "print(*{str(i) for i in range(40)})"
    outcomes = verifier.check_many([(fenced(code), stdin_tests(("", "?")))] * 4)
    assert len({o.extracted for o in outcomes}) == 1


def test_deep_recursion_and_large_input_and_output(verifier: CodeVerifier) -> None:
    deep = "@cache\ndef f(n):\n    return n and 1 + f(n - 1)\nprint(f(int(input())))"
    assert verifier(fenced(deep), stdin_tests(("15000", "15000"))).correct
    numbers = " ".join(map(str, range(400_000)))
    assert verifier(fenced("print(*map(int, input().split()), sep='\\n')"), stdin_tests((numbers, numbers))).extracted
    assert verifier(fenced("print(*map(int, input().split()))"), stdin_tests((numbers, numbers))).correct
    assert verifier(fenced("print(1)"), stdin_tests((numbers, "1"), ("", "1"))).correct  # never reads its input


def test_text_is_utf_8_and_lines_may_end_in_crlf(verifier: CodeVerifier) -> None:
    assert verifier(fenced("print(input() + 'é' + input())\r"), stdin_tests(("ж\r\n漢", "жé漢"))).correct


# Verdicts on functions

TWICE = function_tests("twice", ("[1, 2]\n3", "[[1, 2, 1, 2], 3]"), ("[]\nnull", "[[], null]"))


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("class Solution:\n    def twice(self, x: List[int], y: Optional[int]):\n        return [x * 2, y]", "correct"),
        ("def twice(x, y):\n    print('debugging', x)\n    return (x + x, y)", "correct"),
        ("class Solution:\n    def twice(self, x, y):\n        x += x\n        return x, y", "correct"),
        ("import numpy\ndef twice(x, y):\n    return [x * 2, y and numpy.int64(y)]", "correct"),
        ("class Solution:\n    def twice(self, x, y):\n        return [x, y]", "wrong"),
        ("class Solution:\n    def other(self, x, y):\n        return [x * 2, y]", "wrong"),
        ("def twice(x):\n    return x", "wrong"),
        ("def twice(x, y):\n    return {1, 2}", "wrong"),
        ("def twice(x, y):\n    pass", "wrong"),
        ("def twice(x, y):\n    exit()", "wrong"),
        ("print('[[1, 2, 1, 2], 3]')", "wrong"),
        ("def twice(x, y):\n    l = []\n    l.append(l)\n    return l", "wrong"),
        ("def twice(x, y):\n    while True: pass", "timeout"),
    ],
)
def test_functions(verifier: CodeVerifier, code: str, status: str) -> None:
    assert CodeVerifier(limit=1.5)(fenced(code), TWICE).status == status


def test_a_livecodebench_row(verifier: CodeVerifier) -> None:
    private = [{"input": '["é"]', "output": '"é"', "testtype": "functional"}]
    row = {
        "starter_code": "class Solution:\n    def most(self, words: List[str]) -> str:\n        ",
        "public_test_cases": json.dumps([{"input": '["a", "b", "b"]', "output": '"b"', "testtype": "functional"}]),
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(json.dumps(private)))).decode(),
        "metadata": '{"func_name": "most"}',
    }
    solution = "class Solution:\n    def most(self, words):\n        return Counter(words).most_common(1)[0][0]"
    assert verifier(fenced(solution), "tests", row).correct
    wrong = verifier(fenced(solution.replace("(words).", "(words[:1]).")), "tests", row)
    assert wrong.extracted == "test 1 of 2: expected '\"b\"', got '\"a\"'"


# Real problems

SOLUTIONS = {
    "code-stdin-000": """
n, m = map(int, input().split())
flip = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "ZYXWVUTSRQPONMLKJIHGFEDCBA")
def key(i):
    out = list(titles[i])
    out[1::2] = [c.translate(flip) for c in out[1::2]]
    return out
titles = [input() for _ in range(n)]
print(*[i + 1 for i in sorted(range(n), key=key)])
""",
    "code-stdin-003": """
s = input().strip()
def count(i, rest, x):
    if i == len(s):
        return rest == 0
    total = 0
    for d in range(10):
        if s[i].isdigit() and int(s[i]) != d or s[i] == "X" and x not in (None, d):
            continue
        if i == 0 and d == 0 and len(s) > 1:
            continue
        total += count(i + 1, (rest * 10 + d) % 25, d if s[i] == "X" else x)
    return total
count = cache(count)
print(int(count(0, 0, None)))
""",
    "code-stdin-013": """
for _ in range(int(input())):
    s = input()
    print("YES" if 2 * s.count("B") == len(s) else "NO")
""",
    "code-stdin-026": """
import sys
M = 10 ** 9 + 7
half = [1, 1]
for i in range(3, 200_001):
    half.append(half[-1] * i % M)
for n in sys.stdin.read().split()[1:]:
    print(half[2 * int(n) - 1])
""",
    "code-stdin-028": """
for _ in range(int(input())):
    a, b, c = map(int, input().split())
    print((a + c) % 2)
""",
    "code-stdin-029": """
for _ in range(int(input())):
    input()
    a = input().split()
    print(a.count("1") * 2 ** a.count("0"))
""",
}  # fmt: skip


@pytest.fixture
def problems() -> dict[str, dict[str, Any]]:
    folder = os.environ.get("POLARITY_TEST_DATA")
    if not folder:
        pytest.skip("POLARITY_TEST_DATA does not name a folder with code_stdin.jsonl")
    with open(Path(folder, "code_stdin.jsonl"), encoding="utf-8") as file:
        return {row["id"]: row for row in map(json.loads, file)}


def test_own_solutions_of_real_problems(verifier: CodeVerifier, problems: dict[str, dict[str, Any]]) -> None:
    assert all(read_tests(row["answer"], row) for row in problems.values())
    items = [(fenced(code), problems[name]["answer"], problems[name]) for name, code in SOLUTIONS.items()]
    spoiled = [(r.replace("% 2", "% 3").replace("i + 1", "i").replace("2 *", "3 *"), g, row) for r, g, row in items]
    outcomes = verifier.check_many([*items, *spoiled])
    assert [o.status for o in outcomes[: len(items)]] == ["correct"] * len(items), outcomes[: len(items)]
    changed = [o.status for (r, *_), (s, *_), o in zip(items, spoiled, outcomes[len(items) :], strict=True) if r != s]
    assert changed == ["wrong"] * len(items)


# The machinery


def test_nothing_is_left_behind(verifier: CodeVerifier) -> None:
    responses = [
        fenced(code) for code in ("print(3)", "while True: pass", "import os\nos.kill(os.getppid(), 9)", "1/0")
    ]
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    CodeVerifier(limit=0.2).check_many([(response, SUM) for response in responses] * 2)
    assert len(os.listdir("/proc/self/fd")) == files
    assert threading.active_count() == threads
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # no children, not even ended ones


def test_works_off_the_main_thread(verifier: CodeVerifier) -> None:
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.extend(verifier.check_many([(fenced(RIGHT[0]), SUM)] * 3)))
    thread.start()
    thread.join()
    assert [o.status for o in outcomes] == ["correct"] * 3


@pytest.fixture
def fresh_search() -> Iterator[None]:
    """What `find_sandbox` found is forgotten, before and after."""
    sandbox._search.cache_clear()
    yield
    sandbox._search.cache_clear()


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    which = sandbox.shutil.which
    monkeypatch.setattr(
        sandbox.shutil, "which", lambda tool, path=None: None if tool in missing else which(tool, path=path)
    )


@pytest.mark.usefixtures("fresh_search")
def test_refuses_without_a_sandbox_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "bwrap", "unshare")
    items = [(fenced(RIGHT[0]), SUM), (fenced("print(0)"), SUM), (fenced("while True: pass"), SUM)]
    with pytest.raises(
        UserError, match=r"bwrap is not installed.*install bubblewrap and util-linux.*--unsafe"
    ) as error:
        CodeVerifier().check_many(items)
    assert "\n" not in str(error.value)
    unsafe = CodeVerifier(limit=1.0, unsafe=True)
    assert [o.status for o in unsafe.check_many(items)] == ["correct", "wrong", "timeout"]


@pytest.mark.usefixtures("fresh_search")
def test_falls_back_to_unshare_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "bwrap")
    try:
        with pytest.warns(UserWarning, match="does not hide this machine's files .*bwrap is not installed"):
            find_sandbox()
    except UserError as error:
        pytest.skip(str(error))
    items = [(fenced(RIGHT[0]), SUM), (fenced("print(0)"), SUM), (fenced("while True: pass"), SUM)]
    assert [o.status for o in CodeVerifier(limit=1.0).check_many(items)] == ["correct", "wrong", "timeout"]


@pytest.mark.usefixtures("fresh_search")
def test_a_sandbox_that_contains_nothing_fails_its_probe() -> None:
    fake = sandbox.Sandbox("fake", (*sandbox._python(), "-c"), None, hides_files=True)
    assert sandbox._probe(fake) == "it shows this machine's files"
    assert "No such file" in (sandbox._probe(sandbox.Sandbox("none", ("/nowhere",), None, True)) or "")
    broken = sandbox.Sandbox("broken", ("sh", "-c", "echo out of order >&2; exit 1"), None, True)
    assert sandbox._probe(broken) == "out of order"


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="limit=0"):
        CodeVerifier(limit=0)
    with pytest.raises(UserError, match="memory_mb=1"):
        CodeVerifier(memory_mb=1)
