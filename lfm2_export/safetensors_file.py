"""One safetensors file: its header, checked before anything is believed, and reads of exact byte ranges.

In: a path. Out: ``Shard`` (tensor names with dtype, shape and place in the file) and numpy arrays, read with
``readinto``. Nothing is memory-mapped: a mapped page counts as resident memory, and a file that shrinks under a map
kills the process.

Format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length N, N bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}`` with offsets counted from byte 8 + N, then the data without
holes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np

from lfm2_export import files, json_values, paths
from lfm2_export.config import MOST_TENSORS
from lfm2_export.errors import CheckpointError
from lfm2_export.messages import named, shown

# MOST_TENSORS at 128 bytes each; 16 times the header of the 24B, were it one file. The format allows 100 MB, which
# could take 4 GB parsed.
MAX_HEADER_BYTES = 16 << 20
# No tensor of the family has more than 3.
_MOST_AXES = 8

# bfloat16 has no numpy dtype: its bits are read as uint16.
STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
# Bits of a value in every dtype of the format: tensors that the model does not use may have any.
_BITS = {
    **{name: 8 * dtype.itemsize for name, dtype in STORED_DTYPES.items()},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "U32": 32, "I32": 32},
    **{"U64": 64, "I64": 64, "C64": 64},
}

# 512 KiB of bf16 and its 1 MiB of fp32 stay in a core's cache: twice as fast as whole tensors.
_BLOCK_BYTES = 1 << 19


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies. ``offset`` counts from the start of ``file``; ``dtype`` is the format's name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def is_readable(self) -> bool:
        """Whether its values are floats of a kind that is read."""
        return self.dtype in STORED_DTYPES

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        return STORED_DTYPES[self.dtype]

    @property
    def raw_dtype(self) -> np.dtype[Any]:
        """What ``read_stored`` gives: the stored dtype, but float32 for float64."""
        return STORED_DTYPES["F32" if self.dtype == "F64" else self.dtype]

    def rows(self, rows: slice | None) -> TensorInfo:
        """The part that holds a range of the first axis."""
        if rows is None:
            return self
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"{self.name}: rows must have step 1, not {step}")
        return self.part(self.name, (max(stop - start, 0), *self.shape[1:]), start * math.prod(self.shape[1:]))

    def part(self, name: str, shape: tuple[int, ...], first_element: int) -> TensorInfo:
        """The contiguous tensor of ``shape`` that starts ``first_element`` values into this one."""
        bits = _BITS[self.dtype]
        offset = self.offset + first_element * bits // 8
        return replace(self, name=name, shape=shape, offset=offset, nbytes=math.prod(shape) * bits // 8)


class ComputedTensor(TensorInfo):
    """One whose values are computed, as float32, while they are read."""

    @property
    def is_readable(self) -> bool:
        return True

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        return np.dtype("<f4")

    @property
    def raw_dtype(self) -> np.dtype[Any]:
        return self.stored_dtype


class WeightFile(Protocol):
    """A file that tensors are read from. ``real`` is its path without links, ``identity`` what tells a later change."""

    @property
    def path(self) -> Path: ...

    @property
    def real(self) -> Path: ...

    @property
    def identity(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A safetensors file as its header describes it, a ``WeightFile``; ``metadata`` is what it says of itself, as it
    stands."""

    path: Path
    real: Path
    identity: tuple[int, ...]
    tensors: dict[str, TensorInfo]
    metadata: Any = None

    def stored(self, info: TensorInfo) -> np.ndarray:
        """A tensor as stored (``read_stored``)."""
        return read_stored(self, info)

    def float32(self, info: TensorInfo) -> np.ndarray:
        """A tensor as float32."""
        return read_float32(self, info)

    def row_blocks(self, info: TensorInfo, rows: int) -> Iterator[np.ndarray]:
        """A tensor as stored, in blocks of so many rows (``read_row_blocks``)."""
        return read_row_blocks(self, info, rows)


def read_shard(path: Path) -> Shard:
    """Reads and checks a file's header.

    Raises:
        CheckpointError: the file is missing, truncated or altered.
    """
    real = files.inside(path, path.parent, CheckpointError)
    with files.open_regular(path, path.parent, CheckpointError, real=real) as file:
        status = os.fstat(file.fileno())
        header, data_start = _read_header(path, file, status.st_size)
    tensors, metadata = _parse_header(path, header, data_start)
    _check_layout(path, tensors, data_start, status.st_size)
    return Shard(path=path, real=real, identity=file_identity(status), tensors=tensors, metadata=metadata)


def read_stored(shard: WeightFile, info: TensorInfo) -> np.ndarray:
    """The tensor as stored; bfloat16 as its bits in uint16, float64 as float32 (what does not fit becomes infinite).

    Raises:
        CheckpointError: the file changed since its header was read.
    """
    out = np.empty(info.shape, info.raw_dtype)
    flat = out.reshape(-1)
    done = 0
    for block in map(_narrowed, read_blocks(shard, info, _BLOCK_BYTES)):
        flat[done : done + block.size] = block
        done += block.size
    return out


def read_row_blocks(shard: WeightFile, info: TensorInfo, rows: int) -> Iterator[np.ndarray]:
    """The tensor as stored (see ``read_stored``), in blocks of so many rows, the last one shorter. The next block
    overwrites the one before.

    Raises:
        CheckpointError: the file changed since its header was read.
    """
    row_bytes = math.prod(info.shape[1:]) * info.stored_dtype.itemsize
    for block in map(_narrowed, read_blocks(shard, info, rows * row_bytes)):
        yield block.reshape(-1, *info.shape[1:])


