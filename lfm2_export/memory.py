"""Memory as the system limits and reports it: the address space that is left, and errors that mean there is no more.

Light: the command line asks before it imports what may not fit. What a piece of work needs is in ``resources.py``.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import PurePath

_STATM = PurePath("/proc/self/statm")
# How libraries whose exceptions are all one say it: C++'s std::bad_alloc, torch's and onnxruntime's allocators,
# ExecuTorch's error code, the loader of shared libraries, Python's threads.
_SAID = re.compile(
    r"bad[_ ]alloc|(can't|cannot|could not|failed to|unable to) allocate(?! memory in static TLS)|out of memory"
    r"|MemoryAllocationFailed|error: 0x:?21\b|failed to map segment from shared object(?!: Operation not permitted)"
    r"|can't start new thread|pthread_create failed",
    re.IGNORECASE,
)
_CHAIN = 8


def ran_out(error: BaseException) -> bool:
    """Whether ``error``, or what it came of, says that there was no memory left."""
    return any(_says_so(one) for one in _chain(error))


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | ImportError | OSError | SystemError) and bool(_SAID.search(str(error)))


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    for _ in range(_CHAIN):
        if found is None:
            return
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def address_space_left() -> int | None:
    """Bytes that this process may still map where a limit is set (``ulimit -v``, many batch systems), else None."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    return max(0, limit - _of_statm(0))


def resident() -> int | None:
    """Bytes of this process that are in memory; None where the system does not say (outside Linux)."""
    return _of_statm(1) or None


def _of_statm(field: int) -> int:
    """Bytes; 0 where they cannot be known."""
    try:
        with open(_STATM, encoding="ascii") as file:
            return int(file.read().split()[field]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
