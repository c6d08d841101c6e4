"""The files in lm-evaluation-harness's shape: by our own account of it, and by its own code where it is installed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from polarity.evaluation import Generation, Task, evaluate, in_batches, run_evaluation, step_results
from polarity.rewards import exact

ROWS = [{"id": f"p{i}", "problem": f"{i}?", "answer": str(i)} for i in range(5)]
SETTINGS = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 9, "stop": [], "seed": 3}
TASK = "AIME 24/odd"


def speak(rows: Any, samples: int, split: str) -> list[Generation]:
    return [Generation(f"#### {j}" if j else "#### ", 2.0, 0.1, False) for _ in rows for j in range(samples)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shape") / "model"
    tasks = [Task(TASK, ROWS, exact, "exact", "Q: {problem}"), Task("one", ROWS[:1], exact, "exact")]
    run_evaluation(tasks, in_batches(speak, 3), 8, SETTINGS, model="org/some-model", out=path)
    return path


@pytest.fixture
def results(out: Path) -> dict[str, Any]:
    (file,) = out.glob("results_*.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


class Metric(BaseModel):
    metric: StrictStr
    aggregation: StrictStr
    higher_is_better: StrictBool | None


class TaskConfig(BaseModel):
    task: StrictStr
    output_type: StrictStr
    repeats: StrictInt
    num_fewshot: StrictInt
    generation_kwargs: dict[str, Any]
    metric_list: list[Metric]
    metadata: dict[str, Any]


class Samples(BaseModel):
    original: StrictInt
    effective: StrictInt


class Results(BaseModel):
    """What lm-eval's result_schema.py (0.4.13) calls EvalResults, as far as evaluations without a model can have it."""

    results: dict[str, dict[str, StrictStr | StrictInt | float]]
    group_subtasks: dict[str, list[StrictStr]]
    configs: dict[str, TaskConfig]
    versions: dict[str, float]
    n_shot: dict[str, StrictInt] = Field(alias="n-shot")
    higher_is_better: dict[str, dict[str, StrictBool | None]]
    n_samples: dict[str, Samples] = Field(alias="n-samples")
    config: dict[str, Any]
    date: float
    task_hashes: dict[str, StrictStr]
    model_source: StrictStr
    model_name: StrictStr
    model_name_sanitized: StrictStr
    total_evaluation_time_seconds: StrictStr


class Sample(BaseModel):
    """SampleResult of the same file, for generation."""

    model_config = ConfigDict(extra="allow")
    doc_id: StrictInt
    doc: dict[str, Any]
    target: StrictStr
    arguments: dict[str, dict[str, Any]]
    resps: list[list[StrictStr]]
    filtered_resps: list[list[StrictStr]]
    filter: StrictStr
    metrics: list[StrictStr]
    doc_hash: StrictStr = Field(pattern="^[0-9a-f]{64}$")
    prompt_hash: StrictStr = Field(pattern="^[0-9a-f]{64}$")
    target_hash: StrictStr = Field(pattern="^[0-9a-f]{64}$")


def read_samples(out: Path, task: str) -> list[dict[str, Any]]:
    (file,) = out.glob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def test_results_have_the_shape(results: dict[str, Any]):
    found = Results.model_validate(results)
    assert list(found.results) == ["AIME_24_odd", "one"]
    for task, values in found.results.items():
        assert {"alias", "name", "sample_len"} <= values.keys()
        numbers = {key for key in values if "," in key}
        assert all(key.endswith(",none") for key in numbers)
        for key in numbers:
            metric = key.partition(",")[0]
            assert metric.endswith("_stderr") or f"{metric}_stderr,none" in numbers
        assert {m.metric for m in found.configs[task].metric_list} <= {key.partition(",")[0] for key in numbers}
    assert found.results["one"]["pass@1_stderr,none"] == "N/A"  # one problem has no standard error
    assert found.configs["one"].generation_kwargs["max_gen_toks"] == 9
    assert found.model_name_sanitized == "org__some-model"
    assert found.higher_is_better["one"]["truncated"] is False


