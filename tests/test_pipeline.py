"""Exports that were interrupted: the same command goes on where the last one was killed, another starts anew, and what
comes out is byte for byte what an export in one go gives."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lfm2_export
from lfm2_export import cli, ledger, pipeline, resources
from lfm2_export.artifact import Artifact
from lfm2_export.backends.onnx import weights
from lfm2_export.backends.weights import stream
from lfm2_export.backends.weights.pieces import Piece
from lfm2_export.backends.weights.stream import WeightStream
from lfm2_export.errors import ArtifactError, CheckpointError, Lfm2ExportError, ResourceError
from lfm2_export.manifest import MANIFEST
from lfm2_export.progress import Progress
from tests.artifacts import snapshot
from tests.checkpoints import write_random_checkpoint
from tests.faults.forks import Forks
from tests.faults.ready import RAW_CONFIG

ROOT = Path(__file__).parent.parent
SCHEMES = ("fp16", "q4")  # of the tests for which one is not enough
WORKSPACE = ".out.lfm2-export.partial"

# argv: checkpoint, output, how many pieces are written before the process dies or waits, schemes.
CHILD = """
import os, signal, sys, threading, time
from pathlib import Path
import lfm2_export
from lfm2_export import artifact_writer, folders, ledger
from lfm2_export.backends.weights.stream import WeightStream

checkpoint, output, pieces, schemes, end = sys.argv[1:]
ledger.SYNC_SECONDS = 0.01
left, lock = int(pieces), threading.Lock()

def lines():
    return sum(path.read_bytes().count(b"\\n") - 1 for path in Path(output).parent.rglob("*.ledger"))

def stop():
    expected = lines_before + int(pieces)
    while lines() < expected:
        time.sleep(0.005)
    print("ready", flush=True)
    if end == "wait":
        sys.stdin.read()
        os._exit(1)
    os.kill(os.getpid(), signal.SIGKILL)

def write_piece(self, piece, files, real=WeightStream.write_piece):
    global left
    with lock:
        left -= 1
        mine = left
    if mine == -1:
        stop()
    if mine < -1:  # another thread's piece: one of them stops the process
        time.sleep(600)
    return real(self, piece, files)

lines_before = lines()
WeightStream.write_piece = write_piece
if end == "commit":
    artifact_writer.ArtifactWriter.commit = lambda self: stop()
if end == "manifest":
    def move(self, name, target, new_name, real=folders.Folder.move):
        if target.path == Path(output) and name == "lfm2_export.json":
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, name, target, new_name)
    folders.Folder.move = move
lfm2_export.export(checkpoint, scheme=schemes.split(","), output=output)
"""


def start(checkpoint: Path, out: Path, pieces: int) -> subprocess.Popen[str]:
    """An export that waits once so many pieces are written."""
    command = [sys.executable, "-c", CHILD, str(checkpoint), str(out), str(pieces), "q4", "wait"]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


Kill = Callable[..., None]


@pytest.fixture(scope="session")
def kill_after(forks: Forks) -> Kill:
    """``kill_after(pieces, checkpoint, out)``: an export that is killed once so many pieces are written."""

    def killed(pieces: int, checkpoint: Path, out: Path, *, end: str = "kill", schemes: str = "q4") -> None:
        done = forks.code(CHILD, checkpoint, out, str(pieces), schemes, end)
        assert done.code == -signal.SIGKILL, done.err

    return killed


def lines_in(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") - 1 for path in folder.rglob("*.ledger"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("pipeline") / "checkpoint", RAW_CONFIG, seed=0, dtype="F32")


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """What an export (as q4) in one go gives, and of how many pieces."""
    with pytest.MonkeyPatch.context() as patched:
        written = count_pieces(patched)
        folder = tmp_path_factory.mktemp("pipeline") / "whole"
        lfm2_export.export(checkpoint, output=folder)
    return snapshot(folder), len(written)


DONE = 20  # of a program's pieces


@pytest.fixture(scope="module")
def killed_once(checkpoint: Path, kill_after: Kill, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    kill_after(DONE, checkpoint, folder / "out")
    return folder


@pytest.fixture
def out(killed_once: Path, tmp_path: Path) -> Path:
    """Where an export was killed after ``DONE`` pieces; alone in its parent."""
    shutil.copytree(killed_once, tmp_path / "parent")
    return tmp_path / "parent" / "out"


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "SYNC_SECONDS", 0.01)


def count_pieces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the name of every piece that is read and quantized."""
    written, real = [], WeightStream.write_piece

    def write_piece(self: WeightStream, piece: Piece, files: Sequence[int]) -> Any:
        written.append(piece.weight.name)
        return real(self, piece, files)

    monkeypatch.setattr(WeightStream, "write_piece", write_piece)
    return written


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_pieces(monkeypatch)


