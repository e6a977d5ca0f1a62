"""How tokens are chosen and when generation ends, as one frozen dataclass.

In: the checkpoint's ``generation_config.json`` and what the caller overrides. Out: values that were checked once.
Names, defaults and meaning are those of transformers' GenerationConfig, so that one file says the same thing to both;
the one difference is ``max_new_tokens`` (transformers stops at 20 tokens unless told otherwise).
"""

from __future__ import annotations

import logging
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from numbers import Real
from pathlib import Path
from typing import Any

from lfm2_export import paths
from lfm2_export.errors import GenerationError
from lfm2_export.files import TEXT_LIMIT, read_json_object
from lfm2_export.generation_keys import unsupported
from lfm2_export.messages import listed, shown

logger = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 512

_FROM_FILE = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_length",
    "min_new_tokens",
    "max_new_tokens",
)
# To give one of these is to ask for sampling.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Words that must not be written, and their tokens.
_MOST_WORDS, _LONGEST_WORD = 100_000, 1_000
# In the file, but about something else than choosing tokens.
_NOT_OURS = {"eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}


class _DefaultFloat(float):
    """A default, told from the same number given."""


class _DefaultInt(int):
    """A default, told from the same number given."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of one generation.

    ``do_sample`` None is settled here: True where a setting of sampling was given (a temperature, for instance), so
    that ``GenerationConfig(temperature=0.3)`` samples as ``--temperature 0.3`` does; a ``seed`` alone changes nothing.

    With ``do_sample`` False or ``temperature`` 0 the likeliest token is taken (greedy); only ``repetition_penalty``
    then changes the scores. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0, ``typical_p`` 1, ``epsilon_cutoff`` 0,
    ``eta_cutoff`` 0 and ``repetition_penalty`` 1 switch the respective step off; ``top_p`` 0 leaves one token, as in
    transformers. ``suppress_tokens`` are never chosen, ``begin_suppress_tokens`` not first, ``bad_words_ids`` (token
    sequences) not in a row, ``no_repeat_ngram_size`` (0: off) forbids to write so many tokens again, and
    ``stop_token_ids`` are not chosen before ``min_new_tokens`` are there, or ``min_length`` with the prompt. With
    ``seed`` None every run differs. Numbers may be as small and as large as float64 has them: sampling counts in
    float64 where float32 has no room.

    Raises:
        GenerationError: a value is out of range.
    """

    do_sample: bool | None = None
    temperature: float = _DefaultFloat(1.0)
    top_k: int = _DefaultInt(50)
    top_p: float = _DefaultFloat(1.0)
    min_p: float = _DefaultFloat(0.0)
    typical_p: float = _DefaultFloat(1.0)
    epsilon_cutoff: float = _DefaultFloat(0.0)
    eta_cutoff: float = _DefaultFloat(0.0)
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.do_sample is None:
            given = (getattr(self, name) for name in _SAMPLING)
            object.__setattr__(self, "do_sample", not all(isinstance(v, _DefaultFloat | _DefaultInt) for v in given))
        if not isinstance(self.do_sample, bool):
            raise _error("do_sample", self.do_sample, "true or false")
        values: dict[str, Any] = {
            name: _number(name, getattr(self, name), in_range, expected)
            for name, (in_range, expected) in _NUMBERS.items()
        }
        for name, (low, expected) in _INTEGERS.items():
            values[name] = _integer(name, getattr(self, name), low, expected)
        values["stop_token_ids"] = _tokens("stop_token_ids", self.stop_token_ids)
        for name in ("suppress_tokens", "begin_suppress_tokens"):  # an id that no token has changes nothing
            values[name] = _tokens(name, getattr(self, name), low=None)
        values["bad_words_ids"] = _words("bad_words_ids", self.bad_words_ids)
        values["seed"] = None if self.seed is None else _integer("seed", self.seed, 0, "an integer from 0 up")
        for name, value in values.items():  # numpy's numbers become Python's
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """``stop_token_ids`` to look one up in: a file may name any number of them."""
        return frozenset(self.stop_token_ids)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, place: str = "generation_config.json") -> GenerationConfig:
        """Reads the contents of a ``generation_config.json``.

        What it does not state, or states as null, has the default. Settings that would change what transformers
        generates and that are not supported are named in a warning, once; other keys are logged.
        """
        if names := unsupported(raw):
            _warn_of_unsupported(place, listed(names))
        if unknown := sorted(k for k in raw if k not in _FROM_FILE and k not in _NOT_OURS and raw[k] is not None):
            logger.info("%s: not used here: %s", place, listed(unknown))
        known = {key: raw[key] for key in _FROM_FILE if raw.get(key) is not None}
        stops = raw.get("eos_token_id")
        stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
        try:
            # In a file a temperature alone does not switch sampling on: so transformers reads it.
            return cls(**{"do_sample": False, **known}, stop_token_ids=tuple(stops))
        except GenerationError as error:
            # The file has another name for them.
            fault = re.sub("^stop_token_ids=", "eos_token_id=", str(error))
            raise GenerationError(f"{place}: {fault}") from error

    @classmethod
    def from_file(cls, path: str | Path) -> GenerationConfig:
        """Reads ``generation_config.json``, or the defaults (greedy) where there is no such file.

        Raises:
            GenerationError: it is no JSON object in a regular file of at most 1 MiB, or a value is out of range.
        """
        path = Path(path)
        if not paths.exists(path, GenerationError):
            return cls()
        raw = read_json_object(path, path.parent, GenerationError, limit=TEXT_LIMIT)
        return cls.from_dict(raw, place=paths.shown(path))

    @classmethod
    def from_artifact(cls, path: str | Path) -> GenerationConfig:
        """The settings that came with an artifact's checkpoint, and the tokens that end a reply: those of its
        ``generation_config.json``, or where that names none those of its ``config.json``.

        Raises:
            GenerationError: it is no folder with such files, a file is damaged, or a value is out of range.
        """
        folder = Path(path)
        own, model = folder / "generation_config.json", folder / "config.json"
        if not any(paths.exists(file, GenerationError) for file in (own, model)):
            raise GenerationError(
                f"{paths.shown(folder)}: has neither generation_config.json nor config.json; give an artifact's folder"
            )
        config = cls.from_file(own)
        if config.stop_token_ids or not paths.exists(model, GenerationError):
            return config
        stated = read_json_object(model, folder, GenerationError, limit=TEXT_LIMIT).get("eos_token_id")
        stops = cls.from_dict({"eos_token_id": stated}, place=paths.shown(model)).stop_token_ids
        return replace(config, stop_token_ids=stops)

    def override(
        self,
        *,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        epsilon_cutoff: float | None = None,
        eta_cutoff: float | None = None,
        repetition_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        bad_words_ids: tuple[tuple[int, ...], ...] | None = None,
        suppress_tokens: tuple[int, ...] | None = None,
        begin_suppress_tokens: tuple[int, ...] | None = None,
        min_length: int | None = None,
        min_new_tokens: int | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: tuple[int, ...] | None = None,
        seed: int | None = None,
    ) -> GenerationConfig:
        """A copy with everything replaced that is not None.

        Asking for a setting of sampling asks for sampling, unless ``do_sample`` is given too; a seed alone does not.
        """
        sampling: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
            "epsilon_cutoff": epsilon_cutoff,
            "eta_cutoff": eta_cutoff,
        }
        if do_sample is None and any(value is not None for value in sampling.values()):
            do_sample = True
        options: dict[str, Any] = {
            **sampling,
            "do_sample": do_sample,
            "repetition_penalty": repetition_penalty,
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "bad_words_ids": bad_words_ids,
            "suppress_tokens": suppress_tokens,
            "begin_suppress_tokens": begin_suppress_tokens,
            "min_length": min_length,
            "min_new_tokens": min_new_tokens,
            "max_new_tokens": max_new_tokens,
            "stop_token_ids": stop_token_ids,
            "seed": seed,
        }
        return replace(self, **{name: value for name, value in options.items() if value is not None})


