"""The files by which sentence-transformers and PyLate know a retriever: its modules, prompts and lengths.

In: a checkpoint's or an artifact's folder, whose files strangers wrote. Out: ``RetrieverFiles``: what the head of an
encoder is (``completed``), where the weights of ColBERT's Dense lie, how texts are prepared (``TextSettings``), and
which files are carried over. What would be computed otherwise than here is refused by name: other modules, other
poolings, an activation behind the Dense.

Sources: sentence-transformers 6.2's ``BaseModel`` and ``Pooling``; PyLate 1.6's ``ColBERT``, whose checkpoints have the
same files with settings of its own.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lfm2_export import files, json_values, paths
from lfm2_export.config import ModelConfig
from lfm2_export.errors import CheckpointError, Lfm2ExportError
from lfm2_export.folders import is_plain_name
from lfm2_export.heads import Pooling
from lfm2_export.messages import shown

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
LENGTH = "sentence_bert_config.json"
MODULE_CONFIG, MODULE_WEIGHTS = "config.json", "model.safetensors"
# Bytes. The published ones have less than 2 kB; a Dense of 8,192 x 8,192 float32 values has 256 MB.
JSON_LIMIT = 1 << 20
WEIGHTS_LIMIT = 300 << 20
_MOST_MODULES = 8
_MOST_TOKENS = 2**31 - 1
_IDENTITY = "torch.nn.modules.linear.Identity"
# Older configs have a boolean for each way to pool.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Dense:
    """ColBERT's projection of each token: its weights [width, hidden_size], and a bias [width] or none."""

    weights: Path
    hidden_size: int
    width: int
    bias: bool


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How texts become tokens.

    A retriever of one vector a text has ``prompts`` that are put in front of it ("query", "document"). ColBERT inserts
    the token that a prefix is (``query_prefix``, ``document_prefix``) behind the first one, cuts queries and documents
    to their lengths, fills queries up with expansion tokens, and leaves the vectors of ``skiplist_words`` out of
    documents. ``max_tokens``: None where no file says it.
    """

    prompts: Mapping[str, str]
    default_prompt: str | None = None
    max_tokens: int | None = None
    query_prefix: str = "[Q] "
    document_prefix: str = "[D] "
    query_length: int = 32
    document_length: int = 180
    expands_queries: bool = True
    attends_to_expansion: bool = False
    skiplist_words: tuple[str, ...] = tuple(string.punctuation)


@dataclass(frozen=True, kw_only=True)
class RetrieverFiles:
    """A retriever's modules. ``names``: the files that are carried over, relative to ``folder``."""

    folder: Path
    names: tuple[str, ...]
    pooling: Pooling | None
    dense: Dense | None
    text: TextSettings

    def completed(self, config: ModelConfig) -> ModelConfig:
        """The config with its head.

        Raises:
            CheckpointError: the Dense is for another width.
        """
        assert config.encoder is not None
        dense = self.dense
        if dense is None:
            return replace(config, encoder=replace(config.encoder, pooling=self.pooling))
        if dense.hidden_size != config.hidden_size:
            raise CheckpointError(
                f"{paths.shown(dense.weights.parent / MODULE_CONFIG)}: in_features={dense.hidden_size}, but "
                f"config.json says hidden_size={config.hidden_size}; download both again"
            )
        head = replace(config.encoder, projection=dense.width, projection_bias=dense.bias)
        return replace(config, encoder=head)

    def limit(self, name: str) -> int:
        """The most bytes that one of ``names`` may have."""
        return WEIGHTS_LIMIT if name.endswith(MODULE_WEIGHTS) else JSON_LIMIT


def read(folder: Path, kind: type[Lfm2ExportError] = CheckpointError) -> RetrieverFiles | None:
    """The modules of a folder; None where it has no ``modules.json``.

    Raises:
        kind: a file is damaged or leads out of the folder, or a module would be computed otherwise than here.
    """
    if not paths.exists(folder / MODULES, kind):
        return None
    return _Reader(folder, kind).read()


