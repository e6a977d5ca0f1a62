"""A checkpoint, opened: its config checked, its tensors matched name by name, its weights read one at a time.

In: a directory, a bundled name or a Hub id. Out: ``Checkpoint``, whose tensors carry the published names whatever the
layout on disk (experts one by one, or fused as transformers 5 saves them). Nothing is unpickled, memory-mapped, or
loaded before it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lfm2_export import paths
from lfm2_export.config import ModelConfig
from lfm2_export.errors import CheckpointError
from lfm2_export.families import find_family
from lfm2_export.families.tensors import EMBEDDING, HEAD, FusedTensor, ModelTensor, Part
from lfm2_export.hashing import sha256_files
from lfm2_export.safetensors_file import (
    Shard,
    TensorInfo,
    read_float32,
    read_row_blocks,
    read_shard,
    read_stored,
)
from lfm2_export.source import Source, resolve

logger = logging.getLogger(__name__)

# name -> (shape as stored, shape that the config asks for)
WrongShapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_BF16_INFINITY = 0x7F80  # every bit pattern above it is a NaN
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Facts about the file, not about the model: they differ between two downloads of the same weights.
_VOLATILE_KEYS = ("transformers_version", "_name_or_path")


def open_checkpoint(name: str | Path, *, revision: str | None = None, offline: bool = False) -> Checkpoint:
    """Opens a checkpoint by directory, bundled name or Hub id and checks all that can be checked without its weights.

    Raises:
        CheckpointError: it cannot be found, or its files are missing, damaged or do not fit its config.
        ConfigError: a config value is missing, out of range or not supported.
        ResourceError: the download filled the disk.
    """
    source = resolve(str(name), revision=revision, offline=offline)
    return Checkpoint(str(name), source)


class Checkpoint:
    """One checkpoint. ``tensors`` (where each lies) and ``model_tensors`` (what each is) are keyed by published names;
    reads are safe from several threads.

    ``revision`` is the commit of a Hub snapshot; ``raw_config`` is config.json as it stands, ``config`` its meaning.
    """

    def __init__(self, name: str, source: Source):
        self.name = name
        self.path = source.path
        self.revision = source.revision
        self.raw_config = read_json_object(self.path / "config.json")
        self.family = find_family(self.raw_config, str(self.path / "config.json"))
        self.config: ModelConfig = self.family.parse_config(self.raw_config)
        self._shards = {shard.path: shard for shard in _open_shards(self.path)}
        stored = {name: info for shard in self._shards.values() for name, info in shard.tensors.items()}
        self._drop_tied_head(stored)
        self.model_tensors: Mapping[str, ModelTensor] = self.family.tensors(self.config)
        fused = self.family.fused_tensors(self.config)
        self.tensors: Mapping[str, TensorInfo] = match_tensors(self.path, self.model_tensors, fused, stored)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or a range of its first axis, as float32.

        Raises:
            CheckpointError: the file changed or cannot be read.
        """
        return self._part(self.tensors[name], rows)

    def read_raw(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or a range of its first axis, as stored: float32, float16, or bfloat16's bits as uint16.

        Raises:
            CheckpointError: the file changed or cannot be read.
        """
        info = self.tensors[name].rows(rows)
        return read_stored(self._shards[info.file], info)

    def read_raw_blocks(self, name: str, rows: slice | None, block_rows: int) -> Iterator[np.ndarray]:
        """What ``read_raw`` returns, in blocks of ``block_rows`` rows; the next one overwrites the one before.

        Raises:
            CheckpointError: the file changed or cannot be read.
        """
        info = self.tensors[name].rows(rows)
        return read_row_blocks(self._shards[info.file], info, block_rows)

    @property
    def parameter_count(self) -> int:
        return sum(info.count for info in self.tensors.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def parts(self) -> dict[str, tuple[int, int]]:
        """Parameters and stored bytes per part of the model, in a fixed order; parts that it lacks are left out."""
        parts = dict.fromkeys(Part, (0, 0))
        for name, info in self.tensors.items():
            part = self.model_tensors[name].part
            count, nbytes = parts[part]
            parts[part] = (count + info.count, nbytes + info.nbytes)
        return {str(part): sums for part, sums in parts.items() if sums != (0, 0)}

    @property
    def active_parameter_count(self) -> int:
        """Parameters that one token meets: of a layer's experts, only those that it is routed to."""
        experts = self.parts().get(Part.EXPERTS, (0, 0))[0]
        if not experts:
            return self.parameter_count
        used = experts * self.config.num_experts_per_tok // self.config.num_experts
        return self.parameter_count - experts + used

    def files(self) -> list[Path]:
        """Tokenizer, chat template, generation config and licence files, those that exist."""
        licences = [name for name in paths.names(self.path, CheckpointError) if name.startswith("LICENSE")]
        found = [self.path / name for name in (*COMPANIONS, *licences)]
        return [path for path in found if paths.is_file(path, CheckpointError)]

    @cached_property
    def config_sha256(self) -> str:
        """SHA-256 of config.json's meaning: spacing, order of keys and the writing library's version do not count."""
        meaning = {key: value for key, value in self.raw_config.items() if key not in _VOLATILE_KEYS}
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def shard_hashes(self) -> dict[str, str]:
        """SHA-256 of every weight file by its name; streamed once, then remembered.

        Raises:
            CheckpointError: a file of the Hub's cache is not what the Hub said it is (its name there is its hash).
        """
        return dict(self._shard_hashes)

    @cached_property
    def _shard_hashes(self) -> dict[str, str]:
        digests = sha256_files(self._shards, remembered=True)
        for path, digest in digests.items():
            blob = path.resolve()
            if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) and blob.name != digest:
                raise CheckpointError(
                    f"{path}: its bytes were altered (sha256 {digest[:12]}…, the Hub gave {blob.name[:12]}…); "
                    f"delete {blob} and download it again"
                )
        return {path.name: digest for path, digest in sorted(digests.items())}

    def _drop_tied_head(self, stored: dict[str, TensorInfo]) -> None:
        """Some tools store a tied head a second time. A copy is left out; a head of its own contradicts the config."""
        if not self.config.tie_word_embeddings or HEAD not in stored or EMBEDDING not in stored:
            return
        head, embedding = stored[HEAD], stored[EMBEDDING]
        if not self._same_values(head, embedding):
            raise CheckpointError(
                f"{head.file}: {HEAD} differs from {EMBEDDING}, but config.json says tie_word_embeddings=true; "
                "set it to false to use the stored head, or remove the head"
            )
        logger.info("%s: %s repeats the tied %s and is left out", head.file, HEAD, EMBEDDING)
        del stored[HEAD]

    def _same_values(self, left: TensorInfo, right: TensorInfo) -> bool:
        if left.shape != right.shape or len(left.shape) != 2:
            return False
        step = max(1, (1 << 22) // max(1, left.shape[1]))
        ranges = (slice(start, start + step) for start in range(0, left.shape[0], step))
        return all(np.array_equal(self._part(left, rows), self._part(right, rows)) for rows in ranges)

    def _part(self, info: TensorInfo, rows: slice | None) -> np.ndarray:
        return read_float32(self._shards[info.file], info.rows(rows))


def check_finite(name: str, array: np.ndarray) -> None:
    """Refuses NaN and infinity.

    Raises:
        CheckpointError: names the tensor, how many values are not finite, and the first of them.
    """
    # Largest and smallest see every NaN and infinity, at several times the speed of np.isfinite over all values.
    if not array.size or (np.isfinite(array.max()) and np.isfinite(array.min())):
        return
    bad = ~np.isfinite(array)
    first = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), array.shape))
    raise CheckpointError(
        f"{name}: {int(bad.sum())} of {array.size} values are not finite, first {array[first]} at {list(first)}; "
        "the weights are damaged, download or train them again"
    )