def refusal(kind: type[Lfm2ExportError], *args: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        lfm2_export.export(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    print(message)
    return message


def assert_same(out: Path, expected: dict[str, bytes]) -> None:
    found = snapshot(out)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    assert os.listdir(out.parent) == [out.name], "nothing is left beside it"


def test_an_export_of_two_programs_killed_again_and_again_reads_nothing_twice(
    checkpoint, tmp_path, written, kill_after
) -> None:
    lfm2_export.export(checkpoint, scheme=SCHEMES, output=tmp_path / "whole")
    expected, pieces = snapshot(tmp_path / "whole"), len(written)
    written.clear()
    out = tmp_path / "parent" / "out"
    for moment, so_far in ((0, 0), (1, 1), (pieces // 2 + 3, pieces // 2 + 4)):
        kill_after(moment, checkpoint, out, schemes=",".join(SCHEMES))
        assert lines_in(out.parent) == so_far
    seen: list[tuple[int, int]] = []
    lfm2_export.export(
        checkpoint,
        scheme=SCHEMES,
        output=out,
        progress=Progress(continued=lambda done, total: seen.append((done, total))),
    )
    print(f"{pieces} pieces, {len(written)} in the last attempt, {seen[0][0]} of {seen[0][1]} bytes done before")
    assert len(written) == pieces - so_far
    assert_same(out, expected)
    Artifact.open(out)


def test_an_export_killed_after_its_last_piece_reads_nothing(checkpoint, whole, tmp_path, written, kill_after) -> None:
    expected, pieces = whole
    out = tmp_path / "parent" / "out"
    kill_after(pieces, checkpoint, out, end="commit")
    # Of what was made beside the weights nothing is believed.
    files = out.parent / WORKSPACE / "files"
    (files / "config.json").write_text("{}")
    (files / "special_tokens_map.json").write_text("{}")
    (files / "onnx" / "model_q4.onnx").write_bytes(b"")
    lfm2_export.export(checkpoint, output=out)
    assert written == []
    assert_same(out, expected)


def test_an_export_killed_in_its_last_step_has_nothing_left_to_read(
    checkpoint, whole, tmp_path, written, kill_after
) -> None:
    """Into a folder that is there already files go one by one; all but the manifest went."""
    expected, pieces = whole
    out = tmp_path / "parent" / "out"
    out.mkdir(parents=True)
    kill_after(pieces + 1, checkpoint, out, end="manifest")
    assert sorted(snapshot(out)) == sorted(expected.keys() - {MANIFEST})
    with pytest.raises(ArtifactError, match=r"has no lfm2_export\.json; an export into the folder was interrupted"):
        Artifact.open(out)
    lfm2_export.export(checkpoint, output=out)
    assert written == []
    assert_same(out, expected)


def test_a_program_that_is_added_goes_on_too(checkpoint, tmp_path, written, kill_after) -> None:
    """The artifact is there already, and stays as it was while the new program waits."""
    out = tmp_path / "parent" / "out"
    lfm2_export.export(checkpoint, scheme="q8", output=out)
    before, in_one_program = snapshot(out), len(written)
    kill_after(DONE, checkpoint, out)
    assert snapshot(out) == before
    Artifact.open(out)
    written.clear()
    lfm2_export.export(checkpoint, output=out)
    assert len(written) == in_one_program - DONE
    assert len(Artifact.open(out).programs) == 2
    assert os.listdir(out.parent) == ["out"]


def test_the_command_says_what_is_done_and_the_bar_begins_there(
    checkpoint, out, whole, written, monkeypatch, capsys
) -> None:
    assert cli.main(["export", str(checkpoint), "-o", str(out)]) == 0
    said = capsys.readouterr().err
    print(said)
    total = lfm2_export.checkpoint.open_checkpoint(checkpoint).total_bytes
    line = next(line for line in said.splitlines() if "interrupted" in line)
    assert line.startswith("continuing an export that was interrupted: ")
    assert line.endswith(f" of {resources.human_bytes(total)} are done")
    assert len(written) == whole[1] - DONE
    assert_same(out, whole[0])


def test_progress_counts_what_is_skipped(checkpoint, out, written) -> None:
    events: list[tuple[int, int]] = []
    progress = Progress(
        advance=lambda nbytes: events.append((len(written), nbytes)),
        continued=lambda done, total: seen.append((done, total)),
    )
    seen: list[tuple[int, int]] = []
    lfm2_export.export(
        checkpoint,
        output=out,
        progress=progress,
    )
    ((done, total),) = seen
    assert sum(nbytes for before, nbytes in events if before == 0) == done
    assert sum(nbytes for _, nbytes in events) == total


def versions_of(**changed: str) -> Callable[[], dict[str, str]]:
    real = pipeline.recorded_versions()
    return lambda: {**real, **changed}


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "q8"},
        {"algorithm": "round"},
        {"group_size": 16},
        {"exclude": ["model.embed_tokens.weight"]},
    ],
    ids=["scheme", "algorithm", "group size", "exclude"],
)
def test_another_command_starts_anew(checkpoint, out, whole, written, options) -> None:
    seen: list[int] = []
    progress = Progress(continued=lambda done, total: seen.append(done))
    lfm2_export.export(checkpoint, output=out, progress=progress, **options)
    assert seen == []
    assert len(written) == whole[1]
    Artifact.open(out)
    assert os.listdir(out.parent) == ["out"]


def test_other_versions_or_pieces_start_anew(checkpoint, out, whole, written, monkeypatch, tmp_path) -> None:
    shutil.copytree(out.parent, tmp_path / "other")
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "recorded_versions", versions_of(numpy="0.0"))
        lfm2_export.export(checkpoint, output=out)
    assert len(written) == whole[1]
    written.clear()
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 30_000)
    lfm2_export.export(checkpoint, output=tmp_path / "other" / "out")
    assert len(written) == whole[1], "the plan is another"
    Artifact.open(tmp_path / "other" / "out")


