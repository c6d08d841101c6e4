"""Raw records out of what a user names: a file, a directory, or a dataset of the Hugging Face hub.

    FILE.jsonl  FILE.parquet  FILE.csv     any other ending is read as JSONL
    DIR  or  DIR:split                     saved by `datasets`, or holding .parquet, .jsonl or .csv files
    hf:org/name[/config][:split]           through `datasets`
    hf:org/name/path/FILE.jsonl            one file of a hub dataset, whatever loading script it has

Files are streamed. Nothing is checked here but that a record is an object: columns and contents are `columns.py`'s.
"""

import csv
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polarity.errors import UserError, nearest

HUB = "hf:"
TABLES = (".parquet", ".jsonl", ".csv")  # what a directory is searched for, in this order
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_BOM = b"\xef\xbb\xbf"


class Fault(Exception):
    """Why a record is no problem row: `reason` is what is counted, `detail` is said to the user."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


# (number from 1: line of a text file, row of a table), (the record, or its fault), (its text, for the quarantine)
Records = Iterator[tuple[int, "dict[str, Any] | Fault", Any]]


def records(spec: str | Path) -> Records:
    """Stream the records of `spec`. Raises UserError, one line with the fix, where there is nothing to read."""
    if str(spec).startswith(HUB):
        return _hub(str(spec))
    path, split = Path(spec), ""
    if not path.exists():
        folder, _, last = str(spec).rpartition(":")
        if folder and Path(folder).is_dir():
            path, split = Path(folder), last
    return _directory(path, split) if path.is_dir() else _file(path)


def _file(path: Path) -> Records:
    if not path.exists():
        raise UserError(f"no data file {path}")
    readers = {".parquet": _parquet, ".csv": _csv}
    try:
        yield from readers.get(path.suffix.lower(), _json_lines)(path)
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _json_lines(path: Path) -> Records:
    with path.open("rb") as file:  # bytes: lines end at \n alone, while texts hold U+2028 and U+0085
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if not line.strip():
                continue
            text = line.decode("utf-8", errors="replace").rstrip("\r\n")
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield number, Fault("not UTF-8", f"cannot be read as UTF-8 text: {error.reason}"), text
            except json.JSONDecodeError as error:
                yield number, Fault("not JSON", f"not JSON: {error.msg} at column {error.colno}"), text
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits; ten thousand brackets
                yield number, Fault("not JSON", f"not JSON that can be read: {error}"), text
            else:
                if isinstance(record, dict):
                    yield number, record, record
                else:
                    yield number, Fault("not an object", "expected an object with problem and answer"), text


def _csv(path: Path) -> Records:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, record in enumerate(csv.DictReader(file), start=1):
            named = {key: value for key, value in record.items() if key is not None}
            yield number, named, named


def _parquet(path: Path) -> Records:
    parquet = _need("pyarrow.parquet", path)
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield number, record, record
    except ValueError as error:  # what pyarrow's own errors are
        raise UserError(f"{path}: cannot be read as parquet: {error}") from error


def _directory(path: Path, split: str) -> Records:
    if (path / "dataset_dict.json").exists():
        names = json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]
        return _saved(path / _chosen(str(path), names, split))
    if (path / "state.json").exists():
        return _saved(path)
    for ending in TABLES:
        files = sorted(path.rglob(f"*{ending}"))
        if files:
            groups: dict[str, list[Path]] = {}
            for file in files:
                name = file.relative_to(path).with_suffix("").as_posix()
                groups.setdefault(_SHARD.sub("", name).removeprefix("data/"), []).append(file)
            return _files(groups[_chosen(str(path), list(groups), split)])
    raise UserError(f"{path}: cannot be read: a directory without .parquet, .jsonl or .csv files")


def _files(paths: list[Path]) -> Records:
    before = 0
    for path in paths:
        last = 0
        for last, record, text in _file(path):
            yield before + last, record, text
        before += last


def _chosen(where: str, names: list[str], split: str) -> str:
    """The split of that name, which may leave out the folders before it; without a name, the only one there is."""
    if not split and len(names) == 1:
        return names[0]
    found = [name for name in names if split and split in (name, name.split("/")[-1])]
    if len(found) != 1:
        hint = f"no split {split!r}; {nearest(split, names)}" if split else f"holds {', '.join(sorted(names))}"
        raise UserError(f"{where}: {hint}; write {where}:{sorted(names)[0]} for one of them")
    return found[0]


def _saved(path: Path) -> Records:
    datasets = _need("datasets", path)
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a saved dataset: {error}") from error
    return ((number, record, record) for number, record in enumerate(data, start=1))


def _hub(spec: str) -> Records:
    name, _, split = spec.removeprefix(HUB).partition(":")
    parts = name.split("/")
    if len(parts) < 2 or not all(parts):
        raise UserError(f"{spec}: write hf:org/name[/config][:split], or hf:org/name/FILE")
    repository, rest = "/".join(parts[:2]), "/".join(parts[2:])
    if Path(rest).suffix in TABLES:
        hub = _need("huggingface_hub", spec)
        return _file(Path(_fetched(spec, hub.hf_hub_download, repository, rest, repo_type="dataset")))
    found = _fetched(spec, _need("datasets", spec).load_dataset, repository, rest or None, split=split or None)
    if isinstance(found, dict):
        found = found[_chosen(spec, list(found), "")]
    return ((number, record, record) for number, record in enumerate(found, start=1))


def _fetched(spec: str, fetch: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return fetch(*arguments, **options)
    except Exception as error:  # off-line, gated, misspelt: each library has its own kinds
        line = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(
            f"{spec} cannot be fetched ({type(error).__name__}: {line}); check the name, the network and "
            f"`hf auth login`, or download it and give the local path"
        ) from error


def _need(module: str, what: str | Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(f"{what}: reading it needs {package}; pip install 'polarity-rl[data]'") from error
