"""Who may ask: by the key, and by the page that a browser has open.

In: a request's headers. Out: nothing, or a 401 or 403. A page of the web can reach a server on this machine in two
ways: it sends a request from its own origin (then the browser says so in Origin), or its name is made to point to this
machine (then Host is that name). Neither is answered unless it was allowed.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lfm2_export.messages import shown
from lfm2_export.server.chat_page import is_of_page
from lfm2_export.server.errors import ApiError

ANY = "*"
_OPEN = ("/health",)


@dataclass(frozen=True, kw_only=True)
class Access:
    """``key`` None: none is asked for. ``origins``: of pages that may ask, ``*`` any. ``local``: the server is bound to
    this machine alone, so that only its own names are its Host."""

    key: str | None = None
    origins: Collection[str] = ()
    local: bool = True

    def check(self, path: str, headers: Headers) -> None:
        """Raises: ApiError."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.local and not _is_local(host):
            raise ApiError(403, f"Host {shown(host, 60)} is no name of this machine; ask 127.0.0.1 or localhost")
        is_own = origin in (None, f"http://{host}", f"https://{host}")
        if not is_own and origin not in self.origins and ANY not in self.origins:
            raise ApiError(403, f"Origin {shown(origin, 60)} may not ask; start the server with --allow-origin")
        is_open = path in _OPEN or is_of_page(path)  # the page asks its user for the key
        if self.key is not None and not is_open and not _has_key(headers, self.key):
            raise ApiError(401, "no API key, or another one; send Authorization: Bearer KEY", code="invalid_api_key")


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name.lower() == "localhost":
        return True
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _has_key(headers: Headers, key: str) -> bool:
    """A header is bytes, which Starlette reads as Latin-1 whatever they are."""
    kind, _, given = headers.get("authorization", "").encode("latin-1").partition(b" ")
    same = [hmac.compare_digest(given.strip(), sent) for sent in _as_sent(key)]
    return kind.lower() == b"bearer" and any(same)


def _as_sent(key: str) -> list[bytes]:
    """What clients may make of a key: UTF-8, or Latin-1, as browsers do. Bytes that were no UTF-8 when the key was
    given, which Python passes on as surrogates, are themselves."""
    sent = list[bytes]()
    for encoding, errors in (("utf-8", "surrogateescape"), ("latin-1", "strict")):
        with contextlib.suppress(UnicodeEncodeError):
            sent.append(key.encode(encoding, errors))
    return sent


class Guarded:
    """The application behind ``access``."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._access.check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                await JSONResponse(error.to_json(), status_code=error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)
