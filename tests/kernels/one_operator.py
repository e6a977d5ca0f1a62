"""Our operators one at a time, in onnx models of one node."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from lfm2_export.backends.onnx.session import session_options
from lfm2_export.kernels import build

Arrays = dict[str, npt.NDArray[Any] | None]
FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

FLOAT_OUT = {"out": TensorProto.FLOAT}


def operator_library() -> Path | None:
    """The library itself, whether or not its kernels here are faster than onnxruntime's; None without a compiler."""
    return build.onnx_library_path()


def open_operator(
    op: str,
    inputs: Arrays,
    outputs: Mapping[str, int],
    attributes: Mapping[str, Any],
    *,
    threads: int = 1,
    constants: Collection[str] = (),
) -> ort.InferenceSession:
    """A session of one node; an input that is None is left out, one of ``constants`` is an initializer."""
    given = {name: array for name, array in inputs.items() if array is not None}
    node = helper.make_node(
        op,
        [name if array is not None else "" for name, array in inputs.items()],
        list(outputs),
        domain="lfm2",
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        op,
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), [f"{name}_{axis}" for axis in range(array.ndim)]
            )
            for name, array in given.items()
            if name not in constants
        ],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(given[name], name) for name in constants if name in given],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("lfm2", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = session_options(threads, operator_library())
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_operator(
    op: str, inputs: Arrays, outputs: Mapping[str, int], attributes: Mapping[str, Any], *, threads: int = 1
) -> list[npt.NDArray[Any]]:
    session = open_operator(op, inputs, outputs, attributes, threads=threads)
    return session.run(None, {name: array for name, array in inputs.items() if array is not None})


def random_inputs(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def given_x(inputs: Arrays, x: FloatArray | None) -> FloatArray:
    """``x``, or where it is None that of the inputs."""
    found = inputs["x"] if x is None else x
    assert found is not None
    return found
