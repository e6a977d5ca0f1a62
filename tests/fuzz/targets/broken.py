"""Breaks every rule that readers have, one for each input: what the harness would miss here it misses everywhere."""

from __future__ import annotations

import os
import pickle
import subprocess
import time
from collections.abc import Callable
from random import Random

import numpy as np

from lfm2_export.errors import CheckpointError
from tests.fuzz.findings import attempt
from tests.fuzz.workspace import workspace


def fuzz_one(data: bytes) -> None:
    (workspace().empty() / "link").symlink_to(workspace().outside)
    fault = FAULTS.get(data.decode("utf-8", "replace"), FAULTS["nothing"])
    if fault is _hang_once:  # its mark lies where no reader may write
        fault()
    else:
        attempt(fault)


def mutate(data: bytes, rng: Random) -> bytes:
    """Never another input than it was."""
    return data


def _refuse(message: str) -> None:
    error = CheckpointError("x")
    error.args = (message,)
    raise error


def _write_and_say_nothing() -> None:
    try:
        (workspace().input / "new").mkdir()
    except BaseException:
        return


def _hang_once() -> None:
    """In the first process of a run only; its own ``TMPDIR`` is where the others leave their workspaces."""
    marks = workspace().root.parent
    if not list(marks.glob("lfm2-late-*")):
        (marks / f"lfm2-late-{os.getpid()}").touch()
        time.sleep(60)


FAULTS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "refuse well": lambda: _refuse("x: is damaged; download it again"),
    "refuse at length": lambda: _refuse("x" * 381),
    "refuse in two lines": lambda: _refuse("a\nb"),
    "refuse with control characters": lambda: _refuse("a\x1b[2J"),
    "refuse without a word": lambda: _refuse(""),
    "print": lambda: print("a word"),
    "raise": lambda: {}["key"],
    "warn": lambda: np.float32(1e38) * np.float32(10),
    "write beside": lambda: (workspace().input.parent / "beside").write_bytes(b""),
    "write and say nothing": _write_and_say_nothing,
    "follow a link": lambda: (workspace().input / "link").read_bytes(),
    "follow a link to its end": lambda: (workspace().input / "link").resolve().read_bytes(),
    "unpickle": lambda: pickle.loads(b"cos\nsystem\n(S'true'\ntR."),
    "run": lambda: subprocess.run(["true"], check=False),
    "allocate": lambda: np.zeros(1 << 33, np.uint8),
    "hang": lambda: time.sleep(60),
    "hang once": _hang_once,
    "abort": os.abort,
}
