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
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lfm2_export import files, paths
from lfm2_export.config import ModelConfig
from lfm2_export.errors import CheckpointError
from lfm2_export.families import find_family
from lfm2_export.families.tensors import EMBEDDING, HEAD, FusedTensor, ModelTensor, Part
from lfm2_export.hashing import sha256_files
from lfm2_export.messages import MESSAGE_LIMIT, listed
from lfm2_export.safetensors_file import TensorInfo, read_float32, read_row_blocks, read_stored
from lfm2_export.source import Source, resolve
from lfm2_export.weight_files import open_weights

logger = logging.getLogger(__name__)

# Of a list in a message: "262144 missing: " and " and 262143 more; ".
_COUNTS = 36

# name -> (shape as stored, shape that the config asks for)
WrongShapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# The names go into the model card.
_LICENCE = re.compile(r"LICENSE[\w.-]{0,40}", re.ASCII)
_MOST_LICENCES = 16
# The published ones have 1 kB; 10,000 layers spelled out need 200.
_CONFIG_LIMIT = 1 << 20
# Bytes of a head that is compared with the embedding it repeats: 128,000 tokens of 8,192 float32 values.
_HEAD_LIMIT = 4 << 30
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
        self.raw_config = _read_config(self.path)
        self.family = find_family(self.raw_config, paths.shown(self.path / "config.json"))
        self.config: ModelConfig = self.family.parse_config(self.raw_config)
        self._shards = {shard.path: shard for shard in open_weights(self.path)}
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
        return self._raw(self.tensors[name].rows(rows))

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
        found = [self.path / name for name in COMPANIONS]
        return [path for path in found if paths.exists(path, CheckpointError)] + self.licences()

    def licences(self) -> list[Path]:
        """Licence files: LICENSE, LICENSE.md and the like, the first few."""
        found = paths.names(self.path, CheckpointError, _LICENCE.fullmatch)
        if len(found) > _MOST_LICENCES:
            logger.warning("%s: has %d licence files; the first %d are taken", self.path, len(found), _MOST_LICENCES)
        chosen = [self.path / name for name in found[:_MOST_LICENCES]]
        return [path for path in chosen if _is_no_folder(path)]

    @cached_property
    def config_sha256(self) -> str:
        """SHA-256 of config.json's meaning: spacing, order of keys and the writing library's version do not count."""
        meaning = {key: value for key, value in self.raw_config.items() if key not in _VOLATILE_KEYS}
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def shard_hashes(self) -> dict[str, str]:
        """SHA-256 of every weight file by its name; streamed once, then remembered.

        Raises:
            CheckpointError: a file cannot be read, or one of the Hub's cache is not what the Hub said it is (its name
                there is its hash).
        """
        return dict(self._shard_hashes)

    @cached_property
    def _shard_hashes(self) -> dict[str, str]:
        digests = sha256_files(self._shards, CheckpointError, remembered=True)
        for path, digest in digests.items():
            blob = path.resolve()
            if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) and blob.name != digest:
                raise CheckpointError(
                    f"{paths.shown(path)}: its bytes were altered (sha256 {digest[:12]}…, the Hub gave "
                    f"{blob.name[:12]}…); delete {paths.shown(blob, 100)} and download it again"
                )
        return {path.name: digest for path, digest in sorted(digests.items())}

    def _drop_tied_head(self, stored: dict[str, TensorInfo]) -> None:
        """Some tools store a tied head a second time. A copy is left out; a head of its own contradicts the config."""
        if not self.config.tie_word_embeddings or HEAD not in stored or EMBEDDING not in stored:
            return
        head, embedding = stored[HEAD], stored[EMBEDDING]
        if embedding.shape != (self.config.vocab_size, self.config.hidden_size) or embedding.nbytes > _HEAD_LIMIT:
            return  # then the head is left over, and what is wrong is said with it
        if not self._same_values(head, embedding):
            raise CheckpointError(
                f"{paths.shown(head.file)}: {HEAD} differs from {EMBEDDING}, but config.json says "
                "tie_word_embeddings=true; set it to false to use the stored head, or remove the head"
            )
        logger.info("%s: %s repeats the tied %s and is left out", head.file, HEAD, EMBEDDING)
        del stored[HEAD]

    def _same_values(self, left: TensorInfo, right: TensorInfo) -> bool:
        if left.shape != right.shape:
            return False
        step = max(1, (1 << 22) // left.shape[1])
        ranges = (slice(start, start + step) for start in range(0, left.shape[0], step))
        return all(self._same_rows(left.rows(rows), right.rows(rows)) for rows in ranges)

    def _same_rows(self, left: TensorInfo, right: TensorInfo) -> bool:
        """Bits where both have the same dtype, which is fast; values where they have not (or 0 and -0)."""
        if left.dtype == right.dtype and np.array_equal(self._raw(left), self._raw(right)):
            return True
        return np.array_equal(self._part(left, None), self._part(right, None))

    def _raw(self, info: TensorInfo) -> np.ndarray:
        return read_stored(self._shards[info.file], info)

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


def _is_no_folder(path: Path) -> bool:
    """A folder of licences is left alone; what is neither that nor a file is refused where it is read."""
    return paths.exists(path, CheckpointError) and not paths.is_folder(path, CheckpointError)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not paths.exists(path, CheckpointError):
        raise CheckpointError(f"{paths.shown(folder)}: has no {path.name}; give a checkpoint's own folder")
    return files.read_json_object(path, folder, CheckpointError, limit=_CONFIG_LIMIT)


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
    found, wrong = _take_fused_apart(fused_tensors, stored)
    for name, tensor in model_tensors.items():
        if name in found and found[name].shape != tensor.shape:
            wrong[name] = (found[name].shape, tensor.shape)
    missing = [name for name in model_tensors if name not in found]
    left_over = [name for name in found if name not in model_tensors]
    _raise_mismatch(path, missing, left_over, wrong)
    return {name: found[name] for name in model_tensors}


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
    lists = {kind: names for kind, names in lists.items() if names}
    if not lists:
        return
    start = f"{paths.shown(path)}: the weights do not fit config.json; "
    remedy = "; use the config.json of these weights"
    room = (MESSAGE_LIMIT - len(start + remedy)) // len(lists) - _COUNTS
    problems = [f"{len(names)} {kind}: {listed(names, room=room, longest=160)}" for kind, names in lists.items()]
    details = [f"{kind}: {name}" for kind, names in lists.items() for name in names]
    raise CheckpointError(f"{start}{'; '.join(problems)}{remedy}", details=details)