def read_float32(shard: WeightFile, info: TensorInfo) -> np.ndarray:
    """The tensor as float32, converted block by block: the stored bytes never stand in memory beside the result.

    Raises:
        CheckpointError: the file changed since its header was read.
    """
    out = np.empty(info.shape, np.float32)
    flat = out.reshape(-1)
    bits = flat.view(np.uint32)
    done = 0
    for block in map(_narrowed, read_blocks(shard, info, _BLOCK_BYTES)):
        if info.dtype == "BF16":
            part = bits[done : done + block.size]
            part[...] = block
            part <<= 16
        else:
            flat[done : done + block.size] = block
        done += block.size
    return out


def _narrowed(block: np.ndarray) -> np.ndarray:
    """float64 as float32."""
    if block.dtype != np.float64:
        return block
    with np.errstate(over="ignore"):  # a value that does not fit is infinite, and refused as such
        return block.astype(np.float32)


def read_blocks(shard: WeightFile, info: TensorInfo, block_bytes: int) -> Iterator[np.ndarray]:
    """A tensor's stored values in order, in blocks that share one buffer."""
    buffer = np.empty(min(block_bytes, max(info.nbytes, 1)), np.uint8)
    with files.open_regular(shard.path, shard.path.parent, CheckpointError, real=shard.real) as file:
        _check_unchanged(shard, file)
        file.seek(info.offset)
        for done in range(0, info.nbytes, block_bytes):
            block = buffer[: min(block_bytes, info.nbytes - done)]
            _read_exactly(info, file, block.data)
            yield block.view(info.stored_dtype)
        _drop_from_page_cache(file, info.offset, info.nbytes)


def read_into(shard: WeightFile, info: TensorInfo, out: np.ndarray) -> None:
    """A tensor's bytes as they are, into a contiguous array of its size.

    Raises:
        CheckpointError: the file changed since its header was read.
    """
    if info.nbytes != out.nbytes:
        raise ValueError(f"{info.name}: has {info.nbytes} bytes, not the {out.nbytes} of the array")
    with files.open_regular(shard.path, shard.path.parent, CheckpointError, real=shard.real) as file:
        _check_unchanged(shard, file)
        file.seek(info.offset)
        _read_exactly(info, file, out.reshape(-1).view(np.uint8).data)


def _read_exactly(info: TensorInfo, file: FileIO, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise _damaged(info.file, f"ends inside {named(info.name)}")
        done += count


def _check_unchanged(shard: WeightFile, file: FileIO) -> None:
    if file_identity(os.fstat(file.fileno())) != shard.identity:
        raise CheckpointError(
            f"{paths.shown(shard.path)}: was changed while it was being read; leave it alone and start again"
        )


def file_identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _drop_from_page_cache(file: FileIO, offset: int, nbytes: int) -> None:
    """A weight is read once: its pages need not push out the ones that the machine's other work wants."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)


def _read_header(path: Path, file: FileIO, size: int) -> tuple[bytes, int]:
    start = file.read(8)
    if start == b"version ":
        raise CheckpointError(
            f"{paths.shown(path)}: is a git-lfs pointer, not the weights; run `git lfs pull` in its folder"
        )
    if len(start) < 8:
        raise _damaged(path, f"is truncated ({size} bytes, no header)")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        raise _damaged(
            path,
            f"states a header of {length} bytes, at most {MAX_HEADER_BYTES} are read; it is not a safetensors file "
            "or was altered",
        )
    if 8 + length > size:
        raise _damaged(path, f"is truncated ({size} bytes, its header alone needs {8 + length})")
    header = bytearray()
    while len(header) < length and (piece := file.read(length - len(header))):
        header += piece
    return bytes(header), 8 + length


def _damaged(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{paths.shown(path)}: {fault}; download it again")


def _parse_header(path: Path, header: bytes, data_start: int) -> tuple[dict[str, TensorInfo], Any]:
    try:
        entries = json_values.parse(header, pairs_hook=_refuse_duplicates)
    except json_values.JsonError as error:
        raise _damaged(path, f"its header {error}") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = entries.pop("__metadata__", None)
    if len(entries) > MOST_TENSORS:
        raise _damaged(path, f"its header lists {len(entries)} tensors, more than the {MOST_TENSORS} that are read")
    return {name: _tensor_info(path, name, entry, data_start) for name, entry in entries.items()}, metadata


def _refuse_duplicates(pairs: json_values.Pairs) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise json_values.JsonError(f"names {named(repeated)} twice")
    return entries


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"the header's entry {named(name)} is damaged ({shown(entry)})")
    if dtype not in _BITS:
        raise _damaged(path, f"{named(name)} is stored as {named(dtype)}, which the format does not know")
    begin, end = offsets
    bits = math.prod(shape) * _BITS[dtype]
    needed = bits // 8
    if end - begin != needed or bits % 8:
        raise _damaged(
            path,
            f"{named(name)} has data_offsets {offsets} ({end - begin} bytes), its shape {shown(shape)} in {dtype} "
            f"needs {needed} bytes; the file was altered",
        )
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), file=path, offset=data_start + begin, nbytes=needed)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    """Few of them: the product of ten thousand axes takes minutes."""
    if not isinstance(value, list) or len(value) > _MOST_AXES:
        return False
    return all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """The data must follow the header without holes or overlaps and end where the file ends, as the format says."""
    position = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            kind = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            begin = info.offset - data_start
            offsets = [begin, begin + info.nbytes]
            raise _damaged(path, f"{named(info.name)} at data_offsets {offsets} {kind}; the file was altered")
        position += info.nbytes
    if position > size:
        raise _damaged(path, f"is truncated ({size} bytes of {position})")
    if position < size:
        raise _damaged(path, f"has {size - position} bytes after its last tensor; the file was altered")
