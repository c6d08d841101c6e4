"""trackio, off-line: its store holds what metrics.jsonl holds, once, after a resume too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_loggers import CONFIG, Driver, log, make_rows, run  # noqa: F401

from polarity.rundir import RunReader, RunWriter

READ = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage as store
found = {}
for record in store.get_run_records("polarity"):
    rows = store.get_logs("polarity", record["name"], run_id=record["id"])
    for row in rows:
        del row["timestamp"]
    config = store.get_run_config("polarity", record["name"], run_id=record["id"])
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    found[record["id"]] = {"name": record["name"], "rows": rows, "config": config}
print(json.dumps(found))
"""


def stored(folder: Path) -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, "-c", READ], env={"TRACKIO_DIR": str(folder)}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_trackio_holds_every_value_at_its_step_and_a_resumed_run_once(run: Path):  # noqa: F811
    log(run, "trackio", make_rows(0, 7))
    (id_, first), *others = stored(run / "trackio").items()
    assert others == []
    assert id_ == (run / "trackio" / "run_id").read_text()
    assert first == {"name": "dapo-seed_3", "rows": make_rows(0, 7), "config": CONFIG}

    RunWriter(run).rewind(4)
    left, again = RunReader(run).metrics, make_rows(5, 9, seed=1)
    log(run, "trackio", again)
    ((_, second),) = stored(run / "trackio").items()
    assert second["rows"] == left + again


@pytest.mark.parametrize("resumed", [False, True])
def test_a_shared_store_keeps_other_runs_of_the_same_name(run: Path, tmp_path: Path, resumed: bool):  # noqa: F811
    store = {"TRACKIO_DIR": str(tmp_path / "store")}
    other = RunWriter.create(tmp_path / "other" / "dapo" / "seed_3", json.dumps(CONFIG), seed=3).path
    log(other, "trackio", make_rows(0, 3, seed=2), **store)
    log(run, "trackio", make_rows(0, 7), **store)
    if resumed:
        RunWriter(run).rewind(-1)
        log(run, "trackio", make_rows(0, 7), **store)
    found = stored(tmp_path / "store")
    assert sorted(len(each["rows"]) for each in found.values()) == [4, 8]
    assert found[(run / "trackio" / "run_id").read_text()]["rows"] == make_rows(0, 7)


def test_a_second_run_in_one_process_is_refused(run: Path, tmp_path: Path):  # noqa: F811
    other = RunWriter.create(tmp_path / "other", json.dumps(CONFIG), seed=3).path
    code = (
        "import sys; from pathlib import Path; from polarity.loggers import make_loggers\n"
        "for path in sys.argv[1:]:\n    [logger.close() for logger in make_loggers(['trackio'], Path(path), {})]"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run), str(other)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "UserError: trackio writes to" in done.stderr
    assert "start each run in a process of its own, or set TRACKIO_DIR" in done.stderr
    assert done.stdout == ""
