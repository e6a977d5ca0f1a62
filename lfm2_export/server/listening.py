"""The socket, and the server's life: until a signal ends it.

In: models and an address. Out: nothing; SIGINT and SIGTERM end it as they end any command, after the answers that are
under way have had some seconds to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import uvicorn

from lfm2_export.errors import ConfigError
from lfm2_export.server.access import Access
from lfm2_export.server.app import create_app
from lfm2_export.server.limits import Limits
from lfm2_export.server.served import Models

logger = logging.getLogger(__name__)

# For answers that are under way when the end is asked for, and then for their last event.
_GRACE_S, _LAST_S = 5, 3
_BACKLOG = 128
_LAST_PORT = 65535


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any that is free.

    Raises:
        ConfigError: there is no such address, or it is taken.
    """
    if not 0 <= port <= _LAST_PORT:  # getaddrinfo takes it modulo 65536
        raise ConfigError(f"--port {port}: is no port; give one from 1 to {_LAST_PORT}, or 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(_BACKLOG)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} --port {port}: cannot be listened on ({reason}); choose others") from error
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ip_address(bound.getsockname()[0]).is_loopback


class _Server(uvicorn.Server):
    """Ends answers that take too long with an event that says so, before their connections are cut."""

    def __init__(self, config: uvicorn.Config, models: Models):
        super().__init__(config)
        self._models = models

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn takes SIGINT and SIGTERM; a terminal that goes ends the server likewise, unless that is ignored."""
        with super().capture_signals():
            before = signal.getsignal(signal.SIGHUP) if hasattr(signal, "SIGHUP") else signal.SIG_IGN
            if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
                yield
                return
            signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, before)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        late = asyncio.get_running_loop().call_later(_GRACE_S, self._models.stop)
        await super().shutdown(sockets)
        late.cancel()


class _Told(logging.Handler):
    """What uvicorn logs, as a line of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        reason = record.exc_info[1] if record.exc_info else None
        logger.log(record.levelno, "%s%s", record.getMessage(), "" if reason is None else f" ({reason!r})")


def serve(bound: socket.socket, models: Models, limits: Limits, access: Access, *, ready: Callable[[], None]) -> None:
    """Answers until a signal comes, which is raised again when all has ended; ``ready`` is called before."""
    config = uvicorn.Config(
        create_app(models, limits, access),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=_GRACE_S + _LAST_S,
    )
    log, told = logging.getLogger("uvicorn.error"), _Told(logging.WARNING)
    log.addHandler(told)
    log.propagate = False
    ready()
    try:
        _Server(config, models).run(sockets=[bound])
    finally:
        log.removeHandler(told)
        models.close()
        bound.close()
