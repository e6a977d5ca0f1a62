"""What others put where an export keeps its journal, lock and unfinished files: readers leave it alone, exports follow
no link in it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_export
from lfm2_export import cli, folders, staging
from lfm2_export.artifact import Artifact
from lfm2_export.artifact_writer import ArtifactWriter
from lfm2_export.errors import ArtifactError
from lfm2_export.ledger import Ledger
from lfm2_export.manifest import MANIFEST, FileEntry, Manifest
from lfm2_export.parity import ParityReport, hops, measure_parity
from lfm2_export.runners import load_runner
from tests.artifacts import record, snapshot, write_artifact, write_program
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.conftest import Exported, Once

INSIDE, BESIDE = "inside", "beside"
VICTIM = "mine"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@dataclass(frozen=True)
class World:
    """An artifact as it was downloaded, and what must not change whatever lies in it."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "parent" / "out"

    @property
    def outside(self) -> Path:
        return self.folder / "outside"

    def root(self, where: str) -> Path:
        return self.out / ".lfm2-export.partial" if where == INSIDE else self.out.parent / ".out.lfm2-export.partial"

    def lock(self, where: str) -> Path:
        return self.root(where).with_suffix(".lock")

    def seen(self, folder: Path | None = None) -> dict[str, tuple[object, ...]]:
        """Everything below with its kind, number, times and content."""
        return {str(path): _look(path) for path in sorted((folder or self.folder).rglob("*"))}


