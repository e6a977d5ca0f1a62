"""Reads the weights that a .pte really computes with back out of the file.

In: a program's folder, its manifest entry and the model's config. Out: ``StoredWeights``, a source for
``models/loading.py`` with float32 values under the published names, so that the eager model can be run with exactly
what the artifact holds.

Neither a .pte nor XNNPACK keep the names of weights. The manifest says for each of them the SHA-256 of the bytes that
it is stored as; they are looked for in the file under that hash, hashed again, and taken apart here, but for blobs of
experts, whose layouts ``packing`` and ``kernels.packing`` know both ways. A weight that is not in the file, or in
another layout, is an error. What the manifest says is checked first (``parts.py``).

Embedding and head are separate weights here even where the checkpoint ties them: the file stores two tables.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lfm2_export import paths
from lfm2_export.backends.executorch import parts
from lfm2_export.backends.executorch.packing import unpack_stock
from lfm2_export.backends.executorch.parts import StoredPart, parse_places
from lfm2_export.backends.executorch.pte import Place, PteFile
from lfm2_export.config import ModelConfig
from lfm2_export.errors import ArtifactError, QuantizationError
from lfm2_export.families import Family, get_family
from lfm2_export.manifest import MODEL, Program
from lfm2_export.messages import named


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A published tensor and its parts, as the manifest describes them."""

    shape: tuple[int, ...]
    parts: Sequence[StoredPart]

    @property
    def dtype(self) -> str:
        """One of float32, int8 and int4."""
        return self.parts[0].dtype


class StoredWeights:
    """The weights of one .pte, as ``models.loading.WeightSource``.

    Args:
        path: the program.
        places: by tensor, where it lies, as the manifest has it.
        config: of the model that the program was made of.

    Raises:
        ArtifactError: the manifest does not say where a weight of the model lies, or says what cannot be.
        RunnerError: the file is no .pte, or a damaged one.
    """

    def __init__(self, path: Path, places: object, config: ModelConfig):
        self.config = replace(config, tie_word_embeddings=False)
        self.family: Family = get_family(config.model_type)
        self._file = PteFile(path)
        self._found: dict[str, Place] = {}
        shapes = {name: tensor.shape for name, tensor in self.family.tensors(self.config).items()}
        try:
            found = parse_places(places, shapes)
        except ArtifactError as error:
            raise ArtifactError(f"{paths.shown(path, 100)}: {error}; export again") from error
        self.tensors: Mapping[str, Tensor] = {
            name: Tensor(shape=shape, parts=found[name]) for name, shape in shapes.items()
        }

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or a range of its first axis, as float32.

        Raises:
            ArtifactError: the file does not hold it, or holds numbers that are not finite.
            RunnerError: the file is damaged.
        """
        tensor = self.tensors[name]
        with np.errstate(over="ignore", invalid="ignore"):
            pieces = [self._part(name, part) for part in tensor.parts]
        values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if not np.isfinite(values).all():
            raise ArtifactError(
                f"{paths.shown(self._file.path)}: {named(name)} has numbers that are not finite; export again"
            )
        return values.reshape(tensor.shape)[rows or slice(None)]

    def _part(self, name: str, part: StoredPart) -> np.ndarray:
        match part.kind:
            case parts.FLOAT:
                return self._numbers(name, part).reshape(part.shape)
            case parts.CONV:
                return self._numbers(name, part).reshape(part.shape[::-1]).T
            case parts.STOCK:
                return self._stock(name, part)
            case parts.LFM2:
                return self._lfm2(name, part)
        return self._codes(name, part)

    def _numbers(self, name: str, part: StoredPart) -> np.ndarray:
        return self._bytes(name, part.data, np.dtype("<f4"), math.prod(part.shape))

    def _codes(self, name: str, part: StoredPart) -> np.ndarray:
        """Linear layers and embeddings: codes along rows, a scale for each group."""
        (rows, columns), group = part.shape, part.group_size
        if part.kind in (parts.INT8, parts.EMBEDDING8):
            codes = self._bytes(name, part.data, np.dtype(np.int8), rows * columns).astype(np.float32)
        else:
            packed = self._bytes(name, part.data, np.dtype(np.uint8), rows * columns // 2)
            halves = (packed & 15, packed >> 4)
            order = halves if part.kind == parts.INT4 else halves[::-1]
            codes = np.stack(order, axis=-1).astype(np.float32) - 8
        if part.kind == parts.INT4:  # bfloat16: the upper half of a float32
            raw = self._bytes(name, part.scale, np.dtype("<u2"), rows * columns // group, prefix="scale_")
            scale = (raw.astype(np.uint32) << 16).view(np.float32)
        else:
            prefix = "scale_" if part.kind == parts.INT8 else ""
            scale = self._bytes(name, part.scale, np.dtype("<f4"), rows * columns // group, prefix=prefix)
        return (codes.reshape(rows, -1, group) * scale.reshape(rows, -1, 1)).reshape(rows, columns)

    def _stock(self, name: str, part: StoredPart) -> np.ndarray:
        first, stop = part.blob_rows
        try:
            values = unpack_stock(self._one_of(name, part), part.shape[1], part.group_size)
        except QuantizationError as error:
            raise ArtifactError(f"{paths.shown(self._file.path)}: {named(name)}: {error}") from error
        return values[first:stop]

    def _lfm2(self, name: str, part: StoredPart) -> np.ndarray:
        from lfm2_export.kernels.packing import unpack_matrix

        tiles = self._one_of(name, part)
        return unpack_matrix(tiles[part.first :: part.step]).dequantize()

    def _one_of(self, name: str, part: StoredPart) -> np.ndarray:
        """One expert's entry of a blob that holds all of a layer's."""
        byte, shape = np.dtype(np.uint8), part.blob_shape
        place = self._place(name, part.data, math.prod(shape))
        count = math.prod(shape[1:])
        return self._file.read(place, byte, count, skip=part.expert * count).reshape(shape[1:])

    def _bytes(self, name: str, digest: str, dtype: np.dtype, count: int, prefix: str = "") -> np.ndarray:
        """The bytes whose SHA-256 is ``digest``, among XNNPACK's data or the program's constants."""
        return self._file.read(self._place(name, digest, count * dtype.itemsize, prefix), dtype, count)

    def _place(self, name: str, digest: str, size: int, prefix: str = "") -> Place:
        if digest not in self._found:
            self._found[digest] = self._find(name, f"{prefix}{digest}", digest, size)
        return self._found[digest]

    def _find(self, name: str, key: str, digest: str, size: int) -> Place:
        keyed = self._file.named_data.get(key)
        for place in [keyed] if keyed else self._file.constants:
            if size <= place.size < size + _PADDING and self._digest(place, size) == digest:
                return place
        raise ArtifactError(
            f"{paths.shown(self._file.path)}: does not hold {named(name)} as the manifest describes it; export again"
        )

    def _digest(self, place: Place, size: int) -> str:
        return hashlib.sha256(self._file.read(place, np.dtype(np.uint8), size).data).hexdigest()


# Constants start at multiples of 16 bytes, delegates' data at larger ones.
_PADDING = 4096


def open_stored(folder: Path, program: Program, config: ModelConfig) -> StoredWeights:
    """The weights of the program's file; raises as ``StoredWeights``."""
    path = folder / program.graphs[MODEL]
    weights = program.options.get("weights")
    return StoredWeights(path, weights.get(path.name) if isinstance(weights, Mapping) else weights, config)
