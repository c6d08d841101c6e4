"""Where problems come from: an endless training stream, evaluation splits and the verifier, of a world or of files."""

import random
from dataclasses import replace
from pathlib import Path

from polarity.config import DataConfig, RunConfig
from polarity.data import Row, apply_template, load_problems, load_template
from polarity.errors import UserError, nearest
from polarity.rewards import Verifier, resolve_verifier
from polarity.worlds import World, resolve_world


class Source:
    """`train(start, count)` depends on its arguments and the seed alone: a run's only data state is one integer."""

    verifier: Verifier
    split_names: list[str]
    stop: tuple[str, ...] = ()
    template: str = "{problem}"

    def train(self, start: int, count: int) -> list[Row]:
        """Problems number `start` to `start + count` of the training stream."""
        raise NotImplementedError

    def split(self, name: str, count: int) -> list[Row]:
        """The first `count` problems of an evaluation split (all, where it has fewer), the same for every run."""
        raise NotImplementedError

    def finite(self) -> list[Row]:
        """Every training problem, where there are finitely many: what can be checked before a run starts."""
        return []

    def quarantine(self, folder: Path) -> list[str]:
        """Write the rows that were set aside when the data were read; a line for each source that lost some."""
        return []

    def prompt(self, row: Row) -> str:
        return apply_template(self.template, row["problem"])

    def splits(self, names: list[str] | None, count: int) -> dict[str, list[Row]]:
        for name in names or []:
            if name not in self.split_names:
                raise UserError(f"unknown split {name!r}; {nearest(name, self.split_names)}")
        return {name: self.split(name, count) for name in (self.split_names if names is None else names)}


class WorldSource(Source):
    def __init__(self, world: World, seed: int):
        self.world, self.seed = world, seed
        self.verifier = world.verify
        self.split_names = list(world.splits)

    def train(self, start: int, count: int) -> list[Row]:
        rows = []
        for i in range(start, start + count):
            row = self.world.problem(self.split_names[0], random.Random(f"{self.seed}/{i}"))
            rows.append({"id": f"train-{i}", **row})
        return rows

    def split(self, name: str, count: int) -> list[Row]:
        return self.world.problems(name, count)


class FileSource(Source):
    """Epochs of seeded shuffles over a file."""

    def __init__(self, data: DataConfig, seed: int):
        specs = {"train": data.train or "", **data.evaluation}
        self.loaded = {name: load_problems(spec, data.columns, max_bad=data.max_bad) for name, spec in specs.items()}
        self.rows = self.loaded["train"].rows
        self.verifier = resolve_verifier(
            data.verifier, limit=data.verifier_limit, rewards=data.rewards, unsafe=data.unsafe
        )
        self.seed = seed
        self.split_names = list(data.evaluation)
        self.stop, self.template = tuple(data.stop), load_template(data.template)

    def train(self, start: int, count: int) -> list[Row]:
        rows: list[Row] = []
        while len(rows) < count:
            epoch, offset = divmod(start + len(rows), len(self.rows))
            order = random.Random(f"{self.seed}/epoch {epoch}").sample(range(len(self.rows)), len(self.rows))
            rows += [self.rows[i] for i in order[offset : offset + count - len(rows)]]
        return rows

    def finite(self) -> list[Row]:
        return self.rows

    def quarantine(self, folder: Path) -> list[str]:
        lines = []
        for name, loaded in self.loaded.items():
            if loaded.quarantined:
                loaded = replace(loaded, path=loaded.write(folder / f"{name}.jsonl"))
            if loaded.quarantined or loaded.repeats:
                lines.append(loaded.summary())
        return lines

    def split(self, name: str, count: int) -> list[Row]:
        return self.loaded[name].rows[:count]


def make_source(config: RunConfig) -> Source:
    if config.world is not None:
        return WorldSource(resolve_world(config.world), config.seed)
    if config.data.train is None:
        raise UserError("data.train is not set; give a file of problems, or a world")
    return FileSource(config.data, config.seed)


def model_path(config: RunConfig) -> Path:
    """The directory of the policy before training."""
    if config.model is not None:
        return Path(config.model)
    if config.world is None:
        raise UserError("no model is set; give the directory of a Hugging Face causal LM")
    world = resolve_world(config.world)
    base = config.base or next(iter(world.bases))
    if base not in world.bases:
        raise UserError(f"world {world.name!r} has no base {base!r}; {nearest(base, world.bases)}")
    return world.base_path(base)
