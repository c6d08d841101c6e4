"""Python programs, graded on the tests of LiveCodeBench and of data sets in its shape.

Tests are of two kinds: `stdin` (text in, text out) and `functional` (a function's JSON arguments, one a line, and the
JSON of what it returns). Where they are read from, first found first:

- the row's `input_output`: {"inputs": [...], "outputs": [...], "fn_name": name or null}, an object or its JSON;
- the row's `public_test_cases` and `private_test_cases` together: lists of {input, output, testtype}, their JSON, or
  (as LiveCodeBench stores the private ones) the base64 of the zlib of the pickle of that JSON, read without unpickling
  anything but strings, numbers, lists and dictionaries;
- `gold`, the JSON of either shape. With tests in the row, gold may be any placeholder.

The function's name is `fn_name`, else `func_name` in the row's `metadata` (an object or its JSON).

Grading follows LiveCodeBench (lcb_runner/evaluation/testing_util.py): its names are imported before the program, the
limit is wall clock a test, the tests run in order up to the first that fails, and `sys.exit` is a normal end.
Departures: each test is a fresh process with a real standard input and `__name__ == "__main__"` (there: a function
called again and again with parts of `sys` replaced), tuples count as lists at any depth, and keys of dictionaries are
compared as JSON writes them.
"""

import base64
import functools
import io
import json
import math
import os
import pickle
import re
import signal
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from polarity.errors import UserError
from polarity.rewards.outcome import Outcome
from polarity.rewards.sandbox import Program, Run, SandboxError, Session, find_sandbox, last_line

FENCE = re.compile(r"[ \t]*+```+[ \t]*+([^\s`]*+)[^`]*+$")  # possessive: linear in the line
PYTHON_TAGS = ("python", "python3", "py")
SPARE_OUTPUT = 1 << 20  # bytes a program may print beyond four times the expected output
UNPACKED_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    """One test. function: the name of the function to call, None for a test of standard input.

    data: the standard input, or the JSON list of arguments; expected: the output, or the JSON of the value.
    """

    data: str
    expected: str
    function: str | None


class CodeVerifier:
    """Correct if the response's program passes all tests of its problem; score 1 or 0, no credit for a part of them.

    status: wrong (another output, an exception, too much memory or output), timeout (a test took longer than `limit`
    seconds, 6 in LiveCodeBench), unparsed (no complete fenced block), error (no usable tests, or the sandbox broke).
    extracted: the program if it is correct, else what the first failing test says.
    Programs run in a sandbox, see polarity.rewards.sandbox for what is and is not contained; without one the first use
    raises UserError, unless `unsafe` allows ordinary processes. memory_mb: MiB of address space a test.
    Time: at most (number of tests) * limit a program; programs run in parallel, one a core, a program's tests in turn,
    since most wrong programs fail the first.
    """

    def __init__(self, limit: float = 6.0, memory_mb: int = 1024, unsafe: bool = False):
        if not 0 < limit < math.inf or memory_mb < 64:
            raise UserError(f"limit={limit}, memory_mb={memory_mb}: use a limit of more than 0 s and at least 64 MiB")
        self.limit, self.memory_mb, self.unsafe = limit, memory_mb, unsafe

    def __call__(self, response: str, gold: str, row: Mapping[str, Any] | None = None) -> Outcome:
        """Grade one response; gold and row as in the module's docstring. Raises UserError where nothing can be run."""
        code = extract_code(response)
        if code is None:
            return Outcome(False, "unparsed", 0.0)
        try:
            tests = read_tests(gold, row)
        except UserError as error:
            return Outcome(False, "error", 0.0, extracted=str(error))
        sandbox = find_sandbox(self.unsafe)
        program = Program(code, tests[0].function, self.limit, self.memory_mb)
        try:
            with Session(sandbox, program) as session:
                for i, test in enumerate(tests, 1):
                    run = session.run(test.data.encode("utf-8", "replace"), SPARE_OUTPUT + 4 * len(test.expected))
                    failure = _failure(run, test)
                    if failure:
                        late = run.ended == "timeout" or run.code == -signal.SIGXCPU
                        reason = f"test {i} of {len(tests)}: {failure}"
                        return Outcome(False, "timeout" if late else "wrong", 0.0, extracted=reason)
        except (SandboxError, OSError) as error:  # OSError: no descriptors or no processes left here
            return Outcome(False, "error", 0.0, extracted=f"sandbox: {error}")
        return Outcome(True, "correct", 1.0, extracted=code)

    def check_many(self, items: Iterable[Sequence[Any]]) -> list[Outcome]:
        """One Outcome for each (response, gold) or (response, gold, row), in order; one program a core at a time."""
        find_sandbox(self.unsafe)  # once, and its UserError from here
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="polarity-code") as pool:
            return list(pool.map(lambda item: self(*item), items))


def extract_code(response: str) -> str | None:
    """The last complete fenced block marked as Python, else the last complete fenced block, else None.

    A fence is a line of three or more backticks; an opening one may name the language. A fence that names one inside
    an open block starts over: the block before it never ended.
    """
    blocks: list[tuple[str, str]] = []
    start, tag = -1, ""
    lines = response.split("\n")
    for i, line in enumerate(lines):
        fence = FENCE.match(line)
        if not fence:
            continue
        if start < 0 or fence[1]:
            start, tag = i, fence[1].lower()
        else:
            blocks.append((tag, textwrap.dedent("\n".join(lines[start + 1 : i]))))
            start = -1
    python = [code for tag, code in blocks if tag in PYTHON_TAGS]
    return python[-1] if python else blocks[-1][1] if blocks else None


