"""The page at ``/``: a chat in the browser, through the same API as any other client's.

In: the package's folder ``page``. Out: a route for each of its files, which are read once; no other path reaches a
file. What the page may do is said by its Content-Security-Policy: its own scripts and styles, and this server.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

_INDEX = "index.html"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def is_of_page(path: str) -> bool:
    """Whether a file of the page is at the path of a URL."""
    return path in _files()


def page_routes() -> list[Route]:
    return [Route(path, _File(content, kind), methods=["GET"]) for path, (content, kind) in _files().items()]


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Path in a URL: bytes and media type."""
    found = {}
    for file in resources.files("lfm2_export.server").joinpath("page").iterdir():
        kind = _TYPES.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            found["/" if file.name == _INDEX else f"/{file.name}"] = file.read_bytes(), kind
    return found


class _File:
    """One file as an ASGI application."""

    def __init__(self, content: bytes, media_type: str):
        self._response = Response(content, media_type=media_type, headers=_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._response(scope, receive, send)
