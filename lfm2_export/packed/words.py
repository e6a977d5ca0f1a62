"""Codes of 4 or 8 bits out of int32 words, the first code in the lowest bits.

In: words as uint32, little-endian, so that their bytes come in the codes' order. Out: a code a byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2_export.quant.formats import ByteArray

BITS = (4, 8)


def unpack_rows(words: npt.NDArray[Any], bits: int) -> ByteArray:
    """Words [rows, n], each of neighbours in a row, as codes [rows, n * 32 / bits]."""
    inner = np.ascontiguousarray(words, "<u4").view(np.uint8)
    if bits == 8:
        return inner
    codes = np.empty((len(inner), 2 * inner.shape[1]), np.uint8)
    np.bitwise_and(inner, 15, out=codes[:, 0::2])
    np.right_shift(inner, 4, out=codes[:, 1::2])
    return codes


def unpack_columns(words: npt.NDArray[Any], bits: int) -> ByteArray:
    """Words [n, columns], each of neighbours in a column, as codes [columns, n * 32 / bits]: turned on their side."""
    return unpack_rows(words.T, bits)
