"""A process of its own that logs to a run directory, as a trainer does: each W&B and trackio state is a process's.

usage: drive_loggers.py RUN NAME[,NAME] [FINISH_SECONDS]; rows come as JSON lines on stdin. Each is written to
metrics.jsonl and logged, then "done" is printed. The line "kill core" ends W&B's own process, "raise" the training.
"""

import json
import sys
from pathlib import Path

import psutil
import yaml

from polarity import loggers
from polarity.rundir import RunReader, RunWriter

run, names = Path(sys.argv[1]), sys.argv[2].split(",")
loggers.FINISH_SECONDS = float(sys.argv[3]) if len(sys.argv) > 3 else 30.0
writer = RunWriter(run)
made = loggers.make_loggers(names, run, RunReader(run).config)
print("ready", flush=True)
try:
    for line in sys.stdin:
        if line == "kill core\n":
            cores = [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]
            for core in cores:
                core.kill()
            psutil.wait_procs(cores)
        elif line == "raise\n":
            raise RuntimeError("training failed")
        else:
            row = json.loads(line)
            writer.metrics(row)
            for logger in made:
                logger.log(row)
        print("done", flush=True)
finally:
    for logger in made:
        logger.close()
assert yaml.safe_load((run / "config.yaml").read_text())  # the run directory is as it was
