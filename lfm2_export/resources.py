"""What a piece of work will need of the machine, compared with what is there before the work starts.

In: bytes needed. Out: nothing, or a ResourceError that states both figures. Where the system does not say how much
there is (or the figure cannot be trusted), the work is allowed to try.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lfm2_export.errors import ResourceError
from lfm2_export.memory import address_space_left

logger = logging.getLogger(__name__)

# Graphs, tokenizer and manifest beside the weights, and the alignment of the weights: measured well below this.
_DISK_EXTRA = 64 << 20
_DISK_SHARE = 0.01

# torch, the traced graph and its fake weights; measured 0.45 GB for 24 layers of the 8B.
_EXPORT_BASE = 512 << 20
# A tensor on its way: fp32 values, a working copy, codes, scales and rounding's own temporaries.
_EXPORT_BYTES_PER_VALUE = 16
_MORE_MEMORY = "close other programs, raise the container's limit, or use a larger machine"
# No machine has it: it was computed from a number that somebody made up, and may be beyond a float.
_BEYOND = 10**18

_most_cores: int | None = None


def disk_needed(program_bytes: Iterable[int]) -> int:
    """Bytes of disk for programs whose data files have these sizes."""
    return int(sum(program_bytes) * (1 + _DISK_SHARE)) + _DISK_EXTRA


def export_memory_needed(largest_piece: int, *, at_once: int = 1) -> int:
    """Bytes of memory for an export that works on ``at_once`` pieces of tensors of at most ``largest_piece`` values."""
    return _EXPORT_BASE + _EXPORT_BYTES_PER_VALUE * largest_piece * at_once


def usable_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """The cores that this process may run on: in a container often fewer than the machine has, and no more than
    ``at_most_cores`` allows.

    Linux says which hardware threads share a core; they would only compete for its memory and vector units.
    """
    there = _cores(topology)
    return there if _most_cores is None else min(there, _most_cores)


@contextmanager
def at_most_cores(count: int) -> Iterator[None]:
    """Within it this process works in at most so many threads, where several share a machine; estimates of memory
    count with them. For a whole process: two threads with different bounds would have each other's."""
    global _most_cores
    before, _most_cores = _most_cores, count
    try:
        yield
    finally:
        _most_cores = before


def _cores(topology: Path) -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = affinity(0) if affinity else range(os.cpu_count() or 1)
    siblings = [topology / f"cpu{cpu}" / "topology" / "thread_siblings_list" for cpu in cpus]
    if not all(path.is_file() for path in siblings):
        return len(cpus)
    return len({path.read_text() for path in siblings})


def processor_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """As the processor names itself to Linux on x86; elsewhere what Python knows, at least its architecture."""
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def check_disk(folder: str | Path, needed: int, *, purpose: str = "the artifact") -> None:
    """Refuses work that the disk under ``folder`` (which need not exist yet) has no room for.

    Raises:
        ResourceError: states what is needed and what is free.
    """
    free = free_disk(Path(folder))
    if free is not None and free < needed:
        raise ResourceError(
            f"{folder}: {purpose} needs {human_bytes(needed)} of disk, {human_bytes(free)} are free; "
            "free space or give another --output"
        )


def is_disk_full(error: OSError) -> bool:
    """Whether there is no room, by the disk's size, a quota or a limit on a file's size."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_memory(needed: int, *, purpose: str = "the export", remedy: str = _MORE_MEMORY) -> None:
    """Refuses work that the memory has no room for.

    Raises:
        ResourceError: states what is needed and what is available.
    """
    available = available_memory()
    if available is not None and available < needed:
        raise ResourceError(
            f"{purpose} needs {human_bytes(needed)} of memory, {human_bytes(available)} are available; {remedy}"
        )


def free_disk(folder: Path) -> int | None:
    """Bytes that this user can still write below ``folder`` or the nearest of its parents that exists."""
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), None)
    if existing is None:
        return None
    try:
        return shutil.disk_usage(existing).free
    except OSError as error:
        logger.debug("free space of %s is unknown: %s", existing, error)
        return None


def available_memory() -> int | None:
    """Bytes that this process may still use without swapping others out: the machine's, its control group's, or what
    its own limit leaves."""
    known = [value for value in (_system_memory(), *_cgroup_memory(), address_space_left()) if value is not None]
    return min(known, default=None)


def human_bytes(count: int) -> str:
    """A size as a person reads it: 1.5 GB."""
    if count >= _BEYOND:
        return "more than 1,000,000 TB"
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _system_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """MemAvailable plus free swap on Linux; the physical memory elsewhere, which at least refuses the impossible."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        return sum(int(fields[key].split()[0]) * 1024 for key in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError, IndexError):
        return _physical_memory()


def _physical_memory() -> int | None:
    if sys.platform == "win32":
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _cgroup_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What each limit above this process leaves (control groups v2, and v1's own group), page cache not counted."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            yield from _limits(root, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            yield from _limits(root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _limits(root: Path, path: str, limit: str, usage: str, prefix: str) -> Iterator[int]:
    group = root / path.strip("/")
    for folder in (group, *group.parents):
        if folder.is_relative_to(root) and (left := _left(folder, limit, usage, prefix)) is not None:
            yield left


def _left(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = sum(int(stat.get(f"{prefix}{key}", 0)) for key in ("inactive_file", "active_file"))
        used = int((folder / usage).read_text()) - cache
        return max(0, int((folder / limit).read_text()) - max(0, used))
    except (OSError, ValueError):  # no such group here, or the limit reads "max"
        return None
