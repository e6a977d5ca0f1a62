"""A conversation that keeps the model's state between turns.

In: a runner, a tokenizer, what the user says. Out: the assistant's text, piece by piece. Only tokens that the runner
does not hold yet are prefilled. A conv state cannot be rewound, so places to come back to are marked on the way:
before every assistant turn (to regenerate it, or to edit what the user said after it) and at its end (to go on).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lfm2_export.artifact import Artifact
from lfm2_export.asynchronous import streamed
from lfm2_export.backends.base import Mark, Runner, check_fits
from lfm2_export.chat_template import Message
from lfm2_export.choices import BackendName, KernelsName, KvCacheName, SchemeName
from lfm2_export.constraints import Constraint
from lfm2_export.errors import ContextLimitError, GenerationError
from lfm2_export.generation import FinishReason, continue_from
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.hub_artifacts import open_artifact
from lfm2_export.logprobs import Choice, choice_of
from lfm2_export.messages import shown
from lfm2_export.replies import StopStrings
from lfm2_export.runners import load_runner
from lfm2_export.speculation import SpeculativeRunner
from lfm2_export.states import State, read_state, write_state
from lfm2_export.text import StreamDecoder, Tokenizer

# Of a rendered prompt, what a reply to it may be; None: anything.
Constrain = Callable[[str], Constraint | None]
# What places to come back to may take together, two a turn; older turns are prefilled again if ever needed. A mark
# holds conv states (0.3 MB for the 8B) and the rings of sliding layers (7 MB for LFM3-1.7B), a place logits, too.
_PLACES_BYTES, _LEAST_PLACES = 64 << 20, 2
_MAX_TRANSCRIPTS = 32
_TOKEN_BYTES = 8  # a pointer in a list


@dataclass(frozen=True, kw_only=True, eq=False)
class _Place:
    """Where the runner was when it held ``tokens``; ``logits`` [1, V] after them where they are known."""

    tokens: list[int]
    mark: Mark
    logits: np.ndarray | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        logits = 0 if self.logits is None else self.logits.nbytes
        return self.mark.nbytes + logits + _TOKEN_BYTES * len(self.tokens)


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
        messages: a conversation to go on with, which may begin with a system message.
        stop: strings that end a reply; no part of one is given out, or kept in ``messages``.
        logprobs: how many of the likeliest tokens of each place of a reply to keep (``logprobs``); None: nothing.
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
        messages: Sequence[Message] | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        skip_special_tokens: bool = False,
    ):
        if not isinstance(config, GenerationConfig):
            raise GenerationError(f"config is {shown(config, 40)}; give a GenerationConfig")
        self.config = config
        self._runner = runner
        self._tokenizer = tokenizer
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._tools = tools
        self._variables = variables
        self._template = chat_template
        self._skip = skip_special_tokens
        self._stop = check_stops((stop,) if isinstance(stop, str) else tuple(stop))
        self._top = check_top(logprobs)
        self._logprobs: list[Choice] = []
        self._messages: list[Message] = started_with(messages, self._system)
        self._system = [one for one in self._messages[:1] if one["role"] == "system"]
        self._places: list[_Place] = []
        self._transcripts: list[_Transcript] = []
        self._finish_reason: FinishReason | None = None
        self._turn = 0
        self._prefilled_tokens = 0
        self._prompt = ""
        self._reply_tokens = 0

    @classmethod
    def from_artifact(
        cls,
        path: str | Path | Artifact,
        *,
        config: GenerationConfig | None = None,
        backend: BackendName | None = None,
        scheme: SchemeName | None = None,
        threads: int | None = None,
        kernels: KernelsName | None = None,
        kv_cache: KvCacheName | None = None,
        **options: Any,
    ) -> Chat:
        """A conversation on a runner of its own, with the artifact's settings and stop tokens.

        Args:
            path: the artifact's folder, a program in it, its Hub id, or an opened one.
            config: in place of the artifact's settings (``GenerationConfig.from_artifact``).
            backend, scheme, threads, kernels, kv_cache: as in ``load_runner``.
            options: those of ``Chat`` itself (``system``, ``stop``, ...).

        Raises:
            ArtifactError, RunnerError, GenerationError: as ``load_runner``, ``Tokenizer.from_dir`` and ``Chat``.
        """
        artifact = path if isinstance(path, Artifact) else open_artifact(path, backend=backend, scheme=scheme)
        runner = load_runner(
            artifact, backend=backend, scheme=scheme, threads=threads, kernels=kernels, kv_cache=kv_cache
        )
        settings = GenerationConfig.from_artifact(artifact.path) if config is None else config
        return cls(runner, Tokenizer.from_dir(artifact.path), settings, **options)

    def __repr__(self) -> str:
        return f"Chat({len(self._messages)} messages, {int(self._runner.lengths.max(initial=0))} tokens in the runner)"

    @property
    def logprobs(self) -> list[Choice]:
        """How likely the last reply's tokens were, one after the other, where it was asked for."""
        return list(self._logprobs)

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, as dicts; a reply is there once its text has been read to the end or closed."""
        return list(self._messages)

    @property
    def system(self) -> str | None:
        """The system message. Where it is replaced, the next turn prefills the whole conversation again."""
        return str(self._system[0]["content"]) if self._system else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self._messages[len(self._system) :]
        self._system = [] if text is None else [{"role": "system", "content": text}]
        self._messages = [*self._system, *rest]
        self._turn += 1

    @property
    def variables(self) -> Mapping[str, Any]:
        """More names for the chat template. Where they change what it writes, more is prefilled again."""
        return dict(self._variables or {})

    @variables.setter
    def variables(self, values: Mapping[str, Any]) -> None:
        self._variables = dict(values)

    @property
    def prompt(self) -> str:
        """What the last turn's prompt was as text; "" before the first."""
        return self._prompt

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the last reply ended; None while it goes on or where the caller closed it."""
        return self._finish_reason

    @property
    def prefilled_tokens(self) -> int:
        """How many tokens the last turn had to prefill; the rest of its prompt was in the runner."""
        return self._prefilled_tokens

    @property
    def reply_tokens(self) -> int:
        """How many tokens the last reply has so far."""
        return self._reply_tokens

    @property
    def held_tokens(self) -> int:
        """How many tokens of the context are in use."""
        return int(self._runner.lengths.max(initial=0))

    @property
    def context_length(self) -> int:
        """The most tokens that a conversation can have."""
        return self._runner.context_length

    def count(self) -> int:
        """How many tokens the conversation has."""
        return len(self._tokenize(self._render(self._messages, ends=True))) if self._messages else 0

    def clear(self) -> None:
        """Starts over with the system message alone."""
        self._messages, self._transcripts = list(self._system), []
        self._turn += 1

    def load(self, messages: Sequence[Message]) -> None:
        """Goes on with another conversation; its first message may be a system message."""
        self._messages, self._transcripts = list(messages), []
        self._system = [one for one in self._messages[:1] if one["role"] == "system"]
        self._turn += 1

    def send(self, content: str | Message | Sequence[Message], *, constrain: Constrain | None = None) -> Iterator[str]:
        """The reply to a user's text (or to any messages, such as results of tools), piece by piece.

        ``constrain``: which tokens the reply may have.

        Raises:
            ContextLimitError: the conversation is longer than the context; it is left as it was.
            GenerationError: while the reply is read, where the runner was used for something else meanwhile.
        """
        return self._reply([*self._messages, *_as_messages(content)], constrain)

    def asend(self, content: str | Message) -> AsyncGenerator[str, None]:
        """``send`` for code that awaits: each token is computed in a thread."""
        return streamed(lambda: self.send(content))

    def regenerate(self) -> Iterator[str]:
        """Another reply instead of the last one; nothing is prefilled again."""
        return self._reply(self._messages[: self._last("assistant")])

    def edit(self, content: str, *, constrain: Constrain | None = None) -> Iterator[str]:
        """The reply to ``content`` in place of the user's last message; what came before it is not prefilled again."""
        return self._reply([*self._messages[: self._last("user")], *_as_messages(content)], constrain)

    def undo(self) -> str:
        """Forgets the user's last message and all that came after it; that message's text.

        Raises:
            GenerationError: there is none.
        """
        index = self._last("user")
        content = str(self._messages[index]["content"])
        self._messages = self._messages[:index]
        self._turn += 1
        return content

    def drop_oldest(self, content: str | Message | Sequence[Message], *, room: int) -> int:
        """Forgets the oldest turns, so many that ``content`` and ``room`` tokens behind it fit the context; how many
        turns those are. The next prompt is prefilled as a whole.

        Raises:
            ContextLimitError: it would not fit alone; the conversation is left as it was.
        """
        rest, new = self._messages[len(self._system) :], _as_messages(content)
        starts = [index for index, message in enumerate(rest) if message["role"] == "user"]
        ends = [*starts[1:], len(rest)] if starts else []
        if new[0]["role"] != "user":
            ends = ends[:-1]  # it belongs to the last turn

        def fits(end: int) -> bool:
            text = self._render([*self._system, *rest[end:], *new])
            return len(self._tokenize(text)) + room <= self._runner.context_length

        dropped = bisect.bisect_left(ends, True, key=fits)
        if dropped == len(ends):
            raise ContextLimitError(
                f"this message and {room} tokens for its reply do not fit the context of {self._runner.context_length} "
                "alone; send a shorter one"
            )
        self._messages = [*self._system, *rest[ends[dropped] :]]
        self._turn += 1
        return dropped + 1

    def settle(self) -> None:
        """Prefills what of the conversation so far the runner does not hold: the next turn prefills only itself."""
        self._settle()

    def save_state(self, path: str | Path) -> None:
        """Writes the conversation and the runner's state after it to a file, which ``load_state`` opens in
        milliseconds.

        Raises:
            GenerationError: nothing was said yet, or the file cannot be written.
            ResourceError: the disk is full.
        """
        place, text = self._settle()
        snapshot = self._runner.snapshot()
        state = State(messages=self._messages, text=text, tokens=place.tokens, snapshot=snapshot)
        write_state(path, state, self._tokenizer)

    def load_state(self, path: str | Path) -> None:
        """Goes on with a conversation that ``save_state`` wrote, without a prefill.

        Raises:
            GenerationError: there is no such file, it is damaged, or it was made by another program.
            ContextLimitError: this runner's context is shorter.
        """
        state = read_state(path, self._runner, self._tokenizer)
        if isinstance(self._runner, SpeculativeRunner):
            self._runner.restore_with(state.snapshot, state.tokens)
        else:
            self._runner.restore(state.snapshot)
        self.load(state.messages)
        self._places = [_Place(tokens=state.tokens, mark=self._runner.mark())]
        self._remember(state.tokens, state.text)

    def _settle(self) -> tuple[_Place, str]:
        """The place behind the conversation so far, where the runner then is, and its text."""
        if not self._messages:
            raise GenerationError("chat: nothing was said yet, and there is no system message; say something first")
        text = self._render(self._messages, ends=True)
        tokens = self._tokenize(text)
        place = next((p for p in self._places if p.tokens == tokens and self._runner.is_valid(p.mark)), None)
        if place is None:
            place, _ = self._prefill(tokens)
        else:
            self._runner.rewind(place.mark)
        self._remember(tokens, text)
        self._turn += 1
        return place, text

    def _last(self, role: str) -> int:
        for index in range(len(self._messages) - 1, -1, -1):
            if self._messages[index]["role"] == role:
                return index
        raise GenerationError(f"chat: there is no {role} message yet")

    def _render(self, messages: Sequence[Message], *, ends: bool = False) -> str:
        """The conversation as text; ``ends``: without the beginning of a reply."""
        return self._tokenizer.render_chat(
            messages,
            tools=self._tools,
            chat_template=self._template,
            variables=self._variables,
            add_generation_prompt=not ends,
        )

    def _reply(self, messages: list[Message], constrain: Constrain | None = None) -> Iterator[str]:
        text = self._render(messages)
        tokens = self._tokenize(text)
        constraint = None if constrain is None else constrain(text)
        place, logits = self._prefill(tokens)
        self._messages, self._finish_reason, self._prompt = messages, None, text
        self._reply_tokens = 0
        self._turn += 1
        self._remember(tokens, text)
        return self._stream(place, logits, text, self._turn, constraint)

    def _tokenize(self, text: str) -> list[int]:
        """The prompt's tokens. Replies stay as the model wrote them: their text may have another tokenization."""
        known = max((t for t in self._transcripts if text.startswith(t.text)), key=lambda t: len(t.text), default=None)
        if known is None:
            return self._tokenizer.encode(text, add_special_tokens=False)
        return known.tokens + self._tokenizer.encode(text[len(known.text) :], add_special_tokens=False)

    def _remember(self, tokens: list[int], text: str) -> None:
        self._transcripts = [*self._transcripts, _Transcript(tokens=tokens, text=text)][-_MAX_TRANSCRIPTS:]

    def _keep(self, place: _Place) -> _Place:
        """A place to come back to; the oldest go where all take more memory than they may."""
        places = [*self._places, place]
        sizes = list(itertools.accumulate(one.nbytes for one in reversed(places)))
        count = max(_LEAST_PLACES, bisect.bisect_right(sizes, _PLACES_BYTES))
        self._places = places[-count:]
        return place

    def _prefill(self, tokens: list[int]) -> tuple[_Place, np.ndarray]:
        """Brings the runner to the end of ``tokens`` by the shortest way; that place, with its logits."""
        check_fits(np.zeros(1, dtype=np.int64), [len(tokens)], self._runner.context_length)
        self._places = [place for place in self._places if self._runner.is_valid(place.mark)]
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
        return self._keep(_Place(tokens=tokens, mark=self._runner.mark(), logits=logits)), logits

    def _stream(
        self, prompt: _Place, logits: np.ndarray, text: str, turn: int, constraint: Constraint | None
    ) -> Iterator[str]:
        decoder = StreamDecoder(
            self._tokenizer, skip_special_tokens=self._skip or None, stop_tokens=self.config.stop_tokens
        )
        reply: list[int] = []
        stops, self._logprobs = StopStrings(self._stop), []
        self._check_undisturbed(prompt, reply, turn)
        try:
            events = continue_from(self._runner, logits, [prompt.tokens], self.config, constraint=constraint)
            for event in events:
                reply.append(event.token)
                self._reply_tokens = len(reply)
                self._finish_reason = event.finish_reason
                if self._top is not None and event.logits is not None:
                    self._logprobs.append(choice_of(event.token, event.logits, self._top, self._tokenizer))
                yield stops.push(decoder.push(event.token))
                if stops.found is not None:
                    self._finish_reason = "stop"
                    return
                if event.finish_reason is None:
                    self._check_undisturbed(prompt, reply, turn)
            yield stops.push(decoder.finish()) + stops.finish()
        finally:
            if turn == self._turn and stops.found is not None:
                self._record_stopped(prompt, reply, stops.found)
            elif turn == self._turn:
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

    def _record_stopped(self, prompt: _Place, reply: list[int], stop: str) -> None:
        """Takes a reply that a stop string ended into the conversation: what came before it. The runner is behind it,
        so the next turn goes on from the prompt."""
        said = self._tokenizer.decode(reply)
        self._messages.append({"role": "assistant", "content": said.partition(stop)[0]})

    def _record(self, prompt: _Place, text: str, reply: list[int]) -> None:
        """Takes the reply, a cut short one too, into the conversation and marks its end."""
        if self._is_after(prompt, reply):
            held = prompt.tokens + reply[:-1]
            self._keep(_Place(tokens=held, mark=self._runner.mark()))
        # The template writes the end of a message itself.
        said = reply[:-1] if self._finish_reason == "stop" else reply
        content = self._tokenizer.decode(said)
        self._messages.append({"role": "assistant", "content": content})
        self._remember(prompt.tokens + said, text + content)