def _look(path: Path) -> tuple[object, ...]:
    found = path.lstat()
    content: object = None
    if stat.S_ISLNK(found.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(found.st_mode) and found.st_size < 1 << 20:
        content = path.read_bytes()
    return found.st_mode, found.st_ino, found.st_nlink, found.st_size, found.st_mtime_ns, found.st_ctime_ns, content


def make_world(folder: Path) -> World:
    world = World(folder)
    (world.outside / "deep").mkdir(parents=True)
    for name in ("victim", "deep/victim", MANIFEST, "commit.json"):
        (world.outside / name).write_text(VICTIM)
    world.out.parent.mkdir()
    return world


# What is planted


def forge(root: Path, waiting: dict[str, str], *, listed: list[str] | None = None, **changes: Any) -> None:
    """A workspace that is as right as can be: files that wait to be moved, under a manifest that lists them and
    ``listed`` and a journal that was written here; ``changes`` are made to the journal."""
    manifest = Manifest.from_json((root.parent / MANIFEST if root.parent.name == "out" else _out(root)).read_bytes())
    vouched = dict(manifest.files)
    for name in (*waiting, *(listed or [])):
        data = waiting.get(name, VICTIM).encode()
        vouched[name] = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    text = Manifest(checkpoint=manifest.checkpoint, programs=manifest.programs, files=vouched).to_json()
    (root / "files").mkdir(parents=True)
    for name, content in {**waiting, MANIFEST: text}.items():
        (root / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "files" / name).write_text(content)
    journal = {
        "format": 1,
        "workspace": root.stat().st_ino,
        "index": hashlib.sha256(text.encode()).hexdigest(),
        "files": [*waiting, *(listed or []), MANIFEST],
    }
    (root / "commit.json").write_text(json.dumps(journal | changes))


def _out(root: Path) -> Path:
    return root.parent / "out" / MANIFEST


Plant = Callable[[World, str], None]


def names(*given: str) -> Plant:
    """A journal and a manifest that name these."""
    return lambda world, where: forge(world.root(where), {"new": "new"}, listed=list(given))


def copied_from_elsewhere(world: World, where: str) -> None:
    forge(world.root(where), {"new": "new"}, workspace=1)


def of_the_first_version(world: World, where: str) -> None:
    forge(world.root(where), {"new": "new"})
    journal = {"last": MANIFEST, "delete": ["../victim", "config.json"], "files": ["new", MANIFEST]}
    (world.root(where) / "commit.json").write_text(json.dumps(journal))


def workspace_is_a_link(world: World, where: str) -> None:
    forge(world.root(where), {"victim": "evil"})
    world.root(where).rename(world.outside / where)
    world.root(where).symlink_to(world.outside / where)


def files_are_a_link(world: World, where: str) -> None:
    forge(world.root(where), {"victim": "evil"})
    shutil.rmtree(world.root(where) / "files")
    (world.root(where) / "files").symlink_to(world.outside)


def journal_is_a_link(world: World, where: str) -> None:
    forge(world.root(where), {"new": "new"})
    (world.root(where) / "commit.json").rename(world.outside / f"commit.{where}")
    (world.root(where) / "commit.json").symlink_to(world.outside / f"commit.{where}")


def folder_in_files_is_a_link(world: World, where: str) -> None:
    forge(world.root(where), {"deep/victim": "evil"})
    shutil.rmtree(world.root(where) / "files" / "deep")
    (world.root(where) / "files" / "deep").symlink_to(world.outside / "deep")


def file_is_a_link(world: World, where: str) -> None:
    forge(world.root(where), {"victim": VICTIM})
    (world.root(where) / "files" / "victim").unlink()
    (world.root(where) / "files" / "victim").symlink_to(world.outside / "victim")


def destination_is_a_link(world: World, where: str) -> None:
    forge(world.root(where), {"extra/victim": "evil"})
    if not (world.out / "extra").is_symlink():
        (world.out / "extra").symlink_to(world.outside / "deep")


def removal_through_a_link(world: World, where: str) -> None:
    """The former manifest lists a file that the new one does not, behind a link; nothing has been moved yet."""
    manifest = Manifest.from_json((world.out / MANIFEST).read_bytes())
    forge(world.root(where), {"new": "new"})
    victim = FileEntry(bytes=len(VICTIM), sha256=hashlib.sha256(VICTIM.encode()).hexdigest())
    listed = {**manifest.files, "extra/victim": victim}
    text = Manifest(checkpoint=manifest.checkpoint, programs=manifest.programs, files=listed).to_json()
    if not (world.out / "extra").is_symlink():
        (world.out / "extra").symlink_to(world.outside / "deep")
        (world.out / MANIFEST).write_text(text)


def files_went_missing(world: World, where: str) -> None:
    forge(world.root(where), {"new": "new", "newer": "new"})
    (world.root(where) / "files" / "newer").unlink()


def manifest_is_another(world: World, where: str) -> None:
    forge(world.root(where), {"new": "new"}, index="0" * 64)


def manifest_is_damaged(world: World, where: str) -> None:
    forge(world.root(where), {"new": "new"}, index=hashlib.sha256(b"{").hexdigest())
    (world.root(where) / "files" / MANIFEST).write_text("{")


def file_that_is_not_named(world: World, where: str) -> None:
    forge(world.root(where), {"new": "new"})
    (world.root(where) / "files" / "surplus").write_text("evil")


def journal_says(data: bytes) -> Plant:
    def plant(world: World, where: str) -> None:
        forge(world.root(where), {"new": "new"})
        (world.root(where) / "commit.json").write_bytes(data)

    return plant


def journal_is_huge(world: World, where: str) -> None:
    forge(world.root(where), {"new": "new"})
    os.truncate(world.root(where) / "commit.json", 100_000_000)


def special(kind: Callable[[Path], None], name: str) -> Plant:
    """Something else instead of a file or beside the files."""

    def plant(world: World, where: str) -> None:
        forge(world.root(where), {"new": "new"})
        path = world.root(where) / name
        path.unlink(missing_ok=True)
        kind(path)

    return plant


def make_socket(path: Path) -> None:
    bound = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)  # its name has little room
    try:
        bound.bind(path.name)
    finally:
        os.chdir(here)
        bound.close()


def of_another_owner(world: World, where: str) -> None:
    forge(world.root(where), {"new": "new"})
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(world.root(where) / "files" / "new", 12345, -1)


