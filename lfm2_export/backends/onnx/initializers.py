"""Reads the initializers of an ONNX graph, in the graph or beside it; each is checked against its bytes.

In: the path of a .onnx file from anywhere. Out: ``GraphFile``: which node reads an initializer, and ``Stored``, whose
bytes are there, as many as its shape and dtype need. onnx's own readers raise whatever a damaged file makes them.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import external_data_helper, numpy_helper

from lfm2_export import files, paths
from lfm2_export.errors import ArtifactError
from lfm2_export.messages import named, shown

# The graphs of the 24B are below 2 MB, their weights lie beside them. Parsed, an empty node of two bytes takes 100.
GRAPH_LIMIT = 32 << 20

_DTYPES: dict[int, np.dtype[Any]] = {
    onnx.TensorProto.FLOAT: np.dtype("<f4"),
    onnx.TensorProto.FLOAT16: np.dtype("<f2"),
    onnx.TensorProto.UINT8: np.dtype(np.uint8),
}
_MOST_AXES = 8


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One initializer: where its bytes lie. ``inline`` holds them where the graph does."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    path: Path
    offset: int
    inline: np.ndarray | None = None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Entries of the first axis.

        Raises:
            ArtifactError: the file cannot be read, or is no longer as long as it was.
        """
        if self.inline is not None:
            return self.inline.reshape(self.shape)[start:stop]
        each = math.prod(self.shape[1:])
        count = (stop - start) * each
        try:
            values = np.fromfile(self.path, self.dtype, count, offset=self.offset + start * each * self.dtype.itemsize)
        except OSError as error:
            raise files.unreadable(self.path, error, ArtifactError) from error
        if values.size != count:
            raise _ends_inside(self.path, self.name)
        return values.reshape(-1, *self.shape[1:])

    def as_rows(self, count: int) -> Stored:
        """The same bytes as [count, columns].

        Raises:
            ArtifactError: they are no such number of rows.
        """
        size = math.prod(self.shape)
        if size % count:
            raise ArtifactError(
                f"{paths.shown(self.path)}: {named(self.name)} is stored as {shown(list(self.shape))}, which is not "
                f"{count} rows; export again"
            )
        return replace(self, shape=(count, size // count))


def read_graph(path: Path) -> onnx.ModelProto:
    """A graph without its external data.

    Raises:
        ArtifactError: the file cannot be read, or is no ONNX graph.
    """
    model = onnx.ModelProto()
    try:
        model.ParseFromString(files.read_bytes(path, path.parent, ArtifactError, limit=GRAPH_LIMIT))
    except DecodeError as error:
        raise ArtifactError(f"{paths.shown(path)}: is not an ONNX graph; export again") from error
    return model


class GraphFile:
    """A graph's initializers, and which node reads each of them at which input.

    Raises:
        ArtifactError: the file cannot be read, or is no ONNX graph.
    """

    def __init__(self, path: Path):
        self.path = path
        model = read_graph(path)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.readers: dict[str, tuple[onnx.NodeProto, int]] = {}
        self._restored: dict[str, str] = {}  # what Casts to float32 make of initializers
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name in self._initializers:
                    self.readers.setdefault(name, (node, index))
            if _is_cast_to_float32(node) and node.input[0] in self._initializers:
                self._restored[node.output[0]] = node.input[0]
        self._data_files: dict[str, DataFile] = {}

    def stored(self, name: str) -> Stored:
        """An initializer by its name, or by that of a Cast's output that makes float32 of it: no value changes there.

        Raises:
            ArtifactError: there is none, or its bytes are not there, not all of them, or of another kind.
        """
        if name not in self._initializers:
            name = self._restored.get(name, name)
        tensor = self._initializers.get(name)
        if tensor is None:
            raise self.refusal(f"has no initializer {named(name)}")
        shape, dtype = tuple(tensor.dims), _DTYPES.get(tensor.data_type)
        if dtype is None:
            raise self.refusal(
                f"{named(name)} has the element type {tensor.data_type}, which is none of our weights' (float32, "
                "float16, uint8)"
            )
        if not 1 <= len(shape) <= _MOST_AXES or min(shape) < 1 or math.prod(shape) * dtype.itemsize >= 2**63:
            raise self.refusal(f"{named(name)} has the shape {shown(list(shape))}")
        if not external_data_helper.uses_external_data(tensor):
            values = self._inline(name, tensor, math.prod(shape), dtype).reshape(shape)
            return Stored(name=name, shape=shape, dtype=dtype, path=self.path, offset=0, inline=values)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        nbytes = math.prod(shape) * dtype.itemsize
        file = self._data_file(name, entries.get("location"))
        offset = self._number(name, "offset", entries.get("offset", "0"))
        length = self._number(name, "length", entries.get("length", str(nbytes)))
        if length != nbytes:
            raise self.refusal(f"{named(name)} has {length} bytes, its shape {shown(list(shape))} needs {nbytes}")
        if offset + nbytes > file.size:
            raise _ends_inside(file.path, name)
        return Stored(name=name, shape=shape, dtype=dtype, path=file.path, offset=offset)

    def _inline(self, name: str, tensor: onnx.TensorProto, count: int, dtype: np.dtype) -> np.ndarray:
        if tensor.HasField("raw_data"):
            if len(tensor.raw_data) == count * dtype.itemsize:
                return np.frombuffer(tensor.raw_data, dtype)
            raise self.refusal(f"{named(name)} has {len(tensor.raw_data)} bytes, its shape needs {count}")
        try:
            return numpy_helper.to_array(tensor)
        except (ValueError, TypeError, OverflowError) as error:
            raise self.refusal(f"{named(name)} has not the {count} numbers of its shape") from error

    def _number(self, name: str, key: str, text: object) -> int:
        """Of an external tensor, which has them as text."""
        if isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 20:
            return int(text)
        raise self.refusal(f"{named(name)} lies at {key} {shown(text, 40)}, which is no number of bytes")

    def _data_file(self, name: str, location: object) -> DataFile:
        if not isinstance(location, str) or location in ("", ".", "..") or set(location) & set("/\\:\0"):
            raise self.refusal(f"{named(name)} names the data file {shown(location)}, which is not beside it")
        if location not in self._data_files:
            self._data_files[location] = DataFile(self.path.parent / location)
        return self._data_files[location]

    def refusal(self, fault: str) -> ArtifactError:
        """The error for what is wrong in this graph."""
        return ArtifactError(f"{paths.shown(self.path)}: {fault}; export again")


def _is_cast_to_float32(node: onnx.NodeProto) -> bool:
    return (
        (node.op_type, node.domain) == ("Cast", "")
        and (len(node.input), len(node.output)) == (1, 1)
        and any(attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT for attribute in node.attribute)
    )


@dataclass(frozen=True)
class DataFile:
    """A file of weights beside a graph."""

    path: Path

    @cached_property
    def size(self) -> int:
        """Bytes.

        Raises:
            ArtifactError: it is not there, leads out of its folder, or is no regular file.
        """
        with files.open_regular(self.path, self.path.parent, ArtifactError) as file:
            return os.fstat(file.fileno()).st_size


def _ends_inside(path: Path, name: str) -> ArtifactError:
    return ArtifactError(f"{paths.shown(path)}: ends inside {named(name)}; copy it again, or export again")
