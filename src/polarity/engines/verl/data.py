"""The problems of a run as parquet files in verl's columns, in the order in which the run draws them.

    data_source                `train`, or the name of the evaluation split
    prompt                     [{role: user, content}]: the text the model gets, template applied
    reward_model.ground_truth  the answer
    extra_info                 index, split, id, answer, max_new_tokens, and row: the whole problem row as JSON

The training file holds as many rows as the run can draw, so verl neither shuffles nor begins it again.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polarity.config import RunConfig
from polarity.data import Row
from polarity.engines.embedded.source import Source
from polarity.engines.verl.settings import LIMIT
from polarity.errors import UserError

Record = dict[str, Any]
_ROWS = 8192  # written at a time
_LARGEST = 100e9  # bytes of text in one file


@dataclass(frozen=True)
class Prompts:
    """The tokenizer, and what a prompt must fit: `tokens` at most, token ids below `vocabulary`."""

    tokenizer: Any
    tokens: int
    vocabulary: int


def check_data(config: RunConfig, source: Source, prompts: Prompts) -> None:
    """Refuse what can be before anything is written: an unknown split, a prompt too long, more rows than a disk has."""
    for rows in _splits(config, source).values():
        check_prompts(source, rows, prompts)
    finite = source.finite()
    check_prompts(source, finite, prompts)
    count = training_rows(config)
    size = count * sum(len(_encoded(row)) for row in finite[:100]) / max(1, len(finite[:100]))
    if size > _LARGEST:
        raise UserError(
            f"the {count:,} problems that the run may draw would take {size / 1e9:.0f} GB; lower rollout.max_rounds or "
            f"steps, or drop long columns from data.train"
        )


def write_data(config: RunConfig, source: Source, prompts: Prompts, files: tuple[Path, Path]) -> None:
    """Write the files for training and validation, each whole or not at all."""
    train, validation = files
    train.parent.mkdir(parents=True, exist_ok=True)
    _write(train, _training(config, source, prompts))
    _write(validation, _validation(config, source))


def training_rows(config: RunConfig) -> int:
    """How many problems the run can draw at most."""
    rounds = config.rollout.max_rounds if "resample" in config.build_method().needs else 1
    return config.steps * config.rollout.prompts * rounds


def row_of(extra_info: Mapping[str, Any] | None) -> Row:
    """The problem row that an `extra_info` of these files carries; of other files, what it holds."""
    info = dict(extra_info or {})
    return json.loads(info["row"]) if isinstance(info.get("row"), str) else info


def check_prompts(source: Source, rows: Sequence[Row], prompts: Prompts) -> None:
    """Raise UserError for the first prompt that the run cannot take; tokenised as the embedded engine does."""
    if not rows:
        return
    texts = [source.prompt(row) for row in rows]
    for row, prompt in zip(rows, prompts.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        if not prompt:
            raise UserError(f"problem {row['id']!r}: the prompt has no tokens; mend data.template or the problem")
        if max(prompt) >= prompts.vocabulary:
            token = prompts.tokenizer.convert_ids_to_tokens(max(prompt))
            raise UserError(
                f"problem {row['id']!r}: the tokenizer's {token!r} is beyond the model's vocabulary of "
                f"{prompts.vocabulary}; take the text out, or give the model and its tokenizer the same size"
            )
        if len(prompt) > prompts.tokens:
            raise UserError(
                f"problem {row['id']!r}: its prompt has {len(prompt)} tokens and the run takes {prompts.tokens}; drop "
                f"it, or add the verl override data.max_prompt_length={len(prompt)}"
            )


def _splits(config: RunConfig, source: Source) -> dict[str, list[Row]]:
    wanted = config.evaluation
    found = source.splits(wanted.splits, wanted.problems if wanted.every else 1)
    return found if wanted.every else {}


def _training(config: RunConfig, source: Source, prompts: Prompts) -> Iterator[list[Record]]:
    finite, count = bool(source.finite()), training_rows(config)
    encoded: dict[int, str] = {}  # a finite source draws the same objects again and again
    for start in range(0, count, _ROWS):
        rows = source.train(start, min(_ROWS, count - start))
        if finite:
            encoded |= {id(row): _encoded(row) for row in rows if id(row) not in encoded}
        else:
            check_prompts(source, rows, prompts)
        texts = [encoded[id(row)] if finite else _encoded(row) for row in rows]
        limit = config.rollout.max_new_tokens
        yield [_record(source, row, "train", start + i, limit, texts[i]) for i, row in enumerate(rows)]


def _validation(config: RunConfig, source: Source) -> Iterator[list[Record]]:
    # without evaluations a row all the same: verl opens the file, and looks at nothing in it
    splits = _splits(config, source) or {"train": source.train(0, 1)}
    for name, rows in splits.items():
        yield [_record(source, row, name, i, config.evaluation_tokens, _encoded(row)) for i, row in enumerate(rows)]


def _record(source: Source, row: Row, split: str, index: int, limit: int, text: str) -> Record:
    return {
        "data_source": split,
        "prompt": [{"role": "user", "content": source.prompt(row)}],
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "extra_info": {
            "index": index, "split": split, "id": row["id"], "answer": row["answer"], LIMIT: limit, "row": text
        },
    }  # fmt: skip


def _encoded(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)


def _write(path: Path, parts: Iterable[list[Record]]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError("the verl engine writes parquet files; pip install 'polarity-rl[verl]'") from error
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    info = [("index", pa.int64()), ("split", pa.string()), ("id", pa.string()), ("answer", pa.string())]
    schema = pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(message)),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            ("extra_info", pa.struct([*info, (LIMIT, pa.int64()), ("row", pa.string())])),
        ]
    )
    aside = path.with_name(path.name + ".partial")
    with pq.ParquetWriter(aside, schema, compression="zstd") as file:
        for rows in parts:
            file.write_table(pa.Table.from_pylist(rows, schema=schema))
    aside.replace(path)
