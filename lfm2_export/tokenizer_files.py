"""What a tokenizer's files say, checked, as plain data; nothing is opened by the library yet.

In: a folder with tokenizer.json, tokenizer_config.json and chat_template.jinja as published. Out: the bytes of the
first, the tokens that the second declares, and the template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_export import paths
from lfm2_export.errors import ArtifactError
from lfm2_export.files import TEXT_LIMIT, read_bytes, read_json_object, read_text
from lfm2_export.messages import one_line, shown
from lfm2_export.tokenizer_backend import Token

# The largest of the family, with 128,000 tokens, has 10 to 17 MB.
TOKENIZER_LIMIT = 32 << 20
# Of one token's text.
_TOKEN_LIMIT = 4096

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_REMEDY = "restore it or export again"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """``declared`` and ``special`` are tokens for ``tokenizer_backend.build``; ``named`` has the text of bos_token,
    eos_token, ... by name."""

    path: Path
    data: bytes
    declared: tuple[Token, ...]
    special: tuple[Token, ...]
    named: Mapping[str, str]
    template: str | None


def read(folder: Path) -> TokenizerFiles:
    """Reads the files of a checkpoint or an artifact.

    Raises:
        ArtifactError: tokenizer.json is missing; a file is damaged, too large, no regular file or a link that leaves
            the folder.
    """
    path = folder / "tokenizer.json"
    if not paths.exists(path, ArtifactError):
        raise ArtifactError(f"{paths.shown(path)}: no such file; restore it from the checkpoint or export again")
    config = _object(folder, "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config = {**config, **_object(folder, "special_tokens_map.json")}
    place = folder / "tokenizer_config.json"
    declared = tuple(_declared(config, place))
    named = _named(config)
    return TokenizerFiles(
        path=path,
        data=read_bytes(path, folder, ArtifactError, limit=TOKENIZER_LIMIT),
        declared=declared,
        special=tuple(_special(config, declared, named, place)),
        named=named,
        template=_template(folder, config, place),
    )


def _object(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return read_json_object(path, folder, ArtifactError) if paths.exists(path, ArtifactError) else {}


def _declared(config: Mapping[str, Any], place: Path) -> Iterator[Token]:
    """The tokens of added_tokens_decoder in the order of their ids."""
    declared = config.get("added_tokens_decoder", {})
    if not isinstance(declared, dict):
        raise _damaged(place, f"added_tokens_decoder={shown(declared)} is no object of tokens by id")
    for _, entry in sorted(declared.items(), key=lambda item: _number(item[0], place)):
        yield _token(entry, place)


def _number(key: str, place: Path) -> int:
    try:
        return int(key)
    except ValueError as error:
        raise _damaged(place, f"added_tokens_decoder has {shown(key)} for an id") from error


def _token(entry: Any, place: Path) -> dict[str, Any]:
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


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name: the usual ones, a model's own (``image_token``), and those of extra_special_tokens."""
    extra = config.get("extra_special_tokens")
    own = {k: v for k, v in config.items() if k.endswith("_token") and k not in _NAMED and isinstance(v, str)}
    usual = {name: config.get(name) for name in _NAMED}
    found = {**usual, **own, **(extra if isinstance(extra, Mapping) else {})}
    return {name: text for name, token in found.items() if (text := _content(token)) is not None}


def _special(
    config: Mapping[str, Any], declared: tuple[Token, ...], named: Mapping[str, str], place: Path
) -> Iterator[Token]:
    """The named tokens and the extra ones, with the flags that they are declared with."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    listed = [_content(token) for token in extra] if isinstance(extra, list) else []
    flags = {token["content"]: token for token in declared}
    for text in dict.fromkeys([*named.values(), *(text for text in listed if text)]):
        yield {"normalized": False, **flags.get(text, {}), "content": _text(text, place), "special": True}


def _template(folder: Path, config: Mapping[str, Any], place: Path) -> str | None:
    """The template's own file wins over tokenizer_config.json, where it may be one of several by name."""
    path = folder / "chat_template.jinja"
    if paths.exists(path, ArtifactError):
        return read_text(path, folder, ArtifactError)
    template = config.get("chat_template")
    if isinstance(template, list):
        entries = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next((entry.get("template") for entry in entries), None)
    if not isinstance(template, str):
        return None
    _check_unicode(template, "chat_template", place)
    if len(template) > TEXT_LIMIT:
        raise ArtifactError(
            f"{paths.shown(place)}: chat_template has {len(template)} characters, more than {TEXT_LIMIT}; {_REMEDY}"
        )
    return template


def _damaged(place: Path, fault: str) -> ArtifactError:
    return ArtifactError(f"{paths.shown(place)}: its tokens are damaged ({one_line(fault, 200)}); {_REMEDY}")
