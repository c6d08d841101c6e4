"""A foreign source as a run directory: its numbers by the definitions of docs/metrics.md, its rollouts in our format.

N rows (responses) of a step, T padded length. What the source lacks is absent, and `notes` of config.yaml say so.
"""

import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from tqdm import tqdm

from polarity.analysis import NGramMetrics
from polarity.errors import UserError
from polarity.report.foreign.find import Source, find, nothing_at
from polarity.report.foreign.jsonl import JsonLines
from polarity.report.foreign.measure import evaluation_metrics, length_of, step_metrics
from polarity.report.foreign.rows import Record, Row, Tally
from polarity.report.foreign.trl import Completions
from polarity.rundir import RunReader, RunWriter

Reader = JsonLines | Completions

SPLIT = "validation"
MEMORY = 2**30  # bytes of n-grams, of each n, before they go to disk
MOST_FAULTS = 0.01  # share of rows that may be unreadable; a single one always may
LOGGED_STEPS = 40
LOGGED_GROUPS = 4  # of a step, as log.rollout_groups of our own runs
LOGGED_ROWS = 32  # of a group: half of them its worst, half its best
WRITERS = {
    "verl": "verl's rollout dump", "verl validation": "verl's validation dump", "TRL": "TRL's completions",
    "JSON lines": "JSON lines",
}  # fmt: skip
# What runs of ours have and sources may lack, and metrics of which one at least is there where it is known.
LACKING = {
    "entropy": ("entropy/mean",), "token probabilities": ("positive/probability", "negative/probability"),
    "truncated responses": ("length/truncated",), "rewards": ("reward/mean",),
}  # fmt: skip
# Converted folders that no reader has adopted yet; they go when the process ends.
_TEMPORARY: dict[Path, tempfile.TemporaryDirectory[str]] = {}


def convert(path: Path, out: Path) -> Path:
    """Read the rollouts that another trainer logged at `path`, write the run directory `out`, and return `out`.

    path: a folder of verl's dumps (trainer.rollout_data_dir, trainer.validation_data_dir, or the folder with both), the
    output_dir of a TRL trainer with log_completions=True or its completions folder, or a JSONL file or a folder of
    them; docs/foreign.md has every key. out: a folder that is new or empty; gets config.yaml (`method`, `source`,
    `length_unit`, `notes`), metrics.jsonl, rollouts/ and, from validation dumps, evaluations/.

    Rows are read step by step: memory is that of the largest step. Raises UserError where `path` holds no rollouts, or
    those of several runs; where over 1 % of its rows cannot be read; and where pyarrow is missing for a parquet file.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder or file of rollouts")
    sources = find(path)
    if not sources:
        raise nothing_at(path)
    if len(sources) > 1:
        raise UserError(f"{path} holds {len(sources)} runs, the first at {sources[0].path}; convert them one by one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; choose another folder to convert to")
    return convert_source(sources[0], out)


def converted(path: Path) -> list[Path]:
    """Run directories, in temporary folders, of the sources at `path`; a RunReader of each is to be given to `adopt`.

    Raises UserError as `convert` does, but not where there is nothing at `path`.
    """
    folders = []
    for source in find(path):
        temporary = tempfile.TemporaryDirectory(prefix="polarity_")
        # The page tells runs of one name apart by their folders' names.
        folder = Path(temporary.name).resolve() / "-".join(source.path.parts[-3:]).strip("/")
        _TEMPORARY[folder] = temporary
        folders.append(convert_source(source, folder))
    return folders


def adopt(reader: RunReader) -> None:
    """Remove the temporary folder that `reader` reads when `reader` is collected; nothing for other folders."""
    if temporary := _TEMPORARY.pop(reader.path, None):
        weakref.finalize(reader, temporary.cleanup)


def convert_source(source: Source, out: Path) -> Path:
    """`convert`, of a source that has been found."""
    readers: dict[str, Reader] = {}
    if source.kind == "TRL":
        readers["training"] = Completions(source.files)
    elif source.kind != "verl validation":
        readers["training"] = JsonLines(source.files, source.kind)
    validation = source.files if source.kind == "verl validation" else source.validation
    if validation:
        readers["validation"] = JsonLines(validation, "verl validation")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as spill:
        grams = NGramMetrics("word", directory=spill, memory=MEMORY)
        unit, seen = _write(source, readers, RunWriter(out), grams)
    _check(source, [reader.tally for reader in readers.values()])
    config = {
        "method": {"name": source.label},
        "source": f"{WRITERS[source.kind]}: {'/'.join(source.path.parts[-3:])}",
        "length_unit": unit,
        "notes": _notes(source, readers, unit, seen),
    }
    RunWriter(out).config(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return out


def _write(
    source: Source, readers: Mapping[str, Reader], writer: RunWriter, grams: NGramMetrics
) -> tuple[str, set[str]]:
    """Everything but config.yaml. Returns the unit of lengths and the names of all metrics written."""
    steps = sorted({step for reader in readers.values() for step in reader.steps})
    stride, shown = -(-len(steps) // LOGGED_STEPS), next(iter(readers))
    unit, seen = "", set[str]()
    bar = tqdm(steps, desc=f"reading {source.label}", unit="step", disable=not sys.stderr.isatty(), leave=False)
    for place, step in enumerate(bar):
        rows = {part: found for part, reader in readers.items() if (found := reader.rows(step))}
        if not rows:
            continue
        first = next(iter(rows.values()))
        unit = unit or ("words" if any(length_of(row, "tokens") is None for row in first) else "tokens")
        metrics: dict[str, float] = {}
        if "training" in rows:
            texts, correct = zip(*((row.response, row.correct) for row in rows["training"]), strict=True)
            metrics |= step_metrics(rows["training"], unit) | grams.step([], texts, correct, [])
        if "validation" in rows:
            results, samples = evaluation_metrics(rows["validation"], unit)
            metrics |= {f"eval/{SPLIT}/{name}": value for name, value in results.items()}
            writer.evaluation(step, {"step": step, "results": {SPLIT: results}, "samples": {SPLIT: samples}})
        if shown in rows and (place % stride == 0 or place == len(steps) - 1):
            writer.rollouts(step, logged(rows[shown], step))
        writer.metrics({"step": step, **metrics})
        seen |= metrics.keys()
    return unit, seen


def logged(rows: Sequence[Row], step: int) -> list[Record]:
    """Rows of a rollouts file: LOGGED_GROUPS groups, mixed ones before uniform ones, each in the order of its rows.

    Of a group with more than LOGGED_ROWS, those with the lowest and those with the highest rewards.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    order = sorted(enumerate(groups.values()), key=lambda pair: len({row.correct for row in pair[1]}) == 1)
    records = []
    for number, group in order[:LOGGED_GROUPS]:
        ranked = sorted(range(len(group)), key=lambda i: (group[i].correct, group[i].reward or 0.0))
        half = LOGGED_ROWS // 2
        kept = sorted(ranked if len(ranked) <= LOGGED_ROWS else ranked[:half] + ranked[-half:])
        records += [_record(group[i], step, number) for i in kept]
    return records


