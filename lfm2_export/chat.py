"""A conversation that keeps the model's state between turns.

In: a runner, a tokenizer, what the user says. Out: the assistant's text, piece by piece. Only tokens that the runner
does not hold yet are prefilled. A conv state cannot be rewound, so places to come back to are marked on the way:
before every assistant turn (to regenerate it, or to edit what the user said after it) and at its end (to go on).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lfm2_export.backends.base import Mark, Runner, check_fits
from lfm2_export.chat_template import Message
from lfm2_export.errors import GenerationError
from lfm2_export.generation import FinishReason, continue_from
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.text import StreamDecoder, Tokenizer

# Two per turn. A mark holds one conv state (0.3 MB for the 8B); older turns are prefilled again if ever needed.
_MAX_PLACES = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class _Place:
    """Where the runner was when it held ``tokens``; ``logits`` [1, V] after them where they are known."""

    tokens: list[int]
    mark: Mark
    logits: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class _Transcript:
    """A conversation up to some place as the model saw it: its exact tokens, and their text."""

    tokens: list[int]
    text: str


class Chat:
    """One conversation on one runner.

    Another user of the runner costs this one its state, never its correctness: a reply that was being written then ends
    with a GenerationError.

    Args:
        runner: a runner of batch size 1 from here on.
        tokenizer: with a chat template.
        config: how replies are generated.
        system: the system message.
        tools: JSON schemas of functions that the model may call.
        variables: more names for the chat template.
        chat_template: one of the tokenizer's by name, or Jinja source; by default as ``render_chat`` chooses.
        skip_special_tokens: True: the text given out has no markers of tool calls and the like. ``messages`` always
            has them: a template is to write the reply again as the model did.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        skip_special_tokens: bool = False,
    ):
        self.config = config
        self._runner = runner
        self._tokenizer = tokenizer
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._tools = tools
        self._variables = variables
        self._template = chat_template
        self._skip = skip_special_tokens
        self._messages: list[Message] = list(self._system)
        self._places: list[_Place] = []
        self._transcripts: list[_Transcript] = []
        self._finish_reason: FinishReason | None = None
        self._turn = 0
        self._prefilled_tokens = 0

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, as dicts; a reply is there once its text has been read to the end or closed."""
        return list(self._messages)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the last reply ended; None while it goes on or where the caller closed it."""
        return self._finish_reason

    @property
    def prefilled_tokens(self) -> int:
        """How many tokens the last turn had to prefill; the rest of its prompt was in the runner."""
        return self._prefilled_tokens

    def clear(self) -> None:
        """Starts over with the system message alone."""
        self._messages, self._transcripts = list(self._system), []
        self._turn += 1

    def send(self, content: str | Message) -> Iterator[str]:
        """The reply to a user's text (or to any message, such as a tool's result), piece by piece.

        Raises:
            ContextLimitError: the conversation is longer than the context; it is left as it was.
            GenerationError: while the reply is read, where the runner was used for something else meanwhile.
        """
        message = {"role": "user", "content": content} if isinstance(content, str) else content
        return self._reply([*self._messages, message])

    def regenerate(self) -> Iterator[str]:
        """Another reply instead of the last one; nothing is prefilled again."""
        return self._reply(self._messages[: self._last("assistant")])

    def edit(self, content: str) -> Iterator[str]:
        """The reply to ``content`` in place of the user's last message; what came before it is not prefilled again."""
        return self._reply([*self._messages[: self._last("user")], {"role": "user", "content": content}])

    def _last(self, role: str) -> int:
        for index in range(len(self._messages) - 1, -1, -1):
            if self._messages[index]["role"] == role:
                return index
        raise GenerationError(f"chat: there is no {role} message yet")

    def _reply(self, messages: list[Message]) -> Iterator[str]:
        text = self._tokenizer.render_chat(
            messages, tools=self._tools, chat_template=self._template, variables=self._variables
        )
        tokens = self._tokenize(text)
        place, logits = self._prefill(tokens)
        self._messages, self._finish_reason = messages, None
        self._turn += 1
        self._remember(tokens, text)
        return self._stream(place, logits, text, self._turn)

    def _tokenize(self, text: str) -> list[int]:
        """The prompt's tokens. Replies stay as the model wrote them: their text may have another tokenization."""
        known = max((t for t in self._transcripts if text.startswith(t.text)), key=lambda t: len(t.text), default=None)
        if known is None:
            return self._tokenizer.encode(text, add_special_tokens=False)
        return known.tokens + self._tokenizer.encode(text[len(known.text) :], add_special_tokens=False)

    def _remember(self, tokens: list[int], text: str) -> None:
        self._transcripts = [*self._transcripts, _Transcript(tokens=tokens, text=text)][-_MAX_PLACES:]

    def _prefill(self, tokens: list[int]) -> tuple[_Place, np.ndarray]:
        """Brings the runner to the end of ``tokens`` by the shortest way; that place, with its logits."""
        check_fits(np.zeros(1, dtype=np.int64), [len(tokens)], self._runner.context_length)
        self._places = [place for place in self._places if self._runner.is_valid(place.mark)][-_MAX_PLACES:]
        start = max((p for p in self._places if _leads_to(p, tokens)), key=lambda p: len(p.tokens), default=None)
        if start is None:
            self._runner.reset()
        else:
            self._runner.rewind(start.mark)
        new = tokens[len(start.tokens) :] if start else tokens
        self._prefilled_tokens = len(new)
        if start and start.logits is not None and not new:
            return start, start.logits
        logits = self._runner.prefill([new])
        self._places.append(_Place(tokens=tokens, mark=self._runner.mark(), logits=logits))
        return self._places[-1], logits

    def _stream(self, prompt: _Place, logits: np.ndarray, text: str, turn: int) -> Iterator[str]:
        decoder = StreamDecoder(
            self._tokenizer, skip_special_tokens=self._skip or None, stop_tokens=self.config.stop_tokens
        )
        reply: list[int] = []
        self._check_undisturbed(prompt, reply, turn)
        try:
            for event in continue_from(self._runner, logits, [prompt.tokens], self.config):
                reply.append(event.token)
                self._finish_reason = event.finish_reason
                yield decoder.push(event.token)
                if event.finish_reason is None:
                    self._check_undisturbed(prompt, reply, turn)
            yield decoder.finish()
        finally:
            if turn == self._turn:
                self._record(prompt, text, reply)

    def _check_undisturbed(self, prompt: _Place, reply: list[int], turn: int) -> None:
        if turn != self._turn or not self._is_after(prompt, reply):
            raise GenerationError(
                f"chat: the runner was used for something else after {len(reply)} tokens of this reply; "
                "read a reply to its end first, or give every conversation a runner of its own"
            )

    def _is_after(self, prompt: _Place, reply: list[int]) -> bool:
        """Whether the runner is where this reply left it: its last token is chosen, but not fed yet."""
        held = len(prompt.tokens) + max(0, len(reply) - 1)
        return self._runner.is_valid(prompt.mark) and self._runner.lengths.tolist() == [held]

    def _record(self, prompt: _Place, text: str, reply: list[int]) -> None:
        """Takes the reply, a cut short one too, into the conversation and marks its end."""
        if self._is_after(prompt, reply):
            held = prompt.tokens + reply[:-1]
            self._places.append(_Place(tokens=held, mark=self._runner.mark()))
        # The template writes the end of a message itself.
        said = reply[:-1] if self._finish_reason == "stop" else reply
        content = self._tokenizer.decode(said)
        self._messages.append({"role": "assistant", "content": content})
        self._remember(prompt.tokens + said, text + content)


def _leads_to(place: _Place, tokens: list[int]) -> bool:
    """Whether going on from ``place`` can give the logits after ``tokens``."""
    held = len(place.tokens)
    if held == len(tokens) and place.logits is None:
        return False
    return held <= len(tokens) and tokens[:held] == place.tokens
