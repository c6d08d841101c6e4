"""A whole evaluation: generate, grade, write each problem as it is done, and go on where it stopped.

The directory of an evaluation:

    evaluation.json            settings and when it began: written first, compared on every restart
    samples_TASK_DATE.jsonl    one line a problem, appended when all its responses are graded, in the order they finish
    results_DATE.json          written when every problem is there

Lines are appended by single writes; half of a line at the end, which a killed process may leave, is cut off and that
problem done again. Metrics are computed from the lines in the order of the problems, so that a stopped and resumed
evaluation gives the numbers of one that ran through.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from polarity.data import Row, apply_template
from polarity.errors import UserError
from polarity.evaluation import lm_eval
from polarity.evaluation.evaluate import Generate
from polarity.evaluation.metrics import Generation, Graded, level_of, measure
from polarity.rewards import Verifier, check_many
from polarity.rewards.outcome import refuse_failure

# A verifier that fails on this many responses, and on all so far, ends an evaluation at once.
FAILURES = 64
HEAD = "evaluation.json"


@dataclass(frozen=True)
class Task:
    """One split or benchmark. verifier_name: as it stands in the settings; template: prompt text with {problem}."""

    name: str
    rows: Sequence[Row]
    verifier: Verifier
    verifier_name: str
    template: str = "{problem}"

    def prompt(self, row: Row) -> str:
        return apply_template(self.template, row["problem"])


# (task, indices of its rows, samples for each) -> responses by index, in parts, as they are ready
Stream = Callable[[Task, Sequence[int], int], Iterable[Mapping[int, Sequence[Generation]]]]


def in_batches(generate: Generate, problems: int) -> Stream:
    """A stream from a sampler that takes some rows at a time. It must seed itself by the rows it is handed."""

    def stream(task: Task, indices: Sequence[int], samples: int) -> Iterator[Mapping[int, Sequence[Generation]]]:
        for start in range(0, len(indices), problems):
            part = indices[start : start + problems]
            made = generate([task.rows[i] for i in part], samples, task.name)
            yield {i: made[j * samples : (j + 1) * samples] for j, i in enumerate(part)}

    return stream


def run_evaluation(
    tasks: Sequence[Task],
    stream: Stream,
    samples: int,
    settings: Mapping[str, Any],
    *,
    model: str,
    out: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate; {"results": {task: {metric: mean}}, "tasks": {task: what `measure` says}, "settings", "directory"}.

    settings: everything that makes two evaluations differ, as flat JSON data; samples, the verifiers' names, templates
    and a hash of each task's problems are added here. out: the evaluation's directory, which gets the files; one that
    holds an evaluation with the same settings is finished, and read when there is nothing left to do. An `out` that
    ends in .json gets the results file alone, and nothing to resume from. Raises UserError when `out` holds an
    evaluation with other settings, or anything else; and when a verifier always fails.
    """
    names = [lm_eval.task_name(task.name) for task in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"two splits have the same name in: {', '.join(names)}; evaluate them apart")
    settings = {**settings, "samples": samples}
    for name, task in zip(names, tasks, strict=True):
        settings |= {f"{name}.verifier": task.verifier_name, f"{name}.template": task.template}
        settings[f"{name}.problems"] = _fingerprint(task)
    store = Store.open(out, settings) if out and out.suffix != ".json" else None
    if store and store.results is not None:
        return _found(store.results, store)
    started = time.time()
    measured, hashes = {}, {}
    for name, task in zip(names, tasks, strict=True):
        done = store.finished(name, repair=True) if store else {}
        left = [i for i in range(len(task.rows)) if i not in done]
        for part in _graded_parts(task, stream(task, left, samples), len(task.rows), len(done), progress):
            lines = {
                i: lm_eval.sample_line(i, task.rows[i], task.prompt(task.rows[i]), settings, problem)
                for i, problem in part.items()
            }
            if store:
                store.append(name, lines.values())
            done |= {i: _without_texts(line) for i, line in lines.items()}
        ordered = [done[i] for i in range(len(task.rows))]
        measured[name] = measure([lm_eval.read_graded(line) for line in ordered])
        hashes[name] = lm_eval.samples_hash(ordered)
    date = store.date if store else started
    record = lm_eval.results_record(
        measured, settings, model=model, date=date, seconds=time.time() - started, hashes=hashes
    )
    if store:
        store.finish(record)
    elif out:
        out.parent.mkdir(parents=True, exist_ok=True)
        _replace(out, record)
    return _found(record, store)


def _found(record: Mapping[str, Any], store: "Store | None") -> dict[str, Any]:
    own = record["polarity"]
    results = {task: measured["means"] for task, measured in own["tasks"].items()}
    return {"results": results, **own, "directory": str(store.path) if store else None}


