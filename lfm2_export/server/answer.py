"""What every kind of answer has: objects to stream, and the one that says it all.

In: pieces as they are generated, then how it ended. Out: JSON objects in OpenAI's form.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Protocol

from lfm2_export.server.errors import invalid
from lfm2_export.server.generating import Done, Piece
from lfm2_export.server.limits import Limits
from lfm2_export.server.sampling_request import Sampling

Json = dict[str, Any]


class Answer(Protocol):
    """One answer while it is made; pieces go through it in order."""

    def begun(self) -> list[Json]:
        """What a stream begins with."""

    def piece(self, piece: Piece) -> list[Json]:
        """What a piece adds to a stream, often nothing yet."""

    def done(self, done: Done) -> list[Json]:
        """What a stream ends with."""

    def whole(self, done: Done) -> Json:
        """All of it, after every piece; instead of ``done``."""


class Envelope:
    """What stands around every object of one answer."""

    def __init__(self, kind: str, prefix: str, model: str):
        self._fields = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._kind = kind

    def around(self, choices: list[Json], *, kind: str | None = None, usage: Done | None = None) -> Json:
        made = {"object": kind or self._kind, **self._fields, "choices": choices}
        return made if usage is None else made | {"usage": usage_json(usage)}


def usage_json(done: Done) -> Json:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


def room(sampling: Sampling, prompt_tokens: int, context: int, limits: Limits, *, default: int | None = None) -> int:
    """How many tokens an answer may have.

    Raises: ApiError: more are asked for than there is room for.
    """
    if prompt_tokens > context:
        problem = f"the prompt has {prompt_tokens} tokens, the model's context {context}; shorten it"
        raise invalid("messages" if default is None else "prompt", problem, code="context_length_exceeded")
    asked = sampling.max_tokens
    if asked is None:
        return max(1, min(context - prompt_tokens, default or limits.tokens, limits.tokens))
    if asked > limits.tokens:
        raise invalid("max_tokens", f"{asked} tokens; this server gives {limits.tokens} at most")
    if prompt_tokens + asked > max(context, prompt_tokens + 1):
        problem = f"{prompt_tokens} tokens of the prompt and {asked} of the answer; the model's context has {context}"
        raise invalid("max_tokens", f"{problem}; ask for fewer", code="context_length_exceeded")
    return asked
