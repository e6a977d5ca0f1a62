"""Standard streams as they come: closed, full, read by nobody, unable to spell a name. Printing ends in no traceback.

In: the streams that the process was started with. Out: streams that can be printed to, and errors that can be told
from others. Light: the command line needs this before it imports anything else.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable, Iterator

from lfm2_export.errors import ResourceError
from lfm2_export.messages import one_line, printable

_DETAIL_LIMIT = 2000
_NAMES = ("stdin", "stdout", "stderr")


class ReaderGone(Exception):
    """Nobody reads standard output any more, as after ``| head``: what would be printed need not be made."""


class OutputError(ResourceError):
    """Standard output cannot be written."""


@contextlib.contextmanager
def prepared(*, own: bool) -> Iterator[None]:
    """Within it all three streams are there, and what an encoding cannot spell is printed as an escape.

    ``own``: this process is ours alone, so its streams are left like that and closed descriptors are opened.
    """
    before = {name: getattr(sys, name) for name in _NAMES}
    printed = (before["stdout"], before["stderr"])
    errors = {stream: stream.errors for stream in printed if isinstance(stream, io.TextIOWrapper)}
    if own:
        _open_closed()
    for name in _NAMES:
        if getattr(sys, name) is None:
            _set_nowhere(name)
    for name in ("stdout", "stderr"):
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if not own:
            _restore(before, errors)


def _restore(before: dict[str, object], errors: dict[io.TextIOWrapper, str | None]) -> None:
    for name, stream in before.items():
        setattr(sys, name, stream)
    for wrapper, setting in errors.items():
        if not wrapper.closed:
            wrapper.reconfigure(errors=setting)


def _open_closed() -> None:
    """A closed descriptor would be given to the next file that is opened, which would then be printed into."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free


def _set_nowhere(name: str) -> None:
    setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115


def is_terminal() -> bool:
    """Whether results are printed where control characters act."""
    return sys.stdout.isatty()


def deliver(text: str) -> None:
    """Prints results.

    Raises:
        ReaderGone: nobody reads them any more.
        OutputError: they cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as error:
        _set_nowhere("stdout")
        raise ReaderGone from error
    except (OSError, ValueError) as error:  # ValueError: the file was closed
        # What could not be written would be tried again when the process ends.
        _set_nowhere("stdout")
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise OutputError(
            f"standard output: cannot be written ({reason}); free space, or send the output elsewhere"
        ) from error


def tell(text: str) -> None:
    """Prints what a person should know to standard error, where that is possible."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        _set_nowhere("stderr")


def error_line(text: str) -> None:
    """The one line that a failed command leaves."""
    tell(f"lfm2-export: {one_line(text)}\n")


def details(lines: Iterable[str]) -> None:
    """What an error's line has no room for, for who asked."""
    for line in lines:
        tell(f"{printable(line, _DETAIL_LIMIT)}\n")
