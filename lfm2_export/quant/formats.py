"""How a weight matrix is stored, and the stored matrix itself.

In: a float32 weight [rows, in_features] and a format. Out: a ``QuantizedTensor`` (or a float array), the values that a
runtime will compute with, and how far they are from the weight. Codes are kept one per byte; packing them is the
business of a backend.

A group of ``group_size`` neighbours along in_features, or a whole row, shares a scale and a zero point:
weight = (code - zero_point) * scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2_export.errors import QuantizationError

ScaleDtype = Literal["float32", "float16", "bfloat16"]
FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
ScaleArray = npt.NDArray[np.floating[Any]]

GROUP_SIZES = (16, 32, 64, 128, 256)
_SCALE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
# The least scale is far above float32's subnormals, so that neither it nor its product with an activation is one;
# float16's subnormals are needed: weights below 4e-4 live there.
_LEAST_SCALE = {"float32": 2.0**-100, "float16": 2.0**-24, "bfloat16": 2.0**-100}
_GREATEST_SCALE = {"float32": 3.4028234e38, "float16": 65504.0, "bfloat16": 3.3895314e38}
_FLOAT16_LEAST_NORMAL = np.float32(2.0**-14)
_PIECE = 1 << 18  # weights held as temporaries at a time


@dataclass(frozen=True, kw_only=True)
class FloatFormat:
    """Weights as floating point numbers."""

    dtype: Literal["float32", "float16"]

    def bits_per_weight(self, in_features: int) -> float:
        return float(np.dtype(self.dtype).itemsize * 8)

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype}


@dataclass(frozen=True, kw_only=True)
class IntFormat:
    """Weights as unsigned codes of ``bits`` bits in groups of ``group_size`` along in_features; None: a row is a group.

    ``symmetric``: no zero points are stored, the zero point is 2^(bits-1). ``signed_scale``: a symmetric group may have
    a negative scale, so that its largest weight, of either sign, falls on the grid's longer half (llama.cpp's Q4_0 does
    that). ``bfloat16`` scales are float32 numbers with the lower 16 bits zero.
    """

    bits: Literal[4, 8]
    group_size: int | None = 32
    symmetric: bool
    scale_dtype: ScaleDtype = "float32"
    signed_scale: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise QuantizationError(f"bits={self.bits} is not supported; use 4 or 8")
        if self.group_size not in (*GROUP_SIZES, None):
            known = ", ".join(map(str, GROUP_SIZES))
            raise QuantizationError(f"group_size={self.group_size} is not supported; use one of {known}")
        if self.scale_dtype not in _SCALE_BITS:
            known = ", ".join(_SCALE_BITS)
            raise QuantizationError(f"scale_dtype={self.scale_dtype!r} is not supported; use one of {known}")
        if self.signed_scale and not self.symmetric:
            raise QuantizationError("signed_scale=True needs symmetric=True: a zero point already places the grid")

    @property
    def dtype(self) -> str:
        return f"int{self.bits}"

    @property
    def greatest_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle_code(self) -> int:
        """The zero point of every group where none is stored."""
        return 1 << (self.bits - 1)

    @property
    def greatest_scale(self) -> float:
        return _GREATEST_SCALE[self.scale_dtype]

    def bits_per_weight(self, in_features: int) -> float:
        """Bits per weight of a row of that width, with scales and zero points."""
        extra = _SCALE_BITS[self.scale_dtype] + (0 if self.symmetric else self.bits)
        return self.bits + extra / self.group_of(in_features)

    def group_of(self, in_features: int) -> int:
        """How many weights of a row of that width share a scale."""
        return self.group_size or in_features

    def groups(self, in_features: int, fqn: str) -> int:
        """Groups per row.

        Raises:
            QuantizationError: ``in_features`` is not a multiple of the group size.
        """
        size = self.group_of(in_features)
        if not in_features or in_features % size:
            raise QuantizationError(
                f"{fqn}: in_features={in_features} is not a multiple of group_size={self.group_size}; "
                f"pass {_group_size_hint(in_features)}exclude this layer"
            )
        return in_features // size

    def representable_scale(self, scale: FloatArray) -> FloatArray:
        """The nearest scales that ``scale_dtype`` holds: never zero, never infinite, and of its sign."""
        size = np.clip(np.abs(scale), _LEAST_SCALE[self.scale_dtype], self.greatest_scale, dtype=np.float32)
        # Groups of zeros have scales of either zero, and XNNPACK takes no negative ones.
        return np.copysign(_ROUND_SCALE[self.scale_dtype](size), scale + np.float32(0))

    def holds(self, other: IntFormat) -> bool:
        """Whether codes and scales of another format are, as they are, of this one."""
        same = (self.bits, self.group_size, self.symmetric) == (other.bits, other.group_size, other.symmetric)
        signs = self.signed_scale or not other.signed_scale
        return same and signs and self.scale_dtype in (other.scale_dtype, "float32")

    def to_json(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": self.scale_dtype,
            "signed_scale": self.signed_scale,
        }


WeightFormat = FloatFormat | IntFormat


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedTensor:
    """A quantized matrix: ``qdata`` uint8 [rows, in_features], one code per byte; ``scale`` [rows, groups], float16
    where the format says so, else float32; ``zero_point`` uint8 [rows, groups], None in symmetric formats."""

    qdata: ByteArray
    scale: ScaleArray
    zero_point: ByteArray | None
    format: IntFormat

    def __post_init__(self) -> None:
        groups = (self.qdata.shape[0], self.format.groups(self.qdata.shape[1], "qdata"))
        assert self.qdata.dtype == np.uint8
        assert self.scale.shape == groups
        assert (self.zero_point is None) == self.format.symmetric
        assert self.zero_point is None or (self.zero_point.shape == groups and self.zero_point.dtype == np.uint8)

    @property
    def shape(self) -> tuple[int, int]:
        return self.qdata.shape[0], self.qdata.shape[1]

    def rows(self, rows: slice) -> QuantizedTensor:
        """Some of the rows, as views."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return QuantizedTensor(
            qdata=self.qdata[rows], scale=self.scale[rows], zero_point=zero_point, format=self.format
        )

    def dequantize(self) -> FloatArray:
        """The weights that a runtime computes with, float32 [rows, in_features]."""
        out = np.empty(self.shape, np.float32)
        for piece in _row_pieces(self.shape):
            part = self.rows(piece)
            groups = out[piece].reshape(*part.scale.shape, -1)
            zero_point = self.format.middle_code if part.zero_point is None else part.zero_point[..., None]
            np.subtract(part.qdata.reshape(groups.shape), zero_point, out=groups, dtype=np.float32)
            np.multiply(groups, part.scale[..., None].astype(np.float32), out=groups)
        return out


