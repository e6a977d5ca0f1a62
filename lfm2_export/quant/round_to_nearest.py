"""``round``: each group's grid covers its least and greatest weight, and every weight goes to the nearest point.

The quickest algorithm, and the yardstick for the others. Needs no data but the weight.
"""

from __future__ import annotations

import numpy as np

from lfm2_export.quant._groups import Chunk, fit_range, quantize_in_chunks, write_codes
from lfm2_export.quant.formats import FloatArray, IntFormat, QuantizedTensor


def quantize(
    weight: FloatArray, format: IntFormat, *, fqn: str = "weight", threads: int | None = None
) -> QuantizedTensor:
    """``weight`` float32 [rows, in_features] in ``format``; ``threads`` None takes every usable core.

    Raises:
        QuantizationError: the width does not fit the group size, a weight is not finite, or a scale overflows.
    """
    return quantize_in_chunks(weight, format, _quantize_chunk, fqn=fqn, threads=threads)


def _quantize_chunk(chunk: Chunk) -> None:
    chunk.scale_C[:], chunk.zero_point_C[:] = fit_range(chunk.values_GC, chunk.format)
    np.multiply(chunk.values_GC, 1 / chunk.scale_C, out=chunk.values_GC)
    write_codes(chunk.values_GC, chunk)
