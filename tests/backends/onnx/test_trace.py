"""What tracing leaves behind in the process."""

import gc

import pytest

from lfm2_export.backends.onnx.trace import without_collection


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_as_before_after_a_trace_that_failed(was_on):
    before = gc.isenabled()
    (gc.enable if was_on else gc.disable)()
    try:
        with pytest.raises(ValueError, match="while it was off"), without_collection():
            raise ValueError(f"while it was {'on' if gc.isenabled() else 'off'}")
        assert gc.isenabled() == was_on
    finally:
        (gc.enable if before else gc.disable)()
