"""Chat completions: from a request to a prompt, and from pieces of text to messages with thinking and calls."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lfm2_export.constraints import Constraint
from lfm2_export.errors import GenerationError
from lfm2_export.forced_calls import behind_thinking, forced_calls
from lfm2_export.replies import Called, Event, ReplyParser, Said, Thought, ToolCall, Tools, for_template, opens_thinking
from lfm2_export.schema_limits import check_tools
from lfm2_export.server import logprobs
from lfm2_export.server.answer import Envelope, Json, room
from lfm2_export.server.chat_request import ChatRequest
from lfm2_export.server.errors import ApiError, invalid
from lfm2_export.server.generating import Asked, Done, Piece
from lfm2_export.server.limits import Limits
from lfm2_export.server.preparing import encoded
from lfm2_export.server.served import Model
from lfm2_export.text import Tokenizer

_KIND, _CHUNK = "chat.completion", "chat.completion.chunk"


def prepare(model: Model, request: ChatRequest, limits: Limits) -> tuple[Asked, ChatAnswer]:
    """What to generate, and what makes an answer of it.

    Raises:
        ApiError, GenerationError: there is no chat template, it refuses the messages, or there is no room.
    """
    tokenizer = model.tokenizer
    if not tokenizer.has_chat_template:
        raise ApiError(400, f"{model.name} has no chat template; use /v1/completions")
    tools = Tools.from_openai(request.tools) if request.offers_tools else None
    if request.forced is not None and tools is not None:
        with _refused("tool_choice"):
            check_tools(schema for name, schema in tools.schemas.items() if request.forced in ("", name))
    prompt = _render(tokenizer, request)
    tokens = encoded(model, prompt, "messages", add_special_tokens=False)
    allowed = room(request.sampling, len(tokens), model.runner.context_length, limits)
    parser = ReplyParser(tools=tools, thinking=opens_thinking(prompt), parallel=request.parallel_calls)
    asked = Asked(
        prompt=tokens,
        config=request.sampling.config(model.settings, allowed),
        stops=request.sampling.stops,
        top_logprobs=request.top_logprobs,
        constraint=_constraint(model, request, tools, prompt),
    )
    return asked, ChatAnswer(model.name, parser, include_usage=request.sampling.include_usage)


def _render(tokenizer: Tokenizer, request: ChatRequest) -> str:
    return tokenizer.render_chat(
        for_template(request.messages, tokenizer.chat_templates.values()),
        tools=request.tools if request.offers_tools else None,
        variables=request.variables,
    )


def _constraint(model: Model, request: ChatRequest, tools: Tools | None, prompt: str) -> Constraint | None:
    """Of a request that asks for a schema, or for a call; not for both (``parse_chat``)."""
    if request.schema is not None:
        with _refused("response_format"):
            return behind_thinking(model.grammars.of_schema(request.schema), model.tokenizer, prompt)
    if request.forced is not None and tools is not None:
        with _refused("tool_choice"):
            return forced_calls(
                model.grammars,
                model.tokenizer,
                tools,
                prompt,
                name=request.forced,
                parallel=request.parallel_calls,
            )
    return None


@contextmanager
def _refused(param: str) -> Iterator[None]:
    """What cannot be constrained is the request's fault."""
    try:
        yield
    except GenerationError as error:
        raise invalid(param, str(error), code="unsupported_value") from error


class ChatAnswer:
    """An ``Answer`` with one message."""

    def __init__(self, model: str, parser: ReplyParser, *, include_usage: bool = False):
        self._envelope = Envelope(_KIND, "chatcmpl", model)
        self._parser = parser
        self._include_usage = include_usage
        self._events: list[Event] = []
        self._logprobs: list[logprobs.Choice] = []
        self._calls = 0

    def begun(self) -> list[Json]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def piece(self, piece: Piece) -> list[Json]:
        self._logprobs += piece.logprobs
        chunks = self._take(self._parser.push(piece.text))
        if piece.logprobs:
            chunks = chunks or [self._chunk({"content": ""})]
            chunks[0]["choices"][0]["logprobs"] = {"content": logprobs.chat_json(piece.logprobs)}
        return chunks

    def done(self, done: Done) -> list[Json]:
        chunks = self._take(self._parser.finish())
        chunks.append(self._chunk({}, finish_reason=self._reason(done)))
        if self._include_usage:
            chunks.append(self._envelope.around([], kind=_CHUNK, usage=done))
        return chunks

    def whole(self, done: Done) -> Json:
        self._take(self._parser.finish())
        choice: Json = {"index": 0, "message": self._message(), "finish_reason": self._reason(done), "logprobs": None}
        if self._logprobs:
            choice["logprobs"] = {"content": logprobs.chat_json(self._logprobs)}
        return self._envelope.around([choice], usage=done)

    def _reason(self, done: Done) -> str:
        return "tool_calls" if self._parser.called and done.finish_reason == "stop" else done.finish_reason

    def _take(self, events: Iterable[Event]) -> list[Json]:
        events = list(events)
        self._events += events
        return [self._chunk(self._delta(event)) for event in events]

    def _delta(self, event: Event) -> Json:
        match event:
            case Said(text=text):
                return {"content": text}
            case Thought(text=text):
                return {"reasoning_content": text}
            case Called(calls=calls):
                first, self._calls = self._calls, self._calls + len(calls)
                return {"tool_calls": [{"index": first + i, **_call_json(call)} for i, call in enumerate(calls)]}

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return self._envelope.around([choice], kind=_CHUNK)

    def _message(self) -> Json:
        said = "".join(event.text for event in self._events if isinstance(event, Said))
        thought = "".join(event.text for event in self._events if isinstance(event, Thought))
        calls = [call for event in self._events if isinstance(event, Called) for call in event.calls]
        message: Json = {"role": "assistant", "content": said}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message |= {"content": said if said.strip() else None, "tool_calls": [_call_json(call) for call in calls]}
        return message


def _call_json(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": call.arguments_json}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
