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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2_export import files, mixups, paths, retrieval
from lfm2_export.config import ModelConfig
from lfm2_export.errors import CheckpointError, Lfm2ExportError
from lfm2_export.families import find_family, is_drafter
from lfm2_export.families.tensors import EMBEDDING, HEAD, PROJECTION, PROJECTION_BIAS, ModelTensor, Part
from lfm2_export.gguf import open_gguf
from lfm2_export.gguf import weights as gguf_weights
from lfm2_export.gguf.weights import GgufShard, published_tensors
from lfm2_export.hashing import sha256_files
from lfm2_export.lora import Adapter, MergedTensor, MergedWeights, open_adapter
from lfm2_export.lora.settings import CONFIG as LORA_CONFIG
from lfm2_export.matching import match_tensors, with_prefix
from lfm2_export.messages import listed, shown
from lfm2_export.packages import explained
from lfm2_export.packed import KEY as QUANTIZATION
from lfm2_export.packed import PackedTensor, PackedWeights, exact, read_quantization
from lfm2_export.quant.formats import Codes, IntFormat
from lfm2_export.safetensors_file import Shard, TensorInfo, read_shard
from lfm2_export.source import Source, resolve
from lfm2_export.targets import BorrowedTables, DraftTarget
from lfm2_export.weight_files import open_weights

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION_CONFIG,
)
# The names go into the artifact and its model card.
_LICENCE = re.compile(r"LICENSE[^`/\\:]{0,57}")
_MOST_LICENCES = 16
# The published ones have 1 kB; 10,000 layers spelled out need 200.
_CONFIG_LIMIT = 1 << 20
# Bytes of a head that is compared with the embedding it repeats: 128,000 tokens of 8,192 float32 values.
_HEAD_LIMIT = 4 << 30
_BF16_INFINITY = 0x7F80  # every bit pattern above it is a NaN
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Facts about the file, not about the model: they differ between two downloads of the same weights.
_VOLATILE_KEYS = ("transformers_version", "_name_or_path")


@explained
def open_checkpoint(
    name: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    config_from: str | Path | None = None,
    lora: str | Path | None = None,
    target: str | Path | None = None,
) -> Checkpoint:
    """Opens a checkpoint by directory, GGUF file, bundled name or Hub id and checks all that can be checked without its
    weights.

    Args:
        config_from: for a GGUF file: the checkpoint (directory, bundled name or Hub id) whose config, tokenizer, chat
            template and generation settings count instead of those in the file.
        lora: the folder of a LoRA adapter, as peft saves it, that is merged into the weights as they are read.
        target: of a drafter: the artifact of the model that it drafts for.

    Raises:
        CheckpointError: it cannot be found, or its files are missing, damaged or do not fit its config.
        ConfigError: a config value is missing, out of range or not supported.
        ResourceError: the download filled the disk.
    """
    source = resolve(str(name), revision=revision, offline=offline)
    adapter = None if lora is None else open_adapter(Path(lora))
    borrowed = None if target is None else DraftTarget.open(target)
    if config_from is None:
        return Checkpoint(str(name), source, adapter=adapter, target=borrowed)
    if not source.is_gguf:
        raise CheckpointError(
            f"{paths.shown(source.path)}: is no GGUF file and has a config of its own; leave --config-from out"
        )
    companions = resolve(str(config_from), offline=offline)
    if companions.is_gguf:
        raise CheckpointError(
            f"--config-from {paths.shown(companions.path)}: give a folder or a Hub id, not a GGUF file"
        )
    return Checkpoint(str(name), source, companions.path, adapter, borrowed)


@dataclass(frozen=True, kw_only=True)
class CheckpointRequest:
    """Which checkpoint is meant: the arguments of ``open_checkpoint``, on their way through the functions of this
    package that open one."""

    name: str | Path
    revision: str | None = None
    offline: bool = False
    config_from: str | Path | None = None
    lora: str | Path | None = None
    target: str | Path | None = None

    def open(self) -> Checkpoint:
        """As ``open_checkpoint``."""
        return open_checkpoint(
            self.name,
            revision=self.revision,
            offline=self.offline,
            config_from=self.config_from,
            lora=self.lora,
            target=self.target,
        )


