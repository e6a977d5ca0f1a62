"""Calls that do not fit, by the thousand: none crashes, and none that is taken is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.kernels import c_api, operator_fuzz
from tests.kernels.c_api_fuzz import difference
from tests.kernels.one_operator import operator_library
from tests.kernels.operator_reference import expected

CASES = 1600
FOLDER = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(operator_library() is None, reason="no compiler for our operators")


@pytest.mark.parametrize("kernels", ["", "scalar"], ids=["the fastest kernels", "the plain kernels"])
def test_malformed_calls_are_refused_or_right(tmp_path: Path, kernels: str) -> None:
    if kernels and c_api.runnable_kernels() == [kernels]:
        pytest.skip("the plain kernels are the fastest here")
    place = tmp_path / "case"
    command = [sys.executable, "-m", operator_fuzz.__name__, "--cases", str(CASES), "--place", str(place)]
    environment = os.environ | {"LFM2_KERNELS": kernels, "PYTHONPATH": str(FOLDER)}
    done = subprocess.run(
        command, env=environment, cwd=FOLDER, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, (
        f"exit code {done.returncode} at case {place.read_text().strip()}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    )
    counts = json.loads(done.stdout)
    print(done.stdout.strip())
    # That both happen, and often: a fuzzer that only sees refusals tests nothing else.
    assert counts["cases"] == CASES
    assert counts["refused"] > CASES / 4
    assert counts["compared"] > CASES / 5
    assert counts["C interface: 2"] > CASES / 20 < counts["C interface: ran"] * 2
    assert set(counts["worst"]) == {op for op, _ in operator_fuzz.BASE_OUTPUTS}


def has_floats(call: operator_fuzz.Call) -> bool:
    """TokenLayout has none; its answers are whole numbers, of which each is compared."""
    return any(array is not None and array.dtype == np.float32 for array in call.inputs.values())


@pytest.mark.parametrize("call", [call for call in operator_fuzz.BASES if has_floats(call)], ids=lambda call: call.op)
def test_another_input_would_be_noticed(call: operator_fuzz.Call) -> None:
    """The control: an answer that is off by what 3 % of one float input make is wrong to the fuzzer."""
    (name, array), *_ = ((n, a) for n, a in call.inputs.items() if a is not None and a.dtype == np.float32)
    changed = call.inputs | {name: array * np.float32(1.03) + np.float32(0.03)}
    right, wrong = (expected(call.op, list(inputs.values()), call.attributes)[0] for inputs in (call.inputs, changed))
    error = difference(wrong, right)
    print(f"{call.op}: {name} makes {error:.1e}, {operator_fuzz.bound(call.op):.0e} is wrong")
    assert error is not None
    assert error > operator_fuzz.bound(call.op)
