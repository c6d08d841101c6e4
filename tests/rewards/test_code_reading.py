"""CodeVerifier: which program is taken from a response, where tests are read from, how outputs are compared."""

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from polarity.errors import UserError
from polarity.rewards import code as code_room
from polarity.rewards.code import Case, CodeVerifier, extract_code, read_tests, same_output, same_value


def stdin_tests(*pairs: tuple[str, str]) -> str:
    return json.dumps({"inputs": [p[0] for p in pairs], "outputs": [p[1] for p in pairs], "fn_name": None})


def function_tests(name: str, *pairs: tuple[str, str]) -> str:
    return json.dumps({"inputs": [p[0] for p in pairs], "outputs": [p[1] for p in pairs], "fn_name": name})


# Which program


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```python\na\n```", "a"),
        ("```python\na\n```\nbetter:\n```python\nb\n```", "b"),
        ("```Python3\na\n```", "a"),
        ("``` py\na\n```", "a"),
        ("````python\na\n````", "a"),
        ("```python\na\n```\nit prints\n```\nb\n```", "a"),
        ("```\na\n```", "a"),
        ("```cpp\na\n```\n```\nb\n```", "b"),
        ("```python\na\n```\n```python\nb", "a"),
        ("```python\nstarted\n```python\nb\n```", "b"),
        ("1. so:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
        ("```python\r\na\r\n```\r\n", "a\r"),
        ("```python\nprint('```')\n```", "print('```')"),
        ("```python\n\n```", ""),
        ("print(1)", None),
        ("", None),
        ("```python\na", None),
        ("`a`", None),
    ],
)
def test_extracts_the_last_complete_block(response: str, code: str | None) -> None:
    assert extract_code(response) == code


def test_extraction_is_linear() -> None:
    assert extract_code("```" * 300_000) is None
    assert extract_code("```python\n" * 100_000) is None
    assert extract_code("```" + "a" * 300_000 + "`") is None
    assert extract_code("```" + " " * 300_000 + "`") is None
    assert extract_code(" \t" * 300_000 + "\n```python\na\n```") == "a"


# Where tests are read from

CASES = [{"input": "1", "output": "2", "testtype": "stdin"}, {"input": "3", "output": "4", "testtype": "stdin"}]
FUNCTIONAL = [{"input": '[1, 2]\n"x"', "output": "[2]", "testtype": "functional"}]


def packed(value: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


@pytest.mark.parametrize(
    ("gold", "row"),
    [
        (stdin_tests(("1", "2"), ("3", "4")), None),
        (json.dumps(CASES), {}),
        ("placeholder", {"input_output": stdin_tests(("1", "2"), ("3", "4"))}),
        ("placeholder", {"input_output": {"inputs": [["1"], "3"], "outputs": [["2"], "4"]}}),
        ("placeholder", {"public_test_cases": json.dumps(CASES[:1]), "private_test_cases": json.dumps(CASES[1:])}),
        ("placeholder", {"public_test_cases": CASES[:1], "private_test_cases": packed(json.dumps(CASES[1:]))}),
        ("placeholder", {"public_test_cases": "[]", "private_test_cases": packed(CASES), "metadata": "{}"}),
    ],
)
def test_reads_stdin_tests(gold: str, row: dict[str, Any] | None) -> None:
    assert read_tests(gold, row) == [Case("1", "2", None), Case("3", "4", None)]


@pytest.mark.parametrize(
    ("gold", "row"),
    [
        (json.dumps(FUNCTIONAL), {"metadata": '{"func_name": "f"}'}),
        (json.dumps(FUNCTIONAL), {"metadata": {"func_name": "f"}}),
        (function_tests("f", ('[1, 2]\n"x"', "[2]")), None),
        ("-", {"input_output": {"inputs": [[[1, 2], "x"]], "outputs": [[2]], "fn_name": "f"}}),
        ("-", {"private_test_cases": packed(json.dumps(FUNCTIONAL)), "metadata": '{"func_name": "f"}'}),
    ],
)
def test_reads_functional_tests(gold: str, row: dict[str, Any] | None) -> None:
    assert read_tests(gold, row) == [Case('[[1, 2], "x"]', "[2]", "f")]


@pytest.mark.parametrize(
    ("gold", "row", "message"),
    [
        ("42", None, "no tests: need"),
        ("see the tests", None, "the gold answer is not JSON"),
        ("[]", None, "has no tests"),
        ('{"inputs": ["1"], "outputs": []}', None, "1 test inputs but 0 outputs"),
        (json.dumps(FUNCTIONAL), None, "without the function's name"),
        (json.dumps(CASES + FUNCTIONAL), {"metadata": '{"func_name": "f"}'}, "mixes"),
        (function_tests("f", ("[1", "1")), None, "argument of a functional test"),
        (function_tests("f", ("1", "yes")), None, "output of a functional test"),
        ("[" * 100_000, None, "not JSON"),
        ("-", {"private_test_cases": "bm90IHppcHBlZA=="}, "neither JSON nor base64"),
        ("-", {"private_test_cases": packed(CASES)[:40]}, "neither JSON nor base64"),
        ("-", {"private_test_cases": packed(os.path.join)}, r"it asks for posixpath\.join"),
    ],
)
def test_refuses_what_holds_no_tests(gold: str, row: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_tests(gold, row)
    assert "\n" not in str(error.value)
    outcome = CodeVerifier()("```python\npass\n```", gold, row)
    assert (outcome.status, outcome.score, outcome.extracted) == ("error", 0.0, str(error.value))


class Attack:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_no_code_runs_from_a_pickle(tmp_path: Path) -> None:
    text = packed([Attack(tmp_path / "ran")])
    with pytest.raises(UserError, match="it asks for"):
        read_tests("-", {"private_test_cases": text})
    pickle.loads(zlib.decompress(base64.b64decode(text)))
    assert (tmp_path / "ran").exists()  # the attack works where nothing stops it


def test_a_compression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_room, "UNPACKED_BYTES", 1 << 20)
    with pytest.raises(UserError, match="over 1048576 bytes"):
        read_tests("-", {"private_test_cases": packed("x" * (1 << 21))})


# Comparisons


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("4\n", "4", True),
        (" 1 2 \n3\n\n", "1 2\n3", True),
        ("1\n2", "1 2", False),
        ("1  2", "1 2", True),
        ("a  b", "a b", False),
        ("1.50 2", "1.5 2.0", True),
        ("1e3", "1000", True),
        ("0.3333", "0.333", False),
        ("0.30000000000000004", "0.3", False),
        ("50000000000000001", "50000000000000000", False),
        ("Yes", "YES", False),
        ("", "", True),
        ("", "0", False),
        ("1\n\n2", "1\n2", False),
        ("nan", "NaN", False),
        ("sNaN", "1", False),
        ("1e999999999999999999999", "1", False),
        ("9" * 100_000, "9" * 100_000 + " ", True),
        ("-0", "0", True),
    ],
)
def test_outputs_are_compared_as_livecodebench_does(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    ("returned", "expected", "same"),
    [
        ("[1, 2]", "[1,2]", True),
        ("1.0", "1", True),
        ("true", "1", True),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', True),
        ("[1, 2]", "[2, 1]", False),
        ('"1"', "1", False),
        ("0.30000000000000004", "0.3", False),
        ("null", "0", False),
        ("", "null", False),
        ("[" * 100_000, "[]", False),
    ],
)
def test_values_are_compared_as_json(returned: str, expected: str, same: bool) -> None:
    assert same_value(returned, expected) is same
