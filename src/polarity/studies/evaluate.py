"""`polarity eval`: a model, the last checkpoint of a run, a server, or responses made elsewhere, on problems.

Problems come from benchmarks, a file, or the splits of a world or run; sampling settings from a paper's protocol, the
configuration and dotted overrides, the later ones first in this order: overrides, protocol, configuration.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polarity.config import DataConfig, RunConfig, load_config
from polarity.data import BENCHMARKS, Row, load_problems, load_template
from polarity.engines.embedded.evaluator import respond
from polarity.engines.embedded.policy import Policy, load_policy
from polarity.engines.embedded.sampler import Sampling
from polarity.engines.embedded.source import Source, make_source
from polarity.errors import UserError
from polarity.evaluation import (
    Generate,
    Generation,
    Protocol,
    Request,
    Server,
    Task,
    in_batches,
    resolve_protocol,
    run_evaluation,
    server_stream,
)
from polarity.evaluation.offline import file_hash, given_stream, match, own_rows, read_responses, uneven
from polarity.rewards import Verifier, resolve_verifier
from polarity.rundir import RunReader
from polarity.seeds import seed_for

SAMPLES = 64
LIMIT = "evaluation.max_new_tokens"
# Bytes of a weight file that identify it, at each end.
ENDS = 2**20


def evaluate_model(
    target: Path,
    overrides: Mapping[str, Any],
    *,
    samples: int | None = None,
    protocol: str | None = None,
    benchmarks: Sequence[str] = (),
    data: Path | None = None,
    out: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Sample responses to each problem, grade them, and return what `run_evaluation` does.

    target: a Hugging Face model directory, or a run directory, whose last checkpoint and configuration are used.
    overrides: configuration keys (evaluation.*, data.verifier, data.template, data.stop, world, seed ...). samples:
    for each problem; None = the protocol's, else 64. protocol: a name of PROTOCOLS. out: the evaluation's directory,
    or a FILE.json for the results alone. Raises UserError when target is neither, or a setting is wrong.
    """
    run = target / "config.yaml"
    model = _last_checkpoint(target) if run.exists() else target
    if not (model / "config.json").exists():
        raise UserError(f"{target} is neither a run nor a model directory (it has no config.yaml and no config.json)")
    specs = _specs(benchmarks, data)
    config = _configuration(run if run.exists() else None, str(model), specs, overrides)
    how = _sampling(config, overrides, protocol, samples)
    tasks, stop = _tasks(config, overrides, specs, protocol)
    if config.threads:
        torch.set_num_threads(config.threads)
    policy = load_policy(model, device=config.device, bfloat16=config.dtype == "bfloat16")
    return run_evaluation(
        tasks,
        in_batches(_generator(policy, config, how, tasks, stop), max(1, config.rollout.batch_rows // how.samples)),
        how.samples,
        {"model": str(model), "weights": _weights(model), **_settings(how, stop, config.seed), "dtype": config.dtype},
        model=str(model),
        out=out,
        progress=progress,
    )


def evaluate_server(
    server: Server,
    overrides: Mapping[str, Any],
    *,
    samples: int | None = None,
    protocol: str | None = None,
    benchmarks: Sequence[str] = (),
    data: Path | None = None,
    out: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The same, of a model behind an OpenAI-compatible server."""
    specs = _specs(benchmarks, data)
    limited = protocol is not None and resolve_protocol(protocol).max_new_tokens is not None
    if not limited and LIMIT not in overrides:
        raise UserError(f"a server needs a response limit in tokens; add --{LIMIT}, for example 16384")
    config = _configuration(None, server.model, specs, overrides)
    how = _sampling(config, overrides, protocol, samples)
    tasks, stop = _tasks(config, overrides, specs, protocol)
    limit = how.max_new_tokens or config.evaluation_tokens
    return run_evaluation(
        tasks,
        server_stream(server, Request(how.temperature, how.top_p, limit, how.top_k, stop, config.seed)),
        how.samples,
        {"model": server.model, "chat": server.chat, **_settings(how, stop, config.seed)},
        model=server.model,
        out=out,
        progress=progress,
    )


def grade_responses(
    responses: Path,
    overrides: Mapping[str, Any],
    *,
    benchmarks: Sequence[str] = (),
    data: Path | None = None,
    out: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Grade what something else generated (shapes: polarity.evaluation.offline); "notes" says what was missing.

    Without a benchmark or data, each problem's answer stands in the file. overrides: data.verifier.
    """
    if len(benchmarks) + (data is not None) > 1:
        raise UserError("responses are graded against one benchmark or one data file; grade the files one by one")
    answered = read_responses(responses)
    config = _configuration(None, str(responses), [str(responses)], overrides)
    if benchmarks or data:
        (task,) = _given_tasks(config, overrides, _specs(benchmarks, data), None)
        rows, made, notes = match(answered, task.rows)
        task = Task(task.name, rows, task.verifier, task.verifier_name)
    else:
        name, rows = config.data.verifier, own_rows(responses, answered)
        task = Task(responses.stem, rows, _verifier(config.data, name), _verifier_name(config.data, name))
        made, notes = [a.made for a in answered], uneven([a.made for a in answered])
    found = run_evaluation(
        [task],
        given_stream(made),
        min(map(len, made)),
        {"model": str(responses), "responses": file_hash(responses)},
        model=responses.stem,
        out=out,
        progress=progress,
    )
    return {**found, "notes": notes}


def result_table(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, a heading first: for each task accuracy with its interval, pass@k, the largest vote, and shares."""
    tasks = found["tasks"]
    names = dict.fromkeys(name for measured in tasks.values() for name in measured["means"])
    votes = max((name for name in names if name.startswith("maj@")), key=lambda name: int(name[4:]), default=None)
    shown = [name for name in names if name.startswith("pass@") and name != "pass@1"]
    shown += [
        name for name in (votes, "length", "entropy", "truncated", "unparsed", "timeout", "error") if name in names
    ]
    rows = [["task", "problems", "samples", "pass@1", "95 % interval", *map(str, shown)]]
    for task, measured in tasks.items():
        low, high = measured["intervals"]["pass@1"]
        cells = [_number(measured["means"].get(name)) for name in shown]
        fewest = (
            measured["samples"] if isinstance(measured["samples"], int) else "-".join(map(str, measured["samples"]))
        )
        accuracy = _number(measured["means"]["pass@1"])
        rows.append([task, str(measured["problems"]), str(fewest), accuracy, f"{low:.3f}-{high:.3f}", *cells])
    return rows


def level_lines(found: Mapping[str, Any]) -> list[str]:
    """One line for each task whose problems have levels: accuracy at each of them."""
    return [
        f"{task} by level: "
        + ", ".join(f"{level} {m['accuracy']:.3f} ({m['problems']})" for level, m in measured["levels"].items())
        for task, measured in found["tasks"].items()
        if len(measured["levels"]) > 1
    ]


def comparison_table(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, a heading first, of what `compare_evaluations` found."""
    rows = [["task", "metric", "this", "other", "difference", "95 % interval", "p (t)", "p (permutation)"]]
    for task, compared in found["tasks"].items():
        for name, m in compared["metrics"].items():
            interval, p_t = f"{m['low']:+.3f} to {m['high']:+.3f}", "-" if m["p_t"] is None else f"{m['p_t']:.2g}"
            means = [f"{m['this']:.3f}", f"{m['other']:.3f}", f"{m['difference']:+.3f}"]
            rows.append([task, name, *means, interval, p_t, f"{m['p_permutation']:.2g}"])
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:.0f}"


def _specs(benchmarks: Sequence[str], data: Path | None) -> list[str]:
    return [*benchmarks, *([str(data)] if data else [])]


def _configuration(run: Path | None, model: str, specs: Sequence[str], overrides: Mapping[str, Any]) -> RunConfig:
    """The run's configuration, or the default one, with overrides; benchmarks and data take the place of a world."""
    tree: dict[str, Any] = {"model": model, "base": None}
    if run is None:
        tree["method"] = "grpo"  # evaluation uses no method; a configuration must name one
    if specs:
        tree |= {"world": None, "data.train": specs[0]}
    return load_config(run, {**tree, **overrides})


def _sampling(config: RunConfig, overrides: Mapping[str, Any], protocol: str | None, samples: int | None) -> Protocol:
    """How to sample: what the overrides say, then the protocol, then the configuration."""
    own = config.evaluation
    limit = config.evaluation_tokens
    if protocol is None:
        return Protocol(samples or SAMPLES, own.temperature, own.top_p, max_new_tokens=limit)
    paper = resolve_protocol(protocol)
    given = {key: key in overrides for key in ("evaluation.temperature", "evaluation.top_p", LIMIT)}
    return replace(
        paper,
        samples=samples or paper.samples,
        temperature=own.temperature if given["evaluation.temperature"] else paper.temperature,
        top_p=own.top_p if given["evaluation.top_p"] else paper.top_p,
        max_new_tokens=limit if given[LIMIT] or paper.max_new_tokens is None else paper.max_new_tokens,
    )


def _tasks(
    config: RunConfig, overrides: Mapping[str, Any], specs: Sequence[str], protocol: str | None
) -> tuple[list[Task], tuple[str, ...]]:
    """What is asked, and the strings that end a response."""
    if specs:
        return _given_tasks(config, overrides, specs, protocol), tuple(config.data.stop)
    source = make_source(config)
    splits = source.splits(config.evaluation.splits, config.evaluation.problems)
    if not splits:
        raise UserError(f"{config.model} has no evaluation splits; give --data FILE.jsonl or --benchmark NAME")
    name = _verifier_name(config.data, config.data.verifier) if config.world is None else f"world {config.world}"
    return [Task(split, rows, source.verifier, name, source.template) for split, rows in splits.items()], source.stop


def _given_tasks(
    config: RunConfig, overrides: Mapping[str, Any], specs: Sequence[str], protocol: str | None
) -> list[Task]:
    """Benchmarks and files: all their problems, or as many as evaluation.problems asks for.

    A benchmark brings its verifier, and its template under the protocol; what the overrides say of either holds. A file
    has the run's verifier and template, or the configuration's. A bad row is refused, unless data.max_bad allows it.
    """
    tasks = []
    for spec in specs:
        stem = spec.split("=")[0]
        benchmark = None if Path(spec).exists() else BENCHMARKS.get(stem)
        verifier, template = config.data.verifier, config.data.template
        if benchmark and "data.verifier" not in overrides:
            verifier = benchmark.verifier
        if benchmark and "data.template" not in overrides:
            template = benchmark.templates.get(protocol or "", next(iter(benchmark.templates.values())))
        max_bad = config.data.max_bad if "data.max_bad" in overrides else 0.0
        rows: list[Row] = load_problems(spec, config.data.columns, max_bad=max_bad).rows
        if "evaluation.problems" in overrides:
            rows = rows[: config.evaluation.problems]
        name = benchmark.name if benchmark else Path(stem).stem
        graded_by = _verifier_name(config.data, verifier)
        tasks.append(Task(name, rows, _verifier(config.data, verifier), graded_by, load_template(template)))
    return tasks


def _verifier(data: DataConfig, name: str) -> Verifier:
    """Without the weighted rewards: they change scores, and an evaluation counts what is correct."""
    return resolve_verifier(name, limit=data.verifier_limit, unsafe=data.unsafe and name == "code")


def _verifier_name(data: DataConfig, name: str) -> str:
    """With its limit, which decides what times out."""
    return name if data.verifier_limit is None else f"{name}, {data.verifier_limit:g} s"


def _settings(how: Protocol, stop: Sequence[str], seed: int) -> dict[str, Any]:
    """What a restarted evaluation must have in common with the one it goes on with."""
    sampling = {"temperature": how.temperature, "top_p": how.top_p, "max_new_tokens": how.max_new_tokens}
    top_k = {} if how.top_k is None else {"top_k": how.top_k}
    return {**sampling, **top_k, "stop": list(stop), "seed": seed}


def _generator(
    policy: Policy, config: RunConfig, how: Protocol, tasks: Sequence[Task], stop: tuple[str, ...]
) -> Generate:
    """The embedded sampler, seeded by the run's seed, the task and the first of the problems it is handed."""
    sampling = Sampling(
        max_new_tokens=how.max_new_tokens or config.evaluation_tokens,
        temperature=how.temperature,
        top_p=how.top_p,
        stop=stop,
        batch_rows=config.rollout.batch_rows,
        top_k=how.top_k,
    )
    sources = {}
    for task in tasks:
        sources[task.name] = Source()
        sources[task.name].template = task.template

    def generate(rows: Sequence[Row], samples: int, split: str) -> list[Generation]:
        seed = seed_for(config.seed, "evaluation", split, rows[0]["id"])
        return respond(policy, sources[split], rows, samples, sampling, seed)

    return generate


def _weights(model: Path) -> str:
    """Changes when the model's weights do: a hash over names, sizes and both ends of the weight files."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(ENDS))
            stream.seek(max(0, size - ENDS))
            digest.update(stream.read(ENDS))
    return digest.hexdigest()


def _last_checkpoint(run: Path) -> Path:
    checkpoints = RunReader(run).checkpoints
    if not checkpoints:
        raise UserError(f"run {run} has no checkpoint yet; wait for its first, or evaluate a model directory")
    return checkpoints[max(checkpoints)]