def is_finite(stored: np.ndarray) -> bool:
    """Whether no value is NaN or infinity; float16, float32, or bfloat16's bits as uint16."""
    if stored.dtype != np.uint16:
        return bool(np.isfinite(stored.max(initial=0)) and np.isfinite(stored.min(initial=0)))
    # Signed, the bits of positive values are in the values' order; unsigned, those of negative ones lie above them.
    greatest, most_negative = stored.view(np.int16).max(initial=0), stored.max(initial=0)
    return bool(greatest < _BF16_INFINITY and most_negative < _BF16_INFINITY | 0x8000)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        CheckpointError: it is missing, not JSON, or something else than an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: has no {path.name}; give a checkpoint's own folder") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not a JSON object; download it again")
    return value


def _open_shards(folder: Path) -> list[Shard]:
    """The weight files' headers, as one file or as the index lists them (one file first, as in transformers)."""
    if paths.exists(folder / SINGLE, CheckpointError):
        return [read_shard(folder / SINGLE)]
    if paths.exists(folder / INDEX, CheckpointError):
        return _open_indexed(folder)
    pickles = [name for name in paths.names(folder, CheckpointError) if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{folder}: holds only pickled weights ({', '.join(pickles[:3])}), which can run code and stay closed; "
            "save the model as safetensors"
        )
    raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}; download the weights")


