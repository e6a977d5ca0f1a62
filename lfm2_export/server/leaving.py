"""Clients that go away before they have their answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # the command says which extra is missing
    from starlette.requests import Request

Made = TypeVar("Made")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Made]) -> Made:
    """What ``work`` gives for a request whose body was read.

    Raises:
        ClientDisconnect: the client went away first, and ``work`` is cancelled.
    """
    from starlette.requests import ClientDisconnect

    made, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({made, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            raise ClientDisconnect
        return made.result()
    finally:
        made.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
