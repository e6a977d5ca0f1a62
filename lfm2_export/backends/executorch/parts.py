"""Where a manifest says that a weight lies in a .pte, checked before anything is read by it.

In: the value of ``options["weights"]``, which whoever made the artifact wrote, and the shapes that the model's config
asks for. Out: ``StoredPart`` for each piece of a tensor, whose numbers fit each other and the tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfm2_export.backends.executorch.packing import HEADER_BYTES, stock_bytes
from lfm2_export.errors import ArtifactError
from lfm2_export.messages import named, shown

FLOAT, CONV, INT4, INT8, EMBEDDING8, EMBEDDING4, STOCK, LFM2 = (
    *("float", "conv", "int4", "int8", "embedding8", "embedding4"),
    *("stock", "lfm2"),
)
_NUMBERS, _CODES, _EXPERTS = (FLOAT, CONV), (INT4, INT8, EMBEDDING8, EMBEDDING4), (STOCK, LFM2)
_SHA256 = re.compile("[0-9a-f]{64}")
# llama::quantized_moe_ffn walks 16 columns and 8 rows at a time.
_STOCK_COLUMNS, _STOCK_ROWS = 16, 8


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """Rows ``first_row`` to ``stop_row`` of a tensor [rows, ...], by the SHA-256 of the bytes that they are stored as.

    ``kind`` says how: numbers ("float"; "conv" with its axes turned about), codes with a scale for each ``group_size``
    columns ("int8": for a whole row), or ("stock", "lfm2") rows of one ``expert`` in a blob uint8 ``blob_shape``
    [experts, ...] of a whole layer: ``blob_rows`` of a stock one, every ``step``-th block of 32 from ``first`` on of
    ours.
    """

    kind: str
    shape: tuple[int, ...]
    first_row: int
    stop_row: int
    data: str
    scale: str = ""
    group_size: int = 0
    expert: int = 0
    blob_shape: tuple[int, ...] = ()
    blob_rows: tuple[int, int] = (0, 0)
    first: int = 0
    step: int = 1

    @property
    def dtype(self) -> str:
        """One of float32, int8 and int4."""
        return "float32" if self.kind in _NUMBERS else "int8" if self.kind in (INT8, EMBEDDING8) else "int4"


def parse_places(raw: object, published: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[StoredPart, ...]]:
    """The parts of every tensor in ``published`` (shapes by name); those of other tensors are left alone.

    Raises:
        ArtifactError: a tensor is missing, or a place is none. The message goes on from what the places are of.
    """
    if not isinstance(raw, Mapping):
        raise ArtifactError(f"the manifest's options.weights are {shown(raw)}, not an object for each file")
    if missing := sorted(published.keys() - raw.keys()):
        raise ArtifactError(f"the manifest does not say where {named(missing[0])} lies")
    return {name: _parse_tensor(name, raw[name], shape) for name, shape in published.items()}


def _parse_tensor(name: str, raw: object, shape: tuple[int, ...]) -> tuple[StoredPart, ...]:
    """Parts that lie one below the other and fill the tensor."""
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise ArtifactError(f"the manifest's place of {named(name)} is {shown(raw)}, not a list of parts")
    parts, row = [], 0
    for item in raw:
        part = _Reader(name, item, shape).part()
        if part.first_row != row:
            raise ArtifactError(f"the manifest's parts of {named(name)} do not meet at row {row}")
        parts.append(part)
        row = part.stop_row
    if row != shape[0]:
        raise ArtifactError(f"the manifest's parts of {named(name)} have {row} rows, its config asks for {shape[0]}")
    return tuple(parts)


class _Reader:
    """One part's fields; an error names the tensor, the field and its value."""

    def __init__(self, name: str, raw: object, shape: tuple[int, ...]):
        if not isinstance(raw, Mapping):
            raise ArtifactError(f"the manifest's place of {named(name)} has the part {shown(raw)}, not an object")
        self._name, self._raw, self._shape = name, raw, shape

    def part(self) -> StoredPart:
        kind = self._raw.get("kind")
        if kind not in (*_NUMBERS, *_CODES, *_EXPERTS):
            raise self._wrong("kind", "not a known one")
        first_row, stop_row = self._range("rows", self._shape[0]) if "rows" in self._raw else (0, self._shape[0])
        place: dict[str, Any] = {"kind": kind, "data": self._digest("data"), "shape": (stop_row - first_row,)}
        place |= {"first_row": first_row, "stop_row": stop_row, "shape": (stop_row - first_row, *self._shape[1:])}
        if kind not in _NUMBERS and len(self._shape) != 2:
            raise self._wrong("kind", f"for matrices, which {shown(list(self._shape))} is not")
        if kind in _CODES:
            place |= {"scale": self._digest("scale"), "group_size": self._code_group(kind)}
        if kind in _EXPERTS:
            place |= self._stock(stop_row - first_row) if kind == STOCK else self._lfm2(stop_row - first_row)
        return StoredPart(**place)

    def _stock(self, rows: int) -> dict[str, Any]:
        columns, group_size = self._shape[1], self._group_size(_STOCK_COLUMNS)
        experts, size = self._blob_shape(2)
        # All rows have the same size, so the blob's own says how many it holds.
        block = stock_bytes(_STOCK_ROWS, columns, group_size) - HEADER_BYTES
        if self._integer("columns") != columns:
            raise self._wrong("columns", f"not the {columns} that its config asks for")
        if size <= HEADER_BYTES or (size - HEADER_BYTES) % block:
            raise self._wrong("shape", "no number of whole rows")
        first, stop = self._range("blob_rows", (size - HEADER_BYTES) // block * _STOCK_ROWS)
        if stop - first != rows:
            raise self._wrong("blob_rows", f"not {rows} rows")
        expert = self._integer("expert", 0, experts - 1)
        return {
            "group_size": group_size,
            "expert": expert,
            "blob_shape": (experts, size),
            "blob_rows": (first, stop),
        }

    def _lfm2(self, rows: int) -> dict[str, Any]:
        from lfm2_export.kernels.packing import GROUP_SIZE, TILE_BYTES, TILE_ROWS

        experts, blocks, groups, tile = self._blob_shape(4)
        first, step = self._integer("first", 0, blocks - 1), self._integer("step", 1)
        found = (len(range(first, blocks, step)) * TILE_ROWS, groups * GROUP_SIZE, tile)
        if found != (rows, self._shape[1], TILE_BYTES):
            raise self._wrong("shape", f"{list(found[:2])} weights, its config asks for {[rows, self._shape[1]]}")
        return {
            "expert": self._integer("expert", 0, experts - 1),
            "blob_shape": (experts, blocks, groups, tile),
            "first": first,
            "step": step,
        }

    def _code_group(self, kind: str) -> int:
        return self._shape[1] if kind == INT8 else self._group_size(2 if kind != EMBEDDING8 else 1)

    def _group_size(self, multiple: int) -> int:
        """Of codes, which come in groups that fill a row."""
        size = self._integer("group_size", 1, self._shape[1])
        if self._shape[1] % size or size % multiple:
            raise self._wrong("group_size", f"no multiple of {multiple} that divides {self._shape[1]} columns")
        return size

    def _blob_shape(self, rank: int) -> tuple[int, ...]:
        sizes = self._raw.get("shape")
        if (
            not isinstance(sizes, list | tuple)
            or len(sizes) != rank
            or not all(type(size) is int and size >= 1 for size in sizes)
            or math.prod(sizes) >= 2**63
        ):
            raise self._wrong("shape", f"not the sizes of {rank} axes")
        return tuple(sizes)

    def _digest(self, field: str) -> str:
        digest = self._raw.get(field)
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise self._wrong(field, "not a SHA-256")
        return digest

    def _range(self, field: str, end: int) -> tuple[int, int]:
        value = self._raw.get(field)
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(row) is int for row in value):
            raise self._wrong(field, "not two row numbers")
        if not 0 <= value[0] < value[1] <= end:
            raise self._wrong(field, f"not within {end} rows")
        return value[0], value[1]

    def _integer(self, field: str, least: int = 0, most: int = 2**63 - 1) -> int:
        value = self._raw.get(field)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(field, f"not an integer from {least} to {most}")
        return value

    def _wrong(self, field: str, reason: str) -> ArtifactError:
        value = shown(self._raw.get(field), 60)
        return ArtifactError(f"the manifest's place of {named(self._name)} has {field}={value}, {reason}")