def _open_indexed(folder: Path) -> list[Shard]:
    index = folder / INDEX
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or not an object; download it again")
    for file in weight_map.values():
        _check_plain_name(index, file)
    shards = {file: _open_listed(index, file) for file in dict.fromkeys(weight_map.values())}
    for file, shard in shards.items():
        listed = {name for name, place in weight_map.items() if place == file}
        _check_index(index, file, listed, set(shard.tensors))
    return list(shards.values())


def _check_plain_name(index: Path, file: object) -> None:
    """A shard's name must be a plain one. (The file itself may be a link: the Hub's cache is made of them.)"""
    if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\:\0"):
        raise CheckpointError(
            f"{index}: names the file {file!r}, which is not a plain name in its folder; do not use this checkpoint"
        )


def _open_listed(index: Path, file: str) -> Shard:
    path = index.parent / file
    if not paths.exists(path, CheckpointError):
        raise CheckpointError(f"{path}: is missing, but {index.name} names it; download it again")
    return read_shard(path)


def _check_index(index: Path, file: str, listed: set[str], stored: set[str]) -> None:
    if listed - stored:
        raise CheckpointError(f"{index}: says that {file} holds {_names(listed - stored)}, which it does not")
    if stored - listed:
        raise CheckpointError(f"{index}: does not say that {file} holds {_names(stored - listed)}, which it does")


def match_tensors(
    path: Path,
    model_tensors: Mapping[str, ModelTensor],
    fused_tensors: Mapping[str, FusedTensor],
    stored: Mapping[str, TensorInfo],
) -> dict[str, TensorInfo]:
    """The family's tensors found among the stored ones; fused tensors are taken apart by offset.

    Raises:
        CheckpointError: lists every tensor that is missing, left over, or of another shape than the config says.
    """
    expected = {name: tensor.shape for name, tensor in model_tensors.items()}
    found, wrong = _take_fused_apart(fused_tensors, stored)
    for name in expected.keys() & found.keys():
        if found[name].shape != expected[name]:
            wrong[name] = (found[name].shape, expected[name])
    _raise_mismatch(path, expected.keys() - found.keys(), found.keys() - expected.keys(), wrong)
    return {name: found[name] for name in expected}


def _take_fused_apart(
    fused_tensors: Mapping[str, FusedTensor], stored: Mapping[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], WrongShapes]:
    """The stored tensors with every fused one replaced by its parts, and the fused ones of a wrong shape."""
    found = dict(stored)
    wrong: WrongShapes = {}
    for name, fused in fused_tensors.items():
        if name not in stored or any(part in stored for part in fused.parts):
            continue  # not stored so, or stored twice: then the fused name stays behind as left over
        info = found.pop(name)
        if info.shape != fused.shape:
            wrong[name] = (info.shape, fused.shape)
        _, rows, columns = fused.shape
        for part, place in fused.parts.items():
            shape = (place.stop - place.start, columns)
            found[part] = info.part(part, shape, (place.expert * rows + place.start) * columns)
    return found, wrong


def _raise_mismatch(path: Path, missing: Collection[str], left_over: Collection[str], wrong: WrongShapes) -> None:
    shapes = [f"{name} is {list(is_)}, config.json asks for {list(asked)}" for name, (is_, asked) in wrong.items()]
    lists: dict[str, Collection[str]] = {"missing": missing, "left over": left_over, "wrong shape": shapes}
    problems = [f"{len(names)} {kind}: {_names(names)}" for kind, names in lists.items() if names]
    if problems:
        raise CheckpointError(
            f"{path}: the weights do not fit config.json; {'; '.join(problems)}; use the config.json of these weights"
        )


def _names(names: Iterable[str]) -> str:
    """All of them, in an order that counts layers as numbers."""
    return ", ".join(sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]))
