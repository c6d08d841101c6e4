"""`polarity study paths`: which reasoning paths a trained policy takes that the initial policy did not.

By strategy, exactly, where a verifier names strategies (worlds do); by a language model's judgement for text. Every
number is for one later evaluation against the initial one, over the problems both have.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polarity.analysis.paths import agreement, majority, new_paths, share_of_problems
from polarity.errors import UserError
from polarity.evaluation import Server, read_evaluation
from polarity.evaluation.judge import CHARACTERS, Judged, Question, judge_paths
from polarity.evaluation.run import HEAD, read_head
from polarity.rundir import RunReader

Record = dict[str, Any]

# Settings of an evaluation that change which paths are seen.
SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens")
POOLED = "all"  # all tasks together, where there are several


@dataclass(frozen=True)
class Responses:
    """To one problem. strategies, correct, texts: one entry a response; texts None where none were kept."""

    problem: str | None
    strategies: list[str | None]
    correct: list[bool]
    texts: list[str] | None

    def first(self, n: int) -> "Responses":
        texts = None if self.texts is None else self.texts[:n]
        return Responses(self.problem, self.strategies[:n], self.correct[:n], texts)


@dataclass(frozen=True)
class Evaluation:
    """name: as it is shown; tasks: task (split) to problem id to its responses."""

    name: str
    settings: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Responses]]

    @property
    def most(self) -> int:
        return max((len(r.correct) for problems in self.tasks.values() for r in problems.values()), default=0)


@dataclass(frozen=True)
class Compared:
    """One task of a later evaluation: problem to its initial and its later responses; how many problems only one of
    the two evaluations has."""

    pairs: Mapping[str, tuple[Responses, Responses]]
    missing: int

    @property
    def rollouts(self) -> dict[str, int]:
        """The most responses to a problem on each side."""
        sides = zip(*self.pairs.values(), strict=True)
        return dict(zip(("initial", "later"), (max(len(r.correct) for r in side) for side in sides), strict=True))


@dataclass(frozen=True)
class Judge:
    """A judge's server, and how it is asked; cache: where its replies are kept."""

    server: Server
    cache: Path
    repeats: int = 3
    characters: int = CHARACTERS


def study_paths(
    initial: Path, later: Sequence[Path], *, judge: Judge | None = None, out: Path | None = None, progress: bool = False
) -> Record:
    """{"initial", "by": "strategy" | "judge", "later": [{"name", "tasks": {task: NUMBERS}}], "judge", "notes"}.

    initial, later: directories of `polarity eval`, evaluations/step_*.json of a run, or run directories: the initial
    one stands for its evaluation at step 0, a later one for all its later evaluations; a run alone is compared with
    itself. Where later evaluations differ in their number of responses a problem, the first of each count, as many as
    the fewest: more responses find more. Several tasks are also counted together, as "all".

    NUMBERS: rollouts {initial, later}; any and correct (`analysis.paths.Share`, or None without a problem); found,
    problem to its new strategies or to the numbers of its new responses (from 1); left_out, problems that cannot be
    compared; undecided (judge only), problems in which no response is judged new and a verdict is missing: they are not
    in the share.
    out: a JSON file for all this. Raises UserError where the two have nothing to compare.
    """
    first, others = _sources(initial, list(later))
    fewest = min(evaluation.most for evaluation in others)
    notes = _notes(first, others, fewest)
    compared = [(evaluation.name, _compared(first, evaluation, fewest)) for evaluation in others]
    found: Record = {"initial": first.name, "by": "judge" if judge else "strategy", "judge": None}
    if judge:
        found["later"], found["judge"] = _by_judge(compared, judge, progress)
    else:
        found["later"] = [{"name": name, "tasks": _by_strategy(name, tasks, notes)} for name, tasks in compared]
    found["notes"] = notes
    if out:
        _write(out, found)
    return found


