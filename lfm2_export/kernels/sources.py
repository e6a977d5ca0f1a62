"""The C++ sources beside this file, and a digest of them: what was compiled from others is not taken for ours.

In: the folder. Out: hex digits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SOURCES = Path(__file__).parent


def digest(folder: Path = SOURCES) -> str:
    """SHA-256 of names and contents: of ``CMakeLists.txt`` and of the files in ``src`` and ``runner``."""
    found = hashlib.sha256()
    for file in sorted([folder / "CMakeLists.txt", *(folder / "src").iterdir(), *(folder / "runner").iterdir()]):
        found.update(f"\n{file.relative_to(folder).as_posix()}\n".encode() + file.read_bytes())
    return found.hexdigest()
