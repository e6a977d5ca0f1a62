"""The tensors of a GGUF file as a checkpoint's: under published names, read a range of rows at a time.

In: a path. Out: a ``GgufShard`` (what ``safetensors_file.Shard`` is for the other format), whose places are checked
against the file, and for each published name the ``GgufTensor`` that holds it; experts, which are stacked there, are
taken apart by offset.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lfm2_export import files, paths
from lfm2_export.config import ModelConfig
from lfm2_export.errors import CheckpointError
from lfm2_export.families import get_family
from lfm2_export.families.tensors import HEAD, ModelTensor, Part, TensorClass
from lfm2_export.gguf import blocks
from lfm2_export.gguf.header import Entry, Header, read_header
from lfm2_export.messages import named, shown
from lfm2_export.quant.formats import Codes, IntFormat
from lfm2_export.safetensors_file import TensorInfo, file_identity, read_blocks, read_float32, read_stored

_BLOCK_BYTES = 1 << 19


@dataclass(frozen=True, kw_only=True)
class GgufTensor(TensorInfo):
    """Where one tensor lies. ``dtype`` is GGUF's name for its type; of one made of blocks, a row is a whole number of
    them."""

    @property
    def is_readable(self) -> bool:
        return blocks.is_readable(self.dtype)

    @property
    def is_plain(self) -> bool:
        """Whether it is numbers, one after the other."""
        return self.dtype in blocks.PLAIN

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        return np.dtype(blocks.PLAIN.get(self.dtype, "u1"))

    @property
    def raw_dtype(self) -> np.dtype[Any]:
        """What is read of it: its numbers, but float32 for float64 and for what is in blocks."""
        return self.stored_dtype if self.dtype in ("F16", "BF16") else np.dtype("<f4")

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(1, self.shape[0])

    def part(self, name: str, shape: tuple[int, ...], first_element: int) -> GgufTensor:
        nbytes, start = (count * self.nbytes // max(1, self.count) for count in (math.prod(shape), first_element))
        return replace(self, name=name, shape=shape, offset=self.offset + start, nbytes=nbytes)


@dataclass(frozen=True, kw_only=True)
class GgufShard:
    """A GGUF file as its header describes it; ``real`` is its path without links, ``identity`` what tells a later
    change."""

    path: Path
    real: Path
    identity: tuple[int, ...]
    header: Header
    tensors: Mapping[str, GgufTensor]

    def stored(self, info: TensorInfo) -> np.ndarray:
        """A tensor as stored, blocks as float32."""
        assert isinstance(info, GgufTensor)
        return read_stored(self, info) if info.is_plain else self.float32(info)

    def float32(self, info: TensorInfo) -> np.ndarray:
        """A tensor as float32."""
        assert isinstance(info, GgufTensor)
        if info.is_plain:
            return read_float32(self, info)
        out = np.empty((info.shape[0], math.prod(info.shape[1:])), np.float32)
        first = 0
        for rows in self._blocks(info, max(1, _BLOCK_BYTES // info.row_bytes)):
            out[first : first + len(rows)] = blocks.to_float32(info.dtype, rows)
            first += len(rows)
        return out.reshape(info.shape)

    def row_blocks(self, info: TensorInfo, rows: int) -> Iterator[np.ndarray]:
        """A tensor as ``stored`` gives it, in blocks of so many rows; the next overwrites the one before."""
        assert isinstance(info, GgufTensor)
        for block in self._blocks(info, rows):
            if info.dtype == "F64":
                yield block.view("<f8").astype(np.float32).reshape(-1, *info.shape[1:])
            elif info.is_plain:
                yield block.reshape(-1).view(info.stored_dtype).reshape(-1, *info.shape[1:])
            else:
                yield blocks.to_float32(info.dtype, block)

    def code_blocks(self, info: TensorInfo, rows: int) -> Iterator[Codes]:
        """The codes of a tensor whose type has an exact format, in blocks of so many rows."""
        assert isinstance(info, GgufTensor)
        for block in self._blocks(info, rows):
            yield blocks.codes(info.dtype, block)

    def _blocks(self, info: GgufTensor, rows: int) -> Iterator[np.ndarray]:
        """Bytes, uint8 [rows, bytes of a row]."""
        for block in read_blocks(self, _as_bytes(info), rows * info.row_bytes):
            yield block.reshape(-1, info.row_bytes)


def _as_bytes(info: GgufTensor) -> TensorInfo:
    """The bytes of a tensor, as a tensor of bytes."""
    return _Bytes(
        name=info.name, dtype=info.dtype, shape=(info.nbytes,), file=info.file, offset=info.offset, nbytes=info.nbytes
    )


class _Bytes(TensorInfo):
    @property
    def stored_dtype(self) -> np.dtype[Any]:
        return np.dtype("u1")


def read_gguf(path: Path) -> GgufShard:
    """Reads and checks a file's header.

    Raises:
        CheckpointError: the file is missing, truncated or altered, or is one of several that belong together.
    """
    real = files.inside(path, path.parent, CheckpointError)
    with files.open_regular(path, path.parent, CheckpointError, real=real) as file:
        status = os.fstat(file.fileno())
        header = read_header(path, file)
    if header.settings.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{paths.shown(path)}: is one of {shown(header.settings['split.count'])} files; join them first "
            "(llama-gguf-split --merge)"
        )
    tensors = {name: _tensor(path, entry, status.st_size) for name, entry in header.tensors.items()}
    _check_no_overlap(path, tensors)
    return GgufShard(path=path, real=real, identity=file_identity(status), header=header, tensors=tensors)


def _tensor(path: Path, entry: Entry, size: int) -> GgufTensor:
    kind = blocks.block_type(entry.type)
    if kind is None:
        raise CheckpointError(
            f"{paths.shown(path)}: {named(entry.name)} is of the unknown type {entry.type}; a newer gguf package may "
            "know it"
        )
    if entry.shape[-1] % kind.values:
        raise CheckpointError(
            f"{paths.shown(path)}: {named(entry.name)} has rows of {entry.shape[-1]} values, no multiple of the "
            f"{kind.values} in a block of {kind.name}; the file was altered, download it again"
        )
    nbytes = math.prod(entry.shape) // kind.values * kind.nbytes
    if entry.offset + nbytes > size:
        raise CheckpointError(
            f"{paths.shown(path)}: is truncated ({size} bytes, {named(entry.name)} ends at {entry.offset + nbytes}); "
            "download it again"
        )
    return GgufTensor(
        name=entry.name, dtype=kind.name, shape=entry.shape, file=path, offset=entry.offset, nbytes=nbytes
    )


def _check_no_overlap(path: Path, tensors: Mapping[str, GgufTensor]) -> None:
    end = 0
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise CheckpointError(
                f"{paths.shown(path)}: {named(info.name)} overlaps the tensor before it; the file was altered, "
                "download it again"
            )
        end = info.offset + info.nbytes


def published_tensors(shard: GgufShard, config: ModelConfig) -> dict[str, TensorInfo]:
    """The file's tensors under published names; what no name of the family belongs to keeps its own."""
    left: dict[str, TensorInfo] = dict(shard.tensors)
    found: dict[str, TensorInfo] = {}
    family = get_family(config.model_type)
    names = _Names(config)
    for tensor in family.tensors(config).values():
        if (info := shard.tensors.get(name := names.stored(tensor, shard.tensors))) is not None:
            found[tensor.name] = _of(tensor, info)
            _check_rows(shard.path, info, found[tensor.name])
            left.pop(name, None)
    if (head := left.pop("output.weight", None)) is not None:
        found[HEAD] = head
    return found | left