def _graded_parts(
    task: Task, parts: Iterable[Mapping[int, Sequence[Generation]]], total: int, done: int, progress: bool
) -> Iterator[dict[int, Graded]]:
    """Verdicts on what the stream brings, from when the verifier has not failed for the first time.

    So a verifier that cannot work leaves nothing behind: UserError when it has failed on all of FAILURES, or of all.
    """
    works = done > 0
    held: dict[int, Graded] = {}
    with tqdm(total=total, initial=done, desc=task.name, unit="problem", disable=None if progress else True) as bar:
        for part in parts:
            items = [(g.text, task.rows[i]["answer"], task.rows[i]) for i, made in part.items() for g in made]
            outcomes = iter(check_many(task.verifier, items))
            for i, made in part.items():
                verdicts = [next(outcomes) for _ in made]
                held[i] = Graded(task.rows[i]["id"], level_of(task.rows[i]), made, verdicts)
            works = works or any(o.status != "error" for problem in held.values() for o in problem.outcomes)
            if works:
                yield held
                held = {}
            elif sum(len(problem.outcomes) for problem in held.values()) >= FAILURES:
                break
            bar.update(len(part))
    refuse_failure([o for problem in held.values() for o in problem.outcomes], "the verifier")


def _fingerprint(task: Task) -> str:
    """Changes when a problem, an answer, a prompt or their order does."""
    digest = hashlib.blake2b(digest_size=8)
    for row in task.rows:
        text = json.dumps([row["id"], row["answer"], task.prompt(row)])
        digest.update(text.encode())
    return f"{len(task.rows)} problems, {digest.hexdigest()}"


def _without_texts(line: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a line in memory."""
    return {k: v for k, v in line.items() if k not in ("doc", "arguments", "resps", "filtered_resps")}


class Store:
    """The directory of one evaluation. date: when it began, seconds since 1970; stamp: the same, in file names;
    results: what it ended with, None before."""

    def __init__(self, path: Path, head: Mapping[str, Any]):
        self.path, self.date, self.stamp = path, head["date"], head["stamp"]
        file = path / f"results_{self.stamp}.json"
        self.results: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any]) -> "Store":
        """Begin an evaluation in `path`, or go on with the one that is there."""
        if (path / HEAD).exists():
            head = read_head(path)
            _refuse_changes(path, head["settings"], json.loads(json.dumps(settings)))
            return cls(path, head)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} holds something else than an evaluation; choose another --out")
        now = datetime.now()
        head = {"date": now.timestamp(), "stamp": now.isoformat().replace(":", "-"), "settings": settings}
        try:
            path.mkdir(parents=True, exist_ok=True)
            _replace(path / HEAD, head)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); choose another --out") from error
        return cls(path, head)

    def finished(self, task: str, *, repair: bool = False) -> dict[int, dict[str, Any]]:
        """Lines of the problems that are done, by doc_id, without the texts. repair: cut off half of a last line."""
        file = self._samples(task)
        if not file.exists():
            return {}
        found, end = {}, 0
        with file.open("r+b" if repair else "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                if not raw.endswith(b"\n"):
                    break
                end += len(raw)
                try:
                    line = _without_texts(json.loads(raw))
                    found[int(line["doc_id"])] = line
                except (ValueError, KeyError, AttributeError) as error:
                    raise UserError(f"{file} line {number} is damaged; delete that line, or the file") from error
            if repair:
                stream.truncate(end)
        return found

    def append(self, task: str, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        with self._samples(task).open("ab", buffering=0) as file:  # unbuffered: one write, whole or hardly begun
            file.write(text.encode("utf-8", "backslashreplace"))  # a lone surrogate becomes its JSON escape

    def finish(self, results: Mapping[str, Any]) -> None:
        _replace(self.path / f"results_{self.stamp}.json", results)

    def _samples(self, task: str) -> Path:
        return self.path / f"samples_{task}_{self.stamp}.jsonl"


def read_head(path: Path) -> dict[str, Any]:
    """evaluation.json of the evaluation in `path`."""
    if not (path / HEAD).exists():
        raise UserError(f"{path} is not an evaluation (it has no {HEAD}); give the --out of a polarity eval")
    head: dict[str, Any] = json.loads((path / HEAD).read_text(encoding="utf-8"))
    return head


def read_evaluation(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Graded]]]:
    """Settings and verdicts, task to problem id to Graded, of a finished or stopped evaluation's directory."""
    head = read_head(path)
    store = Store(path, head)
    found: dict[str, dict[str, Graded]] = {}
    for task in (key.removesuffix(".problems") for key in head["settings"] if key.endswith(".problems")):
        problems = [lm_eval.read_graded(line) for _, line in sorted(store.finished(task).items())]
        found[task] = {problem.problem_id: problem for problem in problems}
    return head["settings"], found


def _refuse_changes(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        key = changed[0]
        raise UserError(
            f"{path} holds an evaluation with {key} = {old.get(key)!r}, not {new.get(key)!r}; "
            f"go on with its settings, or choose another --out"
        )


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    aside.replace(path)
