"""A chat in a terminal of its own: keys in, what is drawn out."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# A cursor that goes right leaves a blank, most often.
_RIGHT = re.compile(r"\x08*\x1b\[(\d*)C")
_CSI = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[=>]|\].*?\x07|\([AB0])")


class Terminal:
    """``lfm2-export chat`` with a scripted model. Use as a context manager."""

    def __init__(self, script: dict[str, Any], *arguments: str, home: Path, rows: int = 40, columns: int = 100):
        self._command = [sys.executable, "-m", "tests.terminal.scripted", json.dumps(script), *arguments]
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm-256color",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "XDG_STATE_HOME": str(home),
        }
        self._size = struct.pack("HHHH", rows, columns, 0, 0)
        self._written = b""
        self._at = 0

    def __enter__(self) -> Terminal:
        self._child, self._descriptor = pty.fork()
        if self._child == 0:
            os.chdir(ROOT)
            fcntl.ioctl(0, termios.TIOCSWINSZ, self._size)
            os.execvpe(self._command[0], self._command, self._environment)
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._child, 0)
        os.close(self._descriptor)

    def type(self, keys: str, seconds: float = 30) -> None:
        """Reads on while it writes: each side's buffer may be full, and then both would wait."""
        data, end = keys.encode(), time.monotonic() + seconds
        while data:
            assert time.monotonic() < end, f"nobody reads {data[:40]!r}"
            if select.select([], [self._descriptor], [], 0.05)[1]:
                data = data[os.write(self._descriptor, data[:256]) :]
            self._read(0)

    def wait(self, text: str, seconds: float = 30) -> str:
        """What was drawn since the last wait, up to ``text``, without what moves the cursor or colours."""
        end = time.monotonic() + seconds
        while True:
            drawn = self._drawn()
            if text in drawn[self._at :]:
                start, self._at = self._at, drawn.index(text, self._at) + len(text)
                return drawn[start : self._at]
            assert time.monotonic() < end, f"{text!r} did not come:\n{drawn[self._at :]!r}"
            assert self._read(0.2), f"{text!r} did not come before the end:\n{drawn[self._at :]!r}"

    def ended(self, seconds: float = 30) -> int:
        """The exit code."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._read(0.1)
            child, status = os.waitpid(self._child, os.WNOHANG)
            if child:
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"it has not ended:\n{self._drawn()[self._at :]!r}")

    def drawn(self) -> bytes:
        """Everything so far, as it came."""
        return self._written

    def _drawn(self) -> str:
        text = _RIGHT.sub(lambda found: " " * int(found[1] or 1), self._written.decode("utf-8", "ignore"))
        return _CSI.sub("", text)

    def _read(self, seconds: float) -> bool:
        """Whether there may be more."""
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # Linux's word for a terminal that nobody has open any more
            return False
        self._written += data
        return bool(data)
