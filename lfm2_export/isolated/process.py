"""A child process that works for this one within limits that hold whatever it is made to do.

In: a program of this package, requests as bytes, limits. Out: answers as bytes, or the limit that ended the child.
A chat template is a program and a tokenizer.json drives one: no check of either before it runs can say how long it
will take. Here the system counts, and what goes beyond is killed; nothing in this process waits, grows or crashes.

Processor time, address space and the answer's size are limited on POSIX; macOS sets no bound to the address space
and Windows only to the time on the clock and the answer: there a request may take what memory it can in that time.

The child is a new Python, not a fork (this process has threads and a runtime's state). It takes neither modules nor
settings from the working directory or the environment, it does not get the terminal's signals, and it ends when this
process does: its input closes, or its processor time is used up.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import IO

from lfm2_export.errors import ResourceError
from lfm2_export.isolated.wire import ANSWER, GREETING, OUT_OF_MEMORY, REPLY, REQUEST, Refusal, read, write

# The interpreter of children, for a program that embeds Python and so has none to call.
PYTHON_VARIABLE = "LFM2_EXPORT_PYTHON"
_MARK = "LFM2_EXPORT_CHILD"
# What a child takes of the environment: how to find its libraries, and how this user writes dates.
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "TZDIR", "LANG", "LC_ALL", "LC_CTYPE", "LC_TIME")
# A panic in Rust else takes half a second to say where it was.
_SET = {_MARK: "1", "RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false"}

_CODE = "import sys, importlib; sys.path += sys.argv[2:]; importlib.import_module(sys.argv[1]).main()"

# Time on the clock for each second of processor time, and at least: a busy machine must not fail what is in order.
_PATIENCE, _LEAST_SECONDS = 4.0, 5.0
_STARTUP_SECONDS = 60.0
# For a child that has closed its pipes to be gone, so that its exit code says why.
_DYING_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one request: ``seconds`` of processor time, ``memory`` in bytes of address space, ``reply`` in bytes."""

    seconds: float
    memory: int
    reply: int


class Stopped(Exception):
    """A request went beyond a limit or ended the child; the message goes on from the name of what was asked for."""


class Child:
    """A program that is started when it is first needed, and again after it was killed. Threads take turns.

    Args:
        program: the module that runs; its ``main`` calls ``serve``.
        packages: what it imports beside the standard library and this package.
    """

    def __init__(self, program: str, packages: Sequence[str]):
        self._program, self._packages = program, tuple(packages)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._greeted = False

    def start(self) -> None:
        """Starts the program, where it is not running, without waiting for it.

        Raises:
            ResourceError: this system starts no such process.
        """
        with self._lock:
            self._running()

    def ask(self, request: bytes, limits: Limits) -> bytes:
        """The program's answer.

        Raises:
            Refusal: the program refuses the request.
            Stopped: a limit was reached, or the child ended.
            ResourceError: this system starts no such process.
        """
        with self._lock:
            try:
                kind, leaves, answer = self._exchange(request, limits)
            except BaseException:  # an interrupt too: the child is somewhere in the middle
                self._end()
                raise
            if leaves:
                self._end()
        if kind == ANSWER:
            return answer
        if kind == OUT_OF_MEMORY:
            raise Stopped(f"needs more than {limits.memory >> 20} MB of memory")
        raise Refusal(answer.decode("utf-8", "replace"))

    def stop(self) -> None:
        """Ends the program; the next request starts it again."""
        with self._lock:
            self._end()

    def forget(self) -> None:
        """In a fork of this process: the child belongs to the parent, and the lock may be held by a thread of it."""
        self._lock = threading.Lock()
        if self._process is not None:
            _close(self._process)
            self._process.returncode = 0  # not ours to wait for
        self._process, self._greeted = None, False

    def _exchange(self, request: bytes, limits: Limits) -> tuple[bytes, bool, bytes]:
        process = self._ready()
        source, sink = _pipes(process)
        deadline = _Deadline(process, max(_PATIENCE * limits.seconds, _LEAST_SECONDS))
        try:
            with deadline:
                write(sink, REQUEST.pack(limits.seconds, limits.memory, len(request)), request)
                kind, leaves, size = REPLY.unpack(read(source, REPLY.size))
                if size > limits.reply:
                    raise Stopped(f"gives {size} bytes, more than {limits.reply}")
                answer = read(source, size)
        except (EOFError, OSError) as error:
            raise Stopped(_cause(_exit_code(process), deadline.passed, limits)) from error
        return kind, leaves or deadline.passed, answer

    def _ready(self) -> subprocess.Popen[bytes]:
        """The program, when it has said that it runs."""
        process = self._running()
        if not self._greeted:
            try:
                with _Deadline(process, _STARTUP_SECONDS):
                    self._greeted = read(_pipes(process)[0], 1) == GREETING
            except (EOFError, OSError):
                pass
        if not self._greeted:
            raise _no_process(f"{_python()!r} ended with {_exit_code(process)}")
        return process

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = _launch(self._program, self._packages)
            atexit.register(self._leave)
        return self._process

    def _end(self) -> None:
        """Kills the child and waits for it, so that no zombie is left."""
        process, self._process, self._greeted = self._process, None, False
        if process is not None:
            atexit.unregister(self._leave)
            process.kill()
            _close(process)
            process.wait()

    def _leave(self) -> None:
        """At the end of this process, where a thread that was left behind may hold the lock."""
        if process := self._process:
            process.kill()
            process.wait()


