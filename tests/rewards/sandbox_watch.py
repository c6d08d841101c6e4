"""Runs programs in the sandbox and sees their processes from outside."""

import threading
from pathlib import Path

from polarity.rewards.sandbox import Program, Run, Session, find_sandbox


class Watch:
    """Runs attacks and sees their processes from outside, by a mark in the environment that all of them inherit."""

    def __init__(self, mark: str):
        self.mark = f"POLARITY_TEST_MARK={mark}".encode()
        self.processes = self.threads = self.resident = 0  # peaks; resident in bytes, over all marked processes

    def marked(self) -> list[Path]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (folder / "environ").read_bytes():
                    found.append(folder)
            except OSError:  # ended meanwhile, or another user's
                continue
        return found

    def _look(self) -> None:
        status = []
        for folder in self.marked():
            try:
                lines = (folder / "status").read_text().splitlines()
            except OSError:
                continue
            status.append(dict(line.split(":", 1) for line in lines if ":" in line))
        self.processes = max(self.processes, len(status))
        self.threads = max(self.threads, *(int(s["Threads"]) for s in status), 0)
        self.resident = max(self.resident, sum(1024 * int(s.get("VmRSS", "0 kB").split()[0]) for s in status))

    def run(self, code: str, seconds: float = 5.0, memory_mb: int = 256, output_bytes: int = 1 << 20) -> Run:
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.01):
                self._look()

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            with Session(find_sandbox(), Program(code, None, seconds, memory_mb)) as session:
                return session.run(b"", output_bytes)
        finally:
            over.set()
            watcher.join()
