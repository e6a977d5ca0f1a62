"""Compiles the C++ sources beside this file with CMake.

In: a target of CMakeLists.txt, CMake and a compiler. Out: the target's file, put into place once it is whole. What was
compiled on the way stays in a folder of objects, so that the targets share the kernels, which take most of the time;
one process at a time uses it, and the others wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lfm2_export.errors import Lfm2ExportError
from lfm2_export.folders import Folder, UnexpectedKindError
from lfm2_export.kernels.sources import SOURCES
from lfm2_export.lock import Lock

logger = logging.getLogger(__name__)

_WHOLE = "whole"  # in a folder of objects: no build was interrupted in it
_POLL_S = 0.1


class KernelBuildError(Lfm2ExportError):
    """The operator library could not be built; the message names the file that holds the compiler's output."""

    exit_code = 3


@dataclass(frozen=True, kw_only=True)
class Build:
    """``result``: the file to make, of the name of its target. ``objects``: the folder for what is compiled, which
    ``<objects>.lock`` beside it belongs to. ``entries``: CMake's cache entries. ``remedy``: what to do without."""

    result: Path
    objects: Path
    cmake: str
    entries: Mapping[str, str]
    remedy: str

    def make(self) -> Path:
        """The file, made here or meanwhile by another process.

        Raises:
            KernelBuildError: CMake or the compiler failed, or the cache cannot be written.
        """
        try:
            self.result.parent.mkdir(parents=True, exist_ok=True)
            with _turn(self.objects):
                return self.result if self.result.exists() else self._timed()
        except UnexpectedKindError as error:
            raise KernelBuildError(f"{error.path}: is {error.what} where a lock should be; delete it") from error
        except OSError as error:
            raise KernelBuildError(
                f"{self.result.parent}: {self.result.name} cannot be built here ({error}); set XDG_CACHE_HOME to a "
                "folder that can be written"
            ) from error

    def _timed(self) -> Path:
        logger.info("compiling %s, once, for one to three minutes; or use %s", self.result.name, self.remedy)
        started = time.monotonic()
        with _objects(self.objects) as work:
            self._compile(work)
        logger.info("compiled %s in %.0f s", self.result.name, time.monotonic() - started)
        return self.result

    def _compile(self, work: Path) -> None:
        log = self.result.with_name(f"{self.result.name}.log")
        definitions = [f"-D{name}={value}" for name, value in self.entries.items()]
        # It would keep what an earlier call found, such as the folder of another executorch.
        Path(work, "CMakeCache.txt").unlink(missing_ok=True)
        self._run(log, "w", ["-S", str(SOURCES), "-B", str(work), *definitions])
        # Without a number, make would start everything at once.
        count = str(os.cpu_count() or 1)
        self._run(log, "a", ["--build", str(work), "--target", _cmake_name(self.result.name), "--parallel", count])
        _put_into_place(work / self.result.name, self.result)
        log.unlink(missing_ok=True)

    def _run(self, log: Path, mode: str, arguments: list[str]) -> None:
        command = [self.cmake, *arguments]
        with log.open(mode) as output:
            code = _exit_code(command, output)
        if code:
            raise KernelBuildError(
                f"{Path(self.cmake).name} failed with exit code {code} on {SOURCES}: its output is in {log}; or use "
                f"{self.remedy}"
            )


def _exit_code(command: list[str], output: IO[str]) -> int:
    """Of a command with all that it starts: an interruption ends the compilers too, which would go on without it."""
    with subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            return process.wait()
        except BaseException:
            if sys.platform == "win32":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            raise


def _cmake_name(file_name: str) -> str:
    return file_name.removeprefix("lib").partition(".")[0]


def _put_into_place(made: Path, result: Path) -> None:
    """On the disk before it has its name: a file of that name is believed."""
    with made.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(made, result)


@contextlib.contextmanager
def _turn(objects: Path) -> Iterator[None]:
    """Held by one process at a time; the others wait."""
    with Folder.open(objects.parent) as base:
        lock = Lock(base, f"{objects.name}.lock")
        if not lock.acquire():
            logger.info("waiting for another process that compiles our kernels")
            while not lock.acquire():
                time.sleep(_POLL_S)
        try:
            yield
        finally:
            lock.release()


@contextlib.contextmanager
def _objects(folder: Path) -> Iterator[Path]:
    """The folder for CMake's work: what an earlier build left whole, or a new one. Of a name of its own each time,
    since the compilers of a process that was killed may still be writing; what such a one left is removed."""
    folder.mkdir(exist_ok=True)
    kept = next((found for found in folder.iterdir() if (found / _WHOLE).exists()), None)
    for left in folder.iterdir():
        if left != kept:
            shutil.rmtree(left, ignore_errors=True)
    work = kept or Path(tempfile.mkdtemp(dir=folder))
    (work / _WHOLE).unlink(missing_ok=True)
    try:
        yield work
        (work / _WHOLE).touch()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
