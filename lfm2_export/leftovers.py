"""What other libraries leave behind where nobody asked them to."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

_INDUCTOR = "torch._inductor.runtime.cache_dir_utils"


@contextlib.contextmanager
def swept() -> Iterator[None]:
    """At its end the folder is gone that torch makes for compiled code in the folder for temporary files as soon as
    ``torch.export`` is imported; nothing is compiled here. One that holds anything stays."""
    try:
        yield
    finally:
        if (inductor := sys.modules.get(_INDUCTOR)) is not None:
            with contextlib.suppress(OSError):
                os.rmdir(inductor.default_cache_dir())