def _error(name: str, value: object, expected: str) -> GenerationError:
    return GenerationError(f"{name}={shown(value)} is not usable; expected {expected}")


def _number(name: str, value: Any, in_range: Callable[[float], bool], expected: str) -> float:
    """A finite number as a float; the settings of a file may have any number of digits."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise _error(name, value, expected)
    try:
        number = float(value)
    except OverflowError as error:
        raise _error(name, value, expected) from error
    if not math.isfinite(number) or not in_range(number):
        raise _error(name, value, expected)
    return number


def _integer(name: str, value: Any, low: int | None, expected: str) -> int:
    try:
        number = operator.index(value)
    except TypeError as error:
        raise _error(name, value, expected) from error
    if isinstance(value, bool) or (low is not None and number < low):
        raise _error(name, value, expected)
    return number


# Of numbers, what is in range, in words too; of integers, the lowest.
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda v: v >= 0, "0 (greedy) or a positive number"),
    "top_p": (lambda v: 0 <= v <= 1, "a number from 0 (one token) to 1 (off)"),
    "min_p": (lambda v: 0 <= v <= 1, "a number from 0 (off) to 1"),
    "typical_p": (lambda v: v > 0, "a number above 0 (1: off)"),
    "epsilon_cutoff": (lambda v: v >= 0, "a number from 0 (off) to 1 (off)"),
    "eta_cutoff": (lambda v: v >= 0, "a number from 0 (off) to 1 (off)"),
    "repetition_penalty": (lambda v: v > 0, "a number above 0 (1: off)"),
}
_INTEGERS = {
    "top_k": (0, "0 (off) or a positive integer"),
    "no_repeat_ngram_size": (0, "0 (off) or a positive integer"),
    "min_length": (0, "an integer from 0 up"),
    "min_new_tokens": (0, "an integer from 0 up"),
    "max_new_tokens": (1, "a positive integer"),
}


def _tokens(name: str, value: Any, low: int | None = 0) -> tuple[int, ...]:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise _error(name, value, "a list of token ids")
    return tuple(_integer(name, token, low, "token ids") for token in value)


def _words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list | tuple) or len(value) > _MOST_WORDS:
        raise _error(name, value, f"at most {_MOST_WORDS} lists of token ids")
    words = tuple(_tokens(name, word) for word in value)
    for word in words:
        if not 1 <= len(word) <= _LONGEST_WORD:
            raise _error(name, word, f"lists of 1 to {_LONGEST_WORD} token ids")
    return words


@cache
def _warn_of_unsupported(place: str, names: str) -> None:
    logger.warning(
        "%s: %s: not supported here, and without effect; transformers would generate otherwise", place, names
    )