def _record(row: Row, step: int, group: int) -> Record:
    record: Record = {
        "step": step, "problem_id": row.problem, "group": group, "prompt": row.prompt, "response": row.response,
        "correct": row.correct, "status": "correct" if row.correct else "wrong",
    }  # fmt: skip
    return record | ({} if row.reward is None else {"reward": row.reward}) | row.given


def _check(source: Source, tallies: Sequence[Tally]) -> None:
    """Refuse what has too many rows that cannot be read, or none that can."""
    faults, rows = (sum(getattr(tally, name) for tally in tallies) for name in ("faults", "rows"))
    examples = [example for tally in tallies for example in tally.examples]
    if not rows:
        why = examples[:1] or [reason for tally in tallies for reason in (*tally.left_out, *tally.remarks)]
        raise UserError(f"{source.path} has no rollout that can be read: {'; '.join(why) or 'its files are empty'}")
    if faults > 1 and faults > MOST_FAULTS * (faults + rows):
        raise UserError(
            f"{source.path}: {faults} of {faults + rows} rows cannot be read, the first {examples[0]}; mend or remove "
            f"them: up to {MOST_FAULTS:.0%} are left out with a note"
        )


def _notes(source: Source, readers: Mapping[str, Reader], unit: str, seen: set[str]) -> list[str]:
    """What was read, what was inferred, and what was left out, a sentence each."""
    notes = []
    for part, reader in readers.items():
        tally = reader.tally
        where = f"in {part}, " if len(readers) > 1 else ""
        notes.append(f"{where}{tally.rows:,} rollouts of {len(reader.steps)} logged steps")
        if part == "validation":
            notes.append("rows that repeat their score as `reward`, as verl's validation does, are read as evaluations")
        notes.append(f"{where}correct means {_shares(tally.rules)}")
        notes.append(f"{where}a group is the rows of a step with {_shares(tally.grouping)}")
        if tally.faults:
            more = f" and {tally.faults - len(tally.examples)} more" if tally.faults > len(tally.examples) else ""
            notes.append(f"{tally.faults} rows cannot be read and are left out: {'; '.join(tally.examples)}{more}")
        notes += [f"left out: {what} ({count:,})" for what, count in tally.left_out.items()]
        notes += tally.remarks
    if source.strangers:
        shown = ", ".join(source.strangers[:5]) + (" ..." if len(source.strangers) > 5 else "")
        notes.append(f"files beside them that are not read: {shown}")
    if unit == "words":
        notes.append("lengths are in words, not in tokens, which the source does not have")
    if "training" in readers:
        notes.append("sharpening and discovery: n-grams of words, against the earlier steps that are logged here")
        lacking = [what for what, metrics in LACKING.items() if not seen & set(metrics)]
        notes.append("not in the source, so left out: " + ", ".join([*lacking, "updates", "time"]))
    return notes


def _shares(counts: Mapping[str, int]) -> str:
    """The one thing counted; or all, with how often."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{what} ({count:,} rows)" for what, count in counts.items())
