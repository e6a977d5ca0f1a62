"""What was typed, kept between sessions in this user's state folder, for this user alone.

In: lines. Out: a file of JSON strings, one a line. Where it cannot be read or written, the chat goes on without it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from lfm2_export import console, files, own_files, paths
from lfm2_export.errors import GenerationError, Lfm2ExportError

# Older lines go when a session starts.
_LIMIT, _KEPT = 1 << 20, 1 << 19
_MOST_BYTES = 64 << 20


def default_path() -> Path:
    """By the XDG base directory specification."""
    stated = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(stated) if os.path.isabs(stated) else Path.home() / ".local" / "state"
    return folder / "lfm2-export" / "chat_history"


class TypedHistory:
    """``path`` None: nothing is kept."""

    def __init__(self, path: Path | None):
        self._path = path

    def read(self) -> list[str]:
        """The oldest first."""
        if self._path is None or not paths.exists(self._path, GenerationError):
            return []
        try:
            data = files.read_bytes(self._path, self._path.parent, GenerationError, limit=_MOST_BYTES)
            if len(data) > _LIMIT:
                data = data[-_KEPT:].partition(b"\n")[2]
                own_files.write(self._path, [data], GenerationError)
        except Lfm2ExportError as error:
            self._give_up(str(error))
            return []
        return [line for line in map(_parsed, data.splitlines()) if line]

    def add(self, text: str) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            with open(os.open(self._path, flags, 0o600), "ab") as file:
                if hasattr(os, "fchmod"):
                    os.fchmod(file.fileno(), 0o600)
                file.write(json.dumps(text).encode() + b"\n")
        except OSError as error:
            self._give_up(f"{paths.shown(self._path)}: cannot be written ({error.strerror})")

    def _give_up(self, reason: str) -> None:
        console.note(f"{reason}; what is typed is not kept (--no-history)")
        self._path = None


def _parsed(line: bytes) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    return value if isinstance(value, str) else ""
