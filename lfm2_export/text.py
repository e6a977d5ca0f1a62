"""Text to token ids and back, from a checkpoint's files alone; no transformers.

In: tokenizer.json, tokenizer_config.json, chat_template.jinja as published. Out: the ids that transformers'
``AutoTokenizer`` gives, and text that streams token by token without ever showing half a character.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from lfm2_export import chat_template, paths, tokenizer_files, tokenizer_probe
from lfm2_export.chat_template import Message, RenderLimits
from lfm2_export.errors import ArtifactError, GenerationError
from lfm2_export.isolated.process import Limits
from lfm2_export.messages import shown
from lfm2_export.tokenizer_backend import build, translated

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
        template_limits: RenderLimits = chat_template.DEFAULT_LIMITS,
    ):
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._template = template
        self._place = place
        self._template_limits = template_limits

    @classmethod
    def from_dir(
        cls,
        folder: str | Path,
        *,
        template_limits: RenderLimits = chat_template.DEFAULT_LIMITS,
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
        files = tokenizer_files.read(Path(folder))
        fault, remedy = f"{paths.shown(files.path)}: not a readable tokenizer", "restore it or export again"
        if reason := tokenizer_probe.fault(files.data, files.declared, files.special, tokenizer_limits):
            raise ArtifactError(f"{fault} ({reason}); {remedy}")
        with translated(ArtifactError, fault, remedy):
            backend = build(files.data, files.declared, files.special)
        return cls(backend, files.named, files.template, str(folder), template_limits)

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
            GenerationError: it has characters that are no Unicode text, or that this tokenizer has no token for.
        """
        check_text(text, "text")
        with translated(GenerationError, "text: this tokenizer cannot encode it", "change the text or the tokenizer"):
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        Raises:
            GenerationError: an id is negative, beyond 32 bits, or no integer; or the tokenizer's decoder fails.
        """
        tokens = list(ids)
        with translated(GenerationError, "decode: this tokenizer cannot decode these ids", "use another tokenizer"):
            try:
                return self._backend.decode(tokens, skip_special_tokens=skip_special_tokens)
            except (OverflowError, TypeError) as error:
                raise GenerationError(
                    f"decode: {shown(tokens)} are not all token ids; pass integers from 0 up"
                ) from error

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
            limits=self._template_limits,
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
