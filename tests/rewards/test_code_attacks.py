"""Attacks on what is outside the sandbox. What counts is what this machine saw of them, not how they ended.

Each attack runs twice: as it is, and with the system-call filter taken out, so that namespaces and limits have to hold
by themselves (as they must on a processor for which there is no filter). Attacks that only the filter stops run once.
"""

import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sandbox_watch import Watch

from polarity.rewards import sandbox
from polarity.rewards.code import CodeVerifier

pytestmark = pytest.mark.usefixtures("bubblewrap")


@pytest.fixture
def listeners() -> Iterator[SimpleNamespace]:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        tcp.setblocking(False)
        udp.setblocking(False)

        def heard() -> bool:
            for listen in (tcp.accept, lambda: udp.recv(10)):
                try:
                    listen()
                except BlockingIOError:
                    continue
                return True
            return False

        yield SimpleNamespace(tcp=tcp.getsockname()[1], udp=udp.getsockname()[1], heard=heard)


NETWORK = """
import socket
for kind, port in ((socket.SOCK_STREAM, {tcp}), (socket.SOCK_DGRAM, {udp})):
    try:
        s = socket.socket(socket.AF_INET, kind)
        s.settimeout(0.5)
        s.connect(("127.0.0.1", port))
        s.send(b"secret")
    except OSError as error:
        print(error)
try:
    print("resolved", socket.getaddrinfo("example.com", 80))
except OSError as error:
    print(error)
print("done")
"""


def test_network(watch: Watch, layers: str, listeners: SimpleNamespace) -> None:
    run = watch.run(NETWORK.format(tcp=listeners.tcp, udp=listeners.udp))
    assert not listeners.heard()
    assert b"done" in run.stdout
    assert b"resolved" not in run.stdout


READ = """
import os
for path in {paths!r}:
    try:
        print(open(path).read())
    except OSError:
        pass
    try:
        print(os.listdir(os.path.dirname(path)))
    except OSError:
        pass
for top, folders, files in os.walk("/"):
    folders[:] = [f for f in folders if top != "/" or f not in ("lib", "lib64", "usr", "proc", "sys", "packages")]
    print(top, files)
print(dict(os.environ))
"""


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A file that everybody on this machine may read, in a folder that everybody may write."""
    word = f"secret-{uuid.uuid4().hex}"
    folder = tmp_path / f"open-{uuid.uuid4().hex}"
    folder.mkdir()
    (folder / "secret.txt").write_text(word)
    for path in (folder, *folder.parents):
        if path.is_relative_to(tmp_path.parents[1]):
            path.chmod(0o777)
    monkeypatch.setenv("POLARITY_TEST_SECRET", word)
    return SimpleNamespace(word=word, folder=folder, file=folder / "secret.txt")


def test_reading_files_of_the_host(watch: Watch, layers: str, secret: SimpleNamespace) -> None:
    installed = Path(sys.base_prefix, f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages")
    paths = ["/etc/passwd", "/etc/shadow", "/etc/hostname", str(secret.file), sandbox.__file__, "/root/.bashrc"]
    paths += [str(path) for path in installed.glob("*")]
    run = watch.run(READ.format(paths=paths))
    assert run.code == 0
    assert b"root:" not in run.stdout
    assert secret.word.encode() not in run.stdout
    assert secret.folder.name.encode() not in run.stdout
    assert b"find_sandbox" not in run.stdout
    assert not [path for path in installed.glob("*-*") if path.name.encode() in run.stdout]


def test_reading_memory_and_environment_of_other_processes(watch: Watch, layers: str, secret: SimpleNamespace) -> None:
    names = ("environ", "cmdline", "maps", "mem", "root/etc/passwd", "cwd/pyproject.toml", "fd/0", "fd/3")
    paths = [f"/proc/{pid}/{name}" for pid in (1, 2, 3, "self", os.getpid(), os.getppid()) for name in names]
    run = watch.run(READ.format(paths=paths))
    assert run.code == 0
    assert secret.word.encode() not in run.stdout
    assert b"root:" not in run.stdout
    assert b"POLARITY_TEST_DATA" not in run.stdout


def test_symbolic_links_and_other_ways_out(watch: Watch, layers: str, secret: SimpleNamespace) -> None:
    code = f"""
import ctypes, os
target = {str(secret.file)!r}
paths = ["../" * 40 + target.lstrip("/"), *(f"/proc/{{p}}{{target}}" for p in ("self/root", "1/root", "self/cwd"))]
for i, aim in enumerate([target, *paths, "/", "/proc/1/root"]):
    for link in (os.symlink, os.link):
        try:
            link(aim, f"link{{i}}")
            paths += [f"link{{i}}", f"link{{i}}" + target]
        except OSError:
            pass
libc = ctypes.CDLL(None)
os.makedirs("jail", exist_ok=True)
libc.chroot(b"jail")
for _ in range(40):
    try:
        os.chdir("..")
    except OSError:
        break
libc.chroot(b".")
libc.mount(b"none", b"/tmp/jail", b"proc", 0, 0)
libc.unshare(0x10000000 | 0x20000)
libc.mount(b"/", b"/tmp/jail", 0, 4096 | 16384, 0)
paths += ["/tmp/jail" + target, target.lstrip("/")]
for path in paths:
    try:
        print(open(path).read())
    except OSError:
        pass
