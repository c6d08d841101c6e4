"""`polarity train --engine verl`: run directory, data files, then verl's own entry point in a process of its own.

That process leads a session, and everything it starts on this machine, Ray too, is in it: nothing outlives the run, and
nothing that somebody else started is touched.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from polarity.config import RunConfig, refuse_changes, save_config
from polarity.engines.verl.composition import compose, hydra_value, require_verl
from polarity.engines.verl.cpu import cpu_environment, cpu_overrides
from polarity.engines.verl.overrides import (
    ONE_GPU,
    Cluster,
    checkpoints,
    data_files,
    environment,
    model_name,
    notes,
    overrides,
    prompt_tokens,
)  # fmt: skip
from polarity.errors import UserError, nearest
from polarity.loggers import check_loggers
from polarity.rundir import RunReader, RunWriter

ENTRY = "verl.trainer.main_ppo"
PRESETS = ("cpu-demo",)
GRACE = 20.0  # seconds from the request to end to the end by force
_MODULES = "VERL_USE_EXTERNAL_MODULES"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAY = re.compile(r"^\([^)]*pid=[^)]*\) ?|\s*\[repeated \d+x[^\]]*\].*$")  # who wrote a line, and how often
_RAISED = re.compile(r"(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Exit)): *(.*)")


def train(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    cluster: Cluster = ONE_GPU,
    preset: str | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> int:
    """Train as `config` says with verl and write the run directory `out`; the exit code, 0 or 1.

    preset: cpu-demo for a machine without a GPU, cluster.gpus then being processes. dry_run: print the command, and do
    nothing else. Raises UserError for anything the user can mend.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; {nearest(preset, PRESETS)}")
    if preset is not None and (cluster.address is not None or cluster.nodes > 1):
        raise UserError(
            f"preset {preset} is for one machine, with a Ray of its own; drop the cluster's address and nodes"
        )
    done = _resumed(config, out) if resume else 0
    cpu = cpu_overrides(cluster.gpus) if preset else []
    lines = overrides(config, out, cluster, going_on=done > 0, preset=cpu)
    variables = environment(config, out)
    if preset:  # the platform first: what the plug-in imports has to find it
        cpu_variables = cpu_environment()
        variables = cpu_variables | variables | {_MODULES: f"{cpu_variables[_MODULES]},{variables[_MODULES]}"}
    folder = f"hydra.run.dir={hydra_value(str(out.resolve() / 'verl'))}"
    command = [sys.executable, "-m", ENTRY, folder, "hydra.output_subdir=null", *lines]
    for note in notes(config, cluster):
        print(f"note: {note}", file=sys.stderr)
    if dry_run:
        if find_spec("verl") is None:
            print("note: verl is not installed here, so that it did not check this", file=sys.stderr)
        else:
            compose(lines)
        print(shell(variables, command))
        return 0
    require_verl()
    check_loggers(config.log.to)
    compose(lines)
    if done == config.steps:
        print(f"{out} has completed its {done} steps already", file=sys.stderr)
        return 0
    _prepare(config, out, cluster, resume=resume, overwrite=overwrite)
    text = shell(variables, command)
    (out / "verl" / "command.sh").write_text(f"{text}\n")
    print(text)
    log = out / "verl" / "log.txt"
    with _bar(config, out, done, progress) as look:
        code = run(command, {**os.environ, **variables}, log, look)
    return _ended(config, out, code, log)


def shell(variables: Mapping[str, str], command: Sequence[str]) -> str:
    """The command as a shell reads it, a line for each variable and override."""
    head = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    python, rest = shlex.join(command[:3]), map(shlex.quote, command[3:])
    return " \\\n".join([*head, python, *(f"  {text}" for text in rest)])


def _resumed(config: RunConfig, out: Path) -> int:
    """Steps of the run's last checkpoint, 0 where there is none yet. Raises UserError where there is no such run."""
    if not (out / "config.yaml").exists():
        raise UserError(f"there is no run in {out} to resume; drop --resume to start it")
    if not (out / "verl").is_dir():
        raise UserError(f"{out} was started with the embedded engine; go on with that, or choose another --out")
    refuse_changes(out, RunReader(out).config, config)
    latest = checkpoints(out) / "latest_checkpointed_iteration.txt"
    done = int(latest.read_text()) if latest.exists() else 0
    if done > config.steps:
        raise UserError(f"{out} has completed {done} steps already; give --steps {done} or more to go on")
    return done