def paths_table(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, a heading first."""
    chance = ["by chance"] if found["by"] == "strategy" else []
    heads = [text for name in ("new path", "new and correct") for text in (name, "95 % interval", *chance)]
    rows = [["later", "task", "problems", "responses", *heads]]
    for later in found["later"]:
        for task, numbers in later["tasks"].items():
            shares = [numbers["any"], numbers["correct"]]
            problems = max(share["problems"] if share else 0 for share in shares)
            responses = "{initial} -> {later}".format(**numbers["rollouts"])
            cells = [cell for share in shares for cell in _cells(share, bool(chance))]
            rows.append([later["name"], task, str(problems), responses, *cells])
    return rows


def paths_lines(found: Mapping[str, Any]) -> list[str]:
    """What is to be said beside the table: the judge's agreement with itself, and what is missing."""
    lines = []
    if judge := found["judge"]:
        if agreed := judge["agreement"]:
            kappa = "no kappa, all verdicts are the same" if agreed["kappa"] is None else f"kappa {agreed['kappa']:.2f}"
            lines.append(
                f"the judge agrees with itself in {agreed['percent']:.1f} % of pairs of verdicts, {kappa} "
                f"({agreed['items']} responses judged twice or more); that is not to say that it is right"
            )
        if judge["unparsed"]:
            lines.append(f"{judge['unparsed']} of {judge['replies']} replies hold no verdict and do not count")
        if judge["shortened"]:
            lines.append(
                f"{judge['shortened']} of {judge['questions']} questions were judged with the middle of a text left "
                f"out; raise --characters if the judge can read more"
            )
    for later in found["later"]:
        for task, numbers in later["tasks"].items():
            where = f"{later['name']}, {task}"
            if numbers["left_out"]:
                lines.append(f"{where}: {numbers['left_out']} problems cannot be compared and are left out")
            if numbers.get("undecided"):
                lines.append(f"{where}: {numbers['undecided']} problems without a majority of verdicts are left out")
    return lines + list(found["notes"])


def _cells(share: Mapping[str, Any] | None, chance: bool) -> list[str]:
    if share is None:
        return ["-"] * (3 if chance else 2)
    cells = [f"{share['share']:.3f}", f"{share['low']:.3f}-{share['high']:.3f}"]
    return [*cells, f"{share['chance']:.3f}"] if chance else cells


def _compared(first: Evaluation, later: Evaluation, fewest: int) -> dict[str, Compared]:
    """By task, and of all tasks together where there are several."""
    tasks = {}
    for task in first.tasks:
        a, b = first.tasks[task], later.tasks.get(task, {})
        pairs = {p: (a[p], b[p].first(fewest)) for p in a if p in b and a[p].correct and b[p].correct}
        for problem, (mine, theirs) in pairs.items():
            if None not in (mine.problem, theirs.problem) and mine.problem != theirs.problem:
                raise UserError(f"problem {problem!r} of {later.name} is another one than in {first.name}")
        if pairs:
            tasks[task] = Compared(pairs, len({*a, *b}) - len(pairs))
    if not tasks:
        raise UserError(
            f"{first.name} and {later.name} have no problem in common; give evaluations of the same problems"
        )
    if len(tasks) > 1:
        every = {f"{task}/{p}": pair for task, own in tasks.items() for p, pair in own.pairs.items()}
        tasks[POOLED] = Compared(every, sum(own.missing for own in tasks.values()))
    return tasks


def _by_strategy(name: str, tasks: Mapping[str, Compared], notes: list[str]) -> Record:
    found: Record = {}
    for task, own in tasks.items():
        strategies = [{p: pair[side].strategies for p, pair in own.pairs.items()} for side in (0, 1)]
        correct = [{p: pair[side].correct for p, pair in own.pairs.items()} for side in (0, 1)]
        try:
            numbers = asdict(new_paths(strategies[0], strategies[1], correct[0], correct[1]))
        except ValueError:  # no problem has a strategy on both sides
            notes.append(f"{name}, {task}: the verifier names no strategies, so it is left out")
            continue
        found[task] = {"rollouts": own.rollouts, **numbers, "left_out": numbers["left_out"] + own.missing}
    if not found:
        raise UserError(
            f"{name}: the verifier named no strategies, now or at first; a judge can read texts: give evaluations of "
            f"polarity eval, and add --server URL --judge MODEL --out FILE.json"
        )
    return found


def _by_judge(
    compared: Sequence[tuple[str, Mapping[str, Compared]]], judge: Judge, progress: bool
) -> tuple[list[Record], Record]:
    """Numbers of every later evaluation, and what is to be said of the judge over all of them."""
    places: list[tuple[int, str, str]] = []
    questions: list[Question] = []
    for place, (name, tasks) in enumerate(compared):
        for task, problem, first, later in _each_problem(tasks):
            if first.texts is None or later.texts is None or first.problem is None:
                raise UserError(
                    f"{name}, or what it is compared with, keeps no full responses; evaluate checkpoints with "
                    f"polarity eval --out DIR, and give those directories"
                )
            initial = list(dict.fromkeys(first.texts))
            for number, text in enumerate(later.texts, start=1):
                places.append((place, task, problem))
                asked = f"{name}: {task}/{problem} response {number}"
                questions.append(Question(asked, first.problem, initial, text))
    judged = judge_paths(
        judge.server, questions, repeats=judge.repeats, cache=judge.cache, characters=judge.characters,
        progress=progress,
    )  # fmt: skip
    decided: dict[tuple[int, str, str], list[bool | None]] = {}
    for key, verdicts in zip(places, judged.verdicts, strict=True):
        decided.setdefault(key, []).append(majority(verdicts))
    records = []
    for place, (name, tasks) in enumerate(compared):
        own: dict[str, dict[str, list[bool | None]]] = {task: {} for task in tasks}
        for task, problem, _, _ in _each_problem(tasks):
            own[task][problem] = decided[place, task, problem]
            if POOLED in tasks:
                own[POOLED][f"{task}/{problem}"] = decided[place, task, problem]
        records.append({"name": name, "tasks": {task: _judged(tasks[task], own[task]) for task in tasks}})
    return records, _about(judge, judged)


def _each_problem(tasks: Mapping[str, Compared]) -> list[tuple[str, str, Responses, Responses]]:
    return [(task, p, *pair) for task in tasks if task != POOLED for p, pair in tasks[task].pairs.items()]


def _judged(task: Compared, verdicts: Mapping[str, Sequence[bool | None]]) -> Record:
    """A problem has a new path when one of its later responses is judged new; where none is and a verdict is missing,
    that cannot be told."""
    every = [_any(own) for own in verdicts.values()]
    right = [
        _any([v for v, correct in zip(own, task.pairs[p][1].correct, strict=True) if correct])
        for p, own in verdicts.items()
    ]
    shares = [[new for new in column if new is not None] for column in (every, right)]
    counted = [asdict(share_of_problems(column)) if column else None for column in shares]
    found = {p: [i for i, verdict in enumerate(own, start=1) if verdict] for p, own in verdicts.items()}
    return {
        "rollouts": task.rollouts,
        "any": counted[0],
        "correct": counted[1],
        "found": {p: numbers for p, numbers in found.items() if numbers},
        "left_out": task.missing,
        "undecided": every.count(None),
    }


def _any(verdicts: Sequence[bool | None]) -> bool | None:
    if True in verdicts:
        return True
    return None if None in verdicts else False


def _about(judge: Judge, judged: Judged) -> Record:
    agreed = agreement(judged.verdicts)
    return {
        "model": judge.server.model,
        "questions": len(judged.verdicts),
        "repeats": judge.repeats,
        "replies": sum(map(len, judged.verdicts)),
        "asked": judged.asked,
        "unparsed": judged.unparsed,
        "shortened": judged.shortened,
        "characters": judge.characters,
        "agreement": agreed and asdict(agreed),
    }


def _notes(first: Evaluation, others: Sequence[Evaluation], fewest: int) -> list[str]:
    notes = []
    most = max(evaluation.most for evaluation in others)
    if most > fewest:
        notes.append(f"later evaluations have {fewest} to {most} responses a problem; the first {fewest} of each count")
    for key in SAMPLING:
        mine = first.settings.get(key)
        theirs = {e.name: e.settings.get(key) for e in others if e.settings.get(key) != mine}
        if key != "top_k":  # whose absence means that it is not used; of the others, that it is not known
            theirs = {} if mine is None else {name: value for name, value in theirs.items() if value is not None}
        if theirs:
            name, value = next(iter(theirs.items()))
            more = f" (and {len(theirs) - 1} more differ)" if len(theirs) > 1 else ""
            notes.append(f"{key} is {mine} in {first.name} and {value} in {name}{more}")
    seed = first.settings.get("seed")
    if seed is not None and any(evaluation.settings.get("seed") == seed for evaluation in others):
        notes.append(
            f"all sampled with seed {seed}: a policy that hardly changed repeats its responses and shows fewer new "
            f"paths than by chance; for independent draws evaluate with another seed"
        )
    every = [first, *others]
    partial = {task for e in every for task in e.tasks if not all(task in other.tasks for other in every)}
    return notes + [f"{task} is not in all of them and is left out where it is missing" for task in sorted(partial)]


def _sources(initial: Path, later: list[Path]) -> tuple[Evaluation, list[Evaluation]]:
    if not later and not (initial / "config.yaml").exists():
        raise UserError("give what is compared with it: polarity study paths INITIAL LATER ...")
    firsts = _read(initial, at_first=True)
    if not firsts:
        raise UserError(f"{initial} has no evaluation before training; a run with evaluation.every above 0 has one")
    others = [found for path in later or [initial] for found in _read(path, at_first=False)]
    if not others:
        raise UserError(f"{(later or [initial])[0]} has no evaluation after step 0 yet; wait for it, or give another")
    return firsts[0], others


def _read(path: Path, *, at_first: bool) -> list[Evaluation]:
    """The evaluation at a path; of a run the one at step 0, or all others."""
    if (path / HEAD).exists():
        return [_evaluation_directory(path)]
    if (path / "config.yaml").exists():
        kept = RunReader(path).evaluations
        return [_of_run(f"{path}, step {step}", kept[step]) for step in sorted(kept) if (step == 0) == at_first]
    if not path.is_file():
        raise UserError(f"{path} is no evaluation (a directory of polarity eval), no step_*.json of a run, and no run")
    try:
        return [_of_run(str(path), json.loads(path.read_text(encoding="utf-8")))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an evaluation of a run; give evaluations/step_*.json of a run") from error


def _of_run(name: str, found: Mapping[str, Any]) -> Evaluation:
    tasks = {
        split: {
            r["problem_id"]: Responses(None, r.get("strategies") or [None] * len(r["correct"]), r["correct"], None)
            for r in records
        }
        for split, records in found["samples"].items()
    }
    return Evaluation(name, found.get("settings", {}), tasks)


def _evaluation_directory(path: Path) -> Evaluation:
    """With texts. Of a stopped evaluation the problems that were done."""
    settings, graded = read_evaluation(path)  # which checks every line
    stamp = read_head(path)["stamp"]
    tasks: dict[str, dict[str, Responses]] = {task: {} for task in graded}
    for task, problems in tasks.items():
        if not graded[task]:
            continue
        with (path / f"samples_{task}_{stamp}.jsonl").open("rb") as file:
            for line in (json.loads(raw) for raw in file if raw.endswith(b"\n")):
                text = line["doc"].get("problem", line["arguments"]["gen_args_0"]["arg_0"])
                problems[line["problem_id"]] = Responses(text, line["strategy"], line["correct"], line["resps"][0])
    return Evaluation(str(path), settings, tasks)


def _write(out: Path, found: Mapping[str, Any]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = out.with_name(out.name + ".partial")
        aside.write_text(json.dumps(found, indent=1), encoding="utf-8")
        aside.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out") from error
