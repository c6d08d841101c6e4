"""Run a program that nobody has read, on one input after another, without it touching this machine.

`find_sandbox` takes the first of these that passes a real probe here (once a process; the answer is kept):

1. bubblewrap, as root below `setpriv` to nobody (bubblewrap started as root does not enforce RLIMIT_NPROC): own user,
   mount, pid, network, ipc, uts and cgroup namespaces; of the file system only Python's standard library, the shared
   libraries and NumPy, read-only, /dev/null and /dev/urandom, and a 64 MiB tmpfs as working directory; no /proc.
2. unshare (util-linux), as root with `setpriv` to nobody: the same namespaces, but the host's files stay visible as far
   as their permissions go, and world-writable folders writable. A warning says so.
3. only with `unsafe=True`: an ordinary process that can read and write this user's files.

In each of them a test's process gives up, before the first byte of the program is compiled (rewards/sandbox_runner.py):
by hard limits, address space, CPU time, file size, open files, threads and core files; by a system-call filter (x86-64
and ARM64), new processes, exec, sockets, ptrace, namespaces, mounts, and memory outside the address space. This process
does the rest: a clean environment, a wall-clock limit and an output limit, at which everything inside is killed.

Contained in 1 (tests/rewards/test_code_attacks.py and test_code_exhaustion.py): network, reading and writing files of
the host, its environment and processes, signals, fork and thread bombs, memory, disk, output floods, processes that
outlive the run.
Not contained: a hole in the kernel; side channels (timing, caches, load); CPU contention (a program with threads may
use several cores until its CPU time is spent); memory up to `memory_mb` + the tmpfs for each sandbox that runs at once,
and kernel memory for as many empty files as can be made in the time limit.
Depends on the host: 1 needs user namespaces for ordinary users (off in most containers and some hardened distributions)
and bubblewrap 0.7 or newer; the filter needs a kernel with seccomp. On machines other than x86-64 and ARM64 there is no
filter: programs may start RLIMIT_NPROC processes, each with an address space of its own, and open sockets in a
network namespace that leads nowhere.
"""

import functools
import json
import math
import os
import select
import selectors
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from polarity.errors import UserError

START_SECONDS = 20.0  # for the interpreter inside to come up; not part of a test's limit
STDERR_BYTES = 1 << 20
TMPFS_BYTES = 64 << 20
NOBODY = 65534
PACKAGES = "/packages"
INFO = "{info}"  # in a command: the descriptor on which bubblewrap names the first process of its namespace
ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same program gets the same verdict
    "MALLOC_ARENA_MAX": "2",  # else glibc reserves 64 MiB of address space for each thread
    "OPENBLAS_NUM_THREADS": "1",
}

Ending = Literal["exit", "timeout", "flood", "killed"]


@dataclass(frozen=True)
class Run:
    """What one test's process did.

    ended: exit (by itself), timeout (wall clock), flood (more output than allowed), killed (it took the sandbox down).
    code: its exit code if it ended by itself, negative for a signal.
    """

    ended: Ending
    code: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class Program:
    """What to run: `code` as a script, or `function` of it (a method of its class Solution, if it has one).

    seconds: wall clock a test; memory_mb: MiB of address space a test.
    """

    code: str
    function: str | None = None
    seconds: float = 6.0
    memory_mb: int = 1024


@dataclass(frozen=True)
class Sandbox:
    """A way to start the runner.

    command: argv up to and including Python's -c; packages: where NumPy is, seen from inside; hides_files: whether the
    host's files cannot be seen.
    """

    name: str
    command: tuple[str, ...]
    packages: str | None
    hides_files: bool


class SandboxError(RuntimeError):
    """The sandbox did not start; not the program's doing."""