print("done")
"""
    run = watch.run(code)
    assert b"done" in run.stdout
    assert secret.word.encode() not in run.stdout


def test_writing_files_of_the_host(watch: Watch, layers: str, secret: SimpleNamespace) -> None:
    name = f"polarity-attack-{uuid.uuid4().hex}"
    package = Path(sandbox.__file__).parent
    folders = [secret.folder, Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path.home(), Path("/usr/lib"), package]
    before = {path: path.stat().st_mtime_ns for path in package.glob("*.py")}
    code = f"""
import os
for folder in {[str(f) for f in folders]!r}:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        pass
    try:
        open(f"{{folder}}/{name}", "w").write("here")
    except OSError:
        pass
for path in {[str(p) for p in [*before, secret.file]]!r}:
    for action in (os.remove, lambda p: open(p, "a").write("#"), lambda p: os.chmod(p, 0), lambda p: os.rename(p, "x")):
        try:
            action(path)
        except OSError:
            pass
"""
    assert watch.run(code).code == 0
    assert not [folder for folder in folders if (folder / name).exists()]
    assert secret.file.read_text() == secret.word
    assert secret.file.stat().st_mode & 0o400
    assert {path: path.stat().st_mtime_ns for path in package.glob("*.py")} == before


def test_set_user_id_files_and_devices(watch: Watch, layers: str) -> None:
    name = f"polarity-attack-{uuid.uuid4().hex}"
    code = f"""
import os, stat, subprocess
for folder in ("/tmp", "/dev", "/usr/lib", "/packages"):
    path = f"{{folder}}/{name}"
    try:
        open(path, "w").write("#!/bin/sh")
        os.chmod(path, 0o6777)
    except OSError as error:
        print(error)
    for make in (lambda: os.mknod(path + "d", stat.S_IFBLK | 0o666, os.makedev(254, 0)), lambda: os.chown(path, 0, 0)):
        try:
            make()
            print("made it")
        except OSError as error:
            print(error)
try:
    os.setuid(0)
    print("made it")
except OSError as error:
    print(error)
"""
    run = watch.run(code)
    assert run.code == 0
    assert b"made it" not in run.stdout
    assert not [f for f in ("/tmp", "/dev", "/usr/lib") if list(Path(f).glob(name + "*"))]


def test_signals(watch: Watch, layers: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        code = f"""
import os
for send in (os.kill, os.killpg):
    for who in ({os.getpid()}, {bystander.pid}, {os.getppid()}, 1):
        try:
            send(who, 9)
        except OSError as error:
            print(error)
try:
    os.kill(os.getppid(), 9)
finally:
    os.kill(-1, 9)
"""
        ended = watch.run(code)
        assert bystander.poll() is None
        bystander.communicate(b"\n")
    assert bystander.returncode == 0
    assert ended.ended == "killed"  # it took down its own sandbox, nothing else
    verdict = CodeVerifier()(f"```python\n{code}\n```", '{"inputs": ["", ""], "outputs": ["", ""]}')
    assert verdict.status == "wrong"


def test_ptrace_and_memory_of_the_parent(watch: Watch, layers: str) -> None:
    inside = ", os.getppid(), 1" if layers == "filter" else ""  # without it a program may trace its own runner
    code = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(64)
class Span(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
here = Span(ctypes.addressof(buffer), 64)
for pid in ({os.getpid()}, {os.getppid()}{inside}):
    print(libc.ptrace(16, pid, 0, 0), libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(here), 1, 0))
"""
    run = watch.run(code)
    assert set(run.stdout.split()) == {b"-1"}
    assert Path("/proc/self/status").read_text().count("TracerPid:\t0") == 1


def test_no_other_program_can_be_started(watch: Watch) -> None:
    code = """
import os, subprocess
def spawn():
    os.posix_spawn("/usr/lib/x", ["x"], {})
for start in (lambda: subprocess.run(["/bin/true"]), lambda: os.execv("/proc/self/exe", ["x"]), os.fork, spawn,
              lambda: os.execv("/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", ["x"])):
    try:
        print("started", start())
    except OSError as error:
        print(error)
"""
    assert b"started" not in watch.run(code).stdout


def test_expected_output_is_not_in_the_sandbox_and_verdicts_cannot_be_forged(layers: str) -> None:
    """A program that looks through its memory and writes to every descriptor does not become correct."""
    code = """
import gc, os
for thing in gc.get_objects():
    try:
        text = repr(thing)
    except Exception:
        continue
    if "wanted-" in text and "gc.get_objects" not in text:
        print("found", text)
for file in range(3, 300):
    try:
        os.write(file, bytes(4))
        print("wrote to", file)
    except OSError:
        pass
"""
    verdict = CodeVerifier()(f"```python\n{code}\n```", '{"inputs": ["", ""], "outputs": ["wanted-1", "wanted-2"]}')
    assert verdict.status == "wrong"
    assert verdict.extracted == "test 1 of 2: expected 'wanted-1', got ''"


def unconfined(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30).stdout


def test_the_attacks_work_where_nothing_stops_them(listeners: SimpleNamespace, secret: SimpleNamespace) -> None:
    unconfined(NETWORK.format(tcp=listeners.tcp, udp=listeners.udp).replace("example.com", "localhost"))
    assert listeners.heard()
    read = READ.format(paths=["/etc/passwd", str(secret.file)]).replace('os.walk("/")', 'os.walk("/dev/null")')
    assert unconfined(read).count(secret.word) == 2  # the file and the environment
