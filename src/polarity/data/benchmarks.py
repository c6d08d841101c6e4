"""The benchmarks of the papers: where each comes from, how it is asked, verified, and sampled.

Nothing of them is shipped. A benchmark is read from a file or folder you name, from the folder in the environment
variable POLARITY_DATA, or from the Hugging Face hub. [A]: A3PO's paper, appendix A; [Z]: the NSR paper, section 3.
"""

import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from polarity.data.columns import Row
from polarity.data.problems import MAX_BAD, BadRow, Loaded, load_rows
from polarity.errors import UserError, nearest

FOLDER_VARIABLE = "POLARITY_DATA"

# Samples a problem in a paper's protocol, under the names of polarity.evaluation's protocols.
_A3PO = {"a3po": 32}
_NSR = {"nsr": 256, "nsr_qwen3": 64}
_BOXED = {"a3po": "a3po", "nsr": "qwen", "nsr_qwen3": "qwen3_no_thinking"}
_MAA = "problems (c) MAA; for evaluation, not to be redistributed"


def _as_published(record: Row) -> Row:
    return record


@dataclass(frozen=True)
class Benchmark:
    """hub: what is read from the hub, all of it (`readers.py`); files: the names looked for in a folder, first wins.

    problems: how many there are on the hub. templates, samples: under the name of a paper's protocol; a paper without
    samples does not use it.
    prepare: makes a published record one that `columns.py` understands, and leaves prepared ones alone.
    """

    name: str
    hub: tuple[str, ...]
    files: tuple[str, ...]
    problems: int
    verifier: str
    rights: str
    samples: Mapping[str, int] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=lambda: _BOXED)
    note: str = ""
    prepare: Callable[[Row], Row] = _as_published


def load_benchmark(name: str, path: str | Path | None = None) -> list[Row]:
    """The problems of a benchmark, from `path` (a file, or a folder that holds it), POLARITY_DATA or the hub.

    Raises UserError, one line with the fix, where it is unknown, not found, cannot be fetched, or any row is bad.
    """
    return _load(name, path, max_bad=0).rows


def load_problems(
    spec: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    max_bad: float = MAX_BAD,
    quarantine: Path | None = None,
) -> Loaded:
    """What `spec` names: a benchmark (`aime24`, or `aime24=PATH`), or anything that `load_rows` reads."""
    name, _, path = str(spec).partition("=")
    if name in BENCHMARKS and (path or not Path(name).exists()):
        return _load(name, path or None, max_bad=max_bad, quarantine=quarantine)
    if not str(spec).startswith("hf:") and not Path(spec).exists() and not Path(spec).suffix and ":" not in str(spec):
        raise UserError(f"{spec} is neither a file, a directory nor a benchmark; {nearest(str(spec), BENCHMARKS)}")
    return load_rows(spec, columns, max_bad=max_bad, quarantine=quarantine)