class Session:
    """One program in one sandbox; each `run` is a fresh process. A context manager: leaving it kills all inside.

    One sandbox a program and not one a test: namespaces, interpreter and LiveCodeBench's imports cost about 30 ms, the
    fork of a test about 6 ms. Must be left by the thread that entered it: the sandbox dies with that thread.
    """

    def __init__(self, sandbox: Sandbox, program: Program):
        self._seconds = program.seconds
        self._folder = None if sandbox.hides_files else tempfile.TemporaryDirectory(prefix="polarity-code-")
        self._control, control_inside = os.pipe()
        self._info, info_inside = os.pipe()
        command = [part.replace(INFO, str(info_inside)) for part in sandbox.command]
        try:
            if self._folder and os.getuid() == 0:
                os.chown(self._folder.name, NOBODY, NOBODY)
            self._process = subprocess.Popen(
                [*command, _runner_source(), str(control_inside)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                pass_fds=(control_inside, info_inside), start_new_session=True, env=ENVIRONMENT,
                cwd=self._folder.name if self._folder else "/",
            )  # fmt: skip
        except OSError as error:
            self._release()
            raise SandboxError(str(error)) from error
        finally:
            os.close(control_inside)
            os.close(info_inside)
        self._pipes = [pipe for pipe in (self._process.stdin, self._process.stdout, self._process.stderr) if pipe]
        self._stdin, self._stdout, self._stderr = (pipe.fileno() for pipe in self._pipes)
        self._selector = selectors.DefaultSelector()
        for file in (self._stdout, self._stderr, self._control):
            self._selector.register(file, selectors.EVENT_READ)
        for file in (self._stdin, self._stdout, self._stderr, self._control, self._info):
            os.set_blocking(file, False)
        try:
            self._start(sandbox, program)
        except BaseException:
            self.close()
            raise

    def _start(self, sandbox: Sandbox, program: Program) -> None:
        frame = {
            "code": program.code,
            "function": program.function,
            "packages": sandbox.packages,
            "memory_bytes": program.memory_mb << 20,
            "cpu_seconds": math.ceil(program.seconds) + 1,
        }
        started = self._exchange(json.dumps(frame).encode(), START_SECONDS, STDERR_BYTES)
        if started.ended != "exit":
            raise SandboxError(last_line(started.stderr) or f"the sandbox did not start ({started.ended})")

    def run(self, data: bytes, output_bytes: int) -> Run:
        """Run the program on `data`, in its own process. After anything but an exit the session is of no more use.

        data: its standard input or, for a function, the JSON list of its arguments.
        output_bytes: how much it may write to standard output (1 MiB to standard error) before all is killed.
        """
        return self._exchange(data, self._seconds, output_bytes)

    def _exchange(self, data: bytes, seconds: float, output_bytes: int) -> Run:
        """Send one frame and read until the runner answers; sending and reading take turns: neither can block."""
        deadline = time.monotonic() + seconds
        pending = memoryview(len(data).to_bytes(8, "little") + data)
        received = {self._stdout: bytearray(), self._stderr: bytearray(), self._control: bytearray()}
        most = {self._stdout: output_bytes, self._stderr: STDERR_BYTES, self._control: 4}

        def result(ended: Ending, code: int = 0) -> Run:
            if ended == "killed":  # it says why on standard error, which may come after the end of another pipe
                while len(received[self._stderr]) <= STDERR_BYTES and select.select([self._stderr], [], [], 0.2)[0]:
                    part = os.read(self._stderr, 65536)
                    if not part:
                        break
                    received[self._stderr] += part
            return Run(ended, code, bytes(received[self._stdout]), bytes(received[self._stderr]))

        def read(file: int) -> Ending | None:
            part = os.read(file, 65536)
            received[file] += part
            if not part:  # the runner holds the other end open for as long as it lives
                return "killed"
            return "flood" if len(received[file]) > most[file] else None

        self._selector.register(self._stdin, selectors.EVENT_WRITE)
        while len(received[self._control]) < 4:
            left = deadline - time.monotonic()
            if left <= 0:
                return result("timeout")
            for key, _ in self._selector.select(left):
                if key.fd != self._stdin:
                    if ended := read(key.fd):
                        return result(ended)
                    continue
                try:
                    pending = pending[os.write(self._stdin, pending[:65536]) :]
                except BrokenPipeError:
                    return result("killed")
                if not pending:
                    self._selector.unregister(self._stdin)
        for file in (self._stdout, self._stderr):  # the process has ended: all it wrote is in the pipes by now
            try:
                while True:
                    if ended := read(file):
                        return result(ended)
            except BlockingIOError:
                continue
        return result("exit", struct.unpack("<i", received[self._control])[0])

    def close(self) -> None:
        """Kill everything in the sandbox and wait until it is gone."""
        if not self._kill_namespace():
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._selector.close()
        for pipe in self._pipes:
            pipe.close()
        self._release()

    def _kill_namespace(self) -> bool:
        """Kill bubblewrap's first process: all inside die with it, and bubblewrap reaps it. False if it has none."""
        if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False  # ended already: that process's number may be another's by now
        try:
            os.kill(json.loads(os.read(self._info, 4096))["child-pid"], signal.SIGKILL)
            self._process.wait(2.0)
        except (BlockingIOError, ValueError, ProcessLookupError, subprocess.TimeoutExpired):
            return False
        return True

    def _release(self) -> None:
        os.close(self._control)
        os.close(self._info)
        if self._folder:
            self._folder.cleanup()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_sandbox(unsafe: bool = False) -> Sandbox:
    """The strongest sandbox that works here, tried once with a program that attacks it a little.

    unsafe: where there is none, run programs as ordinary processes of this user. Raises UserError where there is none
    and unsafe is False, and on systems other than Linux.
    """
    if sys.platform != "linux":
        raise UserError("programs are graded on Linux only; run polarity in a Linux container or virtual machine")
    sandbox, failures = _search()
    if sandbox:
        return sandbox
    if unsafe:
        return Sandbox("no sandbox", (*_python(), "-c"), _numpy_folder(), hides_files=False)
    raise UserError(
        f"no sandbox for untrusted programs works here ({failures}); install bubblewrap and util-linux and allow user "
        "namespaces, or accept the risk with --unsafe (CodeVerifier(unsafe=True))"
    )


@functools.cache
def _search() -> tuple[Sandbox | None, str]:
    failures: list[str] = []
    for sandbox in _candidates():
        failure = _probe(sandbox)
        if not failure:
            if not sandbox.hides_files:
                warnings.warn(
                    f"programs run below {sandbox.name}, which does not hide this machine's files "
                    f"({'; '.join(failures)})",
                    stacklevel=3,
                )
            return sandbox, ""
        failures.append(f"{sandbox.name}: {failure}")
    return None, "; ".join(failures)


def _candidates() -> list[Sandbox]:
    python = (*_python(), "-c")
    paths, numpy = _inside(), _numpy_folder()
    separate = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
    if os.getuid() != 0:
        return [
            Sandbox("bubblewrap", (*_bubblewrap(paths), *python), PACKAGES, hides_files=True),
            Sandbox("unshare", (*separate, "--user", "--map-current-user", *python), numpy, hides_files=False),
        ]
    nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
    nobody += ["--inh-caps=-all", "--bounding-set=-all"]
    return [
        Sandbox(
            "setpriv + bubblewrap", (*_uncovered(paths), *nobody, *_bubblewrap(paths), *python), PACKAGES,
            hides_files=True,
        ),
        Sandbox("setpriv + unshare", (*separate, *nobody, *python), numpy, hides_files=False),
    ]  # fmt: skip


def _bubblewrap(paths: dict[str, str]) -> list[str]:
    argv = ["bwrap", "--unshare-user", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    argv += ["--hostname", "sandbox", "--info-fd", INFO]
    for folder in ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(folder):
            argv += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            argv += ["--ro-bind", folder, folder]
    for source, target in paths.items():
        argv += ["--ro-bind", source, target]
    library = Path(sys.base_prefix, "lib")
    for folder in map(str, library.glob("python3*/*-packages")):  # installed packages are not the program's business
        argv += ["--tmpfs", folder, "--remount-ro", folder]
    if str(library) != "/usr/lib":
        argv += ["--setenv", "LD_LIBRARY_PATH", str(library)]  # there is no /etc/ld.so.cache inside
    for device in ("/dev/null", "/dev/urandom"):
        argv += ["--dev-bind", device, device]
    return [*argv, "--size", str(TMPFS_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]


def _uncovered(paths: dict[str, str]) -> list[str]:
    """For root with a Python in its own home (pyenv, uv): a mount namespace in which nobody can reach `paths`.

    An empty tmpfs lies over the first folder that is closed to others, and in it nothing but the paths.
    """
    argv: dict[tuple[str, ...], None] = {}  # in order, each once
    for path in map(Path, paths):
        folders = list(reversed(path.parents))
        closed = [folder for folder in folders if not folder.stat().st_mode & stat.S_IXOTH]
        if closed:
            argv[("--tmpfs", str(closed[0]))] = None
            argv |= {("--dir", str(folder)): None for folder in folders if closed[0] in folder.parents}
            argv[("--ro-bind", str(path), str(path))] = None
    if not argv:
        return []
    return ["bwrap", "--die-with-parent", "--dev-bind", "/", "/", *sum(argv, ()), "--cap-add", "ALL"]


def _python() -> list[str]:
    """The interpreter itself, not a virtual environment's link to it, with nothing but the standard library."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    installed = Path(sys.base_prefix, "bin", name)
    path = installed if installed.exists() else Path(sys.executable)
    return [str(path.resolve()), "-s", "-P", "-S", "-B", "-X", "utf8"]


def _inside() -> dict[str, str]:
    """What Python needs besides the system's libraries: path here -> path inside the sandbox."""
    python = _python()[0]
    paths = {python: python}
    library = Path(sys.base_prefix, "lib")
    if str(library) != "/usr/lib":
        paths[str(library)] = str(library)
    folder = _numpy_folder()
    for name in ("numpy", "numpy.libs"):
        if folder and Path(folder, name).is_dir():
            paths[str(Path(folder, name))] = f"{PACKAGES}/{name}"
    return paths


def _numpy_folder() -> str | None:
    spec = find_spec("numpy")
    return str(Path(spec.origin).parent.parent) if spec and spec.origin else None


@functools.cache
def _runner_source() -> str:
    return Path(__file__).with_name("sandbox_runner.py").read_text(encoding="utf-8")


PROBE = """
import os, socket

def probe(pid, port):
    def refused(action, *arguments):
        try:
            action(*arguments)
        except OSError:
            return True
        return False
    return {
        "shows this machine's files": refused(os.stat, "/etc/passwd"),
        "shows this machine's processes": refused(os.kill, pid, 0),
        "reaches this machine's network": refused(socket.create_connection, ("127.0.0.1", port), 1.0),
    }
"""


def _probe(sandbox: Sandbox) -> str | None:
    """What is wrong with the sandbox on this machine, as a short phrase; None if it starts and contains the probe."""
    for tool in {"bwrap", "setpriv", "unshare"}.intersection(sandbox.command):
        if not shutil.which(tool, path=ENVIRONMENT["PATH"]):
            return f"{tool} is not installed"
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = json.dumps([os.getpid(), server.getsockname()[1]]).encode()
        try:
            with Session(sandbox, Program(PROBE, "probe", seconds=10.0)) as session:
                run = session.run(arguments, 4096)
        except SandboxError as error:
            return str(error)
    if run.ended != "exit" or run.code != 0:
        return last_line(run.stderr) or f"its probe ended with {run.ended}, code {run.code}"
    for fault, refused in json.loads(run.stdout).items():
        if not refused and (sandbox.hides_files or "files" not in fault):
            return f"it {fault}"
    return None


def last_line(output: bytes) -> str:
    """The last line of an error output that is not empty, where Python and command-line tools say what went wrong."""
    lines = output[-4096:].decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
