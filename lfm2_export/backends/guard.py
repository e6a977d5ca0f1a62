"""A runner in several threads: calls wait for each other, and a generation notices when another took it.

In: a runner's class. Out: the same class, whose calls wait for each other and count what changes its state. A runner
holds one state; two threads that each generate on it would mix their tokens without an error. ``generation`` compares
the count before each step and refuses to go on with a state that is no longer its own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound=type)

_CHANGING = (
    *("reset", "prefill", "prefill_scored", "verify", "accept", "decode", "restore", "rewind", "reorder"),
    *("join", "leave"),
)
_LOOKING = ("score", "snapshot", "mark", "is_valid", "copy_row")


class Guard:
    """Of one runner. ``uses`` counts the calls that may have changed its state; hold ``lock`` to look at it and act."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.uses = 0


def guarded(kind: Kind) -> Kind:
    """Makes the calls that a runner's class defines wait for each other."""
    for name in (*_CHANGING, *_LOOKING):
        if name in vars(kind):
            setattr(kind, name, _waiting(getattr(kind, name), changes=name in _CHANGING))
    return kind


def guard_of(runner: object) -> Guard:
    """The runner's guard, made when it is first asked for. A runner of another kind of class has one, too, but only
    those who ask for it keep to it."""
    guard = getattr(runner, _NAME, None)
    if guard is None:
        with _making:
            guard = getattr(runner, _NAME, None)
            if guard is None:
                guard = Guard()
                setattr(runner, _NAME, guard)
    return guard


_NAME = "_lfm2_export_guard"
_making = threading.Lock()


def _waiting(call: Callable[..., Any], *, changes: bool) -> Callable[..., Any]:
    @functools.wraps(call)
    def waiting(runner: object, *args: Any, **options: Any) -> Any:
        guard = guard_of(runner)
        with guard.lock:
            result = call(runner, *args, **options)
            guard.uses += changes  # a call that fails leaves the state as it was
            return result

    return waiting
