"""What a mixture may weigh: budgets as they are asked for, and as bytes.

In: ``--target-bits``, ``--target-size`` and ``--budget``, or nothing for the default. Out: a number of bytes between
the floor and the ceiling of a ``Space``, or one line that says what would be possible.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lfm2_export.backends.weights.widths import Counted
from lfm2_export.errors import QuantizationError
from lfm2_export.messages import shown
from lfm2_export.mixing.units import Space
from lfm2_export.quant.recipes import q4_k_m_bytes
from lfm2_export.resources import human_bytes

MOST_BITS = 8.0
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([a-zA-Z]{0,3})", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """``bits`` a weight, or ``nbytes`` of the file's weights and tables; neither: the bytes of the scheme with its own
    widths where it ``keeps_size``, else those that llama.cpp's Q4_K_M would have; or the floor where that is higher."""

    counted: Counted = Counted.FILE
    keeps_size: bool = False
    bits: float | None = None
    nbytes: int | None = None

    @property
    def is_default(self) -> bool:
        return self.bits is None and self.nbytes is None

    def __str__(self) -> str:
        if self.is_default:
            return "the size of the scheme's own widths" if self.keeps_size else "the size of llama.cpp's Q4_K_M"
        asked = f"--target-size {self.nbytes}" if self.bits is None else f"--target-bits {self.bits:g}"
        return asked if self.counted is Counted.FILE else f"{asked} --budget {self.counted}"


def make_budget(bits: float | None, size: str | int | None, counted: str | None) -> Budget | None:
    """What was asked for; None where nothing was.

    Raises:
        QuantizationError: both or neither of ``bits`` and ``size``, or a value that is no such thing.
    """
    if bits is None and size is None:
        if counted is not None:
            raise QuantizationError(f"--budget {shown(counted)}: pass --target-bits or --target-size with it")
        return None
    if bits is not None and size is not None:
        raise QuantizationError(f"--target-bits {bits:g} and --target-size {shown(size)}: pass one of them")
    if counted is not None and counted not in tuple(Counted):
        raise QuantizationError(f"--budget {shown(counted)}: pass file or step")
    if bits is not None and not 0 < bits <= MOST_BITS:
        raise QuantizationError(f"--target-bits {bits:g}: pass at most {MOST_BITS:g} bits a weight, or --scheme q8")
    return Budget(
        counted=Counted(counted or Counted.FILE), bits=bits, nbytes=None if size is None else parse_size(size)
    )


def parse_size(size: str | int) -> int:
    """Bytes: a number, or one with a unit (700MB, 1.2GB, 650MiB).

    Raises:
        QuantizationError: it is none.
    """
    found = _SIZE.fullmatch(str(size).strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise QuantizationError(f"--target-size {shown(size)}: pass bytes, or a size such as 700MB or 1.2GB")
    return int(float(found[1]) * unit)


def bytes_for(budget: Budget, space: Space) -> int:
    """What all weights may have together, as the budget counts them.

    Raises:
        QuantizationError: less than the floor, or more than 8 bits a weight; the message names both.
    """
    least = space.fixed + space.floor()
    if budget.is_default:
        return max(least, space.own_bytes if budget.keeps_size else q4_k_m_bytes(space.plan.config))
    tables = space.plan.table_bytes if budget.counted is Counted.FILE else 0
    if budget.nbytes is None:
        assert budget.bits is not None
        wanted = int(budget.bits * space.count / 8)
    else:
        wanted = budget.nbytes - tables
    if wanted < least:
        raise QuantizationError(
            f"{budget}: is below the floor of {_bits(least, space)} bits a weight or {human_bytes(least + tables)}, "
            f"which 4 bits in groups of {max(space.plan.scheme.group_sizes)} and a token table of 8 bits need; raise it"
        )
    if wanted > MOST_BITS * space.count / 8:
        raise QuantizationError(
            f"{budget}: is above 8 bits a weight, {human_bytes(space.count + tables)}; the floor is "
            f"{_bits(least, space)} bits or {human_bytes(least + tables)}; lower it, or pass --scheme q8"
        )
    return wanted


def _bits(nbytes: int, space: Space) -> str:
    """Rounded up, so that what a message names is possible."""
    return f"{-(-nbytes * 800 // space.count) / 100:.2f}"
