"""The process inside the sandbox: runs one program on one test after another, each in a fresh process.

Started by rewards/sandbox.py as `python -c <this file's text>`, so it needs no file of the package inside the sandbox
and uses the standard library only. It reads frames (8 bytes little-endian length, then that many bytes) from standard
input: first the program as JSON {code, function, packages, memory_bytes, cpu_seconds}, then one frame a test. For each
test it forks; the child confines itself, becomes the program and ends; this process waits and writes the exit code
(4 bytes, signed, negative for a signal) to the descriptor named on its command line, where a first 0 says it is ready.

A test of standard input reads its frame as file 0. A test of a function has a JSON list of arguments as its frame and
writes the JSON of what the function returns to file 1; what it prints is dropped.
"""

import ctypes
import gc
import json
import os
import resource
import signal
import site
import struct
import sys
import types
from typing import Any

FILE_BYTES = 64 << 20
THREADS = 32

# What LiveCodeBench's grader (lcb_runner/evaluation/testing_util.py) puts before every program, in its order: model
# answers to function problems rely on it (`List[int]`, `inf`, `Counter` without an import). Paid once a program.
NAMES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
)
PRELUDE = "\n".join(
    [f"from {name} import *" for name in [*NAMES.split(), "builtins", "typing"]]
    + [f"import {name}" for name in NAMES.split()]
)

# Linux system calls that a test's process may not make: name, number on x86_64, number on aarch64 (-1: no such call).
# fork and exec: one process per test makes its address-space limit a limit on memory, and nothing can outlive it.
# memfd, System V and message-queue memory lies outside that limit. The others are kernel interfaces with a long
# history of holes that no contest solution needs. Numbers from arch/x86/entry/syscalls/syscall_64.tbl and
# include/uapi/asm-generic/unistd.h.
DENIED: tuple[tuple[str, int, int], ...] = (
    ("fork", 57, -1), ("vfork", 58, -1), ("execve", 59, 221), ("execveat", 322, 281), ("ptrace", 101, 117),
    ("process_vm_readv", 310, 270), ("process_vm_writev", 311, 271), ("kcmp", 312, 272), ("socket", 41, 198),
    ("memfd_create", 319, 279), ("shmget", 29, 194), ("msgget", 68, 186), ("semget", 64, 190), ("mq_open", 240, 180),
    ("unshare", 272, 97), ("setns", 308, 268), ("mount", 165, 40), ("umount2", 166, 39), ("pivot_root", 155, 41),
    ("chroot", 161, 51), ("open_by_handle_at", 304, 265), ("add_key", 248, 217), ("request_key", 249, 218),
    ("keyctl", 250, 219), ("perf_event_open", 298, 241), ("bpf", 321, 280), ("userfaultfd", 323, 282),
    ("io_setup", 206, 0), ("modify_ldt", 154, -1), ("personality", 135, 92),
)  # fmt: skip
# From here on numbers are the same on every architecture (424: pidfd_send_signal; then io_uring, the new mount calls,
# clone3, ...). All answer "not in this kernel", for which every C library has a fallback.
FIRST_NEW_CALL = 424
MACHINES = {"x86_64": (0xC000003E, 56, 0), "aarch64": (0xC00000B7, 220, 1)}  # AUDIT_ARCH_*, clone, column of DENIED


def seccomp_program(machine: str) -> bytes:
    """The system-call filter as classic BPF (8 bytes an instruction), empty for a machine whose numbers are not above.

    Wrong architecture: killed. Calls from FIRST_NEW_CALL: ENOSYS. clone without CLONE_THREAD, and DENIED: EPERM.
    """
    if machine not in MACHINES:
        return b""
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: LD|W|ABS, JMP|JEQ, |JGE, |JSET, RET
    kill, errno, allow = 0x80000000, 0x00050000, 0x7FFF0000
    clone_thread = 0x10000
    architecture, clone, column = MACHINES[machine]
    denied = [numbers[column] for _, *numbers in DENIED if numbers[column] != -1]
    program = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 1, 0, architecture),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),  # seccomp_data.nr
        (at_least, 0, 1, FIRST_NEW_CALL),
        (answer, 0, 0, errno | 38),
        (equal, 0, 4, clone),
        (load, 0, 0, 16),  # low half of its first argument, the flags
        (any_bit, 0, 1, clone_thread),
        (answer, 0, 0, allow),
        (answer, 0, 0, errno | 1),
    ]
    for number in denied:
        program += [(equal, 0, 1, number), (answer, 0, 0, errno | 1)]
    return b"".join(struct.pack("=HBBI", *line) for line in [*program, (answer, 0, 0, allow)])


