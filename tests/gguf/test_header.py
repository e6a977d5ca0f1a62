"""Headers that lie: refused in a line, at once, whatever they count."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import CheckpointError
from lfm2_export.gguf.weights import read_gguf
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.gguf.written import write


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def setting(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(settings: list[bytes], tensors: list[bytes], *, counts: tuple[int, int] | None = None) -> bytes:
    tensor_count, setting_count = counts or (len(tensors), len(settings))
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, setting_count) + b"".join(settings + tensors)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("valid")
    checkpoint = open_checkpoint(write_random_checkpoint(folder / "checkpoint", tiny_config("lfm2"), seed=0))
    return write(folder / "model.gguf", checkpoint).read_bytes()


HUGE = struct.pack("<Q", 2**63)
CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is truncated"),
    "other magic": (b"GGML" + bytes(20), "is no GGUF file"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensors without end": (header([], [], counts=(2**62, 0)), "states 4611686018427387904 tensors"),
    "settings without end": (header([], [], counts=(0, 2**62)), "and 4611686018427387904 settings"),
    "a long key": (header([HUGE + b"x"], []), "has a text of 9223372036854775808 bytes"),
    "a long text": (header([setting("a", 8, HUGE)], []), "has a text of 9223372036854775808 bytes"),
    "a long list": (header([setting("a", 9, struct.pack("<I", 4) + HUGE)], []), "with 9223372036854775808 entries"),
    "a list of texts": (
        header([setting("a", 9, struct.pack("<IQ", 8, 3_999_999))], []),
        "is truncated",
    ),
    "lists in lists": (header([setting("a", 9, struct.pack("<IQIQ", 9, 1, 9, 1))], []), "list of the unknown type 9"),
    "an unknown type": (header([setting("a", 99, b"")], []), "in the unknown type 99"),
    "a key twice": (header([setting("a", 0, b"\0"), setting("a", 0, b"\0")], []), "states a twice"),
    "no UTF-8": (header([struct.pack("<Q", 1) + b"\xff"], []), "not UTF-8"),
    "a tensor twice": (header([], [tensor("a", (1,)), tensor("a", (1,))]), "lists a twice"),
    "no axes": (header([], [tensor("a", ())]), "0 axes"),
    "many axes": (header([], [tensor("a", (1,) * 5)]), "5 axes"),
    "a huge shape": (header([], [tensor("a", (2**40, 2**40))]), "gives a the shape"),
    "an empty shape": (header([], [tensor("a", (0, 4))]), "gives a the shape"),
    "an odd offset": (header([], [tensor("a", (1,), offset=4)]), "no multiple of 32"),
    "an offset beyond": (header([], [tensor("a", (4,), offset=2**40)]), "is truncated"),
    "an unknown tensor type": (header([], [tensor("a", (4,), kind=77)]), "is of the unknown type 77"),
    "half a block": (header([], [tensor("a", (16,), kind=2)]), "no multiple of the 32 in a block of Q4_0"),
    "an overlap": (header([], [tensor("a", (64,)), tensor("b", (4,), offset=32)]) + bytes(999), "overlaps"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_header_that_lies_is_refused_at_once(name: str, tmp_path: Path) -> None:
    data, words = CASES[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400
    assert time.perf_counter() - start < 5


def test_a_file_that_ends_early_is_refused_wherever_it_ends(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for end in range(0, len(valid), max(1, len(valid) // 60)):
        path.write_bytes(valid[:end])
        with pytest.raises(CheckpointError, match=r"truncated|is no GGUF"):
            open_checkpoint(path)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("elsewhere.gguf")])
def test_only_a_regular_file_of_that_name_is_read(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_file_that_changes_while_it_is_read_is_noticed(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(valid)
    found = open_checkpoint(path)
    path.write_bytes(valid + b"x")
    with pytest.raises(CheckpointError, match="was changed while it was being read"):
        found.read(next(iter(found.tensors)))
