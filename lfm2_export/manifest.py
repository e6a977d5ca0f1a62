"""``lfm2_export.json``: what an artifact holds, as dataclasses that are checked field by field when they are read.

In: JSON. Out: ``Manifest``, its programs, their files with size and SHA-256, and every tensor's quantization. A value
of the wrong type, an unknown field or another schema version is refused by name: a manifest is data from elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lfm2_export import json_values
from lfm2_export.cache import CacheSpec
from lfm2_export.dataclass_json import decode, encode
from lfm2_export.errors import ArtifactError
from lfm2_export.folders import is_plain_name
from lfm2_export.messages import as_unicode, named, shown

if TYPE_CHECKING:
    from lfm2_export.checkpoint import Checkpoint

SCHEMA_VERSION = 1
MANIFEST = "lfm2_export.json"
CARD = "README.md"

# What a program is: of a decoder, which has a state (``Program.cache``), of an encoder, which has none, or of a
# drafter, which keeps what it was told of its target's.
DECODER, ENCODER, DRAFTER = "decoder", "encoder", "drafter"

# The graph of a program that any runtime opens; other roles of ``Program.graphs`` are variants of it.
MODEL = "model"

# Bytes. The 24B with a .pte beside every ONNX program is below 16 MB.
MANIFEST_LIMIT = 32 << 20

_LARGEST = 2**31 - 1
_MOST_AXES = 8
_MOST_LAYERS = 10_000
_SHOWN_HOPS = ("lowering", "quantization")
_SHOWN_FIGURES = ("max_abs_error", "kl", "top1_agreement", "perplexity", "cosine_distance", "cosine", "least_cosine")
_NAME = re.compile(r"[\w][\w.+-]{0,63}", re.ASCII)


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
            name=as_unicode(
                checkpoint.name if checkpoint.revision is not None else checkpoint.source.path.resolve().name
            ),
            revision=checkpoint.revision,
            model_type=checkpoint.config.model_type,
            config_sha256=checkpoint.config_sha256,
            shards=checkpoint.shard_hashes(),
        )

    def is_same_as(self, other: CheckpointRecord) -> bool:
        """Whether config and weights are equal, whatever the two were called."""
        return (self.config_sha256, self.shards) == (other.config_sha256, other.shards)

    @property
    def digest(self) -> str:
        """One hash of config and weights, by which a drafter knows its target."""
        return hashlib.sha256(json.dumps([self.config_sha256, sorted(self.shards.items())]).encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.name}@{self.revision[:12]}" if self.revision else self.name


@dataclass(frozen=True, kw_only=True)
class Program:
    """One scheme on one backend.

    ``graphs`` maps a role ("model", "cpu", "scoring", ...) to the file to open for it; ``files`` are all files that the
    program needs, data files included. ``operators`` counts the nodes of the "model" graph by type. ``options`` are the
    settings that made it (group_size, exclude, algorithm, accuracy_level, ...); ``parity`` the figures that
    ``lfm2-export parity`` found, None before it ran. ``kind``: DECODER, ENCODER or DRAFTER. ``cache``: the state of the
    "model" graph; ``own_cache``: of the graphs on our operators, None where it is the same.
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
    kind: str = DECODER
    own_cache: CacheSpec | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.backend, self.scheme

    @property
    def calibration(self) -> str | None:
        """What its weights were fitted to, in words; None where that was no text, or the options do not say it."""
        made = self.options.get("calibration")
        text = made.get("text") if isinstance(made, Mapping) else None
        if not isinstance(text, Mapping):
            return None
        algorithm, source, digest, tokens = (
            self.options.get("algorithm"),
            *(text.get(name) for name in ("source", "sha256", "tokens")),
        )
        if not isinstance(tokens, int) or not all(isinstance(one, str) for one in (algorithm, source, digest)):
            return None
        what = {"default": "lfm2-export's own text", "self": "text that the model wrote"}.get(str(source), source)
        return f"{algorithm} on {tokens:,} tokens of {what} (sha256 {str(digest)[:12]})"

    @property
    def mixture(self) -> str | None:
        """How its widths were chosen, in words; None where they are the scheme's, or the options do not say it."""
        made = self.options.get("mixture")
        said = [made.get(name) for name in ("within", "judged_by")] if isinstance(made, Mapping) else []
        if not said or not all(isinstance(one, str) for one in said):
            return None
        return f"mixed within {said[0]}, judged by {said[1]}"

    def __str__(self) -> str:
        return f"{self.backend} {self.scheme}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole file. ``files`` are those that no single program owns: config, tokenizer, licence, model card;
    ``adopted_files`` the names of those of them that are not an export's but as their owner wants them."""

    checkpoint: CheckpointRecord
    programs: tuple[Program, ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    adopted_files: tuple[str, ...] = ()

    @property
    def adopted(self) -> frozenset[str]:
        return frozenset(self.adopted_files)

    def with_adopted(self, entries: Mapping[str, FileEntry]) -> Manifest:
        """With shared files as their owner has made them."""
        assert entries.keys() <= self.files.keys()
        return replace(
            self, files={**self.files, **entries}, adopted_files=tuple(sorted(self.adopted | entries.keys()))
        )

    def all_files(self) -> dict[str, FileEntry]:
        """Every file that is vouched for, by its name in the artifact."""
        found = dict(self.files)
        for program in self.programs:
            found |= program.files
        return found

    def to_json(self) -> str:
        value = encode(self)
        if not self.adopted_files:  # so that versions that know of none read it
            del value["adopted_files"]
        return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, place: str = MANIFEST) -> Manifest:
        """Reads what ``to_json`` wrote.

        Raises:
            ArtifactError: names the first field that is missing, unknown, of the wrong type or out of bounds.
        """
        try:
            raw = json_values.parse(text)
        except json_values.JsonError as error:
            raise ArtifactError(f"{place}: {error}; export again") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise ArtifactError(
                f"{place}: schema_version={shown(version)} is unknown, this version of lfm2-export reads "
                f"{SCHEMA_VERSION}; install the version that wrote it, or export again"
            )
        try:
            manifest = decode(cls, raw)
            _check(manifest)
        except ArtifactError as error:
            raise ArtifactError(f"{place}: {error}; export again, or install the version that wrote it") from error
        return manifest