def test_a_checkpoint_that_changed_starts_anew(tmp_path, written, kill_after) -> None:
    """Even where its file has the size and the time that it had."""
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", RAW_CONFIG, seed=1, dtype="F32")
    out = tmp_path / "parent" / "out"
    kill_after(DONE, checkpoint, out)
    shard = checkpoint / "model.safetensors"
    times = shard.stat()
    with open(shard, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(0.5).tobytes())
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    lfm2_export.export(checkpoint, output=out)
    pieces = len(written)
    lfm2_export.export(checkpoint, output=tmp_path / "whole")
    assert len(written) == 2 * pieces
    assert_same(out, snapshot(tmp_path / "whole"))


def test_weights_whose_hash_changed_are_refused_in_the_end(checkpoint, out, whole, written) -> None:
    """Where their file's size and times do not tell."""
    (note,) = [path.parent / "checkpoint.json" for path in (out.parent / WORKSPACE).glob("*/model_q4.onnx.ledger")]
    assert not note.exists() or json.loads(note.read_text()) != {}
    note.write_text(json.dumps({"model.safetensors": "0" * 64}))
    message = refusal(ArtifactError, checkpoint, output=out)
    assert message == (
        f"{out}: an export into it was interrupted, and the weights of checkpoint changed since without their files' "
        "times; give the command again to start anew"
    )
    assert os.listdir(out.parent) == []
    written.clear()
    lfm2_export.export(checkpoint, output=out)
    assert len(written) == whole[1]
    assert_same(out, whole[0])


def ledger_of(out: Path) -> Path:
    (path,) = (out.parent / WORKSPACE).rglob("model_q4.onnx.ledger")
    return path


def test_a_torn_line_is_done_again(checkpoint, out, whole, written) -> None:
    path = ledger_of(out)
    path.write_bytes(path.read_bytes()[:-5])
    lfm2_export.export(checkpoint, output=out)
    assert len(written) == whole[1] - DONE + 1
    assert_same(out, whole[0])


