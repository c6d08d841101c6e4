"""Rollouts in JSON lines, step by step: verl's dumps and plain rows of anybody's.

verl's format was read in verl 0.9.1, `_dump_generations` of trainer/ppo/ray_trainer.py and trainer/ppo/v1/
trainer_base.py. A dump is never held whole: of files with several steps a first pass keeps byte ranges alone.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polarity.report.foreign.rows import THRESHOLD, Fault, Record, Row, Tally, clean, digest, number, short, text_of

# What a row's parts are called: the first name that the row has a value for. A row with all of MARK is verl's.
MARK = {"input", "output", "score"}
VERL = {
    "prompt": ("input",), "response": ("output",), "correct": ("acc", "correct"), "reward": ("score",),
    "gold": ("gts",),
}  # fmt: skip
PLAIN = {
    "prompt": ("prompt", "problem"), "response": ("response", "completion", "output"), "correct": ("correct",),
    "reward": ("reward", "score"), "gold": ("gold", "answer"),
}  # fmt: skip
NAMES = {"verl": VERL, "verl validation": VERL, "JSON lines": PLAIN}
# Keys of our rollouts format that plain rows may have, with one entry a token.
LISTS = {
    "tokens": ("tokens",), "token_ids": ("token_ids",), "logp_old": ("logp_old", "logp"),
    "logp_rollout": ("logp_rollout",), "entropy": ("entropy",), "advantage": ("advantage",), "weight": ("weight",),
}  # fmt: skip
TRIES = 20  # lines of a file that are looked at to find out what it holds


@dataclass(frozen=True)
class Block:
    """Bytes of a file whose rows belong to one step; line: the number of its first line."""

    file: Path
    start: int
    end: int
    line: int


class JsonLines:
    """Rows of JSONL files. kind: a key of NAMES. Steps are those that rows name, else those of the files' names."""

    def __init__(self, files: Sequence[Path], kind: str):
        self.names, self.tally = NAMES[kind], Tally()
        self.blocks: dict[int, list[Block]] = {}
        for place, file in enumerate(files, start=1):
            self._index(file, place)
        self.shift = int(kind != "verl validation" and 0 in self.blocks)
        if self.shift:
            self.tally.remark("steps: the source counts from 0; here its first step is 1, the steps completed")

    @property
    def steps(self) -> list[int]:
        return sorted(step + self.shift for step in self.blocks)

    def rows(self, step: int) -> list[Row]:
        """The rows of a step; of a session with several outputs the last one."""
        own = step - self.shift
        rows = [row for block in self.blocks.get(own, []) for row in self._read(block, own)]
        last: dict[str, int] = {}
        for row in rows:
            if row.turn:
                last[row.turn[0]] = max(row.turn[1], last.get(row.turn[0], 0))
        kept = [row for row in rows if row.turn is None or row.turn[1] == last[row.turn[0]]]
        if len(kept) < len(rows):
            self.tally.left_out["rows that are not the last output of their session"] += len(rows) - len(kept)
        self.tally.rows += len(kept)
        return kept

    def _index(self, file: Path, place: int) -> None:
        first, size = first_record(file) or {}, file.stat().st_size
        named = re.search(r"(?<!\d)\d{1,9}$", file.stem)
        step = int(named[0]) if named else place
        own = self.names is VERL and named and named[0] == file.stem and first.get("step", step) == step
        if "step" in first and not own:
            self._scan(file)
            return
        if not own:  # verl's own way is a file a step
            how = "the number at the end of a file's name" if named else "a file's place in the alphabet"
            self.tally.remark(f"steps: rows without `step` have {how} for it")
        self.blocks.setdefault(step, []).append(Block(file, 0, size, 1))

    def _scan(self, file: Path) -> None:
        """A block for each run of rows with the same step. Lines that cannot be read go with the rows before them."""
        start, first_line, current = 0, 1, None
        for line, offset, text in _lines(file):
            try:
                step = _step(parse(text))
            except Fault:
                continue
            if current is not None and step != current:
                self.blocks.setdefault(current, []).append(Block(file, start, offset, first_line))
                start, first_line = offset, line
            current = step
        if current is not None:
            self.blocks.setdefault(current, []).append(Block(file, start, file.stat().st_size, first_line))

    def _read(self, block: Block, step: int) -> Iterator[Row]:
        for line, _, text in _lines(block.file, block):
            place = f"{block.file.name} line {line}"
            try:
                record = parse(text)
                if "step" in record and _step(record) != step:
                    raise Fault(f"its step is {record['step']}, in a file of step {step}")
                yield self._row(record)
            except Fault as fault:
                if text.endswith(b"\n"):
                    self.tally.fault(place, str(fault))
                else:
                    self.tally.remark(f"{place}, the last one, is half written and left out")

    def _row(self, record: Record) -> Row:
        names, plain = self.names, self.names is PLAIN
        prompt, response = (text_of(_first(record, names[part])[1]) for part in ("prompt", "response"))
        if prompt is None or response is None:
            raise Fault(f"no text under {' or '.join(names['prompt' if prompt is None else 'response'])}")
        reward_name, value = _first(record, names["reward"])
        reward = None if value is None else number(value, reward_name)
        verdict_name, verdict = _first(record, names["correct"])
        if verdict is not None:
            rule, correct = f"`{verdict_name}`", number(verdict, verdict_name) >= THRESHOLD
        elif reward is not None:
            rule, correct = f"`{reward_name}` >= {THRESHOLD}", reward >= THRESHOLD
        else:
            raise Fault(f"neither {names['correct'][0]} nor {' nor '.join(names['reward'])}")
        given = _further(record, self.tally.left_out) if plain else {}
        gold = _first(record, names["gold"])[1]
        if gold is not None:
            given["gold"] = clean(gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False))
        named = _first(record, ("problem_id", "id"))[1] if plain else None
        problem = digest(prompt, given.get("gold")) if named is None else clean(str(named))
        group, how, turn = self._group(record, digest(prompt, problem))
        self.tally.rules[rule] += 1
        self.tally.grouping[how] += 1
        return Row(prompt, response, correct, reward, problem, group, given, turn)

    def _group(self, record: Record, same: str) -> tuple[str, str, tuple[str, int] | None]:
        """Group, how it was found, and turn: by `group`, by verl's uid (PROMPT_SESSION_OUTPUT), or by the problem."""
        if self.names is PLAIN and record.get("group") is not None:
            return f"group {record['group']}", "the same `group`", None
        uid = (
            re.fullmatch(r"(.*)_(\d{1,9})_(\d{1,9})", str(record.get("uid")), re.DOTALL) if self.names is VERL else None
        )
        if uid:
            return f"uid {uid[1]}", "the same `uid`", (f"{uid[1]}_{uid[2]}", int(uid[3]))
        return same, "the same prompt and reference answer", None


