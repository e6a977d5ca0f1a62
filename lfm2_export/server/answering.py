"""Answers over HTTP, whole or streamed as server-sent events, for as long as somebody waits for them.

In: what to generate and what makes an answer of it. Out: a response. A client that goes away cancels its job, whether
it waits in the queue or is being answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from lfm2_export import json_values
from lfm2_export.server.answer import Answer, Json
from lfm2_export.server.engine import Engine
from lfm2_export.server.errors import translated
from lfm2_export.server.generating import Asked, Done, Piece
from lfm2_export.server.job import Job, Output
from lfm2_export.server.leaving import unless_gone

# Some proxies hold back what is not marked so.
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def respond(request: Request, engine: Engine, asked: Asked, answer: Answer, *, stream: bool) -> Response:
    """Raises: ApiError where the queue is full, and what went wrong before the first byte."""
    outputs = _Outputs(engine, asked)
    if stream:
        return StreamingResponse(_events(outputs, answer), media_type="text/event-stream", headers=_HEADERS)
    return await _whole(request, outputs, answer)


class _Outputs:
    """A job's outputs in the event loop."""

    def __init__(self, engine: Engine, asked: Asked):
        loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Output]()
        queue = self._queue

        def deliver(output: Output) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who waited
                loop.call_soon_threadsafe(queue.put_nowait, output)

        self._job = Job(asked=asked, deliver=deliver)
        engine.submit(self._job)

    def cancel(self) -> None:
        self._job.cancel()

    async def pieces(self) -> AsyncIterator[Piece | Done]:
        """All of them, Done last. Raises what went wrong."""
        while True:
            output = await self._queue.get()
            if isinstance(output, Exception):
                raise output
            yield output
            if isinstance(output, Done):
                return


async def _events(outputs: _Outputs, answer: Answer) -> AsyncIterator[str]:
    try:
        for chunk in answer.begun():
            yield _event(chunk)
        async for output in outputs.pieces():
            for chunk in answer.done(output) if isinstance(output, Done) else answer.piece(output):
                yield _event(chunk)
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status is sent already
        yield _event(translated(error).to_json())
    finally:
        outputs.cancel()


def _event(chunk: Json) -> str:
    return f"data: {json.dumps(json_values.plain(chunk), ensure_ascii=False, allow_nan=False)}\n\n"


async def _whole(request: Request, outputs: _Outputs, answer: Answer) -> Response:
    try:
        return JSONResponse(json_values.plain(await unless_gone(request, _collected(outputs, answer))))
    finally:
        outputs.cancel()


async def _collected(outputs: _Outputs, answer: Answer) -> Json:
    async for output in outputs.pieces():
        if isinstance(output, Done):
            return answer.whole(output)
        answer.piece(output)
    raise AssertionError("outputs end with Done")
