"""What tracing leaves behind in the process."""

import gc

import pytest

from lfm2_export.backends.onnx.trace import read_functions_once, without_collection


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


def test_onnxscripts_functions_are_read_once_and_are_what_the_exporter_asks_for():
    from onnxscript._framework_apis import torch_2_11
    from torch.onnx._internal.exporter import _registration

    read_functions_once()
    read = _registration.onnxscript_apis.get_torchlib_ops()
    assert _registration.onnxscript_apis.get_torchlib_ops() is read
    stock = torch_2_11.get_torchlib_ops()
    assert stock is not read
    assert [(one.qualified_name, one.function) for one in stock] == [(one.qualified_name, one.function) for one in read]