class _Deadline:
    """Kills a process unless the block ends before; reads and writes in the block then fail."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float):
        self._process = process
        self.passed = False
        self._timer = threading.Timer(seconds, self._pass)
        self._timer.daemon = True

    def _pass(self) -> None:
        self.passed = True
        self._process.kill()

    def __enter__(self) -> None:
        try:
            self._timer.start()
        except RuntimeError as error:
            raise _no_process(str(error)) from error

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()


def _launch(program: str, packages: Iterable[str]) -> subprocess.Popen[bytes]:
    if _MARK in os.environ:
        raise _no_process("this is such a process already")
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    try:
        return subprocess.Popen(
            [_python(), "-I", "-S", "-c", _CODE, program, *_folders(packages)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept | _SET,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except (OSError, ValueError) as error:
        raise _no_process(f"{_python()!r}: {error}") from error


def _python() -> str:
    """The interpreter. A frozen program is none, though it takes itself for one: it would start itself."""
    python = os.environ.get(PYTHON_VARIABLE) or ("" if getattr(sys, "frozen", False) else sys.executable)
    if not python:
        raise _no_process("this program has no Python interpreter of its own")
    return python


def _folders(packages: Iterable[str]) -> list[str]:
    """Where this package and the others come from: not the whole of ``sys.path``, and never the working directory,
    which may be a stranger's checkpoint."""
    found = [Path(__file__).resolve().parents[2]]
    for name in packages:
        spec = PathFinder.find_spec(name, [folder for folder in sys.path if os.path.isabs(folder)])
        if spec is None or spec.origin is None:
            raise _no_process(f"{name} is not installed")
        found.append(Path(spec.origin).parents[1])
    return list(dict.fromkeys(map(str, found)))


def _no_process(reason: str) -> ResourceError:
    return ResourceError(
        f"chat templates and tokenizers are opened in a process of their own, which did not start ({reason}); "
        f"set {PYTHON_VARIABLE} to the Python that lfm2-export is installed in"
    )


def _cause(code: int | None, late: bool, limits: Limits) -> str:
    if late or code == -getattr(signal, "SIGPROF", 0):
        return f"takes more than {limits.seconds:g} s"
    if code is not None and code < 0:
        return f"ended its process (signal {-code}: it crashed or needs more than {limits.memory >> 20} MB of memory)"
    return f"ended its process (exit code {code})"


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """Of a child that has closed its pipes and so is about to end; None where it does not."""
    try:
        return process.wait(_DYING_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdout, process.stdin


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in _pipes(process):
        pipe.close()
