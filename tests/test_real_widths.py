"""The 8B's own widths: what an export takes does not grow with the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.export_memory import measure
from lfm2_export.errors import ResourceError

MOST_MEMORY = 1_200_000_000


def test_export_at_the_8b_widths_stays_small_in_memory(tmp_path: Path) -> None:
    try:
        found = measure(tmp_path, copy=False)
    except ResourceError as error:
        pytest.skip(f"this machine is too small for it: {error}")
    print(
        f"{found['checkpoint_bytes'] / 1e9:.2f} GB of bf16: {found['peak_bytes'] / 1e6:.0f} MB at the peak, "
        f"{found['mb_per_s']:.0f} MB/s, {found['weights_mb_per_s']:.0f} once traced"
    )
    assert found["peak_bytes"] <= MOST_MEMORY
    # int4 with scales and zero points is 5.1 bits at most, the embedding 9: nothing was stored twice or left as floats.
    assert found["artifact_bytes"] < 0.33 * found["checkpoint_bytes"]
