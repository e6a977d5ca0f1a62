"""Plain completions: a prompt as it is, and the text behind it."""

from __future__ import annotations

from lfm2_export.backends.arguments import check_rows
from lfm2_export.server import logprobs
from lfm2_export.server.answer import Envelope, Json, room
from lfm2_export.server.completion_request import DEFAULT_MAX_TOKENS, CompletionRequest
from lfm2_export.server.generating import Asked, Done, Piece
from lfm2_export.server.limits import Limits
from lfm2_export.server.preparing import encoded
from lfm2_export.server.served import Model


def prepare(model: Model, request: CompletionRequest, limits: Limits) -> tuple[Asked, CompletionAnswer]:
    """What to generate, and what makes an answer of it.

    Raises:
        ApiError, GenerationError, RunnerError: a token is not in the vocabulary, or there is no room.
    """
    prompt = request.prompt
    tokens = encoded(model, prompt, "prompt") if isinstance(prompt, str) else prompt
    check_rows([tokens], None, model.runner.vocab_size)
    allowed = room(request.sampling, len(tokens), model.runner.context_length, limits, default=DEFAULT_MAX_TOKENS)
    asked = Asked(
        prompt=tokens,
        config=request.sampling.config(model.settings, allowed),
        stops=request.sampling.stops,
        top_logprobs=request.top_logprobs,
    )
    return asked, CompletionAnswer(model.name, include_usage=request.sampling.include_usage)


class CompletionAnswer:
    """An ``Answer`` with text."""

    def __init__(self, model: str, *, include_usage: bool = False):
        self._envelope = Envelope("text_completion", "cmpl", model)
        self._include_usage = include_usage
        self._text = ""
        self._logprobs: list[logprobs.Choice] = []

    def begun(self) -> list[Json]:
        return []

    def piece(self, piece: Piece) -> list[Json]:
        before = sum(len(choice.chosen.text) for choice in self._logprobs)
        self._text += piece.text
        self._logprobs += piece.logprobs
        if not piece.text and not piece.logprobs:
            return []
        made = logprobs.completion_json(piece.logprobs, before) if piece.logprobs else None
        return [self._envelope.around([_choice(piece.text, made, None)])]

    def done(self, done: Done) -> list[Json]:
        chunks = [self._envelope.around([_choice("", None, done.finish_reason)])]
        return [*chunks, self._envelope.around([], usage=done)] if self._include_usage else chunks

    def whole(self, done: Done) -> Json:
        made = logprobs.completion_json(self._logprobs, 0) if self._logprobs else None
        return self._envelope.around([_choice(self._text, made, done.finish_reason)], usage=done)


def _choice(text: str, made: Json | None, finish_reason: str | None) -> Json:
    return {"index": 0, "text": text, "logprobs": made, "finish_reason": finish_reason}
