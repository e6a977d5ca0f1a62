"""What a server lets its clients take."""

from __future__ import annotations

from dataclasses import dataclass

from lfm2_export.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``body``: bytes of a request. ``tokens``: of an answer. ``parallel``: requests that a program answers
    at once, where it can (server/rows.py). ``queue``: those that wait for it beside these. ``cache_bytes``: of states
    that are kept, for each program; 0 keeps none."""

    body: int = 8 << 20
    tokens: int = 8192
    parallel: int = 16
    queue: int = 64
    cache_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        for name, least in (("body", 1), ("tokens", 1), ("parallel", 1), ("queue", 0), ("cache_bytes", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"limit {name}={value!r} is not usable; give an integer from {least} up")
