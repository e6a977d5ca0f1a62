"""The operator library that a platform wheel carries, so that no compiler is needed.

In: this package's folder. Out: a path in it. Nothing is written; the pure wheel and a checkout have no such folder.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from lfm2_export.kernels import sources

FOLDER = "shipped"


def folder_name(system: str, machine: str, digest: str) -> str:
    """Of a library for ``sys.platform`` and ``platform.machine()``, compiled from the sources of this digest."""
    return f"{system}-{machine}-{digest[:20]}"


def library(file_name: str) -> Path | None:
    """The shipped file of that name, if it is for this machine and from the very sources that lie here."""
    base = sources.SOURCES / FOLDER
    if not base.is_dir():
        return None
    path = base / folder_name(sys.platform, platform.machine(), sources.digest()) / file_name
    return path if path.is_file() else None
