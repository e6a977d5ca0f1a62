"""Changes are the same for the same seed, mostly leave what they change readable, and never fail."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import bundle
from tests.fuzz.bundle import Part
from tests.fuzz.json_mutation import EXTREMES, dumps, loads, mutate_json
from tests.fuzz.targets import TARGETS, kept, load

_ROUNDS = 60


@pytest.mark.parametrize("target", TARGETS)
def test_every_change_is_another_input_and_the_same_again(target: str) -> None:
    mutate = load(target).mutate
    changed = 0
    for path in kept(target):
        data = path.read_bytes()
        for seed in range(_ROUNDS):
            mutated = mutate(data, Random(seed))
            assert mutated == mutate(data, Random(seed))
            changed += mutated != data
    share = changed / (_ROUNDS * len(kept(target)))
    print(f"{target}: {share:.0%} changed")
    assert share > 0.8


def test_changed_json_is_json() -> None:
    data = json.dumps({"a": [1, {"b": "c", "d": None}], "e": 1.5}).encode()
    mutated = {mutate_json(data, Random(seed), ["word"]) for seed in range(1000)}
    for text in mutated:
        if text and len(text) < 1000:  # longer ones are nested or have digits beyond what Python reads
            loads(text)
    print(f"{len(mutated)} different of 1000")
    assert len(mutated) > 300


def test_extremes_are_written_as_they_are_meant() -> None:
    assert loads(dumps([float("1e300"), "\ud800", None]).encode()) == [1e300, "\ud800", None]
    assert '"\\ud800"' in [dumps(value) for value in EXTREMES]
    assert dumps(loads(b'{"a": 1, "a": [true, {}]}')) == '{"a": 1, "a": [true, {}]}'


def test_a_folder_comes_back_from_its_parts(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    parts = [
        Part(b"config.json", b"{}\n"),
        Part(b"sub/model.safetensors", header),
        Part(b"link -> config.json", b""),
        Part(b"pipe (fifo)", b""),
        Part(b"../outside", b"x"),
    ]
    data = bundle.join(parts)
    assert bundle.split(data) == parts
    folder = tmp_path / "folder"
    folder.mkdir()
    bundle.write(folder, data, root=tmp_path)
    assert (folder / "config.json").read_bytes() == (folder / "link").read_bytes() == b"{}\n"
    shard = (folder / "sub" / "model.safetensors").read_bytes()
    assert shard == len(header).to_bytes(8, "little") + header + bytes(8)
    assert (folder / "pipe").is_fifo()
    assert not (tmp_path / "outside").exists()


def test_no_folder_writes_outside_of_itself(tmp_path: Path) -> None:
    """Whatever the parts say: through a link, through a folder that is one, by a name that climbs, over a pipe."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for path in (root / "folder", elsewhere):
        path.mkdir(parents=True)
    (elsewhere / "file").write_bytes(b"kept")
    (root / "outside").write_bytes(b"kept")
    titles = [
        *(f"a -> {elsewhere}/file", "a", f"b -> {elsewhere}", "b/file", "b/new", "c -> ../../elsewhere", "c/file"),
        *("d -> ../outside", "d", "e -> ..", "e/outside", "e/new", "f -> d", "f", "g (fifo)", "g", "../outside"),
        *(f"{elsewhere}/file", "h -> ../missing", "h", "i -> /dev/zero", "i", "j/../../outside", "k -> k", "k"),
    ]
    data = bundle.join(Part(title.encode(), b"overwritten") for title in titles)
    bundle.write(root / "folder", data, root=root)
    assert (elsewhere / "file").read_bytes() == (root / "outside").read_bytes() == b"kept"
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    beside = {name for name in made if not name.startswith("root/folder/")}
    assert beside == {"elsewhere", "elsewhere/file", "root", "root/folder", "root/outside"}
    links = {path.name for path in (root / "folder").iterdir() if path.is_symlink()}
    print(f"links made: {sorted(links)}")
    assert not links & {"a", "b", "c"}


@pytest.mark.parametrize(
    "data", [b"", b"no header", b"=== a", b"=== a\n", b"=== \n", b"=== a\n=== b", b"=== a\n\n=== b\nx"]
)
def test_parts_come_back_from_any_bytes(data: bytes) -> None:
    parts = bundle.split(data)
    assert len(parts) == data.count(b"===")
    assert bundle.split(bundle.join(parts)) == parts
