"""Which foreign rollouts there are at or below a path. Files are looked into; their names are not trusted."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from polarity.errors import UserError
from polarity.report.foreign.jsonl import kind_of
from polarity.report.foreign.trl import is_completions

KINDS = ("verl", "verl validation", "TRL", "JSON lines")  # where a folder holds several, the first one counts
# Folders named like these say nothing of the run; the folder above them names it.
COMMON = {
    *("completions", "rollouts", "rollout", "rollout_data", "rollout_data_dir", "rollout_dumps", "generations"),
    *("dump", "dumps", "data", "logs", "train", "training", "val", "validation", "validation_data", "eval", "samples"),
}  # fmt: skip
LOOKED_FOR = (
    "looked for run directories (config.yaml, metrics.jsonl), verl's dumps (STEP.jsonl with input, output, score), "
    "TRL's completions (*.parquet with step, prompt, completion and rewards) and JSON lines with prompt, response and "
    "correct or reward"
)


@dataclass(frozen=True)
class Source:
    """The rollouts of one run. validation: verl's validation dump that goes with a rollout dump; strangers: names of
    files that lie beside and hold nothing that is read."""

    kind: str
    path: Path
    files: list[Path]
    validation: list[Path] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The name of its folder, or file, that says most."""
        name = self.path.stem if self.path.is_file() else self.path.name
        return name if name.lower() not in COMMON else self.path.parent.name or name


def find(path: Path) -> list[Source]:
    """The sources at `path`: a file, or the folders from it to two below. Run directories of polarity are passed over.

    A folder is a source. Of a folder that holds one rollout dump and one validation dump of verl, both are one.
    """
    path = path.resolve()
    if path.is_file():
        kind = _kind(path)
        return [Source(kind, path, [path])] if kind else []
    return _paired([source for folder in _folders(path) if (source := _source(folder))], path)


def nothing_at(path: Path) -> UserError:
    """What to say where there is neither a run nor a source."""
    return UserError(f"no run at or below {path}; {LOOKED_FOR}")


def _folders(path: Path, depth: int = 2) -> Iterator[Path]:
    if (path / "config.yaml").exists() and (path / "metrics.jsonl").exists():
        return
    yield path
    if depth:
        for folder in sorted(path.iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                yield from _folders(folder, depth - 1)


def _source(folder: Path) -> Source | None:
    files = sorted(f for f in folder.iterdir() if f.suffix in (".jsonl", ".parquet") and f.is_file())
    kinds = {file: _kind(file) for file in files}
    kind = next((kind for kind in KINDS if kind in kinds.values()), None)
    if kind is None:
        return None
    strangers = [file.name for file in files if kinds[file] != kind]
    return Source(kind, folder, [file for file in files if kinds[file] == kind], strangers=strangers)


def _kind(file: Path) -> str | None:
    if file.suffix == ".parquet":
        return "TRL" if is_completions(file) else None
    return kind_of(file)


def _paired(sources: list[Source], path: Path) -> list[Source]:
    """Sources with the validation dumps that lie beside a rollout dump, in folders of their own, put to it."""
    out = []
    for source in sources:
        beside = [s for s in sources if s.path.parent == source.path.parent and s.path != path]
        training, validation = ([s for s in beside if s.kind == kind] for kind in ("verl", "verl validation"))
        if len(training) == len(validation) == 1 and source in (training[0], validation[0]):
            if source is training[0]:
                out.append(replace(source, validation=validation[0].files))
        else:
            out.append(source)
    return out
