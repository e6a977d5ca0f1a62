"""The model that a drafter drafts for: an artifact, of which the drafter borrows token table and head.

In: the artifact's folder. Out: ``DraftTarget``: its config, which checkpoint it is of, and its two matrices, read back
out of a program's files, which an export then streams like a checkpoint's own.

Their rows are copied into the drafter, not referred to: ONNX Runtime opens external data in a model's own folder only,
and a drafter may so be moved, and store a matrix in fewer bits than its target does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lfm2_export import files, paths
from lfm2_export.artifact import Artifact
from lfm2_export.backends import BACKENDS, get_backend
from lfm2_export.config import ModelConfig
from lfm2_export.errors import ArtifactError, CheckpointError
from lfm2_export.families import find_family
from lfm2_export.families.tensors import EMBEDDING, HEAD
from lfm2_export.manifest import DECODER, CheckpointRecord, Program
from lfm2_export.safetensors_file import TensorInfo

if TYPE_CHECKING:
    from lfm2_export.models.loading import WeightSource

_DTYPE = "F32"
_ITEM = 4


@dataclass(frozen=True, kw_only=True)
class BorrowedTables:
    """The target's matrices as if ``path`` were a file of float32 with nothing else in it, each from offset 0."""

    path: Path
    source: WeightSource
    tensors: dict[str, TensorInfo]

    @classmethod
    def of(cls, path: Path, source: WeightSource) -> BorrowedTables:
        shapes = {name: tuple(source.tensors[name].shape) for name in (EMBEDDING, HEAD) if name in source.tensors}
        infos = {
            name: TensorInfo(name=name, dtype=_DTYPE, shape=shape, file=path, offset=0, nbytes=_ITEM * math.prod(shape))
            for name, shape in shapes.items()
        }
        return cls(path=path, source=source, tensors=infos)

    def float32(self, info: TensorInfo) -> np.ndarray:
        """A matrix, or rows of it."""
        first = info.offset // (_ITEM * info.shape[1])
        return self.source.read(info.name, slice(first, first + info.shape[0]))

    def stored(self, info: TensorInfo) -> np.ndarray:
        """The same: what it says of itself is float32."""
        return self.float32(info)

    def row_blocks(self, info: TensorInfo, rows: int) -> Iterator[np.ndarray]:
        """The same, in blocks of so many rows."""
        for start in range(0, info.shape[0], rows):
            yield self.float32(info.rows(slice(start, start + rows)))


@dataclass(frozen=True, kw_only=True)
class DraftTarget:
    """``tables``: what is borrowed."""

    folder: Path
    config: ModelConfig
    record: CheckpointRecord
    tables: BorrowedTables

    @property
    def place(self) -> str:
        """The folder, for messages."""
        return paths.shown(self.folder)

    @classmethod
    def open(cls, folder: str | Path) -> DraftTarget:
        """The target in an artifact's folder.

        Raises:
            ArtifactError: there is no artifact, none of a decoder, or it is damaged.
        """
        artifact = Artifact.open(folder, verify=False)
        program, place = artifact.program(), paths.shown(artifact.path)
        if program.kind != DECODER:
            raise ArtifactError(f"--target {place}: {program} is no decoder; give the artifact of the drafter's model")
        known = [one.backend for one in artifact.programs if one.backend in BACKENDS]  # a later version may know more
        backend = next((name for name in known if get_backend(name).DRAFTER_SCHEMES), None)
        if backend is None:
            raise ArtifactError(
                f"--target {place}: {program} gives no residual streams, which a drafter reads; export the model to "
                "onnx into this folder as well"
            )
        program = artifact.program(backend)
        artifact.verify(program)
        raw = files.read_json_object(artifact.path / "config.json", artifact.path, ArtifactError)
        config = find_family(raw, f"{place}/config.json").parse_config(raw)
        source = get_backend(program.backend).stored_weights(artifact.path, artifact.present(program), config)
        tables = BorrowedTables.of(artifact.path / _data_file(program), source)
        tied = HEAD not in tables.tensors
        return cls(
            folder=artifact.path,
            config=replace(config, tie_word_embeddings=tied),
            record=artifact.manifest.checkpoint,
            tables=tables,
        )

    def fitted(self, drafter: ModelConfig, place: str) -> ModelConfig:
        """The drafter's config with what the target decides.

        Raises:
            CheckpointError: it drafts for a model of other sizes.
        """
        assert drafter.drafter is not None
        own = self.config
        wanted = {
            "layers": (drafter.drafter.num_target_layers, own.num_hidden_layers),
            "hidden size": (drafter.hidden_size, own.hidden_size),
            "vocabulary": (drafter.vocab_size, own.vocab_size),
        }
        if wrong := [f"{name} {asked}, not {found}" for name, (asked, found) in wanted.items() if asked != found]:
            raise CheckpointError(
                f"{place}: drafts for another model than --target {self.place} ({'; '.join(wrong)}); give the artifact "
                "of the model that it was trained with"
            )
        return replace(drafter, tie_word_embeddings=own.tie_word_embeddings)


def _data_file(program: Program) -> str:
    """The file that stands for the program's weights."""
    graphs = set(program.graphs.values())
    return min((name for name in program.files if name not in graphs), default=min(graphs))