def read_tests(gold: str, row: Mapping[str, Any] | None = None) -> list[Case]:
    """The tests of one problem, at least one and all for the same function or none; formats: the module's docstring.

    Raises UserError with the reason.
    """
    row = row or {}
    if row.get("input_output"):
        found = [_json(row["input_output"], "input_output")]
    elif row.get("public_test_cases") or row.get("private_test_cases"):
        found = [_decoded(row[name], name) for name in ("public_test_cases", "private_test_cases") if row.get(name)]
    else:
        found = [_json(gold, "the gold answer")]
    metadata = _json(row.get("metadata") or {}, "metadata")
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    tests = [test for part in found for test in _tests(part, name)]
    if not tests:
        raise UserError("the problem has no tests")
    if len({test.function for test in tests}) > 1:
        raise UserError("the problem mixes stdin and functional tests; keep one kind")
    return tests


def _tests(part: Any, name: str | None) -> list[Case]:
    if isinstance(part, dict) and isinstance(part.get("inputs"), list) and isinstance(part.get("outputs"), list):
        if len(part["inputs"]) != len(part["outputs"]):
            raise UserError(f"{len(part['inputs'])} test inputs but {len(part['outputs'])} outputs")
        name = part.get("fn_name") or name
        return [_test(i, o, name) for i, o in zip(part["inputs"], part["outputs"], strict=True)]
    if isinstance(part, list) and all(isinstance(case, dict) and {"input", "output"} <= case.keys() for case in part):
        functional = [case.get("testtype") == "functional" for case in part]
        if any(functional) and not name:
            raise UserError("functional tests without the function's name; give metadata with func_name")
        return [_test(c["input"], c["output"], name if f else None) for c, f in zip(part, functional, strict=True)]
    raise UserError('no tests: need {"inputs": [...], "outputs": [...]} or a list of {input, output, testtype}')


def _test(given: Any, expected: Any, function: str | None) -> Case:
    if function is None:
        data, output = ("\n".join(map(str, x)) if isinstance(x, list) else str(x) for x in (given, expected))
        return Case(data, output, None)
    if isinstance(given, str):  # one JSON value a line; a list is the arguments themselves
        given = [_json(line, "an argument of a functional test") for line in given.strip().split("\n")]
    output = expected if isinstance(expected, str) else json.dumps(expected)
    _json(output, "the output of a functional test")
    return Case(json.dumps(given), output, function)


@functools.lru_cache(maxsize=256)  # a group of responses asks for the same problem; a test set can be megabytes
def _parsed(text: str) -> Any:
    return json.loads(text)


def _json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return _parsed(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON: {error}") from error


class _Plain(pickle.Unpickler):
    """Strings, numbers, lists, dictionaries: what a pickle can hold without naming a class or a function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


@functools.lru_cache(maxsize=64)
def _unpacked(text: str) -> Any:
    unzip = zlib.decompressobj()
    data = unzip.decompress(base64.b64decode(text, validate=True), UNPACKED_BYTES)
    if not unzip.eof:
        raise ValueError(f"cut short, or over {UNPACKED_BYTES} bytes")
    value = _Plain(io.BytesIO(data)).load()
    return json.loads(value) if isinstance(value, str) else value


def _decoded(value: Any, what: str) -> Any:
    """A column of test cases: a list, its JSON, or the base64 of the zlib of its pickle (JSON has a bracket)."""
    if not isinstance(value, str) or value.lstrip().startswith(("[", "{")):
        return _json(value, what)
    try:
        return _unpacked(value)
    except Exception as error:  # a malformed pickle raises nearly anything
        raise UserError(f"{what} is neither JSON nor base64 of a zlib-compressed plain pickle: {error}") from error


def _failure(run: Run, test: Case) -> str | None:
    """What went wrong with one test, in a few words; None if it passed."""
    if run.ended != "exit":
        return {"timeout": "time limit", "flood": "output limit", "killed": "killed its own sandbox"}[run.ended]
    if run.code < 0:
        return f"ended by signal {-run.code} ({signal.strsignal(-run.code)})"
    if run.code > 0:
        return _short(last_line(run.stderr)) or f"exit code {run.code}"
    printed = run.stdout.decode("utf-8", "replace")
    same = same_output if test.function is None else same_value
    return None if same(printed, test.expected) else f"expected {_short(test.expected)!r}, got {_short(printed)!r}"


def same_output(printed: str, expected: str) -> bool:
    """LiveCodeBench's comparison of outputs, exactly; no numeric tolerance.

    Both are stripped and cut into lines; as many lines, and each pair of lines, stripped, is the same text or the same
    sequence of decimal numbers (`1.50 2` is `1.5 2.0`, 0.333 is not 0.3333).
    """
    lines = [[line.strip() for line in text.strip().split("\n")] for text in (printed, expected)]
    return len(lines[0]) == len(lines[1]) and all(a == b or _same_numbers(a, b) for a, b in zip(*lines, strict=True))


def _same_numbers(a: str, b: str) -> bool:
    try:
        return [Decimal(token) for token in a.split()] == [Decimal(token) for token in b.split()]
    except InvalidOperation:  # not a number, or a signalling NaN
        return False


def same_value(returned: str, expected: str) -> bool:
    """Whether two JSON texts say equal values, as Python compares them (1 = 1.0 = true), without tolerance."""
    try:
        return bool(json.loads(returned) == json.loads(expected))
    except (ValueError, RecursionError):  # nothing returned, or nested beyond reason
        return False


def _short(text: str, most: int = 80) -> str:
    text = text.strip()
    return text if len(text) <= most else text[: most - 3] + "..."
