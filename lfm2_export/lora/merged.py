"""A weight with what an adapter adds to it, read like any other: W + scale * B A in float32.

In: where W, A and B lie. Out: float32 rows, computed block by block when they are asked for. peft adds the same product
and rounds the sum to the base's dtype; here it stays as it is until the scheme stores it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lfm2_export import paths
from lfm2_export.errors import CheckpointError
from lfm2_export.messages import named
from lfm2_export.quant.formats import FloatArray
from lfm2_export.safetensors_file import ComputedTensor, Shard, TensorInfo

_BLOCK_VALUES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class MergedTensor(ComputedTensor):
    """Some whole rows of a merged matrix: those of ``base``, from row ``first_row`` of ``b`` on. ``a`` is [r, columns],
    ``b`` [all rows, r]. ``file``, ``offset`` and ``nbytes`` are the base's."""

    base: TensorInfo
    a: TensorInfo
    b: TensorInfo
    scale: float
    first_row: int = 0

    def part(self, name: str, shape: tuple[int, ...], first_element: int) -> MergedTensor:
        """Whole rows only."""
        assert shape[1:] == self.shape[1:]
        base = self.base.part(name, shape, first_element)
        return replace(
            self,
            name=name,
            shape=shape,
            base=base,
            offset=base.offset,
            nbytes=base.nbytes,
            first_row=self.first_row + first_element // self.shape[1],
        )


def merged(base: TensorInfo, a: TensorInfo, b: TensorInfo, scale: float) -> MergedTensor:
    """A whole matrix."""
    return MergedTensor(
        name=base.name,
        dtype=f"{base.dtype} + LoRA",
        shape=base.shape,
        file=base.file,
        offset=base.offset,
        nbytes=base.nbytes,
        base=base,
        a=a,
        b=b,
        scale=scale,
    )


class MergedWeights:
    """Reads merged weights; what ``Shard`` is for others. Safe from several threads. Reading raises CheckpointError
    where a factor holds NaN or infinity."""

    def __init__(self, shards: Mapping[Path, Shard]):
        self._shards = shards

    def row_blocks(self, info: TensorInfo, rows: int) -> Iterator[FloatArray]:
        """float32 values, in blocks of so many rows."""
        assert isinstance(info, MergedTensor)
        a = self._factor(info.a).astype(np.float64)  # a product in float32 has other bits in blocks of another height
        for start in range(0, info.shape[0], max(1, rows)):
            stop = min(start + max(1, rows), info.shape[0])
            values = self._numbers(info.base.rows(slice(start, stop)))
            b = self._factor(info.b.rows(slice(info.first_row + start, info.first_row + stop))).astype(np.float64)
            with np.errstate(all="ignore"):  # large factors overflow: values are looked at where they are used
                yield values + ((b @ a) * info.scale).astype(np.float32)

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

    def _factor(self, info: TensorInfo) -> FloatArray:
        """Of an adapter: where it is no numbers, the base is not to blame."""
        values = self._numbers(info)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{paths.shown(info.file)}: {named(info.name)} holds NaN or infinity; the adapter is damaged or its "
                "training diverged, give another one"
            )
        return values

    def _numbers(self, info: TensorInfo) -> FloatArray:
        return self._shards[info.file].float32(info)