def test_samples_have_the_shape(out: Path, results: dict[str, Any]):
    lines = read_samples(out, "AIME_24_odd")
    for line in lines:
        sample = Sample.model_validate(line)
        assert all(isinstance(line[metric], float) for metric in sample.metrics)
        assert sample.prompt_hash == hashlib.sha256(f"Q: {sample.doc['problem']}".encode()).hexdigest()
        assert sample.filtered_resps[0] == ["[invalid]", *map(str, range(1, 8))]
        assert sample.arguments["gen_args_0"]["arg_1"]["temperature"] == 0.6
    for metric in lines[0]["metrics"]:
        mean = sum(line[metric] for line in lines) / len(lines)
        assert results["results"]["AIME_24_odd"][f"{metric},none"] == pytest.approx(mean)


def test_a_long_column_of_a_problem_is_not_repeated_in_the_samples(tmp_path: Path):
    rows = [{**ROWS[0], "tests": "x" * 200_000, "level": 2}]
    run_evaluation([Task("t", rows, exact, "exact")], in_batches(speak, 1), 1, SETTINGS, model="m", out=tmp_path / "e")
    assert read_samples(tmp_path / "e", "t")[0]["doc"].keys() == {"id", "problem", "answer", "level"}


def test_an_evaluation_inside_a_run_can_be_given_the_shape():
    found = evaluate(speak, {"id": ROWS}, exact, 8)
    record = step_results({"step": 40, **found, "settings": {**SETTINGS, "samples": 8}}, model="runs/a3po/seed_0")
    shaped = Results.model_validate(record)
    assert shaped.results["id"]["pass@8,none"] == found["results"]["id"]["pass@8"]
    assert shaped.n_samples["id"].effective == 5


def test_lm_evals_table_maker_reads_the_results(results: dict[str, Any]):
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed")
    pytest.importorskip("pytablewriter", reason="pytablewriter, which lm-eval makes tables with, is not installed")
    table = utils.make_table(results)
    assert "|AIME_24_odd" in table
    assert "pass@8" in table
    found = evaluate(speak, {"id": ROWS}, exact, 8)
    record = step_results({**found, "settings": {**SETTINGS, "samples": 8}}, model="m")
    assert "pass@8" in utils.make_table(record)


def test_lm_evals_own_functions_find_and_read_the_files(out: Path, results: dict[str, Any]):
    """The steps of its viewer script: latest results, tasks in them, samples of each task, a table of them."""
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed")
    files = [file.as_posix() for file in out.iterdir()]
    latest = utils.get_latest_filename(utils.get_results_filenames(files))
    configs = json.loads(Path(latest).read_text(encoding="utf-8"))["configs"]
    assert latest == next(out.glob("results_*")).as_posix()
    for task, config in configs.items():
        samples = [
            f for f in utils.get_sample_results_filenames(files) if utils.get_file_task_name(Path(f).name) == task
        ]
        with open(utils.get_latest_filename(samples), encoding="utf-8") as file:
            data = [json.loads(line.strip()) for line in file]
        assert [row["doc_id"] for row in data] == list(range(len(data)))
        for metric in config["metric_list"]:
            assert all(isinstance(row[metric["metric"]], float) for row in data)
        assert (
            utils.hash_string("".join(r["doc_hash"] + r["prompt_hash"] + r["target_hash"] for r in data))
            == (results["task_hashes"][task])
        )
        assert data[0]["doc_hash"] == utils.hash_string(
            json.dumps(data[0]["doc"], indent=2, default=utils.handle_non_serializable, ensure_ascii=False)
        )


def test_lm_evals_wandb_logger_makes_its_table_of_samples(out: Path, results: dict[str, Any]):
    logger = pytest.importorskip("lm_eval.loggers.wandb_logger", reason="lm-eval is not installed")
    data = read_samples(out, "AIME_24_odd")
    for line in data:  # the logger gets them as lm-eval has them in memory: arguments as tuples
        line["arguments"] = [tuple(line["arguments"]["gen_args_0"].values())]
    frame = logger.WandbLogger._generate_dataset(None, data, results["configs"]["AIME_24_odd"])
    assert list(frame["labels"]) == [row["answer"] for row in ROWS]
    assert list(frame["pass@1"]) == [line["pass@1"] for line in data]


def test_the_hub_library_reads_the_samples(out: Path, tmp_path: Path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    (file,) = out.glob("samples_AIME_24_odd_*.jsonl")
    table = datasets.Dataset.from_json(str(file), cache_dir=str(tmp_path))
    assert table.num_rows == 5
    assert table[0]["resps"][0][1] == "#### 1"
