"""Commands in processes of their own, at the price of a fork: for tests that kill them, or make them fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.inject import Fault

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a process ended: by its code, or minus the signal. ``count``: how often the fault's turn could have come."""

    code: int
    out: str
    err: str
    count: int

    @property
    def line(self) -> str:
        """The last one on stderr."""
        return (self.err.splitlines() or [""])[-1]


class Forks:
    """Starts its server at the first request. Each request comes after the one before it is done."""

    def __init__(self, notes: Path):
        self._notes = notes
        self._server: subprocess.Popen[str] | None = None

    def command(
        self,
        *arguments: str | Path,
        root: Path | None = None,
        fault: Fault | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> Done:
        """``lfm2-export ARGUMENTS``, with a fault that strikes below ``root``."""
        return self._ask("", list(map(str, arguments)), root, fault, environment or {})

    def code(self, code: str, *arguments: str | Path, environment: Mapping[str, str | None] | None = None) -> Done:
        """``python -c CODE ARGUMENTS``."""
        return self._ask(code, list(map(str, arguments)), None, None, environment or {})

    def _ask(
        self,
        code: str,
        arguments: list[str],
        root: Path | None,
        fault: Fault | None,
        environment: Mapping[str, str | None],
    ) -> Done:
        server = self._started()
        assert server.stdin is not None
        for name in ("out", "err", "count"):
            (self._notes / name).unlink(missing_ok=True)
        request = {
            "code": code,
            "arguments": arguments,
            "root": str(root),
            "fault": None if fault is None else asdict(fault),
            "environment": dict(environment),
            "notes": str(self._notes),
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code_of_it = int(self._answer(server))
        texts = {name: (self._notes / name).read_text(errors="replace") for name in ("out", "err")}
        count = self._notes / "count"
        return Done(code=code_of_it, count=int(count.read_text()) if count.exists() else -1, **texts)

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.server", str(self._notes / "cache")],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self._answer(self._server) == "ready"
        return self._server

    def _answer(self, server: subprocess.Popen[str]) -> str:
        assert server.stdout is not None
        answer = server.stdout.readline().strip()
        assert answer, "the server has ended"
        return answer

    def close(self) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait(timeout=30)