class _Reader:
    """Reads a retriever's files."""

    def __init__(self, folder: Path, kind: type[Lfm2ExportError]):
        self.folder, self.kind = folder, kind
        self.names = [MODULES]

    def read(self) -> RetrieverFiles:
        pooling, dense = None, None
        for name, path in self._modules():
            match name:
                case "Pooling":
                    pooling = self._pooling(path)
                case "Dense" if dense is None:
                    dense = self._dense(path)
                case "Transformer" | "Normalize":  # vectors are normalized here in any case
                    pass
                case _:
                    raise self._refusal(MODULES, "type", name, "Transformer, then Pooling or one Dense, then Normalize")
        if pooling is not None and dense is not None:
            raise self._refusal(MODULES, "type", "Dense", "no Dense behind a Pooling")
        text = self._text()
        return RetrieverFiles(folder=self.folder, names=tuple(self.names), pooling=pooling, dense=dense, text=text)

    def _modules(self) -> Iterator[tuple[str, str]]:
        """Each module's class, without the package that it is in, and its folder."""
        listed = self._json(MODULES)
        if not isinstance(listed, list) or not 0 < len(listed) <= _MOST_MODULES:
            raise self._refusal(MODULES, "modules", listed, f"a list of 1 to {_MOST_MODULES} modules")
        for entry in listed:
            found = entry if isinstance(entry, dict) else {}
            name, path = found.get("type"), found.get("path", "")
            if not isinstance(name, str):
                raise self._refusal(MODULES, "type", name, "the name of a class")
            if path != "" and not _is_folder_name(path):
                raise self._refusal(MODULES, "path", path, "the plain name of a folder in this one")
            yield name.rpartition(".")[2], path

    def _pooling(self, path: str) -> Pooling:
        place = f"{path}/{MODULE_CONFIG}"
        found = self._object(place)
        self.names.append(place)
        mode = found.get("pooling_mode")
        if mode is None:
            chosen = [name for flag, name in _POOLING_FLAGS.items() if found.get(flag)]
            mode = chosen[0] if len(chosen) == 1 else chosen or "mean"
        if mode not in list(Pooling):
            raise self._refusal(place, "pooling_mode", mode, " or ".join(Pooling))
        if mode == Pooling.MEAN and found.get("include_prompt") is False:  # the first token is pooled in any case
            raise self._refusal(place, "include_prompt", False, "true with mean pooling")
        return Pooling(mode)

    def _dense(self, path: str) -> Dense:
        place, weights = f"{path}/{MODULE_CONFIG}", f"{path}/{MODULE_WEIGHTS}"
        found = self._object(place)
        activation = found.get("activation_function", _IDENTITY)
        if activation != _IDENTITY:
            raise self._refusal(place, "activation_function", activation, _IDENTITY)
        if found.get("use_residual"):
            raise self._refusal(place, "use_residual", found["use_residual"], "false")
        if not paths.exists(self.folder / weights, self.kind):
            raise self.kind(
                f"{paths.shown(self.folder / weights)}: is missing (pickled weights stay closed); save the module as "
                "safetensors"
            )
        self.names += [place, weights]
        integer = _one_of(int, lambda value: 0 < value <= _MOST_TOKENS)
        return Dense(
            weights=self.folder / weights,
            hidden_size=self._value(place, found, "in_features", None, integer, "a positive integer"),
            width=self._value(place, found, "out_features", None, integer, "a positive integer"),
            bias=self._value(place, found, "bias", True, _one_of(bool), "true or false"),
        )

    def _text(self) -> TextSettings:
        found, length = self._optional(SETTINGS), self._optional(LENGTH)
        defaults = TextSettings(prompts={})
        positive = _one_of(int, lambda value: 0 < value <= _MOST_TOKENS)

        def value(key: str, default: _Value, check: Callable[[Any], bool], expected: str) -> _Value:
            result: _Value = self._value(SETTINGS, found, key, default, check, expected)
            return result

        prompts: dict[str, str | None] = value("prompts", {}, _is_texts_by_name, "an object of texts")
        default_prompt = value(
            "default_prompt_name", None, _one_of(str, lambda name: name in prompts), "a prompt's name"
        )
        return TextSettings(
            # None stands for a prompt that is not used.
            prompts={name: text or "" for name, text in prompts.items()},
            default_prompt=default_prompt,
            max_tokens=self._value(LENGTH, length, "max_seq_length", None, positive, "a positive integer"),
            query_prefix=value("query_prefix", defaults.query_prefix, _one_of(str), "a text"),
            document_prefix=value("document_prefix", defaults.document_prefix, _one_of(str), "a text"),
            query_length=value("query_length", defaults.query_length, positive, "a positive integer"),
            document_length=value("document_length", defaults.document_length, positive, "a positive integer"),
            expands_queries=value("do_query_expansion", True, _one_of(bool), "true or false"),
            attends_to_expansion=value("attend_to_expansion_tokens", False, _one_of(bool), "true or false"),
            skiplist_words=tuple(value("skiplist_words", defaults.skiplist_words, _is_texts, "a list of texts")),
        )

    def _optional(self, name: str) -> dict[str, Any]:
        if not paths.exists(self.folder / name, self.kind):
            return {}
        self.names.append(name)
        return self._object(name)

    def _object(self, name: str) -> dict[str, Any]:
        return files.read_json_object(self.folder / name, self.folder, self.kind, limit=JSON_LIMIT)

    def _json(self, name: str) -> object:
        data = files.read_bytes(self.folder / name, self.folder, self.kind, limit=JSON_LIMIT)
        try:
            return json_values.parse(data)
        except json_values.JsonError as error:
            raise self.kind(f"{paths.shown(self.folder / name)}: {error}; bring back the original") from error

    def _value(
        self, place: str, found: Mapping[str, Any], key: str, default: Any, check: Callable[[Any], bool], expected: str
    ) -> Any:
        value = found.get(key)
        if value is None and (default is not None or key not in ("in_features", "out_features")):
            return default
        if not check(value):
            raise self._refusal(place, key, value, expected)
        return value

    def _refusal(self, place: str, key: str, value: object, expected: str) -> Lfm2ExportError:
        return self.kind(
            f"{paths.shown(self.folder / place)}: {key}={shown(value)} is not supported; expected {expected}"
        )


def _one_of(kind: type, also: Callable[[Any], bool] = lambda value: True) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind and also(value)


def _is_folder_name(path: object) -> bool:
    return isinstance(path, str) and is_plain_name(path) and "/" not in path and path.isprintable()


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_texts_by_name(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str | None) for one in value.values())