class Checkpoint:
    """One checkpoint. ``tensors`` (where each lies) and ``model_tensors`` (what each is) are keyed by published names;
    reads are safe from several threads.

    ``revision`` is the commit of a Hub snapshot; ``raw_config`` is config.json as it stands, but for what it says of
    packed weights, ``config`` its meaning. ``retriever``: sentence-transformers' files of an encoder that has them.
    ``adapter`` is what its weights are merged with. ``target``: the model that a drafter drafts for, whose table and
    head are among the tensors; else None.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        companions: Path | None = None,
        adapter: Adapter | None = None,
        target: DraftTarget | None = None,
    ):
        self.name = name
        self.source = source
        self._gguf = open_gguf(source.path, companions) if source.is_gguf else None
        self.path = source.path if self._gguf is None else self._gguf.folder
        self.revision = source.revision
        mixups.refuse_artifact(self.path)
        self.raw_config = _read_config(self.path)
        place = paths.shown(self.path / "config.json")
        self.family = find_family(self.raw_config, place)
        self._quantization = None if self._gguf else read_quantization(self.raw_config, place)
        if self._quantization is not None:
            del self.raw_config[QUANTIZATION]
        self.target = target
        self._check_target(place)
        self.config: ModelConfig = self.family.parse_config(self.raw_config)
        if target is not None:
            self.config = target.fitted(self.config, place)
        head = self.config.encoder
        self.retriever = None if head is None or head.masked_lm else retrieval.read(self.path)
        if self.retriever is not None:
            self.config = self.retriever.completed(self.config)
        self._shards: dict[Path, Shard | GgufShard | BorrowedTables]
        self._packed: PackedWeights | None = None
        stored = self._open_weights()
        self._settle_head(stored)
        self.model_tensors: Mapping[str, ModelTensor] = self.family.tensors(self.config)
        fused = self.family.fused_tensors(self.config)
        self.tensors: Mapping[str, TensorInfo] = match_tensors(
            source.path, self.model_tensors, fused, stored, knows_all=self.config.drafter is not None
        )
        self.adapter = adapter
        self._merged: MergedWeights | None = None
        if adapter is not None:
            self._merge(adapter)

    def _merge(self, adapter: Adapter) -> None:
        if self.is_quantized:
            raise CheckpointError(
                f"{paths.shown(self.source.path)}: is quantized already; --lora is for the unquantized checkpoint"
            )
        self.tensors = adapter.merged(self.tensors, self.model_tensors)
        self._shards[adapter.shard.path] = adapter.shard
        self._merged = MergedWeights({path: one for path, one in self._shards.items() if isinstance(one, Shard)})

    def __repr__(self) -> str:
        adapter = "" if self.adapter is None else f" + {paths.shown(self.adapter.folder.name)}"
        return f"Checkpoint({shown(self.name)}{adapter}: {self.config.model_type}, {self.parameter_count:,} parameters)"

    def _check_target(self, place: str) -> None:
        """Refuses a drafter without its target, and a target of what is no drafter."""
        drafts = is_drafter(self.family)
        if self.target is not None and not drafts:
            raise CheckpointError(f"--target {self.target.place}: {place} is no drafter; leave --target out")
        if self.target is None and drafts:
            raise CheckpointError(
                f"{place}: is a drafter for speculative decoding, of no use without its model; export it with --target "
                "and the artifact of that model"
            )

    def check_decoder(self, asked: str) -> None:
        """Refuses what looks at the next token where there is none.

        Raises:
            CheckpointError: it is an encoder or a drafter; names what was ``asked``.
        """
        if self.config.encoder is not None:
            raise CheckpointError(
                f"{asked}: {paths.shown(self.name)} is an encoder, which predicts no next token; leave it out"
            )
        if self.config.drafter is not None:
            raise CheckpointError(
                f"{asked}: {paths.shown(self.name)} is a drafter, for which it is not made; leave it out"
            )

    def _open_weights(self) -> dict[str, TensorInfo]:
        """The stored tensors by the names of a whole model."""
        if self._gguf is not None:
            self._shards = {self._gguf.shard.path: self._gguf.shard}
            return published_tensors(self._gguf.shard, self.config)
        shards = {shard.path: shard for shard in open_weights(self.path)}
        self._shards = {**shards}
        if self._quantization is None:
            stored = {name: info for shard in shards.values() for name, info in shard.tensors.items()}
        else:
            stored, self._packed = self._quantization.open(shards)
        return with_prefix(stored) | self._open_projection() | self._borrowed()

    def _borrowed(self) -> dict[str, TensorInfo]:
        """A drafter's matrices that are its target's."""
        if self.target is None:
            return {}
        tables = self.target.tables
        self._shards[tables.path] = tables
        return tables.tensors

    def _open_projection(self) -> dict[str, TensorInfo]:
        """ColBERT's Dense, which has a file of its own."""
        dense = None if self.retriever is None else self.retriever.dense
        if dense is None:
            return {}
        files.check(dense.weights, self.path, CheckpointError, limit=retrieval.WEIGHTS_LIMIT)
        shard = read_shard(dense.weights)
        self._shards[shard.path] = shard
        names = {"linear.weight": PROJECTION, "linear.bias": PROJECTION_BIAS}
        return {names.get(name, f"dense.{name}"): info for name, info in shard.tensors.items()}

    @cached_property
    def exact_formats(self) -> Mapping[str, IntFormat]:
        """The tensors that are quantized already on a grid of ours, by published name: an artifact in this format (or
        with wider scales) holds the very same values. Empty where nothing is quantized.

        Raises:
            CheckpointError: a file changed or cannot be read.
        """
        if self._packed is not None:
            return exact.exact_formats(self.tensors, self.model_tensors, self._packed)
        return {} if self._gguf is None else gguf_weights.exact_formats(self.tensors)

    @property
    def is_plain(self) -> bool:
        """Whether other libraries read the same weights from its folder."""
        return not self.is_quantized and self.adapter is None

    @property
    def weight_files(self) -> list[Path]:
        """All files that its weights come from."""
        return sorted(self._shards)

    @property
    def is_quantized(self) -> bool:
        """Whether it is of a format that other libraries read otherwise, if at all: GGUF, or packed safetensors."""
        return self._gguf is not None or self._packed is not None

    def read_code_blocks(self, name: str, rows: slice | None, block_rows: int) -> Iterator[Codes]:
        """Codes and scales of a tensor that has an exact format, in blocks of ``block_rows`` rows.

        Raises:
            CheckpointError: the file changed or cannot be read, or a scale is not finite.
        """
        info, form = self.tensors[name].rows(rows), self.exact_formats[name]
        reader = self._reader(info)
        assert not isinstance(reader, Shard | MergedWeights | BorrowedTables)
        for block in reader.code_blocks(info, block_rows):
            check_finite(f"{name}: scales", block.scale)
            yield block.in_groups_of(form.group_of(info.shape[-1]))

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
        return self._reader(info).row_blocks(info, block_rows)

    def check_tokens(self, tokens: npt.NDArray[np.int64], kind: type[Lfm2ExportError]) -> None:
        """Refuses tokens of a tokenizer that belongs to another model.

        Raises:
            kind: the vocabulary has not that many.
        """
        unknown = tokens[tokens >= self.config.vocab_size]
        if unknown.size:
            raise kind(
                f"{paths.shown(self.path)}: its tokenizer gives token {unknown[0]}, config.json knows "
                f"{self.config.vocab_size}; bring back the tokenizer that belongs to it"
            )

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
        return [path for path in found if paths.exists(path, CheckpointError)] + self._licences

    def shard_name(self, path: Path) -> str:
        """What a weight file is called in records: where it lies in the checkpoint."""
        return path.relative_to(self.path).as_posix() if path.is_relative_to(self.path) else path.name

    @cached_property
    def _licences(self) -> list[Path]:
        """LICENSE, LICENSE.md and the like, so many as a person would put there."""
        found = paths.names(self.path, CheckpointError, lambda name: name.startswith("LICENSE"))
        chosen = [name for name in found if _LICENCE.fullmatch(name) and name.isprintable()][:_MOST_LICENCES]
        if left := set(found) - set(chosen):
            logger.warning("%s: is without these licence files from here on: %s", paths.shown(self.path), listed(left))
        return [path for name in chosen if _is_no_folder(path := self.path / name)]

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply, for every runtime alike: generation_config.json's where it names any, else
        config.json's, as transformers fills the one from the other.

        Raises:
            CheckpointError: generation_config.json is damaged, or names something else than token ids.
        """
        path = self.path / GENERATION_CONFIG
        if not paths.exists(path, CheckpointError):
            return self.config.eos_token_id
        stated = files.read_json_object(path, self.path, CheckpointError).get("eos_token_id")
        if stated is None:
            return self.config.eos_token_id
        tokens = stated if isinstance(stated, list) else [stated]
        for token in tokens:
            if type(token) is not int or token < 0:
                raise CheckpointError(
                    f"{paths.shown(path)}: eos_token_id={shown(token)} is no token id; correct the file"
                )
        return tuple(token for token in tokens if token < self.config.vocab_size)

    @cached_property
    def config_sha256(self) -> str:
        """SHA-256 of config.json's meaning: spacing, order of keys and the writing library's version do not count."""
        meaning = {key: value for key, value in self.raw_config.items() if key not in _VOLATILE_KEYS}
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def shard_hashes(self) -> dict[str, str]:
        """SHA-256 of every weight file by its name, and of what an adapter's settings mean; streamed once, then
        remembered.

        Raises:
            CheckpointError: a file cannot be read, or one of the Hub's cache is not what the Hub said it is (its name
                there is its hash).
        """
        settings = {} if self.adapter is None else {LORA_CONFIG: self.adapter.settings_sha256}
        return self._shard_hashes | settings

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
        return {self.shard_name(path): digest for path, digest in sorted(digests.items())}

    def _settle_head(self, stored: dict[str, TensorInfo]) -> None:
        """What transformers makes of a head that is stored though config.json ties it to the embedding: a copy is left
        out, one that differs is taken for what it is, and one without an embedding stands for both."""
        if not self.config.tie_word_embeddings or HEAD not in stored:
            return
        head, embedding = stored[HEAD], stored.get(EMBEDDING)
        if embedding is None:
            stored[EMBEDDING] = replace(stored.pop(HEAD), name=EMBEDDING)
            return
        shape = (self.config.vocab_size, self.config.hidden_size)
        is_readable = head.is_readable and embedding.is_readable
        if not is_readable or {head.shape, embedding.shape} != {shape} or embedding.nbytes > _HEAD_LIMIT:
            return  # then the head is left over, and what is wrong is said with it
        if self._same_values(head, embedding):
            logger.info("%s: %s repeats the tied %s and is left out", paths.shown(head.file), HEAD, EMBEDDING)
            del stored[HEAD]
            return
        logger.warning(
            "%s: %s differs from %s, though config.json ties them; both are used, as by transformers (say "
            "%s=false there to state it)",
            paths.shown(head.file),
            HEAD,
            EMBEDDING,
            "tie_embedding" if "tie_embedding" in self.raw_config else "tie_word_embeddings",
        )
        self.config = replace(self.config, tie_word_embeddings=False)

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
        return self._reader(info).stored(info)

    def _part(self, info: TensorInfo, rows: slice | None) -> np.ndarray:
        return self._reader(info).float32(info.rows(rows))

    def _reader(self, info: TensorInfo) -> Shard | GgufShard | BorrowedTables | PackedWeights | MergedWeights:
        if isinstance(info, MergedTensor):
            assert self._merged is not None
            return self._merged
        if isinstance(info, PackedTensor):
            assert self._packed is not None
            return self._packed
        return self._shards[info.file]


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


def _without_config(folder: Path) -> CheckpointError:
    place, adapter = paths.shown(folder), folder / "adapter_config.json"
    if not paths.exists(adapter, CheckpointError):
        return CheckpointError(f"{place}: has no config.json; give a checkpoint's own folder")
    settings = files.read_json_object(adapter, folder, CheckpointError, limit=_CONFIG_LIMIT)
    base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type")
    return CheckpointError(
        f"{place}: is an adapter ({shown(kind)}) for {shown(base)}, not a model; give that as the checkpoint and this "
        "by --lora, or merge it with peft (merge_and_unload) and export the result"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not paths.exists(path, CheckpointError):
        raise _without_config(folder)
    return files.read_json_object(path, folder, CheckpointError, limit=_CONFIG_LIMIT)