def _check(manifest: Manifest) -> None:
    """What types alone do not say."""
    _check_name(manifest.checkpoint.model_type, "checkpoint.model_type")
    for name, entry in manifest.all_files().items():
        if not is_plain_name(name):
            raise ArtifactError(f"the file name {shown(name)} leaves the artifact's folder")
        if entry.bytes < 0 or len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
            raise ArtifactError(f"{named(name)} has no valid size and sha256")
    for name in manifest.adopted_files:
        if name not in manifest.files:
            raise ArtifactError(f"adopted_files names {shown(name)}, which is not among the shared files")
    seen: set[tuple[str, str]] = set()
    for program in manifest.programs:
        _check_program(program)
        if program.key in seen:
            raise ArtifactError(f"the program {program} is listed twice")
        seen.add(program.key)


def _check_name(name: str, place: str) -> None:
    """Names that people type and tables show."""
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"{place}={shown(name)} is not a name of letters, digits and _.+- (at most 64)")


def _check_program(program: Program) -> None:
    _check_name(program.backend, "programs: backend")
    _check_name(program.scheme, "programs: scheme")
    if not 1 <= program.context_length <= _LARGEST:
        raise ArtifactError(f"{program} has context_length={program.context_length}, which is not from 1 to {_LARGEST}")
    if MODEL not in program.graphs:
        raise ArtifactError(f"{program} has no graph {MODEL!r}")
    if program.kind not in (DECODER, ENCODER, DRAFTER):
        raise ArtifactError(
            f"{program} has kind={shown(program.kind)}, which is none of {DECODER}, {ENCODER} and {DRAFTER}"
        )
    if (program.kind == DECODER) != bool(program.cache.tensors):
        raise ArtifactError(f"{program} has {len(program.cache.tensors)} state tensors, which no {program.kind} has")
    if program.own_cache is not None and _states(program.own_cache) != _states(program.cache):
        raise ArtifactError(f"{program} has an own_cache of other layers than its cache")
    if program.kind == ENCODER:
        _check_encoder(program)
    if program.kind == DRAFTER:
        _check_drafter(program)
    for role, name in program.graphs.items():
        if name not in program.files:
            raise ArtifactError(f"{program} does not list {shown(name)}, its graph {shown(role)}, among its files")
    tensors: list[TensorSpec | StoredTensor] = [*program.inputs, *program.outputs, *program.tensors]
    for tensor in tensors:
        _check_shape(program, tensor)
    _check_figures(program)
    _check_widths(program)
    moe_op = program.options.get("moe_op")  # read by ExecuTorch's runner
    if moe_op is not None and not _is_mapping_of(moe_op, str):
        raise ArtifactError(f"{program} has options.moe_op={shown(moe_op)}, which is not a string for each file")


