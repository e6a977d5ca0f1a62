"""Text that a thread computes, for code that awaits: the event loop goes on while a token is made.

In: a call that returns pieces of text one after the other. Out: the same pieces as an async iterator. One step of it
runs at a time; closing or cancelling the iterator waits for the step under way and closes the pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any


async def streamed(make: Callable[[], Iterator[str]]) -> AsyncGenerator[str, None]:
    """The pieces of ``make()``, which is itself called in a thread: it may prefill a prompt."""
    pieces: Any = None
    step: asyncio.Future[Any] = asyncio.ensure_future(asyncio.to_thread(make))
    try:
        pieces = await asyncio.shield(step)
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, pieces, None))
            if (piece := await asyncio.shield(step)) is None:
                return
            yield piece
    finally:
        if not step.done():  # a thread cannot be stopped; a token is soon made
            await asyncio.wait([step])
        if pieces is None and not step.cancelled() and step.exception() is None:
            pieces = step.result()
        if pieces is not None:
            await asyncio.to_thread(pieces.close)
