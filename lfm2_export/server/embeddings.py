"""Embeddings: from a request's texts to vectors, on an encoder with a queue and a thread of its own.

``input_type`` "query" or "document" (the default) chooses the model's prompt, where it has one for each.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfm2_export.encoders import Encoder
from lfm2_export.errors import RunnerError
from lfm2_export.manifest import ENCODER
from lfm2_export.messages import shown
from lfm2_export.server.answer import Json
from lfm2_export.server.errors import ApiError, invalid
from lfm2_export.server.fields import Body, refuse_unless, text

_MOST_TEXTS = 2048  # OpenAI's
_QUERY, _DOCUMENT = "query", "document"
_FLOAT, _BASE64 = "float", "base64"


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    model: str | None
    texts: list[str]
    query: bool
    base64: bool


def parse_embedding(body: Body) -> EmbeddingRequest:
    """Raises: ApiError."""
    refuse_unless(body, "dimensions", (), "vectors have the model's own")
    return EmbeddingRequest(
        model=text(body, "model"),
        texts=_texts(body),
        query=_one_of(body, "input_type", (_DOCUMENT, _QUERY)) == _QUERY,
        base64=_one_of(body, "encoding_format", (_FLOAT, _BASE64)) == _BASE64,
    )


def _texts(body: Body) -> list[str]:
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(one, str) for one in texts):
        raise invalid("input", f"{shown(given, 40)} is not usable; give a text or a list of texts")
    if len(texts) > _MOST_TEXTS or not all(texts):
        raise invalid("input", f"give at most {_MOST_TEXTS} texts, none of them empty")
    return texts


def _one_of(body: Body, name: str, choices: tuple[str, ...]) -> str:
    """The first is the default."""
    value = text(body, name)
    if value is not None and value not in choices:
        raise invalid(name, f"{shown(value, 40)} is not one of {', '.join(choices)}")
    return value or choices[0]


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """``vectors`` float32 [texts, width]."""

    vectors: np.ndarray
    tokens: int


class EncoderQueue:
    """One encoder, and the thread that it runs in; requests are taken in the order in which they come.

    Raises:
        RunnerError: it has no vector for a whole text.
    """

    def __init__(self, name: str, encoder: Encoder, *, queue_limit: int):
        if encoder.is_late_interaction:
            raise RunnerError(f"{name}: gives a vector a token, which OpenAI's API cannot say; use `lfm2-export embed`")
        self.name, self.created = name, int(time.time())
        self._encoder, self._limit = encoder, queue_limit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"lfm2-export serve {name}")
        self._asked = 0

    async def embed(self, request: EmbeddingRequest) -> Embedded:
        """Called in one event loop only. Raises: ApiError where the queue is full."""
        if self._asked > self._limit:
            raise ApiError(
                429, f"{self._asked} requests for {self.name} come first; try again later", code="queue_full"
            )
        self._asked += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._embed, request.texts, request.query
            )
        finally:
            self._asked -= 1

    def _embed(self, texts: Sequence[str], query: bool) -> Embedded:
        vectors = np.asarray(self._encoder.encode(texts, query=query))
        tokens = sum(len(self._encoder.preparation.tokens(one, query=query).ids) for one in texts)
        return Embedded(vectors=vectors, tokens=tokens)

    def to_json(self) -> dict[str, Any]:
        length = self._encoder.runner.context_length
        fields = {"id": self.name, "object": "model", "created": self.created, "owned_by": "lfm2-export"}
        return {**fields, "max_model_len": length, "kind": ENCODER}

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def to_json(model: str, embedded: Embedded, *, as_base64: bool) -> Json:
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if as_base64 else vector.tolist()}
        for index, vector in enumerate(embedded.vectors)
    ]
    usage = {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens}
    return {"object": "list", "model": model, "data": data, "usage": usage}


def _base64(vector: np.ndarray) -> str:
    """float32, little endian: what OpenAI's client asks for."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
