"""``lfm2_export.json``: what an artifact holds, as dataclasses that are checked field by field when they are read.

In: JSON. Out: ``Manifest``, its programs, their files with size and SHA-256, and every tensor's quantization. A value
of the wrong type, an unknown field or another schema version is refused by name: a manifest is data from elsewhere.
"""

from __future__ import annotations

import functools
import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from lfm2_export.cache import CacheSpec
from lfm2_export.errors import ArtifactError
from lfm2_export.folders import is_plain_name
from lfm2_export.messages import shown

if TYPE_CHECKING:
    from lfm2_export.checkpoint import Checkpoint

SCHEMA_VERSION = 1
MANIFEST = "lfm2_export.json"

# Which program is taken where the caller does not say: smallest that keeps quality first; q4f16 is for WebGPU.
BACKEND_ORDER = ("onnx", "executorch")
SCHEME_ORDER = ("q4", "8da4w", "q8", "fp16", "fp32", "q4f16")

# The graph of a program that any runtime opens; other roles of ``Program.graphs`` are variants of it.
MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file as it was when it was exported."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph; ``shape`` mixes sizes and axis names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """How one weight is stored: its dtype, how its scales are spread (``granularity``: "group 32", "row"; None without
    scales), the relative error that rounding left (None where none was measured), and why it was not quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    granularity: str | None = None
    error: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """Which checkpoint the artifact was made of. ``name`` is a Hub id or the name of a folder, never a path."""

    name: str
    revision: str | None
    model_type: str
    config_sha256: str
    shards: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> CheckpointRecord:
        """Hashes the checkpoint's files.

        Raises:
            CheckpointError: a file of the Hub's cache was altered.
        """
        return cls(
            name=checkpoint.name if checkpoint.revision is not None else checkpoint.path.resolve().name,
            revision=checkpoint.revision,
            model_type=checkpoint.config.model_type,
            config_sha256=checkpoint.config_sha256,
            shards=checkpoint.shard_hashes(),
        )

    def is_same_as(self, other: CheckpointRecord) -> bool:
        """Whether config and weights are equal, whatever the two were called."""
        return (self.config_sha256, self.shards) == (other.config_sha256, other.shards)

    def __str__(self) -> str:
        return f"{self.name}@{self.revision[:12]}" if self.revision else self.name