def _of(tensor: ModelTensor, info: GgufTensor) -> TensorInfo:
    """One expert's part, or a depthwise kernel with the axis that conversion drops; other shapes are left as they are,
    to be compared."""
    if tensor.expert is not None and len(info.shape) == 3 and tensor.expert < info.shape[0]:
        return info.part(tensor.name, info.shape[1:], tensor.expert * math.prod(info.shape[1:]))
    if tensor.part is Part.CONVOLUTIONS and math.prod(tensor.shape) == info.count:
        return info.part(tensor.name, tensor.shape, 0)
    return replace(info, name=tensor.name)


def _check_rows(path: Path, stored: GgufTensor, info: TensorInfo) -> None:
    """Refuses blocks that do not end where rows of the published shape do: no writer makes norms or kernels of them."""
    assert isinstance(info, GgufTensor)
    values = blocks.values_of(info.dtype)
    if not info.is_plain and math.prod(info.shape[1:]) % values:
        raise CheckpointError(
            f"{paths.shown(path)}: {named(stored.name)} is {info.dtype}, in blocks of {values}, and a row of it has "
            f"{math.prod(info.shape[1:])}; convert the model again"
        )


class _Names:
    """From published names to those of the gguf package, which knows them as llama.cpp's conversion makes them."""

    def __init__(self, config: ModelConfig):
        from gguf import MODEL_ARCH, get_tensor_name_map

        architecture = MODEL_ARCH.LFM2MOE if config.moe_layers else MODEL_ARCH.LFM2
        self._names = get_tensor_name_map(architecture, config.num_hidden_layers)

    def stored(self, tensor: ModelTensor, there: Mapping[str, object]) -> str:
        found: str | None = self._names.get_name(_converted(tensor), try_suffixes=(".weight", ".bias"))
        name = found or tensor.name
        # The norm before the head goes by two names; the newer one is that of other architectures.
        return "output_norm.weight" if name == "token_embd_norm.weight" and name not in there else name


def _converted(tensor: ModelTensor) -> str:
    if tensor.kind is TensorClass.EXPERTS:
        return f"layers.{tensor.layer}.feed_forward.experts.{tensor.matrix}.weight"
    return f"{tensor.name}.bias" if tensor.kind is TensorClass.EXPERT_BIAS else tensor.name


def exact_formats(tensors: Mapping[str, TensorInfo]) -> dict[str, IntFormat]:
    """The formats, by published name, in which tensors can be taken over bit for bit."""
    formats = {name: blocks.exact_format(info.dtype) for name, info in tensors.items()}
    return {name: form for name, form in formats.items() if form is not None}