def _load(name: str, path: str | Path | None, *, max_bad: float, quarantine: Path | None = None) -> Loaded:
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; {nearest(name, BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    try:
        parts = [load_rows(source, max_bad=max_bad, prepare=benchmark.prepare) for source in _sources(benchmark, path)]
    except UserError as error:
        hint = f"; or give a file: {name}=PATH, or a folder in {FOLDER_VARIABLE}" if "hf:" in str(error) else ""
        raise UserError(f"benchmark {name}: {error}{hint}") from error
    rows: list[Row] = [row for part in parts for row in part.rows]
    bad: list[BadRow] = [row for part in parts for row in part.quarantined]
    loaded = Loaded(name, rows, bad, sum(part.repeats for part in parts), quarantine if bad else None)
    if loaded.path:
        loaded.write(loaded.path)
    return loaded


def _sources(benchmark: Benchmark, path: str | Path | None) -> list[str | Path]:
    if path is not None:
        if not Path(path).exists():
            raise UserError(f"no file or folder {path}")
        return _found(benchmark, Path(path)) or [Path(path)]
    folder = os.environ.get(FOLDER_VARIABLE)
    return (_found(benchmark, Path(folder)) if folder else []) or list(benchmark.hub)


def _found(benchmark: Benchmark, folder: Path) -> list[str | Path]:
    """The files of the first pattern that a folder has any of."""
    if folder.is_dir():
        for pattern in benchmark.files:
            files = sorted(file for file in folder.glob(pattern) if file.suffix in (".jsonl", ".parquet", ".csv"))
            if files:
                return list(files)
    return []


def _choices(record: Row) -> Row:
    """GPQA: four options in an order that the question alone decides, the letter of the right one as the answer."""
    if "Correct Answer" not in record:
        return record
    question, right = record["Question"], record["Correct Answer"]
    options = [right, *(record.get(f"Incorrect Answer {i}") for i in (1, 2, 3))]
    if not all(isinstance(text, str) for text in (question, *options)):
        return {"id": record.get("Record ID"), "question": question, "answer": None}  # to be set aside
    options = [text.strip() for text in options]
    right = options[0]
    random.Random(f"gpqa/{question.strip()}").shuffle(options)
    letters = [f"({letter}) {text}" for letter, text in zip("ABCD", options, strict=True)]
    row = {
        "id": record.get("Record ID"),
        "problem": question.strip() + "\n\n" + "\n".join(letters),
        "answer": "ABCD"[options.index(right)],
        "options": options,
        "subject": record.get("High-level domain"),
    }
    return {key: value for key, value in row.items() if value is not None}


_STDIN = "Write a Python program that reads the input from stdin and writes the answer to stdout."
_FUNCTION = "Write Python code that completes this starter code:"
_FENCE = "Put the whole program into one ```python code block."


def _program(record: Row) -> Row:
    """LiveCodeBench: the task with the answer's form, by the starter code; its test columns stay as they are."""
    if "question_content" not in record:
        return record
    starter = str(record.get("starter_code") or "").strip("\n")
    form = f"{_FUNCTION}\n```python\n{starter}\n```\n{_FENCE}" if starter else f"{_STDIN} {_FENCE}"
    public = record.get("public_test_cases")
    row = {key: value for key, value in record.items() if key != "question_content"}
    answer = json.dumps(public) if isinstance(public, list) else public  # CodeVerifier reads all tests from the row
    return {**row, "problem": f"{record['question_content']}\n\n{form}", "answer": answer}


def _olympiad(record: Row) -> Row:
    """OlympiadBench: the answer is a list, nearly always of one."""
    answers = record.get("final_answer")
    if not isinstance(answers, list) or "answer" in record:
        return record
    return {**record, "answer": ", ".join(str(answer) for answer in answers)}


def _whole_number(record: Row) -> Row:
    """AIME and AMC, some copies of which hold their answers as numbers."""
    key = next((key for key in record if key.lower() == "answer"), "answer")
    answer: Any = record.get(key)
    whole = isinstance(answer, (int, float)) and not isinstance(answer, bool) and answer == int(answer)
    return {**record, key: str(int(answer))} if whole else record


_LIVECODEBENCH = tuple(f"hf:livecodebench/code_generation_lite/test{i}.jsonl" for i in ("", 2, 3, 4, 5, 6))
_ALL = (
    Benchmark(
        "aime24", ("hf:HuggingFaceH4/aime_2024:train",), ("aime24.*", "aime_2024.*"), 30, "math", _MAA,
        samples=_A3PO, prepare=_whole_number,
    ),
    Benchmark(
        "aime25", ("hf:math-ai/aime25:test",), ("aime25.*", "aime_2025.*"), 30, "math", _MAA,
        samples=_A3PO | _NSR, prepare=_whole_number,
    ),
    Benchmark(
        "math500", ("hf:HuggingFaceH4/MATH-500:test",), ("math500.*", "MATH-500.*"), 500, "math", "MIT", samples=_A3PO,
    ),
    Benchmark(
        "math", ("hf:DigitalLearningGmbH/MATH-lighteval:test",), ("math_test.*", "math.*"), 5000, "math", "MIT",
        samples=_NSR, note="the test set; its other split, :train, is what [Z] trains on",
    ),
    Benchmark(
        "amc23", ("hf:math-ai/amc23:test",), ("amc23.*",), 40, "math", _MAA, samples=_NSR, prepare=_whole_number,
    ),
    Benchmark(
        "gpqa_diamond", ("hf:Idavidrein/gpqa/gpqa_diamond:train",), ("gpqa_diamond.*",), 198, "choice",
        "CC BY 4.0; gated: its authors ask that no example be published in plain text, so keep rollouts private",
        samples=_A3PO, templates={"a3po": "a3po"}, prepare=_choices,
        note="options in an order drawn from the question's text, the same in every run",
    ),
    Benchmark(
        "livecodebench", _LIVECODEBENCH, ("livecodebench.*", "livecodebench/test*.jsonl"), 1055, "code",
        "problems (c) LeetCode, AtCoder, Codeforces; for evaluation", samples=_A3PO, templates={"a3po": "plain"},
        prepare=_program,
        note="release_v6, several GB with its tests; neither release nor prompt is in [A], so the form of the answer "
        "is asked for in the problem",
    ),
    Benchmark("gsm8k", ("hf:openai/gsm8k/main:test",), ("gsm8k_test.*", "gsm8k.*"), 1319, "math", "MIT"),
    Benchmark(
        "olympiadbench", ("hf:Hothan/OlympiadBench/OE_TO_maths_en_COMP:train",), ("olympiadbench*.*",), 674, "math",
        "Apache-2.0", note="open-ended, text only, English, mathematics", prepare=_olympiad,
    ),
)  # fmt: skip
BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType({benchmark.name: benchmark for benchmark in _ALL})
