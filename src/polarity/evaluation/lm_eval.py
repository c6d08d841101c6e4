"""The shape of lm-evaluation-harness 0.4.x: a results file, and a samples file for each task.

    results_DATE.json          results (METRIC,none and METRIC_stderr,none for each task), configs, versions, n-shot ...
    samples_TASK_DATE.jsonl    a line a problem: doc_id, doc, target, arguments, resps, filtered_resps, metrics, hashes

so that its table maker, its viewers and whatever else reads such files read ours. Beside its keys stand our own: under
"polarity" in the results; in a samples line problem_id, level, and with one entry a response correct, status, score,
extracted, strategy, lengths, entropies and cut. Those are enough to compute every metric again (`read_graded`).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from polarity import __version__
from polarity.evaluation.metrics import POWERS, Generation, Graded, all_values
from polarity.rewards import Outcome

Record = dict[str, Any]

FILTER = "none"
# lm-eval's own word for a response in which a filter found no answer.
INVALID = "[invalid]"
# Of a row, columns longer than this are left out of a samples line: the tests of a programming problem take megabytes.
LONGEST_COLUMN = 100_000
LOWER_IS_BETTER = ("truncated", "unparsed", "timeout", "error")
# Neither higher nor lower is better.
NEUTRAL = ("length", "entropy", "distinct_strategies")


def task_name(name: str) -> str:
    """A split's or benchmark's name as lm-eval's file names bear it."""
    return re.sub(r"[^\w.@+-]+", "_", name)


