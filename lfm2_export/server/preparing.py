"""Requests before they reach a program's queue: a few are prepared at a time, and what cannot fit is not tokenized.

In: a request's text. Out: its tokens. A MB of some texts takes 2.5 s and 400 MB to tokenize: lengths are bounded, and
how many are tokenized at once.
"""

from __future__ import annotations

import asyncio
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from lfm2_export.server.errors import ApiError, invalid
from lfm2_export.server.limits import Limits
from lfm2_export.server.served import Model, Served
from lfm2_export.text import Tokenizer

_AT_ONCE = 2
# How much more text than its own a token may stand for where a tokenizer changes or drops some of it.
_SLACK = 16
# Parts of tokenizer.json that keep every byte of a text.
_KEEPING = ("ByteLevel", "Split", "Sequence", "Digits", "Punctuation")

Prepared = TypeVar("Prepared")


class Preparing:
    """For one event loop. What waits counts for its model as in the engine's queue, which it joins next."""

    def __init__(self, limits: Limits):
        self._queue_limit = limits.queue
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._asked = Counter[str]()

    async def run(self, request: Request, served: Served, prepare: Callable[[], Prepared]) -> Prepared:
        """What ``prepare`` returns, which is called in a thread.

        Raises: ApiError 429 where too many come first; ClientDisconnect where nobody waits any more.
        """
        name = served.model.name
        ahead = self._asked[name]
        if ahead >= self._queue_limit + served.engine.parallel:
            raise ApiError(429, f"{ahead} requests for {name} come first; try again later", code="queue_full")
        self._asked[name] += 1
        try:
            async with self._turns:
                if await request.is_disconnected():
                    raise ClientDisconnect
                return await run_in_threadpool(prepare)
        finally:
            self._asked[name] -= 1


def encoded(model: Model, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a prompt.

    Raises:
        ApiError: it has more bytes than the context's tokens can stand for.
        GenerationError: as ``Tokenizer.encode``.
    """
    context, size = model.runner.context_length, len(text.encode(errors="replace"))
    if size > context * _most_bytes(model.tokenizer):
        problem = f"the prompt has {size} bytes, more than fit the model's context {context}; shorten it"
        raise invalid(param, problem, code="context_length_exceeded")
    return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)


_known: weakref.WeakKeyDictionary[Tokenizer, int] = weakref.WeakKeyDictionary()


def _most_bytes(tokenizer: Tokenizer) -> int:
    """Of a text, for one token."""
    if tokenizer not in _known:
        longest = max((len(token.encode(errors="replace")) for token in tokenizer.vocabulary()), default=1)
        _known[tokenizer] = longest if _keeps_bytes(json.loads(tokenizer.to_json())) else _SLACK * max(longest, 16)
    return _known[tokenizer]


def _keeps_bytes(file: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is BPE of bytes that are written in its tokens one for one: nothing normalized, dropped,
    unknown, or taken along by a special token beside it."""
    kept = all(
        part["type"] in _KEEPING and part.get("behavior") != "Removed" for part in _parts(file.get("pre_tokenizer"))
    )
    beside = any(token.get("lstrip") or token.get("rstrip") for token in file.get("added_tokens") or ())
    unknown = file["model"].get("unk_token") is not None
    return kept and not beside and not unknown and file.get("normalizer") is None and file["model"]["type"] == "BPE"


def _parts(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if part is not None:
        yield part
        for inner in part.get("pretokenizers") or ():
            yield from _parts(inner)