def _prepare(config: RunConfig, out: Path, cluster: Cluster, *, resume: bool, overwrite: bool) -> None:
    """The run directory and the data files, after everything about the data that can be refused."""
    from transformers import AutoConfig, AutoTokenizer

    from polarity.engines.embedded.source import make_source
    from polarity.engines.verl.data import Prompts, check_data, write_data

    model = model_name(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        shape = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model {model} cannot be loaded: {first}") from error
    source = make_source(config)
    prompts = Prompts(tokenizer, prompt_tokens(config, cluster), shape.vocab_size)
    check_data(config, source, prompts)
    if resume:
        RunWriter(out).config(save_config(config))
    else:
        RunWriter.create(out, save_config(config), seed=config.seed, overwrite=overwrite)
        for line in source.quarantine(out / "quarantine"):
            print(line, file=sys.stderr)
    write_data(config, source, prompts, data_files(out))


@contextmanager
def _bar(config: RunConfig, out: Path, done: int, progress: bool) -> Iterator[Callable[[], None]]:
    """A progress bar, and a function that brings it up to date with metrics.jsonl."""
    name = config.method.get("name")
    metrics = out / "metrics.jsonl"
    with tqdm(total=config.steps, initial=done, desc=str(name), disable=not progress, unit="step") as bar:
        bar.set_postfix_str("starting Ray and the workers")
        seen = 0

        def look() -> None:
            nonlocal seen
            if not metrics.exists() or metrics.stat().st_size == seen:
                return
            seen = metrics.stat().st_size
            row = next((r for r in reversed(RunReader(out).metrics) if "reward/mean" in r), None)
            if row is not None and row["step"] > bar.n:
                bar.set_postfix(
                    reward=f"{row['reward/mean']:.3f}", entropy=f"{row['entropy/mean']:.3f}",
                    length=f"{row['length/mean']:.0f}",
                )  # fmt: skip
                bar.update(row["step"] - bar.n)

        yield look


def run(
    command: Sequence[str], variables: Mapping[str, str], log: Path, look: Callable[[], None] = lambda: None
) -> int:
    """Run a command in a session of its own, its output at the end of `log`; the exit code.

    look: called twice a second. Whatever ends this function, Ctrl-C and SIGTERM too, ends the whole session.
    """
    with log.open("ab") as file, _ended_by_signals():
        process = subprocess.Popen(
            command, env=dict(variables), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                look()
                time.sleep(0.5)
            look()
        finally:
            end_session(process)
    return process.returncode


def end_session(process: "subprocess.Popen[Any]") -> None:
    """End the leader, asked first, so that it can end what it started in order; then what is left of its session."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C means: at once
            process.wait(GRACE)
    until = time.monotonic() + (GRACE if process.returncode == 0 else 2.0)
    while _members(process.pid) and time.monotonic() < until:
        time.sleep(0.2)
    while members := _members(process.pid):
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    process.wait()


def _members(session: int) -> list[int]:
    """Living processes of a session, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit():
            try:
                state, _, _, own = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except (OSError, ValueError):  # it has ended meanwhile
                continue
            if int(own) == session and state not in "ZX":
                found.append(int(entry.name))
    return found


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack, as Ctrl-C does; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, _: sys.exit(128 + n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(config: RunConfig, out: Path, code: int, log: Path) -> int:
    """The exit code of the run, and one line where it failed."""
    rows = RunReader(out).metrics
    done = int(rows[-1]["step"]) if rows else 0
    if code == 0 and done >= config.steps:
        return 0
    how = f"verl ended with exit code {code}" if code >= 0 else f"verl was ended by {signal.Signals(-code).name}"
    why = last_error(log.read_text(errors="replace")) or "its log names no error"
    again = f"; --resume goes on from step {_checkpointed(out)}" if _checkpointed(out) else ""
    print(f"failed after step {done}: {how}: {why}; see {log}{again}", file=sys.stderr)
    return 1


def _checkpointed(out: Path) -> int:
    latest = checkpoints(out) / "latest_checkpointed_iteration.txt"
    return int(latest.read_text()) if latest.exists() else 0


def last_error(log: str) -> str | None:
    """The last error that was raised in the log, in one line; a UserError of polarity's before any other."""
    found, own = None, None
    for line in log.splitlines():
        raised = _RAISED.fullmatch(_RAY.sub("", _COLOUR.sub("", line)).strip())
        if raised and not raised[2].startswith("ray::"):
            found = f"{raised[1]}: {raised[2]}".rstrip(": ")
            own = raised[2] if raised[1] == "UserError" else own
    return own or found
