"""What a reader of a stranger's file may do: return, or refuse in one line. Anything else is a finding.

In: a reader and its arguments. Out: what it returned, None where it refused as it should, or an exception: ``Finding``
for a refusal of the wrong form or an act that no reader may do, and whatever else the reader let through.
"""

from __future__ import annotations

import contextlib
import io
import traceback
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

from lfm2_export.errors import Lfm2ExportError
from lfm2_export.messages import MESSAGE_LIMIT
from tests.fuzz import guard
from tests.fuzz.guard import Finding

P = ParamSpec("P")
T = TypeVar("T")

# Done, a wrong input, a machine that cannot; 1 is for checks that fell short, which no fuzz target makes.
_EXIT_CODES = (0, 2, 3)
# What the command line writes before a message.
_PREFIX = "lfm2-export: "


def attempt(reader: Callable[P, T], *args: P.args, **options: P.kwargs) -> T | None:
    """Calls a reader under watch.

    Raises:
        Finding: its refusal is no printable line of at most ``MESSAGE_LIMIT`` characters, or it printed, wrote,
            connected or ran something.
        BaseException: what it raised beside ``Lfm2ExportError``; numpy's warnings (overflow, division) are raised too.
    """
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            return _watched(reader, *args, **options)
    except Lfm2ExportError as error:
        _check_line(str(error), MESSAGE_LIMIT, error)
        return None
    finally:
        if printed := out.getvalue():
            raise Finding(f"printed {printed[:100]!r}")


def attempt_command(*arguments: str) -> None:
    """Runs ``lfm2-export`` in this process, with what it prints kept.

    Raises:
        Finding: an exit code that it does not have, or more than one line on stderr.
        BaseException: as ``attempt``.
    """
    from lfm2_export import cli  # most targets do without

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _watched(cli.main, arguments)
    if code not in _EXIT_CODES:
        raise Finding(f"{arguments[0]} ended with {code!r}")
    if code:
        _check_line(err.getvalue().removesuffix("\n"), len(_PREFIX) + MESSAGE_LIMIT, None)


def _watched(reader: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    with guard.watching(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return reader(*args, **options)


def _check_line(message: str, limit: int, error: Exception | None) -> None:
    if not message or len(message) > limit or not message.isprintable():
        raise Finding(f"a message of {len(message)} characters: {message[:100]!r}") from error


def signature(error: BaseException) -> str:
    """Where and how something went wrong, the same for inputs that meet the same fault: the innermost line of the
    package on the way, and the exception's type."""
    while isinstance(error, Finding) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__} {_innermost(error.__traceback__)}"


def _innermost(trace: TracebackType | None) -> str:
    frames = [frame for frame in traceback.extract_tb(trace) if "/lfm2_export/" in frame.filename.replace("\\", "/")]
    if not frames:
        return "in the harness"
    return f"{frames[-1].filename.replace(chr(92), '/').rpartition('/lfm2_export/')[2]}:{frames[-1].name}"