def kind_of(file: Path) -> str | None:
    """Which of NAMES the rows of a file have, by its first lines; None where they are no rollouts."""
    record = first_record(file)
    if record is None:
        return None
    if record.keys() >= MARK:
        # Validation repeats the score as `reward`, in both trainers; their training dumps do not.
        return "verl validation" if record.get("reward", math.nan) == record["score"] else "verl"
    has = {part: any(name in record for name in names) for part, names in PLAIN.items()}
    return "JSON lines" if has["prompt"] and has["response"] and (has["correct"] or has["reward"]) else None


def first_record(file: Path) -> Record | None:
    """The first JSON object in the first lines of a file."""
    for (_, _, text), _ in zip(_lines(file), range(TRIES), strict=False):
        try:
            return parse(text)
        except Fault:
            continue
    return None


def parse(line: bytes) -> Record:
    """A line as a JSON object. Raises Fault."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Fault(f"not UTF-8: {error.reason}") from error
    except (ValueError, RecursionError) as error:  # no JSON; a number of 5,000 digits; ten thousand brackets
        raise Fault(f"not JSON: {short(error)}") from error
    if not isinstance(record, dict):
        raise Fault("not a JSON object")
    return record


def _lines(file: Path, block: Block | None = None) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, first byte, line) of each line of a file, or a block, that is not blank; \\n alone ends one."""
    offset, line_number = (block.start, block.line) if block else (0, 1)
    with file.open("rb") as opened:
        opened.seek(offset)
        while (block is None or offset < block.end) and (line := opened.readline()):
            if line.strip():
                yield line_number, offset, line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
            offset, line_number = offset + len(line), line_number + 1


def _first(record: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """The first of the names under which the record has a value, and it; (first name, None) where it has none."""
    return next(((name, record[name]) for name in names if record.get(name) is not None), (names[0], None))


def _step(record: Record) -> int:
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 <= step < 2**53 or step != int(step):
        raise Fault("step is not a whole number from 0")
    return int(step)


def _further(record: Record, left_out: Counter[str]) -> Record:
    """What a plain row may have beside the least: truncated, advantage, status, strategy, and lists over tokens."""
    given: Record = {}
    if isinstance(record.get("truncated"), bool):
        given["truncated"] = record["truncated"]
    given |= {key: clean(record[key]) for key in ("status", "strategy") if isinstance(record.get(key), str)}
    for key, names in LISTS.items():
        name, values = _first(record, names)
        if key == "advantage" and isinstance(values, int | float):
            given[key] = number(values, name)
        elif isinstance(values, list):
            kind: Any = {"tokens": str, "token_ids": int}.get(key, float)
            given[key] = [clean(str(v)) if kind is str else kind(number(v, name)) for v in values]
        elif values is not None:
            left_out[f"values of `{name}` that are no list with an entry a token"] += 1
    lengths = {key: len(given[key]) for key in LISTS if isinstance(given.get(key), list)}
    if len(set(lengths.values())) > 1:
        raise Fault("lists over tokens differ in length: " + ", ".join(f"{key} {n}" for key, n in lengths.items()))
    return given
