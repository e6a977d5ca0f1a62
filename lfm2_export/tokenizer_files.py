"""What a tokenizer's files say, checked, as plain data; nothing is opened by the library yet.

In: a folder with tokenizer.json and tokenizer_config.json as published. Out: the bytes of the first, and the tokens
that the second declares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_export import paths
from lfm2_export.errors import ArtifactError
from lfm2_export.files import read_bytes, read_json_object
from lfm2_export.messages import one_line, shown
from lfm2_export.tokenizer_backend import Additions, Token

# The largest of the family, with 128,000 tokens, has 10 to 17 MB.
TOKENIZER_LIMIT = 32 << 20
# Of one token's text.
_TOKEN_LIMIT = 4096

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _OLD_EXTRA, _OWN = "extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Beside a tokenizer_config.json without added_tokens_decoder.
OLDER = "added_tokens.json"
_REMEDY = "restore it or export again"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """``data`` and ``additions`` are for ``tokenizer_backend.build``; ``named`` has the text of bos_token and others by
    name; ``config`` is tokenizer_config.json, which may hold the chat templates, too (``template_files``)."""

    path: Path
    data: bytes
    additions: Additions
    named: Mapping[str, str]
    config: Mapping[str, Any]


def read(folder: Path) -> TokenizerFiles:
    """Reads the files of a checkpoint or an artifact, but for the templates.

    Raises:
        ArtifactError: tokenizer.json is missing; a file is damaged, too large, no regular file or a link that leaves
            the folder.
    """
    path = folder / "tokenizer.json"
    if not paths.exists(path, ArtifactError):
        raise ArtifactError(f"{paths.shown(path)}: no such file; restore it from the checkpoint or export again")
    config = _object(folder, "tokenizer_config.json")
    older: list[tuple[int, Token]] = []
    if "added_tokens_decoder" not in config:
        config = _with_map(config, _object(folder, "special_tokens_map.json"))
        older = list(_older(_object(folder, OLDER), config, folder / OLDER))
    place = folder / "tokenizer_config.json"
    named = _named(config)
    return TokenizerFiles(
        path=path,
        data=read_bytes(path, folder, ArtifactError, limit=TOKENIZER_LIMIT),
        additions={
            "declared": list(_declared(config, place)) if "added_tokens_decoder" in config else None,
            "older": older,
            "special": list(_special(config, named, place)),
            "named": [text for name in named if (text := _content(named[name]))],
            "split": config.get("split_special_tokens") is True,
        },
        named={name: _content(token) or "" for name, token in named.items()},
        config=config,
    )


def _object(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return read_json_object(path, folder, ArtifactError) if paths.exists(path, ArtifactError) else {}


def _with_map(config: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json wins over the config, but for a list of extra tokens, which goes on from the config's."""
    merged, extra = {**config, **named}, (config.get(_EXTRA), named.get(_EXTRA))
    if all(isinstance(tokens, list) for tokens in extra):
        merged[_EXTRA] = [*config[_EXTRA], *(token for token in named[_EXTRA] if token not in config[_EXTRA])]
    return merged


def _declared(config: Mapping[str, Any], place: Path) -> Iterator[Token]:
    """The tokens of added_tokens_decoder in the order of their ids."""
    declared = config["added_tokens_decoder"]
    if not isinstance(declared, dict):
        raise _damaged(place, f"added_tokens_decoder={shown(declared)} is no object of tokens by id")
    for _, entry in sorted(declared.items(), key=lambda item: _number(item[0], place)):
        yield _token(entry, place)


def _older(tokens: Mapping[str, Any], config: Mapping[str, Any], place: Path) -> Iterator[tuple[int, Token]]:
    """Ids and tokens of added_tokens.json, which tools wrote before there was an added_tokens_decoder."""
    extra = config.get(_EXTRA)
    listed = [*(config.get(name) for name in _NAMED), *(extra if isinstance(extra, list) else [])]
    special = {_content(token) for token in listed}
    for text, ident in tokens.items():
        if type(ident) is not int or not 0 <= ident < 1 << 32:
            raise _damaged(place, f"{shown(text)} has {shown(ident)} for an id")
        yield ident, {"content": _text(text, place), "normalized": text not in special, "special": text in special}


def _number(key: str, place: Path) -> int:
    try:
        return int(key)
    except ValueError as error:
        raise _damaged(place, f"added_tokens_decoder has {shown(key)} for an id") from error


def _token(entry: Any, place: Path) -> Token:
    """A token's text and flags; other keys mean nothing."""
    if not isinstance(entry, dict) or "content" not in entry:
        raise _damaged(place, f"the token {shown(entry)} has no content")
    flags = {flag: entry[flag] for flag in _FLAGS if flag in entry}
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise _damaged(place, f"{flag}={shown(value)} of {shown(entry['content'])} is neither true nor false")
    return {"content": _text(entry["content"], place), **flags}


def _text(content: Any, place: Path) -> str:
    if not isinstance(content, str):
        raise _damaged(place, f"the token {shown(content)} is no text")
    if len(content) > _TOKEN_LIMIT:
        raise _damaged(place, f"the token {shown(content)} has {len(content)} characters, more than {_TOKEN_LIMIT}")
    _check_unicode(content, f"the token {shown(content)}", place)
    return content


def _check_unicode(text: str, what: str, place: Path) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _damaged(place, f"{what} has no Unicode text at character {error.start}") from error


def _content(token: object) -> str | None:
    """A token's text; files hold it as a string or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens by name: the usual ones, a model's own (``image_token``), and those of extra_special_tokens; where
    there are none of these two, those of model_specific_special_tokens."""
    own = {k: v for k, v in config.items() if k.endswith("_token") and k not in _NAMED and isinstance(v, str)}
    own |= _mapping(config.get(_EXTRA))
    usual = {name: config.get(name) for name in _NAMED}
    found = {**usual, **(own or _mapping(config.get(_OWN)))}
    return {name: token for name, token in found.items() if _content(token) is not None}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _special(config: Mapping[str, Any], named: Mapping[str, Any], place: Path) -> Iterator[Token]:
    """The named tokens and the extra ones, under their new key or, beside no list of these, the old one."""
    extra = config.get(_EXTRA) or config.get(_OLD_EXTRA) or []
    if isinstance(extra, Mapping):
        extra = config.get(_OLD_EXTRA) or []
    listed = [token for token in extra if _content(token)] if isinstance(extra, list) else []
    for token in (*named.values(), *listed):
        yield _token(token, place) if isinstance(token, dict) else {"content": _text(token, place), "special": True}


def _damaged(place: Path, fault: str) -> ArtifactError:
    return ArtifactError(f"{paths.shown(place)}: its tokens are damaged ({one_line(fault, 200)}); {_REMEDY}")
