"""One session in many hands: buffers that come again as something else, threads at once, too little memory."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.kernels.attention_cases import AttentionCase
from tests.kernels.matrix_cases import FEED_FORWARD_CASES, MOE_CASES, PRODUCT_CASES, PROJECTIONS_CASES, PROJECTIONS_OUT
from tests.kernels.one_operator import FLOAT_OUT, open_operator, operator_library
from tests.kernels.token_cases import CONV_CASES, ConvCase

pytestmark = pytest.mark.skipif(operator_library() is None, reason="no compiler for our operators")

CONV_OUT = {"out": FLOAT_OUT["out"], "present": FLOAT_OUT["out"]}
FOLDER = Path(__file__).parents[2]


class Conv:
    """A GatedConv whose weight is an input, over inputs whose output is C * (the weights' sums)."""

    def __init__(self) -> None:
        case = ConvCase(tokens=1, taps=2, width=48)
        self.session = open_operator("GatedConv", case.inputs, CONV_OUT, {})

    def __call__(self, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The output [width] of a weight [width, 1, taps], all of whose inputs are 1."""
        width, _, taps = weight.shape
        given = {
            "projected": np.ones((1, 1, 3 * width), np.float32),
            "weight": weight,
            "state": np.ones((1, taps - 1, width), np.float32),
            "attended": np.ones((1, 1, 1), np.float32),
            "rows": np.arange(1, taps)[None],
        }
        return self.session.run(None, given)[0][0, 0]


@pytest.mark.parametrize(
    "shapes", [((48, 2), (24, 4)), ((8, 2), (48, 6)), ((48, 6), (3, 2)), ((16, 3), (3, 16), (48, 1))], ids=str
)
def test_one_buffer_may_come_under_another_shape(shapes: tuple[tuple[int, int], ...]) -> None:
    conv, buffer = Conv(), np.random.default_rng(0).normal(size=48 * 6).astype(np.float32)
    for width, taps in (*shapes, *shapes):
        weight = buffer[: width * taps].reshape(width, 1, taps)
        np.testing.assert_allclose(conv(weight), weight.sum((1, 2)), atol=1e-5, err_msg=f"{width} x {taps}")


def test_one_buffer_may_be_filled_anew() -> None:
    conv, weight = Conv(), np.empty((48, 1, 3), np.float32)
    for seed in range(5):
        weight[:] = np.random.default_rng(seed).normal(size=weight.shape)
        np.testing.assert_allclose(conv(weight), weight.sum((1, 2)), atol=1e-5)


@pytest.mark.parametrize("shape", [(48, 1, 7), (48, 7), (336,), (7, 48), (2, 3, 56)], ids=str)
def test_a_weight_in_the_graph_is_what_the_same_weight_as_an_input_is(shape: tuple[int, ...]) -> None:
    case = ConvCase(tokens=5, taps=7, lengths=(5, 1, 3))
    weight = case.inputs["weight"]
    assert weight is not None
    inputs = case.inputs | {"weight": weight.reshape(shape)}
    session = open_operator("GatedConv", inputs, CONV_OUT, {}, constants=["weight"])
    given = {name: array for name, array in inputs.items() if array is not None and name != "weight"}
    for _ in range(2):
        for got, want in zip(session.run(None, given), case.run(), strict=True):
            np.testing.assert_array_equal(got, want)


def cases_of_each_operator() -> list[Any]:
    return [
        *(PRODUCT_CASES[4], PROJECTIONS_CASES[1], FEED_FORWARD_CASES[1]),
        *(MOE_CASES[1], CONV_CASES[2]),
        *(AttentionCase(held=(70, 9), tokens=3, int8=int8) for int8 in (False, True)),
    ]


@pytest.mark.parametrize("case", cases_of_each_operator(), ids=lambda case: case.label.partition(" ")[0])
def test_threads_may_run_one_session_at_once(case: Any) -> None:
    op = case.op if isinstance(case, AttentionCase) else case.label.partition(" ")[0]
    named = {"Projections": PROJECTIONS_OUT, "GatedConv": CONV_OUT}
    outputs = case.outputs if isinstance(case, AttentionCase) else named.get(op, FLOAT_OUT)
    session = open_operator(op, case.inputs, outputs, getattr(case, "attributes", {}), threads=2)
    given = {name: array for name, array in case.inputs.items() if array is not None}
    want, wrong = session.run(None, given), []

    def work() -> None:
        for _ in range(25):
            got = session.run(None, given)
            wrong.extend(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a.tobytes() != b.tobytes())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_with_weights_of_their_own_do_not_mix_them_up() -> None:
    conv, wrong = Conv(), []

    def work(width: int, taps: int) -> None:
        rng, weight = np.random.default_rng(width), np.empty((width, 1, taps), np.float32)
        for _ in range(100):
            weight[:] = rng.normal(size=weight.shape)
            if not np.allclose(conv(weight), weight.sum((1, 2)), atol=1e-5):
                wrong.append((width, taps))

    threads = [threading.Thread(target=work, args=shape) for shape in ((48, 2), (32, 3), (24, 4), (48, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


TOO_LITTLE = """
import resource, sys
import numpy as np
from tests.kernels.matrix_cases import Matrix
from tests.kernels.one_operator import FLOAT_OUT, open_operator, run_operator

w = Matrix(1, 32)
inputs = {"x": np.zeros((1, 1, 32), np.float32), **w.inputs("w")}
attributes = {"N": 1, "K": 32, "bits": 4, "block_size": 32}
session = open_operator("MatMulNBits", inputs, FLOAT_OUT, attributes)
given = {name: array for name, array in inputs.items() if array is not None}
session.run(None, given)
given["x"] = np.zeros((1, 400_000, 32), np.float32)  # 50 MB, whose activations take 250 MB
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
try:
    session.run(None, given)
except Exception as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(session.run(None, given)[0].shape)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_too_little_memory_is_an_error_and_the_session_survives() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOO_LITTLE], cwd=FOLDER, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said, shape = done.stdout.strip().splitlines()
    assert "MatMulNBits: not enough memory" in said
    assert shape == "(1, 400000, 1)"
