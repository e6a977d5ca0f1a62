"""A .pte export that was killed goes on where it was, and what comes out is byte for byte what one in one go gives."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("executorch")

import lfm2_export
from lfm2_export.backends.weights.pieces import Piece
from lfm2_export.backends.weights.stream import WeightStream
from lfm2_export.progress import Progress
from tests.artifacts import snapshot
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.faults.forks import Forks

# One layer: four programs are put together here.
RAW_CONFIG = tiny_config("lfm2_moe", num_hidden_layers=1, layer_types=["full_attention"], num_dense_layers=0)
OPTIONS: dict[str, Any] = {"backend": "executorch", "scheme": "8da4w", "moe_op": "both", "max_context": 64}

# argv: checkpoint, output, how many pieces are written before the process dies. The programs themselves, which would
# be made again anyway, are left out (``tests/faults/ready.py``).
CHILD = f"""
import os, signal, sys, threading, time
from pathlib import Path
import lfm2_export
from lfm2_export import ledger
from lfm2_export.backends.weights.stream import WeightStream

checkpoint, output, pieces = sys.argv[1:]
ledger.SYNC_SECONDS = 0.01
left, lock = int(pieces), threading.Lock()

def lines():
    return sum(path.read_bytes().count(b"\\n") - 1 for path in Path(output).parent.rglob("*.ledger"))

def write_piece(self, piece, files, real=WeightStream.write_piece):
    global left
    with lock:
        left -= 1
        mine = left
    if mine == -1:
        while lines() < expected:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)
    if mine < -1:
        time.sleep(600)
    return real(self, piece, files)

expected = lines() + left
WeightStream.write_piece = write_piece
lfm2_export.export(checkpoint, output=output, **{OPTIONS!r})
"""


def kill_after(pieces: int, checkpoint: Path, out: Path, forks: Forks) -> None:
    done = forks.code(CHILD, checkpoint, out, str(pieces))
    assert done.code == -signal.SIGKILL, done.err
    assert not out.exists()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every piece that is read and quantized."""
    names, real = [], WeightStream.write_piece

    def write_piece(self: WeightStream, piece: Piece, files: Sequence[int]) -> Any:
        names.append(piece.weight.name)
        return real(self, piece, files)

    monkeypatch.setattr(WeightStream, "write_piece", write_piece)
    return names


def test_a_killed_export_goes_on_with_either_way_to_run_experts(
    tmp_path: Path, written: list[str], forks: Forks
) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", RAW_CONFIG, seed=0, dtype="F32")
    lfm2_export.export(checkpoint, output=tmp_path / "whole", **OPTIONS)
    in_all = len(written)
    out = tmp_path / "parent" / "out"
    # In the middle of the first program's weights, then in the middle of the second's.
    stops = (in_all // 4, in_all // 2)
    for pieces in stops:
        kill_after(pieces, checkpoint, out, forks)
    written.clear()
    seen: list[tuple[int, int]] = []
    advanced: list[int] = []
    progress = Progress(
        continued=lambda done, total: seen.append((done, total)),
        start=lambda label, total: advanced.clear(),  # the second program's weights begin where the first's ended
        advance=advanced.append,
    )
    lfm2_export.export(checkpoint, output=out, progress=progress, **OPTIONS)
    ((done, total),) = seen
    print(f"{in_all} pieces, {len(written)} in the last attempt, {done} of {total} bytes done before")
    assert len(written) == in_all - sum(stops)
    assert total == sum(advanced) == lfm2_export.checkpoint.open_checkpoint(checkpoint).total_bytes
    assert total // 2 < done < total
    expected, found = snapshot(tmp_path / "whole"), snapshot(out)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    assert os.listdir(out.parent) == ["out"], "nothing is left beside it"


def test_other_settings_start_anew_and_leave_nothing(
    tmp_path: Path, written: list[str], forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done belongs to the command that did it."""
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", RAW_CONFIG, seed=0, dtype="F32")
    out = tmp_path / "parent" / "out"
    kill_after(20, checkpoint, out, forks)

    def make_pte(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lfm2_export.backends.executorch.trace.make_pte", make_pte)
    seen: list[int] = []
    progress = Progress(continued=lambda done, total: seen.append(done))
    with pytest.raises(KeyboardInterrupt):
        lfm2_export.export(checkpoint, output=out, progress=progress, **{**OPTIONS, "embedding_bits": 4})
    assert seen == []
    assert len(written) == len(set(written)) > 20, "every weight of the first program, from the beginning"
    assert os.listdir(out.parent) == []
