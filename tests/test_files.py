"""Files of strangers: regular ones only, inside of their folder only, of bounded size."""

import os
import sys
from pathlib import Path

import pytest

from lfm2_export import files
from lfm2_export.errors import CheckpointError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and FIFOs")


def read(path: Path, limit: int = 100) -> bytes:
    return files.read_bytes(path, path.parent, CheckpointError, limit=limit)


def test_a_plain_file_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert read(tmp_path / "a") == b"abc"
    assert read(tmp_path / "a", limit=3) == b"abc"


def test_a_file_above_the_limit_is_not_read(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CheckpointError, match=r"a: has 1099511627776 bytes, more than the 100 that"):
        read(tmp_path / "a")


def test_a_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(CheckpointError, match="a: is not a regular file"):
        read(tmp_path / "a")


@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/environ", "/etc/hostname", "../outside", ".."])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path, target):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    (folder / "a").symlink_to(target)
    with pytest.raises(CheckpointError, match="a: is a link that leaves its folder"):
        read(folder / "a")


def test_a_folder_that_is_a_link_to_elsewhere_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").write_bytes(b"secret")
    (tmp_path / "folder" / "sub").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        files.read_bytes(tmp_path / "folder" / "sub" / "a", tmp_path / "folder", CheckpointError, limit=100)


def test_links_within_the_folder_and_the_folder_itself_as_a_link_are_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"abc")
    (tmp_path / "folder" / "b").symlink_to("a")
    (tmp_path / "link").symlink_to("folder")
    assert read(tmp_path / "link" / "b") == b"abc"


def test_the_hub_caches_links_to_its_blobs_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "hash").write_bytes(b"abc")
    (snapshot / "a").symlink_to(Path("..", "..", "blobs", "hash"))
    assert read(snapshot / "a") == b"abc"
    (snapshot / "b").symlink_to(Path("..", "..", "refs"))
    with pytest.raises(CheckpointError, match="leaves its folder"):
        read(snapshot / "b")


def test_a_folder_of_a_snapshot_of_the_hub_is_one_too(tmp_path):
    folder = tmp_path / "models--a--b" / "snapshots" / ("0" * 40) / "sub"
    folder.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "hash").write_bytes(b"abc")
    (folder / "a").symlink_to(Path("..", "..", "..", "blobs", "hash"))
    assert read(folder / "a") == b"abc"


def test_a_folder_of_blobs_that_is_a_link_is_none_of_the_hub(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").symlink_to("/etc")
    (snapshot / "a").symlink_to(Path("..", "..", "blobs", "hostname"))
    with pytest.raises(CheckpointError, match="a: is a link that leaves its folder"):
        read(snapshot / "a")


def test_a_file_that_another_library_reads_is_checked_first(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    files.check(tmp_path / "a", tmp_path, CheckpointError, limit=3)
    with pytest.raises(CheckpointError, match="a: has 3 bytes, more than the 2 that"):
        files.check(tmp_path / "a", tmp_path, CheckpointError, limit=2)


def test_loops_of_links_missing_files_and_folders_are_said_in_a_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    for name, text in {"loop": "loop", "none": "No such file", "folder": "folder"}.items():
        with pytest.raises(CheckpointError, match=text):
            read(tmp_path / name)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{", '{"a": "\\ud800', "\xff"])
def test_what_is_not_json_is_refused_in_a_line(tmp_path, text):
    (tmp_path / "a").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"a: is not JSON"):
        files.read_json_object(tmp_path / "a", tmp_path, CheckpointError)


def test_json_that_is_no_object_is_shown_short(tmp_path):
    (tmp_path / "a").write_text('"' + "x" * 10**6 + '"')
    with pytest.raises(CheckpointError, match=r"a: holds 'xxx.*, not a JSON object") as caught:
        files.read_json_object(tmp_path / "a", tmp_path, CheckpointError)
    assert len(str(caught.value)) < 380
