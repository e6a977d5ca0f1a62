"""A request on its way: what is asked for, who is told, whether anybody still waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lfm2_export.server.generating import Asked, Done, Piece

Output = Piece | Done | Exception


@dataclass(eq=False, kw_only=True)
class Job:
    """``deliver`` is called in the engine's thread with pieces, and at the end with Done or what went wrong."""

    asked: Asked
    deliver: Callable[[Output], None]
    submitted: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()