class Codes(NamedTuple):
    """What a file that is quantized already holds of a matrix.

    ``qdata`` uint8 [rows, columns], a code a byte; ``scale`` float32 [rows, groups], which may be zero or not finite;
    ``zero_point`` uint8 [rows, groups], None where it is the middle code.
    """

    qdata: ByteArray
    scale: FloatArray
    zero_point: ByteArray | None = None

    def in_groups_of(self, size: int) -> Codes:
        """The same values in groups that each group is a whole number of."""
        times = self.qdata.shape[1] // (self.scale.shape[1] * size)
        if times == 1:
            return self
        zero_point = None if self.zero_point is None else np.repeat(self.zero_point, times, axis=1)
        return Codes(self.qdata, np.repeat(self.scale, times, axis=1), zero_point)


@dataclass(frozen=True, kw_only=True)
class StorageError:
    """What storing cost: sums over the weights, so that the parts of a tensor, or tensors, can be added up."""

    squared_error: float = 0.0
    squared_weight: float = 0.0
    greatest_error: float = 0.0

    def __add__(self, other: StorageError) -> StorageError:
        return StorageError(
            squared_error=self.squared_error + other.squared_error,
            squared_weight=self.squared_weight + other.squared_weight,
            greatest_error=max(self.greatest_error, other.greatest_error),
        )

    @property
    def relative_rms(self) -> float:
        """Root of squared error over squared weight; 0 for weights that are all zero and stored so."""
        if self.squared_error == 0.0:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else math.inf


def storage_error(weight: FloatArray, stored: QuantizedTensor | npt.NDArray[np.floating[Any]]) -> StorageError:
    """How far the stored weights are from ``weight``, both [rows, in_features]. Sums of a piece are float32, about five
    digits: in float64 this would take longer than quantizing."""
    total = StorageError()
    for piece in _row_pieces((weight.shape[0], weight.shape[1])):
        if isinstance(stored, QuantizedTensor):
            values = stored.rows(piece).dequantize()
        else:
            values = stored[piece].astype(np.float32)  # a copy
        part = weight[piece]
        difference = np.subtract(part, values, out=values)
        total += StorageError(
            squared_error=float(np.vdot(difference, difference)),
            squared_weight=float(np.vdot(part, part)),
            greatest_error=float(max(difference.max(initial=0.0), -difference.min(initial=0.0))),
        )
    return total


def to_float(weight: FloatArray, format: FloatFormat, *, fqn: str = "weight") -> npt.NDArray[np.floating[Any]]:
    """``weight`` of any shape in the format's dtype.

    Raises:
        QuantizationError: a weight is NaN or infinite, or beyond the dtype's range.
    """
    least, greatest = float(np.min(weight, initial=0.0)), float(np.max(weight, initial=0.0))
    limit = float(np.finfo(format.dtype).max)
    if not (math.isfinite(least) and math.isfinite(greatest)):
        raise QuantizationError(f"{fqn}: holds NaN or infinity; the checkpoint is damaged")
    if max(-least, greatest) > limit:
        raise QuantizationError(
            f"{fqn}: holds {max(-least, greatest):.6g}, beyond {format.dtype}'s {limit:.6g}; use another scheme"
        )
    stored: npt.NDArray[np.floating[Any]] = weight.astype(format.dtype)
    return stored


def _group_size_hint(in_features: int) -> str:
    fitting = [size for size in GROUP_SIZES if in_features and in_features % size == 0]
    best = 32 if 32 in fitting else max(fitting, default=None)
    return f"--group-size {best} or " if best else ""


def _row_pieces(shape: tuple[int, int]) -> Iterator[slice]:
    step = max(1, _PIECE // max(1, shape[1]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _round_to_float16(size: FloatArray) -> FloatArray:
    """Nearest, but upwards among the coarse subnormals: rounding 1.5e-7 to 1.2e-7 would cut off a fifth of a range."""
    rounded = size.astype(np.float16).astype(np.float32)
    cut = (rounded < size) & (size < _FLOAT16_LEAST_NORMAL)
    return np.where(cut, rounded + np.float32(_LEAST_SCALE["float16"]), rounded)


def _round_to_bfloat16(size: FloatArray) -> FloatArray:
    """Nearest, ties to even; ``size`` is positive and below bfloat16's greatest number."""
    raw = size.view(np.uint32)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


_ROUND_SCALE = {
    "float32": lambda size: size,
    "float16": _round_to_float16,
    "bfloat16": _round_to_bfloat16,
}
