"""``round``: each group's grid covers its least and greatest weight, and every weight goes to the nearest point.

The quickest algorithm, and the yardstick for the others. Needs no data but the weight.
"""

from __future__ import annotations

from lfm2_export.quant.groups import Chunk, fit_range, write_codes


def quantize_chunk(chunk: Chunk) -> None:
    """Quantizes the groups of ``chunk``.

    Raises:
        UnfitGroupError: a weight is not finite, or a scale overflows.
    """
    chunk.scale_C[:], chunk.zero_point_C[:] = fit_range(chunk.values_GC, chunk.format)
    write_codes(chunk.values_GC, chunk.scale_C, chunk)