def sample_line(
    doc_id: int, row: Mapping[str, Any], prompt: str, settings: Mapping[str, Any], graded: Graded
) -> Record:
    """One problem as a line of a samples file; settings: how its responses were generated."""
    extracted = [o.extracted if o.status in ("correct", "wrong") else None for o in graded.outcomes]
    found = [
        (INVALID if o.status not in ("correct", "wrong") else "") if e is None else e
        for e, o in zip(extracted, graded.outcomes, strict=True)
    ]
    values = all_values(graded, POWERS)
    target = str(row["answer"])
    return {
        "doc_id": doc_id,
        "doc": {key: value for key, value in row.items() if len(str(value)) <= LONGEST_COLUMN},
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": _generation(settings)}},
        "resps": [[g.text for g in graded.made]],
        "filtered_resps": [found],
        "filter": FILTER,
        "metrics": list(values),
        "doc_hash": _hash(json.dumps(row, indent=2, ensure_ascii=False, default=str)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(target),
        **values,
        "problem_id": graded.problem_id,
        "level": graded.level,
        "correct": graded.correct,
        "status": [o.status for o in graded.outcomes],
        "score": [o.score for o in graded.outcomes],
        "extracted": [o.extracted for o in graded.outcomes],
        "strategy": [o.strategy for o in graded.outcomes],
        "lengths": [g.length for g in graded.made],
        "entropies": [g.entropy for g in graded.made],
        "cut": [g.truncated for g in graded.made],
    }


def read_graded(line: Mapping[str, Any]) -> Graded:
    """The verdicts in a line of `sample_line`, without the texts."""
    made = [Generation("", *known) for known in zip(line["lengths"], line["entropies"], line["cut"], strict=True)]
    columns = zip(*(line[key] for key in ("correct", "status", "score", "extracted", "strategy")), strict=True)
    return Graded(line["problem_id"], line["level"], made, [Outcome(*column) for column in columns])


def results_record(
    measured: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    model: str,
    date: float,
    seconds: float,
    hashes: Mapping[str, str] | None = None,
) -> Record:
    """The content of a results file. measured: task to what `measure` says of it; settings: of this evaluation.

    date: when it began, seconds since 1970; seconds: how long it took; hashes: task to a hash of its samples.
    """
    metrics = {task: _numbers(m["means"]) for task, m in measured.items()}
    return {
        "results": {task: _task_results(task, m) for task, m in measured.items()},
        "group_subtasks": {task: [] for task in measured},
        "configs": {task: _task_config(task, m, settings) for task, m in measured.items()},
        "versions": dict.fromkeys(measured, 1.0),
        "n-shot": dict.fromkeys(measured, 0),
        "higher_is_better": {task: {name: _direction(name) for name in names} for task, names in metrics.items()},
        "n-samples": {task: {"original": m["problems"], "effective": m["problems"]} for task, m in measured.items()},
        "config": {
            "model": f"polarity {__version__}",
            "model_args": {"model": model},
            "batch_size": None,
            "device": None,
            "limit": None,
            "bootstrap_iters": None,
            "gen_kwargs": _generation(settings),
            "random_seed": settings.get("seed"),
        },
        "date": date,
        "task_hashes": dict(hashes or {}),
        "model_source": "polarity",
        "model_name": model,
        "model_name_sanitized": re.sub(r"[\"<>:/|\\?*\[\]]+", "__", model),
        "system_instruction": None,
        "fewshot_as_multiturn": None,
        "chat_template": None,
        "total_evaluation_time_seconds": str(round(seconds, 3)),
        "polarity": {"version": __version__, "settings": dict(settings), "tasks": dict(measured)},
    }


def step_results(evaluation: Mapping[str, Any], model: str, date: float = 0.0) -> Record:
    """A run's `evaluations/step_NNNNNN.json` as the content of a results file.

    Only means stand in it: the run keeps verdicts and each problem's first response, so there is no samples file to
    go with it.
    """
    settings = evaluation["settings"]
    measured = {
        split: {
            "means": means,
            "stderr": {},
            "problems": len(evaluation["samples"][split]),
            "samples": settings["samples"],
        }
        for split, means in evaluation["results"].items()
    }
    return results_record(measured, settings, model=model, date=date, seconds=0.0)


def samples_hash(lines: Sequence[Mapping[str, Any]]) -> str:
    """Of a task's lines, as lm-eval computes it: over their hashes, in the order of the problems."""
    ordered = sorted(lines, key=lambda line: int(line["doc_id"]))
    return _hash("".join(line["doc_hash"] + line["prompt_hash"] + line["target_hash"] for line in ordered))


def _task_config(task: str, measured: Mapping[str, Any], settings: Mapping[str, Any]) -> Record:
    samples = measured["samples"]
    uneven = not isinstance(samples, int)
    # What every line of the samples file has: not the entropy, a mean over all tokens, and not avg@n where n differs.
    in_lines = [n for n in measured["stderr"] if not (uneven and n.startswith("avg@"))]
    return {
        "task": task,
        "output_type": "generate_until",
        "repeats": samples[0] if uneven else samples,
        "num_fewshot": 0,
        "generation_kwargs": _generation(settings),
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": _direction(name)} for name in in_lines
        ],
        "should_decontaminate": False,
        "metadata": {"version": 1.0},
    }


def _task_results(task: str, measured: Mapping[str, Any]) -> Record:
    found: Record = {"alias": task, "name": task, "sample_len": measured["problems"]}
    for name, value in _numbers(measured["means"]).items():
        found[f"{name},{FILTER}"] = value
        error = measured["stderr"].get(name)
        found[f"{name}_stderr,{FILTER}"] = "N/A" if error is None else error
    return found


def _numbers(means: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in means.items() if isinstance(value, float)}


def _generation(settings: Mapping[str, Any]) -> Record:
    """How responses were generated, under the names that lm-eval gives it."""
    known = {key: settings[key] for key in ("temperature", "top_p", "top_k") if key in settings}
    names = {"max_new_tokens": "max_gen_toks", "stop": "until"}
    known |= {name: settings[key] for key, name in names.items() if key in settings}
    return {"do_sample": known["temperature"] > 0, **known} if "temperature" in known else known


def _direction(metric: str) -> bool | None:
    name = metric.split("/")[-1]  # positive/entropy is as neutral as entropy
    return None if name in NEUTRAL else name not in LOWER_IS_BETTER


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
