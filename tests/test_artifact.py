"""Artifacts: made at once or not at all, checked on load, and the text of every refusal."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lfm2_export import hashing, staging
from lfm2_export.artifact import Artifact
from lfm2_export.artifact_writer import ArtifactWriter
from lfm2_export.errors import ArtifactError, Lfm2ExportError, ResourceError
from lfm2_export.folders import Folder
from lfm2_export.manifest import MANIFEST
from tests.artifacts import program, record, snapshot, write_artifact, write_program

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder that does not exist yet, alone in its parent."""
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent" / "out"


def refusal(kind: type[Lfm2ExportError], call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    print(message)
    return message


# Making one


def test_a_new_artifact_holds_what_was_written_and_nothing_else(out: Path) -> None:
    made = write_artifact(out, {"q4": "weights", "fp32": "weights"})
    assert sorted(snapshot(out)) == [
        "README.md",
        "config.json",
        MANIFEST,
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "onnx/model_q4.onnx",
        "onnx/model_q4.onnx_data",
    ]
    assert os.listdir(out.parent) == ["out"]
    opened = Artifact.open(out)
    assert opened.manifest == made.manifest
    assert list(opened.manifest.files) == ["README.md", "config.json"]
    assert list(opened.program().files) == ["onnx/model_q4.onnx", "onnx/model_q4.onnx_data"]
    assert opened.graph(opened.program(), "model") == out / "onnx/model_q4.onnx"
    assert opened.graph(opened.program(), "scoring") is None


def test_parents_are_made_and_an_empty_folder_is_filled(out: Path) -> None:
    write_artifact(out / "a" / "b")
    assert os.listdir(out / "a") == ["b"]
    empty = out / "empty"
    empty.mkdir()
    inode = empty.stat().st_ino
    write_artifact(empty)
    assert empty.stat().st_ino == inode
    Artifact.open(empty)
    assert sorted(os.listdir(out)) == ["a", "empty"]


@pytest.mark.parametrize(
    "name", ["a:b", "c:\\d", "[x]", " ", "-o", "...", "line\nline", "gro\u00df", os.fsdecode(b"\xff")]
)
def test_any_name_that_a_folder_can_have_is_as_good(out: Path, name: str) -> None:
    for schemes in ({"q4": "weights"}, {"fp32": "weights"}):
        write_artifact(out / name, schemes)
    Artifact.open(out / name).update(readme="figures")
    assert len(Artifact.open(out / name).programs) == 2
    assert os.listdir(out) == [name]


def test_a_link_to_a_folder_is_followed(out: Path) -> None:
    (out.parent / "real").mkdir()
    out.symlink_to("real")
    write_artifact(out)
    assert out.is_symlink()
    Artifact.open(out)
    assert sorted(os.listdir(out.parent)) == ["out", "real"]


def test_another_scheme_is_added(out: Path) -> None:
    write_artifact(out, {"q4": "weights"})
    q4 = (out / "onnx/model_q4.onnx_data").read_bytes()
    (out / "notes.txt").write_text("mine")
    write_artifact(out, {"fp32": "weights"}, checkpoint=record("other-name"))
    artifact = Artifact.open(out)
    assert [str(p) for p in artifact.programs] == ["onnx q4", "onnx fp32"]
    assert (out / "onnx/model_q4.onnx_data").read_bytes() == q4
    assert (out / "config.json").read_text().split() == ["{", '"schemes":', "[", '"q4",', '"fp32"', "]", "}"]
    assert (out / "notes.txt").read_text() == "mine"
    assert artifact.manifest.checkpoint.name == "tiny-moe"
    assert os.listdir(out.parent) == ["out"]


def test_the_same_scheme_is_replaced_and_its_old_files_go(out: Path) -> None:
    with ArtifactWriter(out, record()) as writer:
        for name in ("onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "onnx/model_q4.onnx_data_1"):
            writer.write_text(name, "old")
        writer.add_program(program(), ["onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "onnx/model_q4.onnx_data_1"])
        writer.commit()
    write_artifact(out, {"q4": "new"})
    assert (out / "onnx/model_q4.onnx_data").read_text() == "new q4"
    assert not (out / "onnx/model_q4.onnx_data_1").exists()
    assert len(Artifact.open(out).programs) == 1


def test_a_writer_knows_the_programs_to_come(out: Path) -> None:
    write_artifact(out, {"fp32": "weights"})
    with ArtifactWriter(out, record()) as writer:
        assert [p.scheme for p in writer.programs] == ["fp32"]
        write_program(writer, scheme="q4f16")
        write_program(writer, "executorch", "8da4w")
        write_program(writer, scheme="q8")
        assert [p.scheme for p in writer.programs] == ["q8", "fp32", "q4f16", "8da4w"]
        assert writer.programs[0].files["onnx/model_quantized.onnx"].bytes == len("graph q8")


def test_a_file_belongs_to_one_program(out: Path) -> None:
    write_artifact(out)
    with ArtifactWriter(out, record()) as writer:
        writer.write_text("onnx/model_q4.onnx", "x")
        fp32 = program(scheme="fp32", graph="onnx/model_q4.onnx")
        message = refusal(ArtifactError, writer.add_program, fp32, ["onnx/model_q4.onnx"])
    assert "onnx/model_q4.onnx of onnx fp32 belongs to onnx q4 already" in message


def test_a_writer_takes_no_name_outside_the_folder(out: Path) -> None:
    with ArtifactWriter(out, record()) as writer, pytest.raises(ValueError, match="leaves the artifact's folder"):
        writer.path("../x")


# What is in the way


def test_refuses_a_folder_that_holds_something_else(out: Path) -> None:
    out.mkdir()
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (out / name).write_text("mine")
    message = refusal(ArtifactError, write_artifact, out)
    assert message == (
        f"{out}: exists and holds something else (a.txt, b.txt, c.txt, ...); give another --output or an empty folder"
    )
    assert sorted(snapshot(out)) == ["a.txt", "b.txt", "c.txt", "d.txt"]
    assert os.listdir(out.parent) == ["out"]


def test_refuses_the_artifact_of_another_checkpoint(out: Path) -> None:
    write_artifact(out)
    before = snapshot(out)
    message = refusal(ArtifactError, write_artifact, out, checkpoint=record("tiny-dense", "b"))
    assert (
        f"{out}: is an artifact of another checkpoint (tiny-moe, now tiny-dense: config or weights differ)" in message
    )
    assert snapshot(out) == before


def test_refuses_a_folder_with_a_damaged_manifest(out: Path) -> None:
    out.mkdir()
    (out / MANIFEST).write_text("{")
    assert f"{out / MANIFEST}: is not JSON" in refusal(ArtifactError, write_artifact, out)


def test_refuses_a_file_as_output(out: Path) -> None:
    out.write_text("mine")
    assert refusal(ArtifactError, write_artifact, out) == f"{out}: is a file; give a folder as --output"
    assert f"{out / 'sub'}: cannot be written ({out} is a file); give another" in refusal(
        ArtifactError, write_artifact, out / "sub"
    )
    assert out.read_text() == "mine"


def test_refuses_a_parent_that_cannot_be_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(staging.os, "open", denied)
    message = refusal(ArtifactError, write_artifact, out / "sub" / "out")
    assert f"{out / 'sub' / 'out'}: cannot be written (Permission denied); give another --output" in message
    assert os.listdir(out.parent) == []


def test_a_folder_whose_parent_cannot_be_written_is_filled_from_inside(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.os, "access", lambda path, mode: Path(path) != out.parent)
    out.mkdir()
    write_artifact(out)
    write_artifact(out, {"fp32": "weights"})
    assert len(Artifact.open(out).programs) == 2
    assert sorted(os.listdir(out)) == ["README.md", "config.json", MANIFEST, "onnx"]


def deny_writing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Tests may run as root, whom permission bits do not stop."""
    monkeypatch.setattr(staging.os, "access", lambda path, mode: Path(path) != folder)


def fail_replacing(monkeypatch: pytest.MonkeyPatch, folder: Path, after: int = 0) -> None:
    """Moves into ``folder`` fail once so many have been made."""
    real, left = Folder.move, [after]

    def move(source: Folder, name: str, target: Folder, new_name: str) -> None:
        if target.path.is_relative_to(folder):
            if not left[0]:
                places = str(source.path / name), None, str(target.path / new_name)
                raise PermissionError(errno.EPERM, "Operation not permitted", *places)
            left[0] -= 1
        real(source, name, target, new_name)

    monkeypatch.setattr(Folder, "move", move)


def test_refuses_a_folder_that_cannot_be_written_before_any_work(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_artifact(out)
    before = snapshot(out.parent)
    deny_writing(monkeypatch, out)
    expected = f"{out}: cannot be written; make it writable, or give another --output"
    with pytest.raises(ArtifactError) as caught, ArtifactWriter(out, record()):
        pytest.fail("entered")
    assert str(caught.value) == expected
    assert refusal(ArtifactError, made.update, readme="new") == expected
    assert snapshot(out.parent) == before
    assert Artifact.open(out).manifest == made.manifest


def test_refuses_a_folder_inside_that_cannot_be_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_artifact(out)
    before = snapshot(out.parent)
    deny_writing(monkeypatch, out / "onnx")
    with pytest.raises(ArtifactError, match="onnx: cannot be written; make it"):
        ArtifactWriter(out, record(), into=["onnx"]).__enter__()
    assert "onnx: cannot be written; make it" in refusal(ArtifactError, write_artifact, out, {"q8": "weights"})
    assert snapshot(out.parent) == before
    made.update(readme="it is not written to")


def test_refuses_what_stands_where_another_kind_is_needed(out: Path) -> None:
    write_artifact(out)
    (out / "executorch").write_text("mine")
    (out / "onnx" / "model_quantized.onnx").mkdir()
    before = snapshot(out.parent)
    message = refusal(ArtifactError, write_artifact, out, {"8da4w": "weights"}, backend="executorch")
    assert f"{out / 'executorch'}: is a file where a folder is needed; move it away" in message
    message = refusal(ArtifactError, write_artifact, out, {"q8": "weights"})
    assert f"{out / 'onnx' / 'model_quantized.onnx'}: is a folder where a file is needed; move it away" in message
    assert snapshot(out.parent) == before
    Artifact.open(out)


def test_refuses_names_that_no_folder_can_have(out: Path) -> None:
    assert "cannot be looked at (File name too long); check" in refusal(
        ArtifactError, write_artifact, out / ("x" * 300)
    )
    assert "cannot be looked at (embedded null byte); check" in refusal(ArtifactError, write_artifact, out / "a\0b")
    message = refusal(ArtifactError, Artifact.open, Path("x" * 5000))
    assert "cannot be looked at (File name too long); check" in message
    assert len(message) < 500
    assert os.listdir(out.parent) == []


def test_a_long_name_that_a_folder_can_have_is_opened(out: Path) -> None:
    write_artifact(out)
    long = out.rename(out.parent / ("x" * 250))  # too long for a journal beside it
    Artifact.open(long)


def test_refuses_to_write_through_a_link_that_leaves_the_folder(out: Path, tmp_path: Path) -> None:
    write_artifact(out)
    (tmp_path / "elsewhere").mkdir()
    (out / "executorch").symlink_to(tmp_path / "elsewhere")
    message = refusal(ArtifactError, write_artifact, out, {"8da4w": "weights"}, backend="executorch")
    assert "executorch/model_8da4w.pte" in message
    assert "would be written outside of it" in message
    assert os.listdir(tmp_path / "elsewhere") == []
    Artifact.open(out)


# Failing, killed, full, at the same time


def fail_midway(folder: Path, error: BaseException) -> None:
    with ArtifactWriter(folder, record()) as writer:
        write_program(writer, scheme="fp32")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failing_export_leaves_nothing(out: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail_midway(out / "deep" / "out", error)
    assert os.listdir(out.parent) == []
    write_artifact(out)
    before = snapshot(out.parent)
    with pytest.raises(type(error)):
        fail_midway(out, error)
    assert snapshot(out.parent) == before


def test_an_export_without_commit_leaves_nothing(out: Path) -> None:
    with ArtifactWriter(out, record()) as writer:
        write_program(writer)
    assert os.listdir(out.parent) == []


def write_to_full_disk(folder: Path) -> None:
    with ArtifactWriter(folder, record()) as writer:
        writer.path("onnx/model.onnx_data").symlink_to("/dev/full")
        try:
            writer.path("onnx/model.onnx_data").write_bytes(b"0" * 100_000)
        except OSError as error:
            raise RuntimeError("a library's own words") from error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_the_machines_fault_and_loses_nothing(out: Path) -> None:
    write_artifact(out)
    before = snapshot(out.parent)
    message = refusal(ResourceError, write_to_full_disk, out)
    assert message == (
        f"{out}: the disk cannot take more (No space left on device); free space or give another --output; "
        "what was there before is unchanged"
    )
    assert ResourceError.exit_code == 3
    assert snapshot(out.parent) == before
    assert "the disk cannot take more" in refusal(ResourceError, write_to_full_disk, out / "new")
    assert snapshot(out.parent) == before


def run_python(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


EXPORT_AND_WAIT = """
import sys, time
from tests.artifacts import *
with ArtifactWriter(sys.argv[1], record()) as writer:
    write_program(writer, scheme="fp32", content="new")
    print("ready", flush=True)
    time.sleep(60)
"""


def start_export(folder: Path) -> subprocess.Popen[str]:
    """Another process in the middle of an export into ``folder``."""
    process = run_python(EXPORT_AND_WAIT, str(folder))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_export_leaves_what_was_there_and_the_next_one_cleans_up(out: Path, existing: bool) -> None:
    if existing:
        write_artifact(out)
    before = snapshot(out.parent)
    process = start_export(out)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert {name: data for name, data in snapshot(out.parent).items() if name.startswith("out/")} == before
    if existing:
        Artifact.open(out)
    write_artifact(out, {"q8": "weights"})
    assert os.listdir(out.parent) == ["out"]
    assert [p.scheme for p in Artifact.open(out).programs] == ["q4", "q8"] if existing else ["q8"]


def test_a_second_export_at_the_same_time_is_refused(out: Path) -> None:
    write_artifact(out)
    process = start_export(out)
    try:
        message = refusal(ArtifactError, write_artifact, out, {"q8": "weights"})
        assert message == f"{out}: another export is writing to it; wait for it, or give another --output"
        update = refusal(ArtifactError, Artifact.open(out).update, readme="new")
        assert "another export is writing to it" in update
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate(timeout=30)
    write_artifact(out, {"q8": "weights"})
    assert os.listdir(out.parent) == ["out"]


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Whether ``work``, done in another process that kills itself at its n-th rename or removal, was so."""
    process = os.fork()
    if process == 0:
        left = [step]

        def dying(function: Callable[..., object]) -> Callable[..., object]:
            def done(*args: object, **options: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return done

        try:
            os.replace, os.unlink = dying(os.replace), dying(os.unlink)  # type: ignore[assignment]
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert status in (0, signal.SIGKILL), "it failed"
    return status == signal.SIGKILL


def state_to_readers(folder: Path, old: dict[str, bytes], new: dict[str, bytes]) -> str:
    """Old, new or interrupted; reading changes nothing."""
    before = snapshot(folder.parent)
    said = ""
    try:
        Artifact.open(folder)
    except ArtifactError as error:
        said = str(error)
    assert snapshot(folder.parent) == before
    if said:
        assert "; an export into the folder was interrupted or is under way: give the same export command again" in said
        return "interrupted"
    state, expected = ("old", old) if before[f"{folder.name}/{MANIFEST}"] == old[MANIFEST] else ("new", new)
    weights = {name: data for name, data in expected.items() if name.startswith("onnx/")}
    assert {name: before[f"{folder.name}/{name}"] for name in weights} == weights
    return state


def test_an_export_killed_at_any_step_is_finished_by_the_same_command(out: Path) -> None:
    with ArtifactWriter(out, record()) as writer:
        write_program(writer, content="old")
        writer.write_text("onnx/old_file", "old")
        writer.add_program(program(), ["onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "onnx/old_file"])
        writer.write_json("config.json", "old")
        writer.commit()
    old = snapshot(out)
    write_artifact(out, {"q4": "new"})
    new, seen = snapshot(out), []
    assert "onnx/old_file" not in new
    for step in range(30):
        restore(out, old)
        killed = killed_at(step, lambda: write_artifact(out, {"q4": "new"}))
        seen.append(state_to_readers(out, old, new))
        write_artifact(out, {"q4": "new"})
        assert snapshot(out) == new
        assert os.listdir(out.parent) == ["out"]
        if not killed:
            break
    print(seen)
    assert not killed
    assert [state for i, state in enumerate(seen) if state not in seen[:i]] == ["old", "interrupted", "new"]
    assert seen.count("interrupted") >= 2


def test_another_command_finishes_what_was_interrupted_first(out: Path) -> None:
    write_artifact(out, {"q4": "old"})
    kill_halfway(out)
    write_artifact(out, {"fp32": "weights"})
    assert (out / "onnx/model_q4.onnx_data").read_text() == "new q4"
    assert [p.scheme for p in Artifact.open(out).programs] == ["q4", "fp32"]
    assert os.listdir(out.parent) == ["out"]


def test_the_same_command_has_no_more_to_do_than_to_finish(out: Path) -> None:
    """Killed in the midst of putting files into place; other commands and damage are another matter."""

    def export(key: str) -> bool:
        with ArtifactWriter(out, record(), key=key) as writer:
            if writer.finished() is not None:
                return False
            write_program(writer, content=key)
            writer.commit()
        return True

    export("old")
    old, exported_again = snapshot(out), {True: set[bool](), False: set[bool]()}
    workspace = out.parent / ".out.lfm2-export.partial"
    for damaged in (False, True):
        for step in range(30):
            if not killed_at(step, lambda: export("new")):
                break
            moved = not (workspace / "files/onnx/model_q4.onnx").exists()
            if (workspace / "commit.json").exists() and (moved or not damaged):
                if damaged:
                    (out / "onnx/model_q4.onnx").write_text("GRAPH q4")
                exported_again[damaged].add(export("new"))
                assert (out / "onnx/model_q4.onnx_data").read_text() == "new q4"
                Artifact.open(out)
            else:
                shutil.rmtree(workspace, ignore_errors=True)
            restore(out, old)
    print(exported_again)
    assert exported_again == {False: {False}, True: {True}}


def kill_halfway(out: Path) -> None:
    """An export of new q4 weights into ``out`` that is killed once a file of the program was replaced."""
    for step in range(30):
        killed_at(step, lambda: write_artifact(out, {"q4": "new"}))
        if (out / "onnx/model_q4.onnx_data").read_text() == "new q4":
            return
        shutil.rmtree(out.parent / ".out.lfm2-export.partial", ignore_errors=True)
    raise AssertionError("it was never in the midst of it")


def test_what_an_interrupted_export_left_alone_can_be_read(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_artifact(out, {"q4": "old", "fp32": "weights"})
    kill_halfway(out)
    artifact = Artifact.open(out, verify=False)
    assert Artifact.open(out, verify=False).manifest == artifact.manifest
    (said,) = caplog.messages
    assert said == (
        f"{out}: an export into it was interrupted (.out.lfm2-export.partial); the same export command finishes it"
    )
    artifact.verify(artifact.program(scheme="fp32"))
    message = refusal(ArtifactError, artifact.verify, artifact.program(scheme="q4"))
    assert "an export into the folder was interrupted or is under way: give the same export command again" in message
    message = refusal(ArtifactError, artifact.update, readme="new")
    assert message == (
        f"{out}: an export into it was interrupted or is under way; give the same export command again first, or wait "
        "for it"
    )


def test_a_commit_whose_first_move_fails_leaves_the_folder_as_it_was(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_artifact(out)
    before = snapshot(out.parent)
    fail_replacing(monkeypatch, out)
    message = refusal(ArtifactError, write_artifact, out, {"q8": "weights"})
    assert message == f"{out}: cannot be written (Operation not permitted); give another --output"
    assert snapshot(out.parent) == before
    assert os.listdir(out.parent) == ["out"]
    assert [p.scheme for p in Artifact.open(out).programs] == ["q4"]


def test_a_commit_that_fails_halfway_says_so_and_is_finished_later(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_artifact(out)
    for folder in (out, out / "onnx"):  # the second time on entering, from what the first left
        with monkeypatch.context() as patched:
            fail_replacing(patched, folder, after=int(folder == out))
            message = refusal(ArtifactError, write_artifact, out, {"q8": "weights"})
        assert message == (
            f"{out}: not all new files could be put there (onnx/model_quantized.onnx_data: Operation not permitted); "
            "remove the cause, then give the same command again: .out.lfm2-export.partial has the rest"
        )
    write_artifact(out, {"fp32": "weights"})
    assert [p.scheme for p in Artifact.open(out).programs] == ["q4", "q8", "fp32"]
    assert os.listdir(out.parent) == ["out"]


def test_an_error_of_the_files_being_made_is_translated_and_others_are_not(out: Path) -> None:
    def fail(of_ours: bool) -> None:
        with ArtifactWriter(out, record()) as writer:
            path = writer.path("onnx/model.onnx") if of_ours else Path("/elsewhere")
            raise OSError(errno.EIO, "Input/output error", str(path))

    assert f"{out}: cannot be written (Input/output error); give" in refusal(ArtifactError, fail, True)
    with pytest.raises(OSError, match="/elsewhere"):
        fail(False)


def restore(folder: Path, files: dict[str, bytes]) -> None:
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        path.unlink()
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def test_something_put_there_meanwhile_is_not_overwritten(out: Path) -> None:
    with ArtifactWriter(out, record()) as writer:
        write_program(writer)
        out.mkdir()
        (out / "mine").write_text("mine")
        assert "something else was put there meanwhile" in refusal(ArtifactError, writer.commit)
    assert snapshot(out.parent) == {"out/mine": b"mine"}


# Opening one


def test_opening_what_is_no_artifact(out: Path) -> None:
    assert refusal(ArtifactError, Artifact.open, out) == (
        f"{out}: no such directory; give the folder that `lfm2-export export` wrote"
    )
    out.mkdir()
    assert refusal(ArtifactError, Artifact.open, out) == f"{out}: has no {MANIFEST}; it is not an artifact"
    (out / "model.safetensors").write_text("")
    assert (
        refusal(ArtifactError, Artifact.open, out) == f"{out}: has no {MANIFEST}; it is a checkpoint: export it first"
    )


@pytest.mark.parametrize("name", ["onnx/model_q4.onnx_data", "onnx/model_q4.onnx"])
def test_names_a_changed_byte_a_wrong_size_and_a_missing_file(out: Path, name: str) -> None:
    write_artifact(out)
    path = out / name
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert f"{path}: was changed since the export (its sha256 is another); export" in refusal(
        ArtifactError, Artifact.open, out
    )
    path.write_bytes(data[:-1])
    assert f"{path}: has {len(data) - 1} bytes where the export wrote {len(data)}" in refusal(
        ArtifactError, Artifact.open, out
    )
    path.unlink()
    artifact = Artifact.open(out)
    assert f"{path}: is missing, but {MANIFEST} names it" in refusal(
        ArtifactError, artifact.verify, artifact.program("onnx", "q4")
    )
    path.write_bytes(data)
    Artifact.open(out).verify(artifact.program("onnx", "q4"))


def test_shared_files_are_their_owners(out: Path) -> None:
    write_artifact(out)
    config = out / "config.json"
    assert Artifact.open(out).edited() == []
    config.write_text(config.read_text().replace("\n", "\r\n") + "\r\n")
    assert Artifact.open(out).edited() == ["config.json"]
    config.write_text("{")
    assert f"{config}: is not JSON" in refusal(ArtifactError, Artifact.open, out)
    config.unlink()
    assert Artifact.open(out).missing() == ["config.json"]


def test_a_changed_model_card_is_no_damage(out: Path) -> None:
    write_artifact(out)
    (out / "README.md").write_bytes(b"edited, in Latin-1: \xe9")
    assert Artifact.open(out).edited() == ["README.md"]


def test_one_program_can_be_checked_alone(out: Path) -> None:
    write_artifact(out, {"q4": "weights", "fp32": "weights"})
    (out / "onnx/model.onnx_data").unlink()
    artifact = Artifact.open(out, verify=False)
    artifact.verify(artifact.program(scheme="q4"))
    whole = artifact.program(scheme="fp32")
    assert "onnx/model.onnx_data: is missing" in refusal(ArtifactError, artifact.verify, whole)
    (out / "onnx/model.onnx_data").write_text("WEIGHTS fp32")
    artifact.verify(hashes=False)
    assert "onnx/model.onnx_data: was changed" in refusal(ArtifactError, artifact.verify)


def test_a_second_opening_reads_no_file_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_artifact(out)
    now, real, reads = time.time_ns, hashing.sha256_file, []
    monkeypatch.setattr(hashing.time, "time_ns", lambda: now() + 3_000_000_000)
    monkeypatch.setattr(hashing, "sha256_file", lambda path: (reads.append(path.name), real(path))[1])
    Artifact.open(out)
    Artifact.open(out)
    assert sorted(reads) == ["README.md", "config.json", "model_q4.onnx", "model_q4.onnx_data"]


def test_the_preferred_program(out: Path) -> None:
    write_artifact(out, {"q4f16": "x", "fp32": "x", "q8": "x", "q4": "x", "fp16": "x"})
    artifact = write_artifact(out, {"fp32": "x", "8da4w": "x"}, backend="executorch")
    assert [p.scheme for p in artifact.programs] == ["q4", "q8", "fp16", "fp32", "q4f16", "8da4w", "fp32"]
    assert str(artifact.program()) == "onnx q4"
    assert str(artifact.program(scheme="fp32")) == "onnx fp32"
    assert str(artifact.program("executorch")) == "executorch 8da4w"
    assert str(artifact.program("executorch", "fp32")) == "executorch fp32"


def test_an_unknown_program_gives_the_list_of_those_there(out: Path) -> None:
    artifact = write_artifact(out, {"q4": "x", "fp32": "x"})
    message = refusal(ArtifactError, artifact.program, "onnx", "q3")
    assert message == (f"{out}: has no onnx q3 program, only: onnx q4, onnx fp32; export it into this folder first")
    assert "has no executorch program, only: onnx q4" in refusal(ArtifactError, artifact.program, "executorch")


def test_parity_figures_and_card_are_recorded(out: Path) -> None:
    artifact = write_artifact(out, {"q4": "x", "fp32": "x"})
    updated = artifact.update(parity={("onnx", "q4"): {"kl": 2e-4}}, readme="with figures")
    reopened = Artifact.open(out)
    assert reopened.manifest == updated.manifest
    assert reopened.program(scheme="q4").parity == {"kl": 2e-4}
    assert reopened.program(scheme="fp32").parity is None
    assert (out / "README.md").read_text() == "with figures"
    assert os.listdir(out.parent) == ["out"]
    message = refusal(ArtifactError, artifact.update, parity={("onnx", "q8"): {}})
    assert f"{out}: has no onnx q8 program to record figures for" in message


def test_importing_artifacts_imports_no_torch() -> None:
    code = "import sys, lfm2_export.artifact_writer, lfm2_export.resources; print('torch' in sys.modules)"
    out, _ = run_python(code).communicate(timeout=30)
    assert out.strip() == "False"
