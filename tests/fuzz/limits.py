"""How much memory a reader may take, set for the processes that readers are tried in."""

from __future__ import annotations

import resource
import sys
import warnings

from tests.fuzz.targets import Target, kept, load

# Beyond what the process has taken once its modules are loaded and a first input was read.
MEMORY = 1 << 30


def warmed_up(name: str) -> Target:
    """A target whose imports are done, in a process that can take no more than ``MEMORY`` from now on: what wants more
    gets a ``MemoryError``, which is a finding."""
    sys.dont_write_bytecode = True
    target = load(name)
    for path in kept(name)[:1]:
        try:
            target.fuzz_one(path.read_bytes())
        except BaseException as error:  # the run itself says so again
            warnings.warn(f"{path}: {error!r}", stacklevel=1)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MEMORY, hard))
    return target


def _data_bytes() -> int:
    """Private writable memory of this process, which is what the limit counts."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024