@dataclass(frozen=True, kw_only=True)
class Program:
    """One scheme on one backend.

    ``graphs`` maps a role ("model", "cpu", "scoring", ...) to the file to open for it; ``files`` are all files that the
    program needs, data files included. ``operators`` counts the nodes of the "model" graph by type. ``options`` are the
    settings that made it (group_size, exclude, algorithm, accuracy_level, ...); ``parity`` the figures that
    ``lfm2-export parity`` found, None before it ran.
    """

    backend: str
    scheme: str
    graphs: Mapping[str, str]
    files: Mapping[str, FileEntry]
    context_length: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache: CacheSpec
    options: Mapping[str, Any]
    operators: Mapping[str, int]
    tensors: tuple[StoredTensor, ...]
    versions: Mapping[str, str]
    parity: Mapping[str, Any] | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.backend, self.scheme

    def __str__(self) -> str:
        return f"{self.backend} {self.scheme}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole file. ``files`` are those that no single program owns: config, tokenizer, licence."""

    checkpoint: CheckpointRecord
    programs: tuple[Program, ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def all_files(self) -> dict[str, FileEntry]:
        """Every file that is vouched for, by its name in the artifact."""
        found = dict(self.files)
        for program in self.programs:
            found |= program.files
        return found

    def to_json(self) -> str:
        return json.dumps(_encode(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, place: str = MANIFEST) -> Manifest:
        """Reads what ``to_json`` wrote.

        Raises:
            ArtifactError: names the first field that is missing, unknown, of the wrong type or out of bounds.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{place}: is not JSON ({error}); export again") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise ArtifactError(
                f"{place}: schema_version={version!r} is unknown, this version of lfm2-export reads {SCHEMA_VERSION}; "
                "install the version that wrote it, or export again"
            )
        try:
            manifest = _decode(cls, raw, "")
            _check(manifest)
        except ArtifactError as error:
            raise ArtifactError(f"{place}: {error}; export again, or install the version that wrote it") from error
        return manifest


def preference(program: Program) -> tuple[int, int, str, str]:
    """Sorts programs, the one to take where the caller does not say first."""
    return (
        _rank(BACKEND_ORDER, program.backend),
        _rank(SCHEME_ORDER, program.scheme),
        program.backend,
        program.scheme,
    )


def _rank(order: tuple[str, ...], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _check(manifest: Manifest) -> None:
    """What types alone do not say."""
    for name, entry in manifest.all_files().items():
        if not is_plain_name(name):
            raise ArtifactError(f"the file name {name!r} leaves the artifact's folder")
        if entry.bytes < 0 or len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
            raise ArtifactError(f"{name} has no valid size and sha256")
    keys = [program.key for program in manifest.programs]
    for program in manifest.programs:
        if keys.count(program.key) > 1:
            raise ArtifactError(f"the program {program} is listed twice")
        if program.context_length < 1:
            raise ArtifactError(f"{program} has context_length={program.context_length}, which is below 1")
        if MODEL not in program.graphs:
            raise ArtifactError(f"{program} has no graph {MODEL!r}")
        for role, name in program.graphs.items():
            if name not in program.files:
                raise ArtifactError(f"{program} does not list {name!r}, its graph {role!r}, among its files")


def _encode(value: Any) -> Any:
    """Dataclasses, mappings and sequences as JSON values; a figure that is not finite becomes null."""
    if isinstance(value, CacheSpec):
        return value.to_json()
    if is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decode(kind: Any, value: Any, place: str) -> Any:
    """A JSON value as the type that a dataclass field is annotated with."""
    if kind is Any:
        return value
    if kind is CacheSpec:
        return _decode_cache(value, place)
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, place)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _decode_union(args, value, place)
    if origin is tuple:
        return tuple(_decode(args[0], item, f"{place}[{i}]") for i, item in enumerate(_expect(list, value, place)))
    if origin is Mapping:
        items = _expect(dict, value, place).items()
        return {key: _decode(args[1], item, _join(place, key)) for key, item in items}
    if kind is float and type(value) is int:
        return float(value)
    return _expect(kind, value, place)


def _decode_union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    for kind in kinds:
        if kind is type(None) and value is None:
            return None
        if kind in (int, str) and type(value) is kind:
            return value
    rest = [kind for kind in kinds if kind is not type(None)]
    return _decode(rest[0], value, place)


def _decode_dataclass(kind: Any, value: Any, place: str) -> Any:
    raw = _expect(dict, value, place)
    hints = _hints(kind)
    if unknown := sorted(raw.keys() - hints.keys()):
        raise ArtifactError(f"{_join(place, unknown[0])} is an unknown field")
    values = {}
    for f in fields(kind):
        if f.name in raw:
            values[f.name] = _decode(hints[f.name], raw[f.name], _join(place, f.name))
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ArtifactError(f"{_join(place, f.name)} is missing")
    return kind(**values)


_hints = functools.cache(get_type_hints)


def _decode_cache(value: Any, place: str) -> CacheSpec:
    try:
        return CacheSpec.from_json(value)
    except ArtifactError as error:
        raise ArtifactError(f"{place}: {error}") from error


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _expect(kind: type, value: Any, place: str) -> Any:
    if type(value) is not kind:
        names = {dict: "object", list: "list", str: "string", int: "integer", float: "number"}
        raise ArtifactError(f"{place}={shown(value)} is not a{'n' * (kind in (dict, int))} {names[kind]}")
    return value