def workspace_of_another_owner(world: World, where: str) -> None:
    of_another_owner(world, where)
    os.chown(world.root(where), 12345, -1)


def folders_without_end(world: World, where: str) -> None:
    forge(world.root(where), {"new": "new"})
    (world.root(where) / "files" / "/".join("d" * 100)).mkdir(parents=True)


def link_as_lock(world: World, where: str) -> None:
    copied_from_elsewhere(world, where)
    world.lock(where).symlink_to(world.outside / f"made-{where}")


def fifo_as_lock(world: World, where: str) -> None:
    copied_from_elsewhere(world, where)
    os.mkfifo(world.lock(where))


# By what an export says of it.
REFUSED: dict[str, tuple[Plant, str]] = {
    "elsewhere": (copied_from_elsewhere, "its commit.json was written elsewhere"),
    "first version": (of_the_first_version, "its commit.json is damaged"),
    "name above": (names("../victim"), "leaves the artifact's folder|commit.json is damaged"),
    "absolute name": (names("/etc/hostname"), "leaves the artifact's folder|commit.json is damaged"),
    "backslash": (names("..\\victim"), "leaves the artifact's folder|commit.json is damaged"),
    "empty name": (names(""), "leaves the artifact's folder|commit.json is damaged"),
    "own lock": (names(".lfm2-export.lock"), "does not list '.lfm2-export.lock'"),
    "not listed": (
        lambda world, where: forge(world.root(where), {"new": "new"}, files=["new", "victim", MANIFEST]),
        "does not list 'victim'",
    ),
    "surplus file": (file_that_is_not_named, "does not list 'surplus'"),
    "gone file": (files_went_missing, "'newer' is gone or another"),
    "never there": (names("victim"), "'victim' is gone or another"),
    "linked workspace": (workspace_is_a_link, "is a link where an export makes its files; delete it"),
    "linked files": (files_are_a_link, "'files' is a link"),
    "linked journal": (journal_is_a_link, "'commit.json' is a link"),
    "linked folder": (folder_in_files_is_a_link, "'deep' is a link"),
    "linked file": (file_is_a_link, "'victim' is a link"),
    "linked destination": (destination_is_a_link, "'extra/victim' would be written outside of it, through the link"),
    "other manifest": (manifest_is_another, f"the new {MANIFEST} is gone"),
    "damaged manifest": (manifest_is_damaged, "is not JSON"),
    "no JSON": (journal_says(b"\xff{"), "its commit.json is damaged"),
    "no object": (journal_says(b"[1]"), "its commit.json is damaged"),
    "deep JSON": (journal_says(b"[" * 100_000), "its commit.json is damaged"),
    "wrong types": (
        journal_says(b'{"format": 1, "workspace": {}, "index": [], "files": [["x"]]}'),
        "its commit.json is damaged",
    ),
    "empty journal": (journal_says(b""), "its commit.json is damaged"),
    "huge journal": (journal_is_huge, "'commit.json' is larger than"),
    "FIFO as journal": (special(os.mkfifo, "commit.json"), "'commit.json' is a special file"),
    "FIFO as file": (special(os.mkfifo, "files/new"), "'new' is a special file"),
    "FIFO beside the files": (special(os.mkfifo, "draft"), "'draft' is a special file"),
    "socket": (special(make_socket, "files/new"), "'new' is a special file"),
    "folder as journal": (special(Path.mkdir, "commit.json"), "'commit.json' is a folder"),
    "other owner": (of_another_owner, "'new' is another user's"),
    "other owner's workspace": (
        workspace_of_another_owner,
        "partial: is another user's where an export makes its files",
    ),
    "folders without end": (folders_without_end, "'d' is one of more than any export makes"),
    "link as lock": (link_as_lock, "lock: is a link where an export keeps its lock; delete it"),
    "FIFO as lock": (fifo_as_lock, "lock: is a special file where an export keeps its lock; delete it"),
}
# What an export does all the same, within the folder.
FINISHED: dict[str, Plant] = {
    "nothing but right": lambda world, where: forge(world.root(where), {"new": "new"}),
    "removal behind a link": removal_through_a_link,
}
PLANTS = {**{name: plant for name, (plant, _) in REFUSED.items()}, **FINISHED}