@pytest.mark.parametrize("size", [None, 0, -1, +1])
def test_a_data_file_of_another_length_starts_anew(checkpoint, out, whole, written, size) -> None:
    data = out.parent / WORKSPACE / "files" / "onnx" / "model_q4.onnx_data"
    if size is None:
        data.unlink()
    else:
        os.truncate(data, data.stat().st_size + size if size else 0)
    lfm2_export.export(checkpoint, output=out)
    assert len(written) == whole[1]
    assert_same(out, whole[0])


def test_bytes_that_no_line_vouches_for_are_written_again(checkpoint, out, whole) -> None:
    data = out.parent / WORKSPACE / "files" / "onnx" / "model_q4.onnx_data"
    expected = whole[0]["onnx/model_q4.onnx_data"]
    done = np.frombuffer(data.read_bytes(), np.uint8) == np.frombuffer(expected, np.uint8)
    end = len(done) - int(np.argmin(done[::-1])) if not done.all() else len(done)
    first = int(np.argmin(done))
    assert 0 < first < end
    with open(data, "r+b") as file:
        file.seek(first)
        file.write(b"\xa5" * (end - first))
    lfm2_export.export(checkpoint, output=out)
    assert_same(out, whole[0])


def test_a_second_export_is_refused_and_disturbs_nothing(checkpoint, whole, tmp_path, written) -> None:
    out = tmp_path / "parent" / "out"
    process = start(checkpoint, out, DONE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        message = refusal(ArtifactError, checkpoint, output=out)
        assert message == f"{out}: another export is writing to it; wait for it, or give another --output"
        assert written == []
    finally:
        process.kill()
        process.communicate(timeout=30)
    lfm2_export.export(checkpoint, output=out)
    assert len(written) == whole[1] - DONE
    assert_same(out, whole[0])


@contextmanager
def failing_after(pieces: int, out: Path, error: BaseException) -> Iterator[None]:
    """Makes an export into ``out`` raise once so many more pieces are in its ledgers."""
    left, real = [pieces], WeightStream.write_piece
    expected = lines_in(out.parent) + pieces

    def write_piece(self: WeightStream, piece: Piece, files: Sequence[int]) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            return real(self, piece, files)
        until = time.monotonic() + 20
        while lines_in(out.parent) < expected and time.monotonic() < until:
            time.sleep(0.005)
        raise error

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stream, "usable_cores", lambda: 1)
        patched.setattr(WeightStream, "write_piece", write_piece)
        yield


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_keeps_what_is_done(checkpoint, out, whole, written) -> None:
    with failing_after(3, out, FULL):
        message = refusal(ResourceError, checkpoint, output=out)
    assert message == (
        f"{out}: the disk cannot take more (No space left on device); free space and give the same command again, "
        f"which goes on from what is done, or delete {out.parent / WORKSPACE}; what was there before is unchanged"
    )
    assert lines_in(out.parent) == DONE + 3
    written.clear()
    lfm2_export.export(checkpoint, output=out)
    assert len(written) == whole[1] - DONE - 3
    assert_same(out, whole[0])


def test_a_machine_that_is_still_too_small_keeps_what_is_done(checkpoint, out, whole, written, monkeypatch) -> None:
    for short in ("available_memory", "free_disk"):
        with monkeypatch.context() as patched:
            patched.setattr(resources, short, lambda *_: 1000)
            assert "1.0 kB" in refusal(ResourceError, checkpoint, output=out)
        assert lines_in(out.parent) == DONE
    lfm2_export.export(checkpoint, output=out)
    assert len(written) == whole[1] - DONE


def test_what_is_on_the_disk_already_is_not_asked_for_again(checkpoint, out, tmp_path, monkeypatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(pipeline, "check_disk", lambda folder, needed: asked.append(needed))
    data = out.parent / WORKSPACE / "files" / "onnx" / "model_q4.onnx_data"
    there = 512 * data.stat().st_blocks
    for folder in (tmp_path / "whole", out):
        lfm2_export.export(checkpoint, output=folder)
    print(f"needed {asked}, there {there}")
    assert 0.9 * there < asked[0] - asked[1] < 1.02 * there


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), CheckpointError("damaged")])
def test_an_export_that_fails_or_is_stopped_leaves_nothing(checkpoint, out, error) -> None:
    with failing_after(3, out, error), pytest.raises(type(error)):
        lfm2_export.export(checkpoint, output=out)
    assert os.listdir(out.parent) == []
