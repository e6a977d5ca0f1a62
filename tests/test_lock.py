"""The lock file: one holder at a time, whatever others left in its place."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2_export.errors import ArtifactError
from lfm2_export.folders import Folder
from lfm2_export.lock import Lock, held_lock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")

NAME = "the.lock"


def forked(work: Callable[[], None]) -> int:
    """The number of another process that does it."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return process


def test_many_processes_hold_it_one_at_a_time(tmp_path: Path) -> None:
    """Some die with it, some find what those left; a count that none of them guards otherwise tells."""
    counter = tmp_path / "count"
    counter.write_text("0")
    rounds, processes = 40, 6

    def work() -> None:
        with Folder.open(tmp_path) as folder:
            done = 0
            while done < rounds:
                lock = Lock(folder, NAME)
                if not lock.acquire():
                    continue
                before = int(counter.read_text())
                counter.write_text(str(before + 1))
                done += 1
                if done == rounds:
                    os.kill(os.getpid(), signal.SIGKILL)  # the file stays
                lock.release()

    for process in [forked(work) for _ in range(processes)]:
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert (tmp_path / NAME).exists()
    assert int(counter.read_text()) == rounds * processes
    with Folder.open(tmp_path) as folder, held_lock(folder, NAME, tmp_path) as lock:
        assert lock.owner == (tmp_path / NAME).stat().st_uid
        assert not Lock(folder, NAME).acquire(), "nor twice in one process"
    assert not (tmp_path / NAME).exists()


def test_it_is_neither_made_nor_opened_through_anything_else(tmp_path: Path) -> None:
    path = tmp_path / NAME
    kinds: dict[str, Callable[[], object]] = {
        "a link": lambda: path.symlink_to(tmp_path / "made"),
        "a special file": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
    }
    with Folder.open(tmp_path) as folder:
        for kind, make in kinds.items():
            make()
            with (
                pytest.raises(ArtifactError, match=f"{NAME}: is {kind} where an export keeps its lock; delete it"),
                held_lock(folder, NAME, tmp_path),
            ):
                pytest.fail("held")
            assert os.listdir(tmp_path) == [NAME]
            if kind == "a folder":
                path.rmdir()
            else:
                path.unlink()
