"""Rollouts in TRL's completions_*.parquet, which GRPOConfig(log_completions=True) leaves in OUTPUT_DIR/completions.

Read in TRL 1.16.0, `GRPOTrainer.log`: at each log it writes the generation batch that it holds, under the number of
optimiser steps: step, prompt, completion, a column a reward function, whatever log_extra was given, advantage. Where
logging is more frequent than generation, the same batch is written again; evaluation writes to the same files.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polarity.errors import UserError
from polarity.report.foreign.rows import THRESHOLD, Fault, Record, Row, Tally, digest, missing, number, short, text_of


class Completions:
    """Rows of completions_*.parquet, one generation batch a file."""

    def __init__(self, files: Sequence[Path]):
        self.tally, self._last = Tally(), ""
        self.files: dict[int, Path] = {}
        for file in files:
            library = parquet(file)
            try:
                steps = library.read_table(file, columns=["step"])["step"]
                if len(steps):
                    self.files[int(steps[0].as_py())] = file
            except (ValueError, OSError, TypeError) as error:  # pyarrow's own are of the first two; a step of null
                self.tally.remark(f"{file.name} cannot be read as TRL's parquet and is left out: {short(error)}")
        self.evaluated = {0} | _evaluated(files[0].parent)  # before the first step there is nothing but evaluation
        if len(self.evaluated) == 1:
            self.tally.remark(
                "TRL writes evaluation completions into the same files; no trainer_state.json here tells of an "
                "evaluation, so none are left out"
            )

    @property
    def steps(self) -> list[int]:
        return sorted(self.files)

    def rows(self, step: int) -> list[Row]:
        """The rows of a step, in rising order of steps; none where the file is of an evaluation or repeats a batch."""
        if step not in self.files:
            return []
        file = self.files[step]
        table = parquet(file).read_table(file)
        rewards, records = reward_columns(table.schema), table.to_pylist()
        batch = digest(*(text_of(r[name]) for r in records for name in ("prompt", "completion")))
        repeated, self._last = batch == self._last, batch
        if step in self.evaluated or repeated:
            why = "of evaluations" if step in self.evaluated else "that repeat the generation batch of the file before"
            self.tally.left_out[f"files {why}"] += 1
            return []
        rows = []
        for place, record in enumerate(records, start=1):
            try:
                row = self._row(record, rewards)
            except Fault as fault:
                self.tally.fault(f"{file.name} row {place}", str(fault))
                continue
            if row is not None:
                rows.append(row)
        self.tally.rows += len(rows)
        return rows

    def _row(self, record: Record, rewards: Sequence[str]) -> Row | None:
        """None where no reward function said what the verdict is taken from."""
        prompt, response = text_of(record["prompt"]), text_of(record["completion"])
        if prompt is None or response is None:
            raise Fault(f"no text under {'prompt' if prompt is None else 'completion'}")
        scores = {name: number(record[name], name) for name in rewards if not missing(record[name])}
        judge = next((name for name in rewards if judges(name)), rewards[0] if len(rewards) == 1 else None)
        if not scores or (judge is not None and judge not in scores):
            who = f"`{judge}`" if judge else "any reward function"
            self.tally.left_out[f"completions without a score of {who}"] += 1
            return None
        reward = sum(scores.values())
        total = " + ".join(f"`{name}`" for name in rewards)
        correct = (reward if judge is None else scores[judge]) >= THRESHOLD
        self.tally.rules[f"{total if judge is None else f'`{judge}`'} >= {THRESHOLD}"] += 1
        self.tally.grouping["the same prompt"] += 1
        if len(rewards) > 1:
            self.tally.remark(f"the reward is {total}, each with weight 1, since TRL does not log weights")
        advantage = record.get("advantage")
        given = {} if missing(advantage) else {"advantage": number(advantage, "advantage")}
        problem = digest(prompt)
        return Row(prompt, response, correct, reward, problem, problem, given)


def is_completions(file: Path) -> bool:
    """Whether a parquet file has TRL's columns; a half-written one counts by its name."""
    library = parquet(file)
    try:
        return bool(reward_columns(library.read_schema(file)))
    except (ValueError, OSError):
        return file.name.startswith("completions_")


def reward_columns(schema: Any) -> list[str]:
    """The reward columns of a table of TRL's: those of floating-point numbers but for the advantage; else none."""
    if not {"step", "prompt", "completion"} <= set(schema.names):
        return []
    floats = [column.name for column in schema if str(column.type) in ("float", "double", "halffloat")]
    return [name for name in floats if name not in ("step", "advantage")]


def judges(name: str) -> bool:
    """Whether a reward function by its name says if the answer is right."""
    name = name.lower()
    return name == "acc" or "accuracy" in name or ("correct" in name and "incorrect" not in name)


def parquet(file: Path) -> Any:
    """pyarrow.parquet. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(f"{file}: reading it needs pyarrow; pip install 'polarity-rl[data]'") from error


def _evaluated(folder: Path) -> set[int]:
    """Steps at which the run evaluated, as far as trainer_state.json of OUTPUT_DIR and its checkpoints know."""
    files = [*folder.parent.glob("trainer_state.json"), *folder.parent.glob("checkpoint-*/trainer_state.json")]
    steps: set[int] = set()
    for file in files:
        try:
            log = json.loads(file.read_text(encoding="utf-8"))["log_history"]
            steps |= {int(entry["step"]) for entry in log if any(key.startswith("eval_") for key in entry)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # half written, or somebody else's
    return steps