# Readers


@pytest.fixture(scope="session")
def small(once: Once) -> Exported:
    """A program of two layers with a tokenizer, and its checkpoint."""

    def make(folder: Path) -> None:
        source = Path(lfm2_export.__file__).parent / "assets" / "tiny-dense"
        raw = json.loads((source / "config.json").read_text())
        same = {key: raw[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        config = tiny_config("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"], **same)
        write_random_checkpoint(folder / "checkpoint", config, seed=0, dtype="F32")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            shutil.copy(source / name, folder / "checkpoint")
        lfm2_export.export(folder / "checkpoint", scheme="fp32", output=folder / "artifact")

    folder = once("staging-small", make)
    return Exported(checkpoint=folder / "checkpoint", artifact=folder / "artifact")


@pytest.fixture(scope="module")
def report(small: Exported) -> ParityReport:
    torch.set_num_threads(1)
    return measure_parity(small.artifact, small.checkpoint, max_tokens=96, threads=1)


@pytest.fixture
def downloaded(small: Exported, tmp_path: Path) -> World:
    world = make_world(tmp_path / "world")
    shutil.copytree(small.artifact, world.out)
    return world


def read(out: Path) -> list[int]:
    """Opens a folder in every way but parity's, which also writes; the exit codes."""
    Artifact.open(out)
    load_runner(out, kernels="stock").prefill([[1, 2]])
    program = [str(out), "--kernels", "stock"]
    return [
        cli.main(["inspect", str(out)]),
        cli.main(["run", *program, "--prompt", "a", "--max-new-tokens", "1"]),
        cli.main(["chat", *program]),
        cli.main(["bench", *program, "--prompt-tokens", "2", "--new-tokens", "1", "--rounds", "1"]),
    ]


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_no_reader_changes_anything(
    downloaded: World,
    small: Exported,
    report: ParityReport,
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Planted inside and beside."""
    for where in (INSIDE, BESIDE):
        plant(downloaded, where)
    if plant is removal_through_a_link:  # the manifest then names a file outside of the folder, which is not read
        before = downloaded.seen()
        with pytest.raises(ArtifactError, match="victim: is a link that leaves its folder"):
            read(downloaded.out)
        assert downloaded.seen() == before
        return

    def measured(path: Path, *_: object, **__: object) -> ParityReport:
        Artifact.open(path, verify=False).verify()
        return report

    monkeypatch.setattr(hops, "measure", measured)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    before = downloaded.seen()
    assert read(downloaded.out) == [0, 0, 0, 0]
    assert downloaded.seen() == before
    if plant is workspace_is_a_link:  # nobody's unfinished export
        assert caplog.messages == []
        return
    command = ["parity", str(downloaded.out), str(small.checkpoint)]
    assert cli.main(command) == (0 if report.passed else 1)
    assert downloaded.seen() == before
    capsys.readouterr()
    assert cli.main([*command, "--record"]) == 2
    print(refusal := capsys.readouterr().err)
    assert "interrupted" in refusal
    assert downloaded.seen() == before
    (warning,) = caplog.messages
    assert "an export into it was interrupted (.lfm2-export.partial); the same export command finishes it" in warning


def test_a_folder_that_is_reached_through_a_link_is_read_as_any(
    downloaded: World, small: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in full."""
    for where in (INSIDE, BESIDE):
        destination_is_a_link(downloaded, where)
    (downloaded.folder / "link").symlink_to(downloaded.out.parent)
    (downloaded.folder / "other").symlink_to(downloaded.out)
    before = downloaded.seen()
    out = downloaded.folder / "link" / "out"
    assert measure_parity(out, small.checkpoint, max_tokens=96, threads=1).programs
    Artifact.open(downloaded.folder / "other")
    load_runner(out, kernels="stock")
    assert downloaded.seen() == before


# Exports


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = make_world(tmp_path / "world")
    write_artifact(world.out, {"q4": "old"})
    return world


@pytest.fixture(params=[INSIDE, BESIDE, "beside, without handles"])
def where(request: pytest.FixtureRequest, world: World, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where an export keeps its files: inside where its parent cannot be written. Windows has no handles of folders."""
    if request.param == INSIDE:
        monkeypatch.setattr(staging.os, "access", lambda path, mode: Path(path) != world.out.parent)
    elif request.param != BESIDE:
        monkeypatch.setattr(folders, "HANDLES", False)
    return INSIDE if request.param == INSIDE else BESIDE


def contents_of(folder: Path) -> dict[str, object]:
    """What ``World.seen`` sees, but for times."""
    return {name: (mode, size, content) for name, (mode, _, _, size, _, _, content) in World(folder).seen().items()}


@pytest.mark.parametrize(("plant", "reason"), REFUSED.values(), ids=REFUSED)
def test_an_export_refuses_what_no_export_left(world: World, where: str, plant: Plant, reason: str) -> None:
    plant(world, where)
    before, untouched = contents_of(world.folder), world.seen(world.outside)
    with pytest.raises(ArtifactError, match=reason) as caught:
        write_artifact(world.out, {"fp32": "new"})
    message = str(caught.value)
    print(message)
    assert "\n" not in message
    assert message.endswith("; delete it and give the command again")
    assert world.seen(world.outside) == untouched
    assert contents_of(world.folder) == before

    # The remedy, taken at its word.
    named = Path(message.partition(": ")[0])
    assert named in (world.root(where), world.lock(where))
    if named.is_dir() and not named.is_symlink():
        shutil.rmtree(named)
    else:
        named.unlink()
        shutil.rmtree(world.root(where), ignore_errors=True)
    write_artifact(world.out, {"fp32": "new"})
    assert len(Artifact.open(world.out).programs) == 2
    assert world.seen(world.outside) == untouched


@pytest.mark.parametrize("plant", FINISHED.values(), ids=FINISHED)
def test_a_perfect_forgery_reaches_nothing_outside(world: World, where: str, plant: Plant) -> None:
    plant(world, where)
    untouched = world.seen(world.outside)
    write_artifact(world.out, {"fp32": "new"})
    assert world.seen(world.outside) == untouched
    assert (world.out / "new").read_text() == "new"
    assert len(Artifact.open(world.out).programs) == 2
    assert not world.root(where).exists()


@pytest.mark.parametrize("name", ["elsewhere", "linked files", "FIFO as lock"])
def test_the_command_refuses_in_a_line(
    downloaded: World, small: Exported, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, reason = REFUSED[name]
    plant(downloaded, BESIDE)
    untouched = downloaded.seen(downloaded.outside)
    assert cli.main(["export", str(small.checkpoint), "-o", str(downloaded.out), "--scheme", "q8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert downloaded.seen(downloaded.outside) == untouched


@pytest.mark.parametrize("target", ["outside/deep", "parent/out/onnx"])
def test_no_folder_of_the_artifact_is_written_through_a_link(world: World, target: str) -> None:
    (world.out / "executorch").symlink_to(world.folder / target)
    before = contents_of(world.folder)
    with pytest.raises(ArtifactError, match=r"'executorch/model_8da4w\.pte' would be written outside of it"):
        write_artifact(world.out, {"8da4w": "new"}, backend="executorch")
    with (
        pytest.raises(ArtifactError, match="'executorch' would be written outside of it"),
        ArtifactWriter(world.out, record(), into=["executorch"]),
    ):
        pytest.fail("entered: it would be told after the work")
    assert contents_of(world.folder) == before


def test_a_file_of_the_artifact_that_is_a_link_is_replaced_itself(world: World) -> None:
    """As they are in the Hub's cache."""
    untouched = world.seen(world.outside)
    for name in ("onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "README.md", "config.json"):
        (world.out / name).unlink()
        (world.out / name).symlink_to(world.outside / "victim")
    write_artifact(world.out, {"q4": "new"})
    assert world.seen(world.outside) == untouched
    assert (world.out / "onnx/model_q4.onnx_data").read_text() == "new q4"
    assert not any(path.is_symlink() for path in world.out.rglob("*"))
    Artifact.open(world.out)
    (world.out / "README.md").unlink()
    (world.out / "README.md").symlink_to(world.outside / "victim")
    # Whether its owner edited the card is seen by its hash, and a stranger's file is not read for that.
    with pytest.raises(ArtifactError, match=r"README\.md: is a link that leaves its folder"):
        Artifact.open(world.out).update(readme="figures")
    assert world.seen(world.outside) == untouched


def test_a_lock_that_was_left_is_no_obstacle(world: World) -> None:
    world.lock(BESIDE).write_text("")
    write_artifact(world.out, {"fp32": "new"})
    world.lock(BESIDE).write_text("")
    Artifact.open(world.out).update(readme="figures")
    assert os.listdir(world.out.parent) == ["out"]


def test_figures_are_not_recorded_through_a_link(world: World) -> None:
    artifact = Artifact.open(world.out)
    world.lock(BESIDE).symlink_to(world.outside / "made")
    (world.out / ".lfm2-export.draft").symlink_to(world.outside / "victim")
    before = world.seen()
    with pytest.raises(ArtifactError, match="lock: is a link where an export keeps its lock"):
        artifact.update(readme="figures")
    assert world.seen() == before
    world.lock(BESIDE).unlink()
    artifact.update(readme="figures")
    assert (world.outside / "victim").read_text() == VICTIM
    assert sorted(os.listdir(world.out)) == ["README.md", "config.json", MANIFEST, "onnx"]
    (world.out / ".lfm2-export.draft").symlink_to(world.outside / "victim")
    write_artifact(world.out, {"fp32": "new"})
    assert (world.outside / "victim").read_text() == VICTIM
    assert sorted(os.listdir(world.out)) == ["README.md", "config.json", MANIFEST, "onnx"]


def test_figures_leave_what_a_killed_export_did(world: World) -> None:
    killed_writer(world)
    before = contents_of(world.root(BESIDE))
    Artifact.open(world.out).update(readme="figures")
    assert contents_of(world.root(BESIDE)) == before


# What a killed writer with the same key left

DATA, STEPS = {"onnx/model.onnx_data": 4}, [{"x": 1.0}, {"x": 2.0}]


def ledger_of(writer: ArtifactWriter) -> Ledger:
    return Ledger(writer.ledgers / "a.ledger", root=writer.root, sizes=DATA, key="k", steps=2, figures=["x"])


def killed_writer(world: World) -> Path:
    """Leaves a workspace with a ledger of two steps; returns the folder of ledgers."""
    writer = ArtifactWriter(world.out, record(), key="k")
    process = os.fork()
    if process == 0:
        writer.__enter__()
        write_program(writer, scheme="fp32")
        writer.path("onnx/model.onnx_data").write_bytes(b"done")
        header = json.dumps({"key": "k", "files": DATA}).encode()
        lines = b"".join(json.dumps(step).encode() + b"\n" for step in STEPS)
        (writer.ledgers / "a.ledger").write_bytes(header + b"\n" + lines)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
    (ledger,) = world.root(BESIDE).rglob("a.ledger")
    return ledger.parent


def linked(name: str) -> Callable[[World, Path], None]:
    def plant(world: World, ledgers: Path) -> None:
        path = ledgers.parent / name if name.startswith("files") else ledgers / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(world.outside / ("deep" if name == "files/onnx" else "victim"))

    return plant


def another_name(world: World, ledgers: Path) -> None:
    data = ledgers.parent / "files" / "onnx" / "model.onnx_data"
    data.unlink()
    data.hardlink_to(world.outside / "victim")


def ledgers_are_a_link(world: World, ledgers: Path) -> None:
    ledgers.rename(world.outside / "ledgers")
    ledgers.symlink_to(world.outside / "ledgers")


def fifo(name: str) -> Callable[[World, Path], None]:
    def plant(_: World, ledgers: Path) -> None:
        (ledgers / name).unlink(missing_ok=True)
        os.mkfifo(ledgers / name)

    return plant


def ledger_says(change: Callable[[bytes], bytes]) -> Callable[[World, Path], None]:
    return lambda _, ledgers: (ledgers / "a.ledger").write_bytes(change((ledgers / "a.ledger").read_bytes()))


STARTS_ANEW: dict[str, Callable[[World, Path], None]] = {
    "linked folder": linked("files/onnx"),
    "linked data": linked("files/onnx/model.onnx_data"),
    "linked ledger": linked("a.ledger"),
    "linked note": linked("checkpoint.json"),
    "linked draft": linked("a.draft"),
    "linked ledgers": ledgers_are_a_link,
    "data that has another name": another_name,
    "FIFO as ledger": fifo("a.ledger"),
    "FIFO as note": fifo("checkpoint.json"),
    "huge ledger": lambda _, ledgers: os.truncate(ledgers / "a.ledger", 1 << 40),
    "deep JSON": ledger_says(lambda data: data.splitlines()[0] + b"\n" + b"[" * 100_000 + b"\n"),
    "deep header": ledger_says(lambda data: b"[" * 100_000 + b"\n" + data),
    "more steps than there are": ledger_says(lambda data: data + data.splitlines(keepends=True)[-1] * 1000),
    "other figures": ledger_says(lambda data: data.replace(b'"x"', b'"y"')),
    "figures that are none": ledger_says(lambda data: data.replace(b"1.0", b'"a"')),
    "whole numbers": ledger_says(lambda data: data.replace(b"1.0", b"1" * 1000)),
}


def test_what_a_killed_writer_did_is_taken_up(world: World) -> None:
    """The control of what follows."""
    killed_writer(world)
    with ArtifactWriter(world.out, record(), key="k") as writer, ledger_of(writer) as ledger:
        assert list(ledger.done) == STEPS
        assert (writer.root / "onnx/model.onnx_data").read_bytes() == b"done"


@pytest.mark.parametrize("plant", STARTS_ANEW.values(), ids=STARTS_ANEW)
def test_an_export_takes_up_nothing_that_leads_elsewhere_or_is_no_ledger(
    world: World, plant: Callable[[World, Path], None]
) -> None:
    plant(world, killed_writer(world))
    victims = {name: (mode, content) for name, (mode, *_, content) in world.seen(world.outside).items()}
    with ArtifactWriter(world.out, record(), key="k") as writer:
        assert writer.confirm(record()) == record()
        writer.path("onnx/model.onnx")
        with ledger_of(writer) as ledger:
            assert ledger.done == ()
            write_program(writer, scheme="fp32", content="new")
            writer.path("onnx/model.onnx_data").write_bytes(b"next")
        writer.add_program(writer.programs[-1], ["onnx/model.onnx", "onnx/model.onnx_data"])
        writer.commit()
    after = {name: (mode, content) for name, (mode, *_, content) in world.seen(world.outside).items()}
    assert after == victims
    assert [program.scheme for program in Artifact.open(world.out).programs] == ["q4", "fp32"]
    assert (world.out / "onnx/model.onnx_data").read_bytes() == b"next"
    assert os.listdir(world.out.parent) == ["out"]


def test_snapshots_see_a_touched_file(world: World) -> None:
    """The control of every comparison here."""
    before = world.seen()
    os.utime(world.outside / "victim")
    assert world.seen() != before
    assert snapshot(world.outside)["victim"] == VICTIM.encode()
