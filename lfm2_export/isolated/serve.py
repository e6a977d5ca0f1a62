"""The child's side of ``process``: reads requests, sets the limits of each, answers.

In: requests on standard input. Out: answers on standard output and nothing else: what the program prints goes nowhere.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import IO

from lfm2_export.isolated.wire import ANSWER, GREETING, OUT_OF_MEMORY, REFUSAL, REPLY, REQUEST, Refusal, read, write

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def serve(answer: Callable[[bytes], bytes]) -> None:
    """Answers until the parent has gone. ``answer`` raises Refusal where a request is wrong."""
    source, sink = _pipes()
    _prepare()
    write(sink, GREETING)
    while header := _next(source):
        memory, size = header
        kind, reply = _answered(answer, source, size)
        _stop_the_clock()
        # What a request has left behind would count against the next one.
        leaves = kind == OUT_OF_MEMORY or _address_space() > memory // 2
        write(sink, REPLY.pack(kind, leaves, len(reply)), reply)
        if leaves:
            return


def _next(source: IO[bytes]) -> tuple[int, int] | None:
    """The next request's limit of memory and its size; from here on the limits hold. None at the parent's end."""
    try:
        seconds, memory, size = REQUEST.unpack(read(source, REQUEST.size))
    except (EOFError, OSError):
        return None
    _limit(seconds, memory)
    return memory, size


def _answered(answer: Callable[[bytes], bytes], source: IO[bytes], size: int) -> tuple[bytes, bytes]:
    try:
        return ANSWER, answer(read(source, size))
    except Refusal as error:
        return REFUSAL, str(error).encode("utf-8", "backslashreplace")
    except MemoryError:
        return OUT_OF_MEMORY, b""


def _pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output as only this module has them."""
    source, sink = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    return os.fdopen(source, "rb", buffering=0), os.fdopen(sink, "wb", buffering=0)


def _prepare() -> None:
    """Signals as in a new session, whatever the parent made of its own; no core files of crashes."""
    if resource is not None:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit(seconds: float, memory: int) -> None:
    """The system ends this process after ``seconds`` of processor time; memory beyond the limit is not to be had."""
    if resource is None:
        return
    signal.setitimer(signal.ITIMER_PROF, seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    with contextlib.suppress(OSError, ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _stop_the_clock() -> None:
    if resource is not None:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _address_space() -> int:
    """Bytes that this process has now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
