"""Text to token ids and back, from a checkpoint's files alone; no transformers.

In: tokenizer.json, tokenizer_config.json, chat_template.jinja as published. Out: the ids that transformers'
``AutoTokenizer`` gives, and text that streams token by token without ever showing half a character.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from lfm2_export import chat_template
from lfm2_export.chat_template import Message
from lfm2_export.errors import ArtifactError, GenerationError
from lfm2_export.messages import shown

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REPLACEMENT = "\ufffd"
# Tokens that a stream decodes again at each step before it looks for a place to cut, and those it then keeps.
_LONG, _TAIL = 16, 4


class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Whether a bos token is put in front is up to tokenizer.json's post-processor: transformers 5 ignores
    ``add_bos_token`` where that file is there, and so does this.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        template: str | None,
        place: str,
    ):
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._template = template
        self._place = place

    @classmethod
    def from_dir(cls, folder: str | Path) -> Tokenizer:
        """Reads the files of a checkpoint or an artifact.

        Raises:
            ArtifactError: tokenizer.json is missing, or a file is damaged.
        """
        folder = Path(folder)
        backend = _read_backend(folder / "tokenizer.json")
        config = _read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config = {**config, **_read_json(folder / "special_tokens_map.json")}
        named = _named_tokens(config)
        try:
            _add_missing(backend, config, named)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{folder / 'tokenizer_config.json'}: its tokens are damaged ({error!r}); restore it or export again"
            ) from error
        return cls(backend, named, _read_template(folder, config), str(folder))

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """bos_token, eos_token, ... as text, by name; chat templates see them as variables."""
        return self._special_tokens

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def vocab_size(self) -> int:
        """Ids that have a token, the added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens that are written out in it are recognized.

        Raises:
            GenerationError: it has characters that are no Unicode text.
        """
        check_text(text, "text")
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        Raises:
            GenerationError: an id is negative, beyond 32 bits, or no integer.
        """
        tokens = list(ids)
        try:
            return self._backend.decode(tokens, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise GenerationError(f"decode: {shown(tokens)} are not all token ids; pass integers from 0 up") from error

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the text that the model was trained on (chat_template.render)."""
        if self._template is None:
            raise GenerationError(f"{self._place}: no chat template; pass a plain prompt instead of messages")
        return chat_template.render(
            self._template,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            variables={**self._special_tokens, **(variables or {})},
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """``render_chat`` as token ids; the template writes the bos token itself."""
        text = self.render_chat(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )
        return self.encode(text, add_special_tokens=False)


def check_text(text: str, place: str) -> None:
    """Refuses characters that UTF-8 cannot write: lone surrogates, by which Python passes on bytes that are not UTF-8.

    Raises:
        GenerationError: with ``place``, the position and the character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise GenerationError(
            f"{place}: character {error.start} ({character!a}) is not Unicode text; give the text as valid UTF-8"
        ) from error


class StreamDecoder:
    """Decodes tokens one by one; the pieces joined are ``Tokenizer.decode`` of all of them.

    A token may end inside a character. Such a character is held back until the token that completes it (or ``finish``),
    recognized by the U+FFFD that an unfinished UTF-8 sequence decodes to at the end of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Decoded again together with what follows, since some decoders treat a first token differently.
        self._context: list[int] = []
        self._pending: list[int] = []
        self._shown = 0  # characters of the pending text that were returned already

    def push(self, token: int) -> str:
        """The text that is certain with ``token``; often a whole word, sometimes nothing."""
        self._pending.append(token)
        text = self._text(self._pending)
        end = len(text) - text.endswith(_REPLACEMENT)
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        if end == len(text):
            self._context, self._pending, self._shown = self._pending, [], 0
        elif len(self._pending) > _LONG:
            self._shorten(text)
        return piece

    def _shorten(self, text: str) -> None:
        """Lets go of old tokens in a stream of invalid bytes, which never ends with a character that is whole.

        Text that decodes to the same in two parts has no character across the cut: a cut inside one turns its rest into
        at least one more U+FFFD.
        """
        head, tail = self._pending[:-_TAIL], self._pending[-_TAIL:]
        before = self._text(head)
        if len(before) <= self._shown and before + self._tokenizer.decode(tail, skip_special_tokens=self._skip) == text:
            self._context, self._pending, self._shown = head, tail, self._shown - len(before)

    def push_all(self, tokens: Iterable[int]) -> str:
        return "".join(self.push(token) for token in tokens)

    def finish(self) -> str:
        """What was held back, at the end of the stream: U+FFFD if the last character never was completed."""
        piece = self._text(self._pending)[self._shown :]
        self._context, self._pending, self._shown = [], [], 0
        return piece

    def _text(self, tokens: list[int]) -> str:
        before = self._tokenizer.decode(self._context, skip_special_tokens=self._skip)
        both = self._tokenizer.decode(self._context + tokens, skip_special_tokens=self._skip)
        return both[len(before) :]


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; restore it from the checkpoint or export again")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ArtifactError(f"{path}: not a readable tokenizer ({error}); restore it or export again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_utf8(path))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}); restore it or export again") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: a JSON object expected, found {type(value).__name__}")
    return value


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: byte {error.start} is not UTF-8; restore it or export again") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); check the file") from error


def _content(token: object) -> str | None:
    """A token's text; files hold it as a string or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name: the usual ones, a model's own (``image_token``), and those of extra_special_tokens."""
    extra = config.get("extra_special_tokens")
    own = {k: v for k, v in config.items() if k.endswith("_token") and k not in _NAMED and isinstance(v, str)}
    usual = {name: config.get(name) for name in _NAMED}
    found = {**usual, **own, **(extra if isinstance(extra, Mapping) else {})}
    return {name: text for name, token in found.items() if (text := _content(token)) is not None}


def _add_missing(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Makes the tokens that tokenizer_config.json declares known to ``backend`` as special, as transformers does."""
    declared = config.get("added_tokens_decoder", {})
    entries = [entry for _, entry in sorted(declared.items(), key=lambda item: int(item[0]))]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for entry in entries:
        if entry["content"] not in known:
            options = {flag: entry[flag] for flag in flags if flag in entry}
            backend.add_tokens([tokenizers.AddedToken(entry["content"], **options)])
    by_text = {entry["content"]: {f: entry[f] for f in flags if f in entry} for entry in entries}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    listed = [_content(token) for token in extra] if isinstance(extra, list) else []
    for text in [*named.values(), *(text for text in listed if text)]:
        options = {"normalized": False, **by_text.get(text, {}), "special": True}
        backend.add_special_tokens([tokenizers.AddedToken(text, **options)])


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template's own file wins over tokenizer_config.json, where it may be one of several by name."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_utf8(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None
