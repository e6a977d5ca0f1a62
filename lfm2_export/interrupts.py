"""Signals that end the work: what is under way cleans up, and nothing that catches too much can lose one.

In: SIGINT, SIGTERM, SIGHUP. Out: an exception in the main thread, kept until it has arrived. Python runs a signal's
handler between any two instructions, so also in a destructor, in the callback of a weak reference or below a bare
``except:``; torch and executorch have all three, and what is raised there is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# A terminal's Ctrl-C reaches a whole group of processes, and some that start others pass it on once more.
_SAME_PRESS_S = 1.0

Handler = Callable[[int, FrameType | None], Any]

_raised: list[BaseException] = []
_lasting = False
_last = float("-inf")
_waiting: list[tuple[Handler, int]] | None = None
_earned: int | None = None


class Interrupted(KeyboardInterrupt):
    """SIGINT arrived. Python takes note of a plain KeyboardInterrupt that leaves an ``exec`` (every dataclass is made
    by one), and in the end kills a process of ``python -m`` by that signal, whatever became of the exception."""


class Terminated(SystemExit):
    """SIGTERM or SIGHUP arrived; ``code`` is what a shell makes of it, 128 and the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


def exit_code(error: BaseException) -> int:
    """What a process that was stopped by ``error`` exits with."""
    return 128 + _number(error)


def cause(error: BaseException) -> str:
    """The signal's name."""
    return signal.Signals(_number(error)).name


def _number(error: BaseException) -> int:
    return error.number if isinstance(error, Terminated) else int(signal.SIGINT)


@contextlib.contextmanager
def raising(*, for_good: bool = False) -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise as SIGINT does, and what is raised lasts. A signal that is ignored when this
    begins (``nohup``, a shell's background job) stays ignored. Outside of the main thread nothing is changed.

    ``for_good``: the handlers stay when it ends."""
    if not _in_main_thread():
        yield
        return
    forget()
    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _raise)
    try:
        with lasting():
            yield
    finally:
        for number, handler in before.items():
            if not for_good:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _raise(number: int, frame: FrameType | None) -> None:
    global _last
    if _earned is not None:
        os._exit(_earned)
    before, _last = _last, time.monotonic()
    if _last - before > _SAME_PRESS_S:
        raise Interrupted if number == signal.SIGINT else Terminated(number)


def leave_with(code: int) -> None:
    """For a process that is done: a signal that comes while it waits for its threads ends it at once, with the code
    that it has earned, and one that comes later changes nothing. Python would print a traceback, and later, while
    libraries are taken down, has its handlers removed."""
    global _earned
    _earned = code
    atexit.register(_ignore)


def _ignore() -> None:
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)


class lasting:
    """A context in which what a signal's handler raises is not lost: ``check`` raises it again, and so does the end,
    also in place of another error that came of it. Whose handlers they are does not matter. Blocks may be nested."""

    def __enter__(self) -> None:
        global _lasting
        self._outermost = _in_main_thread() and not _lasting
        if not self._outermost:
            return
        _lasting = True
        self._before: dict[int, Handler] = {}
        for number in _ENDING:
            if callable(handler := signal.getsignal(number)):
                self._before[number] = handler
                signal.signal(number, _remembering(handler))
        self._hook, sys.unraisablehook = sys.unraisablehook, _ignoring_raised(sys.unraisablehook)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._outermost:
            return
        global _lasting
        for number, handler in self._before.items():
            signal.signal(number, handler)
        _lasting, sys.unraisablehook = False, self._hook
        lost = next(iter(_raised), None)
        arrived = any(error is one for one in _raised)
        _raised.clear()
        if lost is not None and not arrived:
            raise lost from error


def _remembering(handler: Handler) -> Handler:
    def remember(number: int, frame: FrameType | None) -> None:
        if _waiting is not None:
            _waiting.append((remember, number))
            return
        try:
            handler(number, frame)
        except BaseException as error:
            _raised.append(error)
            raise

    return remember


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within it, where ``lasting`` is, a signal waits: for a few steps that leave something behind if only some of them
    are taken."""
    global _waiting
    if not _lasting or not _in_main_thread() or _waiting is not None:
        yield
        return
    _waiting = []
    try:
        yield
    finally:
        arrived, _waiting = _waiting, None
        for handler, number in arrived:
            handler(number, None)


def _ignoring_raised(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What is raised in a destructor would be printed with its traceback; it is raised again instead."""

    def report(unraisable: Any) -> None:
        if not any(unraisable.exc_value is one for one in _raised):
            hook(unraisable)

    return report


def check() -> None:
    """Raises again what a signal has raised since ``lasting`` began; for between two steps of long work."""
    if _raised and _in_main_thread():
        _again(_raised[0])


def _again(error: BaseException) -> NoReturn:
    raise error


def forget() -> None:
    """For who has caught the exception on purpose and goes on."""
    global _last
    _raised.clear()
    _last = float("-inf")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
