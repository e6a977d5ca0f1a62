"""How much of the machine others used while something was timed: a busy machine is seen, not guessed at.

In: Linux's counters before and after. Out: cores' worth of CPU time that neither this process nor the timed one used,
what a hypervisor kept for itself included; 0 where the system does not tell.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
# Fields of /proc/stat's first line that are time spent: user, nice, system, irq, softirq, steal.
_BUSY = (1, 2, 3, 6, 7, 8)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Seconds of the clock; CPU seconds of the machine; CPU seconds of this process, and of its child ``pid``."""

    clock: float
    machine: float
    own: float
    child: float

    @classmethod
    def now(cls, pid: int) -> Moment:
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return cls(clock=time.perf_counter(), machine=_machine_seconds(), own=own, child=_seconds(pid))

    def foreign_cores(self, begin: Moment) -> float:
        """Since ``begin``; the child has ended by now, so that its time is in ``own``."""
        ours = self.own - begin.own + self.child - begin.child
        elapsed = self.clock - begin.clock
        return max(0.0, (self.machine - begin.machine - ours) / elapsed) if self.machine and elapsed else 0.0


def _machine_seconds() -> float:
    if not _STAT.is_file():
        return 0.0
    fields = _STAT.read_text().split("\n", 1)[0].split()
    return sum(int(fields[index]) for index in _BUSY) / os.sysconf("SC_CLK_TCK")


def _seconds(pid: int) -> float:
    """Of a process that runs; 0 of one that has ended."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")
