"""A weight that is packed in several stored tensors, read as one: as codes, or as the float32 values they stand for.

In: a ``PackedTensor``, which says where codes, scales and zero points lie, and the shards. Out: ``Codes`` and float32
rows. The value of a code is (code - zero point) * scale in float32. The libraries that pack compute the same in the
scales' dtype and round there, which is the only difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lfm2_export import paths
from lfm2_export.errors import CheckpointError
from lfm2_export.messages import named, shown
from lfm2_export.quant.formats import ByteArray, Codes, FloatArray
from lfm2_export.safetensors_file import ComputedTensor, Shard, TensorInfo, read_stored

_BLOCK_VALUES = 1 << 18
_INTEGERS: dict[str, np.dtype[Any]] = {"I32": np.dtype("<u4"), "I64": np.dtype("<i8")}
_SCALES = ("F16", "BF16", "F32")


class IntegerInfo(TensorInfo):
    """A stored tensor of integers: int32 as the words that they are, int64 as numbers."""

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        return _INTEGERS[self.dtype]

    @property
    def raw_dtype(self) -> np.dtype[Any]:
        return self.stored_dtype


class Layout(Protocol):
    """How a tool arranges the parts of a packed weight."""

    def codes(self, tensor: PackedTensor, weights: PackedWeights, block_rows: int) -> Iterator[ByteArray]:
        """Codes, uint8 [rows, columns], in blocks of so many rows."""

    def scales(self, tensor: PackedTensor, weights: PackedWeights) -> FloatArray:
        """float32 [rows, scales of a row]."""

    def zero_points(self, tensor: PackedTensor, weights: PackedWeights) -> ByteArray | None:
        """uint8 [rows, scales of a row]; None where they are all the middle code.

        Raises:
            CheckpointError: one is no code.
        """


@dataclass(frozen=True, kw_only=True)
class PackedTensor(ComputedTensor):
    """Some rows of a packed weight: ``first_row`` and the ``shape[0] - 1`` after it.

    ``parts``: the whole tensors that it lies in, by what they are to the layout. ``step``: how many neighbours in a row
    share a scale. ``symmetric``: whether every zero point is the middle code. ``file`` and ``offset`` are those of the
    codes, ``nbytes`` counts all parts.
    """

    bits: int
    step: int
    symmetric: bool
    layout: Layout
    parts: Mapping[str, TensorInfo]
    first_row: int = 0

    @property
    def row_range(self) -> slice:
        return slice(self.first_row, self.first_row + self.shape[0])

    def part(self, name: str, shape: tuple[int, ...], first_element: int) -> PackedTensor:
        """Whole rows only."""
        columns = self.shape[1]
        assert shape[1:] == (columns,)
        nbytes = self.nbytes * shape[0] // max(1, self.shape[0])
        first = self.first_row + first_element // columns
        return replace(self, name=name, shape=shape, nbytes=nbytes, first_row=first)


class PackedWeights:
    """Reads packed weights; what ``Shard`` is for others. Safe from several threads."""

    def __init__(self, shards: Mapping[Path, Shard]):
        self._shards = shards

    def integers(self, info: TensorInfo) -> np.ndarray:
        """A stored tensor of integers."""
        return read_stored(self._shards[info.file], as_integers(info))

    def numbers(self, info: TensorInfo) -> FloatArray:
        """A stored tensor of floating point numbers, as float32."""
        return self._shards[info.file].float32(info)

    def code_blocks(self, info: TensorInfo, rows: int) -> Iterator[Codes]:
        """Codes, with a scale for every ``step`` of them, in blocks of so many rows."""
        assert isinstance(info, PackedTensor)
        scale, zero_point = info.layout.scales(info, self), info.layout.zero_points(info, self)
        first = 0
        for codes in info.layout.codes(info, self, rows):
            these = slice(first, first + len(codes))
            first += len(codes)
            yield Codes(codes, scale[these], None if zero_point is None else zero_point[these])

    def row_blocks(self, info: TensorInfo, rows: int) -> Iterator[FloatArray]:
        """float32 values, in blocks of so many rows."""
        assert isinstance(info, PackedTensor)
        middle = 1 << (info.bits - 1)
        for codes in self.code_blocks(info, rows):
            zero_point = middle if codes.zero_point is None else codes.zero_point[..., None]
            groups = codes.qdata.reshape(*codes.scale.shape, info.step)
            with np.errstate(all="ignore"):  # a damaged scale may be anything: values are looked at where they are used
                values = np.subtract(groups, zero_point, dtype=np.float32) * codes.scale[..., None]
            yield values.reshape(codes.qdata.shape)

    def float32(self, info: TensorInfo) -> FloatArray:
        """The values of a whole tensor."""
        out, first = np.empty(info.shape, np.float32), 0
        for block in self.row_blocks(info, max(1, _BLOCK_VALUES // max(1, info.shape[1]))):
            out[first : first + len(block)] = block
            first += len(block)
        return out

    def stored(self, info: TensorInfo) -> FloatArray:
        """The same: there are no values of another dtype."""
        return self.float32(info)


def as_integers(info: TensorInfo) -> IntegerInfo:
    return IntegerInfo(
        name=info.name, dtype=info.dtype, shape=info.shape, file=info.file, offset=info.offset, nbytes=info.nbytes
    )


def packed_tensor(
    name: str,
    shape: tuple[int, int],
    *,
    tool: str,
    bits: int,
    step: int,
    symmetric: bool,
    layout: Layout,
    parts: Mapping[str, TensorInfo],
) -> PackedTensor:
    """A whole weight; ``parts`` begin with that of the codes."""
    codes = next(iter(parts.values()))
    groups = "one scale a row" if step == shape[1] else f"groups of {step}"
    return PackedTensor(
        name=name,
        dtype=f"{tool} int{bits}, {groups}",
        shape=shape,
        file=codes.file,
        offset=codes.offset,
        nbytes=sum(info.nbytes for info in parts.values()),
        bits=bits,
        step=step,
        symmetric=symmetric,
        layout=layout,
        parts=parts,
    )


def required(stored: Mapping[str, TensorInfo], name: str, of: TensorInfo) -> TensorInfo:
    """A part that must be there beside ``of``.

    Raises:
        CheckpointError: it is not.
    """
    if name not in stored:
        raise CheckpointError(
            f"{paths.shown(of.file)}: {named(of.name)} is there without {named(name)}; download it again"
        )
    return stored[name]


def check_part(info: TensorInfo, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Refuses a part of another dtype or shape; nothing of it was read yet.

    Raises:
        CheckpointError: names the part, what it is and what it should be.
    """
    if info.dtype not in dtypes or info.shape != shape:
        raise CheckpointError(
            f"{paths.shown(info.file)}: {named(info.name)} is {info.dtype} {shown(list(info.shape))}, expected "
            f"{' or '.join(dtypes)} {shown(list(shape))}; the file was altered, download it again"
        )


def check_scales(info: TensorInfo, shape: tuple[int, ...]) -> None:
    check_part(info, _SCALES, shape)


def check_order(info: TensorInfo, columns: int, step: int, weights: PackedWeights) -> None:
    """Refuses columns that were put into groups by importance: those of a group are not neighbours.

    Raises:
        CheckpointError: names the tensor that says so, or says something else than the groups of columns.
    """
    check_part(info, ("I32",), (columns,))
    if not np.array_equal(weights.integers(info), np.arange(columns, dtype=np.uint32) // step):
        raise CheckpointError(
            f"{paths.shown(info.file)}: {named(info.name)} puts columns into groups by their importance (desc_act, "
            "actorder=group), which no operator here computes with; export the checkpoint that it was made of"
        )


def is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and math.prod(info.shape) > 0
