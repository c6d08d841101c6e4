"""`python -m polarity.engines.verl.cpu.main OVERRIDES`: verl's main_ppo, with Ray workers that start in a moment.

A small run of verl is nearly all imports: ten processes that load PyTorch and transformers each. Here one process loads
them once, leaves a copy of itself behind that only forks, and goes on as verl's main_ppo; what Ray then starts as its
Python (fork_client.py) has a worker forked from that copy. Ray and verl are imported after the fork, by each process
for itself, because Ray keeps what it read from the environment. Linux only.
"""

import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

# What verl, Ray and our plug-in import, where it is installed. None of it has a thread that works when it has loaded.
PRELOADED = (
    "aiohttp datasets fastapi hydra omegaconf pandas peft pydantic requests scipy.stats tensordict torch"
    " torch.distributed.checkpoint torch.distributed.fsdp torchdata.stateful_dataloader transformers"
    " transformers.generation transformers.models.qwen2.modeling_qwen2 transformers.models.qwen3.modeling_qwen3 uvicorn"
    " zmq polarity.config polarity.engines.embedded"
).split()


def main() -> None:
    for module in PRELOADED:
        with suppress(ModuleNotFoundError):
            importlib.import_module(module)
    if "ray" in sys.modules:
        raise RuntimeError("Ray has been imported before the fork; workers would have this process's settings")
    folder = Path(tempfile.mkdtemp(prefix="fork_"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    ended, keep_open = os.pipe()
    if os.fork() == 0:
        os.close(keep_open)
        sys.argv = _serve(listener, ended, folder)  # returns in each worker
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    os.close(ended)
    listener.close()
    client = [sys.executable, "-I", "-S", str(Path(__file__).with_name("fork_client.py")), str(folder / "socket")]
    sys.argv.append(f'ray_kwargs.ray_init.runtime_env.py_executable="{shlex.join(client)}"')
    from verl.trainer import main_ppo

    main_ppo.main()


def _serve(listener: socket.socket, ended: int, folder: Path) -> list[str]:
    """Fork a worker for each client, until the process that holds the other end of `ended` has ended.

    Returns in the worker only, its arguments: it then has the client's environment, working directory and output.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener.fileno(), ended], [], [])
        if ended in ready:
            shutil.rmtree(folder)
            os._exit(0)
        client, _ = listener.accept()
        if os.fork() == 0:
            break
        client.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgrp()  # the driver's signals are not for workers, but they stay in its session
    listener.close()
    os.close(ended)
    message, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while part := client.recv(1 << 20):
        message += part
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    request = json.loads(message)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    client.detach()  # open as long as the worker lives: so long the client waits
    return request["arguments"]


if __name__ == "__main__":
    main()