LIBC = ctypes.CDLL(None, use_errno=True)


def _prctl(*arguments: Any) -> None:
    if LIBC.prctl(*(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments)) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def die_with_parent() -> None:
    _prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def confine(memory_bytes: int, cpu_seconds: int) -> None:
    """Give up, for good, what the program may not have. Raises OSError where the kernel does not take it.

    Hard limits, which only a privileged process could raise again; then the filter (with no_new_privs, which it needs).
    """
    for what, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, THREADS),
        (resource.RLIMIT_STACK, 120 << 20),  # deep recursion through C functions; the kernel keeps 128 MiB free for it
        (resource.RLIMIT_CORE, 0),
    ):
        ceiling = resource.getrlimit(what)[1]
        limit = limit if ceiling == resource.RLIM_INFINITY else min(limit, ceiling)
        resource.setrlimit(what, (limit, limit))
    die_with_parent()
    _prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    code = seccomp_program(os.uname().machine)
    if code:
        buffer = ctypes.create_string_buffer(code, len(code))
        header = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))  # struct sock_fprog
        _prctl(22, 2, ctypes.create_string_buffer(header, len(header)))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _read(count: int) -> bytes:
    parts = []
    while count and (part := os.read(0, min(count, 1 << 20))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_frame() -> bytes | None:
    """The next frame from file 0; None at its end."""
    head = _read(8)
    return _read(int.from_bytes(head, "little")) if len(head) == 8 else None


def run_program(program: dict[str, Any], module: types.ModuleType, data: bytes) -> None:
    """Be the program on one test. What it raises ends this process the way it would end `python program.py`.

    SystemExit of any code is a normal end, as in LiveCodeBench: what counts is what was printed.
    """
    if program["function"] is None:
        file = os.memfd_create("stdin")
        with open(file, "wb", closefd=False) as stream:
            stream.write(data)
        os.lseek(file, 0, os.SEEK_SET)
    else:
        file = os.open(os.devnull, os.O_RDONLY)
        result = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(file, 0)
    os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 the program's, to its end
    confine(program["memory_bytes"], program["cpu_seconds"])
    try:
        exec(compile(program["code"], "program.py", "exec"), module.__dict__)
        if program["function"] is not None:
            owner = module.Solution() if hasattr(module, "Solution") else module
            value = getattr(owner, program["function"])(*json.loads(data))
            # NumPy's scalars equal Python's numbers, so they may stand for them
            text = json.dumps(value, default=lambda number: number.item())
            with open(result, "w", encoding="utf-8") as stream:
                stream.write(text)
    except SystemExit:
        pass


def main() -> None:
    die_with_parent()
    control = int(sys.argv[1])
    program = json.loads(read_frame() or b"{}")
    if program["packages"]:
        sys.path.append(program["packages"])
    site.setquit()
    module = types.ModuleType("__main__")
    exec(PRELUDE, module.__dict__)
    sys.modules["__main__"] = module
    sys.setrecursionlimit(50000)
    gc.freeze()  # halves the cost of a fork's end: what is imported here is not searched for cycles there
    os.write(control, struct.pack("<i", 0))
    while (data := read_frame()) is not None:
        child = os.fork()
        if child == 0:
            os.closerange(3, 1024)  # above all `control`
            run_program(program, module, data)
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(control, struct.pack("<i", status))


if __name__ == "__main__":
    main()
