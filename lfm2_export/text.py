"""Text to token ids and back, from a checkpoint's files alone; no transformers.

In: tokenizer.json, tokenizer_config.json, chat templates as published. Out: the ids that transformers'
``AutoTokenizer`` gives, and text that streams token by token without ever showing half a character.

``StreamDecoder`` is not tokenizers' ``DecodeStream``: that has no end, at which it would give what it holds back, and
decodes a run of invalid bytes anew at every step (4,000 of them: 3.5 s against 0.1 s).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from lfm2_export import chat_template as templates
from lfm2_export import paths, template_files, tokenizer_files, tokenizer_probe
from lfm2_export.chat_template import Message, RenderLimits
from lfm2_export.errors import ArtifactError, GenerationError
from lfm2_export.isolated.process import Limits
from lfm2_export.messages import one_line, shown
from lfm2_export.tokenizer_backend import build, translated

_REPLACEMENT = "\ufffd"
# Tokens that a stream decodes again at each step before it looks for a place to cut, and those it then keeps.
_LONG, _TAIL = 16, 4
# Tokens around what a model says rather than in it: by their role, and as these families write them.
_FRAME_ROLES = ("bos_token", "eos_token", "pad_token", "sep_token", "cls_token")
_FRAME_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")


class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Whether a bos token is put in front is up to tokenizer.json's post-processor: transformers 5 ignores
    ``add_bos_token`` where that file is there, and so does this.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
        place: str,
        template_limits: RenderLimits = templates.DEFAULT_LIMITS,
    ):
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._templates = dict(chat_templates)
        self._place = place
        self._template_limits = template_limits

    @classmethod
    def from_dir(
        cls,
        folder: str | Path,
        *,
        template_limits: RenderLimits = templates.DEFAULT_LIMITS,
        tokenizer_limits: Limits = tokenizer_probe.DEFAULT_LIMITS,
    ) -> Tokenizer:
        """Reads the files of a checkpoint or an artifact.

        A tokenizer that this user has not opened before is tried in another process first (``tokenizer_probe``).

        Args:
            folder: where tokenizer.json is.
            template_limits: what rendering a conversation may take.
            tokenizer_limits: what trying the tokenizer may take.

        Raises:
            ArtifactError: tokenizer.json is missing, or a file is damaged.
            ResourceError: this system starts no process to try it in.
        """
        folder = Path(folder)
        files = tokenizer_files.read(folder)
        fault, remedy = f"{paths.shown(files.path)}: not a readable tokenizer", "restore it or export again"
        if reason := tokenizer_probe.fault(files.data, files.additions, tokenizer_limits):
            raise ArtifactError(f"{fault} ({reason}); {remedy}")
        with translated(ArtifactError, fault, remedy):
            backend = build(files.data, files.additions)
        return cls(backend, files.named, template_files.read(folder, files.config), str(folder), template_limits)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """bos_token, eos_token, ... as text, by name; chat templates see them as variables."""
        return self._special_tokens

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """Jinja sources by name; "default" is taken where none is asked for, "tool_use" where tools are given."""
        return self._templates

    @property
    def vocab_size(self) -> int:
        """Ids that have a token, the added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        """Every token and its id, the added ones included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def to_json(self) -> str:
        """tokenizer.json as it is opened: with the tokens that other files add."""
        return self._backend.to_str()

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens that are written out in it are recognized.

        Raises:
            GenerationError: it has characters that are no Unicode text, or that this tokenizer has no token for.
        """
        check_text(text, "text")
        with translated(GenerationError, "text: this tokenizer cannot encode it", "change the text or the tokenizer"):
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool | None = False, stop_tokens: Collection[int] = ()
    ) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: tokens.
            skip_special_tokens: False: all are shown; True: no special token is, as in transformers; None: as a reply
                is read, without ``frame_tokens`` but with markers that the model writes (tool calls, thinking).
            stop_tokens: left out, too.

        Raises:
            GenerationError: an id is negative, beyond 32 bits, or no integer; or the tokenizer's decoder fails.
        """
        left_out = self.frame_tokens if skip_special_tokens is None else frozenset[int]()
        tokens = [token for token in ids if token not in left_out and token not in stop_tokens]
        with translated(GenerationError, "decode: this tokenizer cannot decode these ids", "use another tokenizer"):
            try:
                return self._backend.decode(tokens, skip_special_tokens=skip_special_tokens is True)
            except (OverflowError, TypeError) as error:
                raise GenerationError(
                    f"decode: {shown(tokens)} are not all token ids; pass integers from 0 up"
                ) from error

    @cached_property
    def frame_tokens(self) -> frozenset[int]:
        """Ids of the special tokens that frame a text or a turn (bos, eos, pad, ``<|im_start|>``, ...): no part of what
        a model says, unlike its other special tokens."""
        texts = {*_FRAME_TOKENS, *(self._special_tokens.get(role, "") for role in _FRAME_ROLES)}
        added = self._backend.get_added_tokens_decoder()
        return frozenset(ident for ident, token in added.items() if token.special and token.content in texts)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the text that the model was trained on (``lfm2_export.chat_template.render``).

        ``chat_template`` is the name of one of ``chat_templates``, or Jinja source. By default it is "tool_use" where
        there is one and tools are given, else "default".

        Raises:
            GenerationError: there is no such template, or as ``render``.
        """
        return templates.render(
            self._template(chat_template, tools),
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            variables={**self._special_tokens, **(variables or {})},
            limits=self._template_limits,
        )

    def _template(self, asked: str | None, tools: object) -> str:
        """Chosen as transformers' ``get_chat_template`` does, but that a mistyped name is not taken for a source."""
        named = self._templates
        if asked is not None:
            if asked not in named and "{" not in asked:
                raise GenerationError(f"{self._place}: has no chat template {shown(asked)}, only: {self._names()}")
            return named.get(asked, asked)
        if tools is not None and template_files.WITH_TOOLS in named:
            return named[template_files.WITH_TOOLS]
        if template_files.DEFAULT in named:
            return named[template_files.DEFAULT]
        if named:
            raise GenerationError(
                f"{self._place}: has no default chat template, only: {self._names()}; pass chat_template=<name>"
            )
        raise GenerationError(f"{self._place}: no chat template; pass a plain prompt instead of messages")

    def _names(self) -> str:
        return one_line(", ".join(sorted(self._templates)), 120) or "none"

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """``render_chat`` as token ids; the template writes the bos token itself."""
        text = self.render_chat(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
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
    """Decodes tokens one by one; the pieces joined are ``Tokenizer.decode`` of all of them, with the same arguments.

    By default that is a reply as it is read: without the tokens that frame it, with its markers of tool calls.

    A token may end inside a character. Such a character is held back until the token that completes it (or ``finish``),
    recognized by the U+FFFD that an unfinished UTF-8 sequence decodes to at the end of the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool | None = None, stop_tokens: Collection[int] = ()
    ):
        self._tokenizer = tokenizer
        self._skip, self._stops = skip_special_tokens, stop_tokens
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
        if len(before) <= self._shown and before + self._decode(tail) == text:
            self._context, self._pending, self._shown = head, tail, self._shown - len(before)

    def push_all(self, tokens: Iterable[int]) -> str:
        return "".join(self.push(token) for token in tokens)

    def finish(self) -> str:
        """What was held back, at the end of the stream: U+FFFD if the last character never was completed."""
        piece = self._text(self._pending)[self._shown :]
        self._context, self._pending, self._shown = [], [], 0
        return piece

    def _text(self, tokens: list[int]) -> str:
        return self._decode(self._context + tokens)[len(self._decode(self._context)) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip, stop_tokens=self._stops)
