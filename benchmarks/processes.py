"""Runs one command and watches it from outside: when each of its lines came, and the most memory that it held.

In: a command. Out: a ``Watched``. Peak memory is read from the system while the command runs, in the same way whoever
wrote the program, and not from ``wait4``, whose figure includes the parent's own memory at the fork.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quiet import Moment
from lfm2_export.errors import Lfm2ExportError

_POLL_S = 0.02


class BenchmarkError(Lfm2ExportError):
    """This machine lacks something that the benchmark needs, or a program that it runs failed."""

    exit_code = 3


@dataclass(frozen=True, kw_only=True)
class Watched:
    """``stderr`` holds (seconds since the start, line). ``peak_bytes``: the most resident memory, files that the
    program maps included; 0 where the system does not tell (it does on Linux). ``foreign_cores``: what others used
    from its first line on."""

    stdout: str
    stderr: tuple[tuple[float, str], ...]
    peak_bytes: int
    foreign_cores: float = 0.0


def watch(command: Sequence[str], *, purpose: str, launcher: Sequence[str] = ()) -> Watched:
    """Runs ``command`` to its end; ``launcher`` goes before it and must replace itself by it (``taskset -c 0,1``).

    Raises:
        BenchmarkError: it cannot be started or failed; the message ends with what it said last.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        try:
            process = subprocess.Popen(
                [*launcher, *command], stdout=out, stderr=subprocess.PIPE, text=True, errors="replace"
            )
        except OSError as error:
            raise BenchmarkError(f"{purpose}: {error.filename or command[0]} cannot be started: {error}") from error
        memory = _PeakMemory(process.pid)
        memory.start()
        assert process.stderr is not None
        try:
            begin, lines = None, []
            for line in process.stderr:
                begin = begin or Moment.now(process.pid)
                lines.append((time.perf_counter() - started, line.rstrip("\n")))
            code = process.wait()
            foreign = Moment.now(process.pid).foreign_cores(begin) if begin else 0.0
        finally:
            process.kill()
            process.wait()
            memory.stop()
        out.seek(0)
        stdout = out.read()
    if code:
        said = next((line for _, line in reversed(lines) if line.strip()), "it said nothing")
        raise BenchmarkError(f"{purpose} failed with status {code}: {said[:300]}")
    return Watched(stdout=stdout, stderr=tuple(lines), peak_bytes=memory.peak_bytes, foreign_cores=foreign)


class _PeakMemory(threading.Thread):
    """Linux keeps a process's peak; it is read until the process ends, so that at most its last moments are missed."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._stopped = threading.Event()

    def run(self) -> None:
        while sys.platform == "linux" and not self._stopped.wait(_POLL_S):
            self.peak_bytes = max(self.peak_bytes, _peak(self._status))

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def _peak(status: Path) -> int:
    try:
        lines = status.read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def read_once(paths: Sequence[Path]) -> None:
    """Brings files into the page cache, so that a load is timed from memory and not from whatever the disk is."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
