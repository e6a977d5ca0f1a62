"""Which glibc a Linux library needs, as its own tables say.

In: a shared library, read by binutils' readelf. Out: a platform tag (PEP 600), or a line why there is none.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from lfm2_export.errors import Lfm2ExportError

# What glibc itself consists of, and libgcc_s, which every platform tag allows; all else might be missing somewhere.
_EVERYWHERE = re.compile(r"(libc|libm|libpthread|libdl|librt|libgcc_s|ld-linux-[\w-]+)\.so\.\d+")
# Of libgcc_s: the newest version of a symbol that the oldest tag promises.
_NEWEST_GCC = (4, 3)
# The oldest that a tag names, whatever less the library needs: none older has a Python that we run on.
_OLDEST = (2, 17)


class NotPortableError(Lfm2ExportError):
    """The library needs what a machine of the tag need not have."""


def manylinux_tag(library: Path, machine: str) -> str:
    """``manylinux_2_N_<machine>``, N the newest version of glibc among the symbols that the library needs.

    Raises:
        NotPortableError: it needs other libraries, or symbols of other versions than glibc's numbered ones.
    """
    foreign = [name for name in _needed(library) if not _EVERYWHERE.fullmatch(name)]
    if foreign:
        raise NotPortableError(f"{library}: needs {', '.join(foreign)}; link it statically")
    major, minor = max([_OLDEST, *_glibc_versions(library)])
    return f"manylinux_{major}_{minor}_{machine}"


def _needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _readelf("--dynamic", library))


def _glibc_versions(library: Path) -> Iterable[tuple[int, int]]:
    # A line of what is needed; those of what is defined are written otherwise.
    for name in re.findall(r"Name: (\S+)\s+Flags: .*Version: ", _readelf("--version-info", library)):
        found = re.fullmatch(r"(GLIBC|GCC)_(\d+)\.(\d+)(\.\d+)*", name)
        version = (0, 0) if found is None else (int(found[2]), int(found[3]))
        if found is None or (found[1] == "GCC" and version > _NEWEST_GCC):
            raise NotPortableError(f"{library}: needs a symbol of version {name}, which no platform tag promises")
        if found[1] == "GLIBC":
            yield version


def _readelf(what: str, library: Path) -> str:
    command = ["readelf", "--wide", what, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C"})
    if done.returncode or not done.stdout.strip():
        raise NotPortableError(f"{library}: readelf cannot read it: {done.stderr.strip()}")
    return done.stdout