def check_stops(stops: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses what ends no text, or every text."""
    for one in stops:
        if not isinstance(one, str) or not one:
            raise GenerationError(f"stop holds {shown(one, 40)}; give strings of at least one character")
    return stops


def check_top(logprobs: int | None) -> int | None:
    """Raises: GenerationError, where ``logprobs`` is no count."""
    if logprobs is not None and (type(logprobs) is not int or logprobs < 0):
        raise GenerationError(f"logprobs={shown(logprobs)}: give how many of the likeliest tokens to keep, 0 or more")
    return logprobs


def started_with(messages: Sequence[Message] | None, system: Sequence[Message]) -> list[Message]:
    """The conversation to begin with.

    Raises:
        GenerationError: it is no list of messages, or there are two system messages.
    """
    given = list(messages or ())
    if not all(isinstance(one, Mapping) and "role" in one for one in given):
        raise GenerationError(f"messages={shown(given)}: a list of dicts with role and content expected")
    if system and given and given[0]["role"] == "system":
        raise GenerationError("chat: a system message is given twice, by system and in messages; leave one out")
    return [*system, *given]


def _as_messages(content: str | Message | Sequence[Message]) -> list[Message]:
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    return [content] if isinstance(content, Mapping) else list(content)


def _leads_to(place: _Place, tokens: list[int]) -> bool:
    """Whether going on from ``place`` can give the logits after ``tokens``."""
    held = len(place.tokens)
    if held == len(tokens) and place.logits is None:
        return False
    return held <= len(tokens) and tokens[:held] == place.tokens
