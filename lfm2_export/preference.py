"""Which program of an artifact is taken where the caller does not say.

In: a manifest's entry, which may name backends and schemes that a later version wrote. Out: a key to sort by: the
backend in the order of its registration, then the scheme's own preference, unknown ones last.
"""

from __future__ import annotations

from lfm2_export.backends import BACKENDS
from lfm2_export.manifest import Program
from lfm2_export.quant.schemes import SCHEMES


def preference(program: Program) -> tuple[float, float, str, str]:
    """Sorts programs, the one to take first."""
    backends = list(BACKENDS)
    backend = backends.index(program.backend) if program.backend in backends else float("inf")
    scheme = SCHEMES[program.scheme].preference if program.scheme in SCHEMES else float("inf")
    return backend, scheme, program.backend, program.scheme
