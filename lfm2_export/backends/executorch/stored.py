"""Reads the weights that a .pte really computes with back out of the file.

In: a program's folder, its manifest entry and the model's config. Out: ``StoredWeights``, a source for
``models/loading.py`` with float32 values under the published names, so that the eager model can be run with exactly
what the artifact holds.

Neither a .pte nor XNNPACK keep the names of weights. The manifest says for each of them the SHA-256 of the bytes that
it is stored as; they are looked for in the file under that hash, hashed again, and taken apart here, not by the
writer's code. A weight that is not in the file, or in another layout, is an error.

Embedding and head are separate weights here even where the checkpoint ties them: the file stores two tables.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lfm2_export.backends.executorch.packing import unpack_stock
from lfm2_export.backends.executorch.pte import Place, PteFile
from lfm2_export.config import ModelConfig
from lfm2_export.errors import ArtifactError
from lfm2_export.families import Family, get_family
from lfm2_export.manifest import MODEL, Program

# Kinds of parts that are not int4.
_DTYPES = {"float": "float32", "conv": "float32", "embedding8": "int8"}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A published tensor and its parts, as the manifest describes them."""

    shape: tuple[int, ...]
    parts: Sequence[Mapping[str, Any]]

    @property
    def dtype(self) -> str:
        """One of float32, int8 and int4."""
        return _DTYPES.get(self.parts[0]["kind"], "int4")


class StoredWeights:
    """The weights of one .pte, as ``models.loading.WeightSource``.

    Raises:
        ArtifactError: the manifest does not say where a weight of the model lies.
    """

    def __init__(self, path: Path, places: Mapping[str, Sequence[Mapping[str, Any]]], config: ModelConfig):
        self.config = replace(config, tie_word_embeddings=False)
        self.family: Family = get_family(config.model_type)
        self._file = PteFile(path)
        self._found: dict[str, Place] = {}
        published = self.family.tensors(self.config)
        if missing := sorted(published.keys() - places.keys()):
            raise ArtifactError(f"{path}: the manifest does not say where {missing[0]} lies; export again")
        self.tensors: Mapping[str, Tensor] = {
            name: Tensor(shape=tensor.shape, parts=places[name]) for name, tensor in published.items()
        }

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or a range of its first axis, as float32."""
        tensor = self.tensors[name]
        parts = [self._part(name, part, tensor.shape) for part in tensor.parts]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return values.reshape(tensor.shape)[rows or slice(None)]

    def _part(self, name: str, part: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
        first, stop = part.get("rows", (0, shape[0]))
        shape = (stop - first, *shape[1:])
        match part["kind"]:
            case "float":
                return self._bytes(name, part["data"], np.dtype("<f4"), math.prod(shape)).reshape(shape)
            case "conv":
                return self._bytes(name, part["data"], np.dtype("<f4"), math.prod(shape)).reshape(shape[::-1]).T
            case "stock":
                return self._stock(name, part)
            case "lfm2":
                return self._lfm2(name, part)
        return self._codes(name, part, shape)

    def _codes(self, name: str, part: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
        """Linear layers and embeddings: codes along rows, a scale for each group."""
        (rows, columns), group = shape, part["group_size"]
        if part["kind"] == "embedding8":
            codes = self._bytes(name, part["data"], np.dtype(np.int8), rows * columns).astype(np.float32)
        else:
            packed = self._bytes(name, part["data"], np.dtype(np.uint8), rows * columns // 2)
            halves = (packed & 15, packed >> 4)
            order = halves if part["kind"] == "int4" else halves[::-1]
            codes = np.stack(order, axis=-1).astype(np.float32) - 8
        if part["kind"] == "int4":  # bfloat16: the upper half of a float32
            raw = self._bytes(name, part["scale"], np.dtype("<u2"), rows * columns // group, prefix="scale_")
            scale = (raw.astype(np.uint32) << 16).view(np.float32)
        else:
            scale = self._bytes(name, part["scale"], np.dtype("<f4"), rows * columns // group)
        return (codes.reshape(rows, -1, group) * scale.reshape(rows, -1, 1)).reshape(rows, columns)

    def _stock(self, name: str, part: Mapping[str, Any]) -> np.ndarray:
        first, stop = part["blob_rows"]
        return unpack_stock(self._one_of(name, part), part["columns"], part["group_size"])[first:stop]

    def _lfm2(self, name: str, part: Mapping[str, Any]) -> np.ndarray:
        from lfm2_export.kernels.packing import unpack_matrix

        tiles = self._one_of(name, part)
        return unpack_matrix(tiles[part["first"] :: part["step"]]).dequantize()

    def _one_of(self, name: str, part: Mapping[str, Any]) -> np.ndarray:
        """One expert's entry of a blob that holds all of a layer's."""
        byte, shape = np.dtype(np.uint8), part["shape"]
        place = self._place(name, part["data"], math.prod(shape))
        count = math.prod(shape[1:])
        return self._file.read(place, byte, count, skip=part["expert"] * count).reshape(shape[1:])

    def _bytes(self, name: str, digest: str, dtype: np.dtype, count: int, prefix: str = "") -> np.ndarray:
        """The bytes whose SHA-256 is ``digest``, among XNNPACK's data or the program's constants."""
        return self._file.read(self._place(name, digest, count * dtype.itemsize, prefix), dtype, count)

    def _place(self, name: str, digest: str, size: int, prefix: str = "") -> Place:
        if digest not in self._found:
            self._found[digest] = self._find(name, f"{prefix}{digest}", digest, size)
        return self._found[digest]

    def _find(self, name: str, key: str, digest: str, size: int) -> Place:
        named = self._file.named_data.get(key)
        for place in [named] if named else self._file.constants:
            if size <= place.size < size + _PADDING and self._digest(place, size) == digest:
                return place
        raise ArtifactError(f"{self._file.path}: does not hold {name} as the manifest describes it; export again")

    def _digest(self, place: Place, size: int) -> str:
        return hashlib.sha256(self._file.read(place, np.dtype(np.uint8), size).data).hexdigest()


# Constants start at multiples of 16 bytes, delegates' data at larger ones.
_PADDING = 4096


def open_stored(folder: Path, program: Program, config: ModelConfig) -> StoredWeights:
    """The weights of the program's file."""
    path = folder / program.graphs[MODEL]
    return StoredWeights(path, program.options["weights"][path.name], config)