def _states(cache: CacheSpec) -> list[str]:
    return [tensor.past_name for tensor in cache.tensors]


def _check_encoder(program: Program) -> None:
    """What its runner reads."""
    size = program.options.get("vocab_size")
    if type(size) is not int or not 1 <= size <= _LARGEST:
        raise ArtifactError(f"{program} has options.vocab_size={shown(size)}, which is not from 1 to {_LARGEST}")
    names = [tensor.name for tensor in program.outputs]
    if not names or len(set(names)) < len(names):
        raise ArtifactError(f"{program} has the outputs {shown(names)}; some, each once, expected")


def _check_drafter(program: Program) -> None:
    """What its runner reads."""
    found = program.options.get("drafter")
    made: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    block, count, layers = (made.get(name) for name in ("block_size", "num_target_layers", "target_layers"))
    sizes = all(type(size) is int and 1 <= size <= _MOST_LAYERS for size in (block, count))
    known = isinstance(layers, list | tuple) and all(type(layer) is int and layer >= 0 for layer in layers)
    if not sizes or not known or not layers or max(layers) >= (count or 0):
        raise ArtifactError(f"{program} has options.drafter={shown(made)}, which names no block and layers of a target")
    if not all(isinstance(made.get(name), str) for name in ("target", "target_name")):
        raise ArtifactError(f"{program} has options.drafter={shown(made)}, which does not say whose drafter it is")


def _check_shape(program: Program, tensor: TensorSpec | StoredTensor) -> None:
    sizes = [axis for axis in tensor.shape if isinstance(axis, int)]
    wrong = len(tensor.shape) > _MOST_AXES or not all(1 <= size <= _LARGEST for size in sizes)
    if wrong or math.prod(sizes) >= 2**63:
        raise ArtifactError(f"{program}: {named(tensor.name)} has the shape {shown(list(tensor.shape))}")


def _check_figures(program: Program) -> None:
    """Those that the model card shows."""
    if not isinstance(text := (program.parity or {}).get("text", ""), str):
        raise ArtifactError(f"{program} has parity.text={shown(text)}, which is not a string")
    for hop in _SHOWN_HOPS:
        figures = (program.parity or {}).get(hop, {})
        if not isinstance(figures, Mapping):
            raise ArtifactError(f"{program} has parity.{hop}={shown(figures)}, which is not an object")
        for name in _SHOWN_FIGURES:
            if not isinstance(figure := figures.get(name), int | float | None):
                raise ArtifactError(f"{program} has parity.{hop}.{name}={shown(figure)}, which is not a number")


def _check_widths(program: Program) -> None:
    """Those that ``inspect`` and the model card show; artifacts of older versions have none."""
    bits = program.options.get("bits_per_weight", {})
    if not _is_mapping_of(bits, int | float) or not all(0 <= value <= 64 for value in bits.values()):
        raise ArtifactError(f"{program} has options.bits_per_weight={shown(bits)}, which is not a number for each kind")
    rows = program.options.get("widths", [])
    if not isinstance(rows, list | tuple) or not all(map(_is_width, rows)):
        raise ArtifactError(f"{program} has options.widths={shown(rows)}, which is not a list of parts and formats")


def _is_width(row: object) -> bool:
    if not isinstance(row, Mapping) or set(row) != {"part", "format", "tensors", "weights"}:
        return False
    names, counts = (row["part"], row["format"]), (row["tensors"], row["weights"])
    return all(isinstance(name, str) for name in names) and all(
        type(count) is int and 0 <= count < 2**63 for count in counts
    )


def _is_mapping_of(value: object, kind: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(item, kind) for item in value.values())
