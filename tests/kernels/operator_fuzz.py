"""Our operators in ONNX Runtime and through the C interface, against calls that nobody would make.

As a program (``python -m tests.kernels.operator_fuzz``) it makes some thousands of calls that do not fit, in up to
three ways: attributes, shapes, types, values, what is left out. Each must be refused, or give what
operator_reference.py computes of the very same arrays. Prints what it counted as JSON; exits with 1 at a wrong answer.
A crash ends the process, so the file PLACE holds the number of the case that is running.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from tests.kernels import c_api_fuzz
from tests.kernels.attention_cases import AttentionCase, dequantize_rows
from tests.kernels.matrix_cases import FEED_FORWARD_CASES, MOE_CASES, PRODUCT_CASES, PROJECTIONS_CASES, PROJECTIONS_OUT
from tests.kernels.norm_cases import NORMED_CASES
from tests.kernels.odd_values import odd_float, odd_integer, pick
from tests.kernels.one_operator import FLOAT_OUT, open_operator
from tests.kernels.operator_reference import expected
from tests.kernels.token_cases import CONV_CASES, LAYOUT_CASES, LAYOUT_OUT

MOST_SESSIONS = 200
MOST_BYTES = 1 << 22
MOST_ELEMENTS = 1 << 59  # that numpy counts in an array without any
# Of the norm: 2e-7 was the most in 24,000 calls of the plain kernels. Others sum in another order, by which a value in
# between may go to the next int8 code, one of 127 steps; and round an int8 cache's queries to 15 bits.
_TIGHT, _LOOSE = 1e-5, 1e-2
_ROUNDED = ("FeedForward", "SparseMoe", "AttentionInt8", "SlidingAttentionInt8")
DTYPES = ("float32", "uint8", "int32", "int64", "float16", "float64", "bool")


@dataclass(frozen=True, kw_only=True)
class Call:
    """``is_finite``: whether its values let an answer be compared."""

    op: str
    outputs: dict[str, int]
    inputs: dict[str, Any]
    attributes: dict[str, Any]
    constants: frozenset[str] = frozenset()
    is_finite: bool = True

    def described(self) -> str:
        inputs = {name: None if a is None else f"{a.dtype}{list(a.shape)}" for name, a in self.inputs.items()}
        return f"{self.op} {self.attributes} {inputs} constants={sorted(self.constants)}"


def bound(op: str) -> float:
    """An answer that is further off is wrong."""
    return _LOOSE if op in _ROUNDED else _TIGHT


def base_calls() -> list[Call]:
    """Small calls that fit."""
    attention = (
        AttentionCase(tokens=5, lengths=(5, 2), head_dim=16),
        AttentionCase(held=(5,), tokens=2, head_dim=16),
        AttentionCase(held=(11, 4, 1), capacity=16, head_dim=48, heads=3, kv_heads=1),
        AttentionCase(held=(11, 4, 1), tokens=2, head_dim=16, window=4),
    )
    cases = [
        *PRODUCT_CASES[:3],
        *PRODUCT_CASES[6:],
        *PROJECTIONS_CASES[::3],
        *FEED_FORWARD_CASES[:3],
        *FEED_FORWARD_CASES[4:6],
        *MOE_CASES[::2],
        *NORMED_CASES[:-5:2],
        *NORMED_CASES[1:-5:4],
        *NORMED_CASES[-3:],
        *CONV_CASES[:5],
        *LAYOUT_CASES,
        *attention,
        *(replace(case, int8=True) for case in attention),
    ]
    rings = [_with_ring(AttentionCase(held=(11, 4, 1), tokens=2, head_dim=16, window=4, int8=i)) for i in (False, True)]
    return [*map(_call_of, cases), *rings]


def _with_ring(case: AttentionCase) -> Call:
    """A cache of whole steps, longer than the window: the same arrays can be a ring."""
    call = _call_of(replace(case, capacity=64))
    return replace(call, attributes=call.attributes | {"ring": 1})


def _call_of(case: Any) -> Call:
    op = case.op if hasattr(case, "op") else case.label.partition(" ")[0]
    float_kind = FLOAT_OUT["out"]
    named = {
        "Projections": PROJECTIONS_OUT,
        "GatedConv": {"out": float_kind, "present": float_kind},
        "TokenLayout": LAYOUT_OUT,
    }
    outputs = case.outputs if hasattr(case, "outputs") else named.get(op, FLOAT_OUT)
    return Call(op=op, outputs=outputs, inputs=dict(case.inputs), attributes=dict(getattr(case, "attributes", {})))


Rng = np.random.Generator
Spoil = Callable[[Rng, Call], Call]


def _some(rng: Rng, call: Call) -> str:
    return pick(rng, [name for name, array in call.inputs.items() if array is not None])


def _with(call: Call, name: str, array: npt.NDArray[Any] | None, *, is_finite: bool = True) -> Call:
    return replace(call, inputs=call.inputs | {name: array}, is_finite=call.is_finite and is_finite)


def spoil_attribute(rng: Rng, call: Call) -> Call:
    if not call.attributes:
        return call
    name = pick(rng, sorted(call.attributes))
    kind = rng.integers(12)
    if kind == 0:
        return replace(call, attributes={n: v for n, v in call.attributes.items() if n != name})
    value = call.attributes[name]
    odd: Any = odd_integer(rng, value) if isinstance(value, int) else odd_float(rng)
    if kind == 1:  # of another type
        odd = float(odd) if isinstance(odd, int) else "text"
    return replace(call, attributes=call.attributes | {name: odd})


def spoil_shape(rng: Rng, call: Call) -> Call:
    name = _some(rng, call)
    array = call.inputs[name]
    shape = list(array.shape)
    axis = int(rng.integers(max(1, len(shape))))
    match int(rng.integers(7)) if shape else 4:
        case 0:
            shape[axis] = max(0, shape[axis] + int(rng.integers(-2, 3)))
        case 1:
            shape[axis] = pick(rng, [0, 1, shape[axis] * 2, shape[axis] // 2])
        case 2:
            shape[axis], shape[0] = shape[0], shape[axis]
        case 3:
            del shape[axis]
        case 4:
            shape = [1] * int(rng.integers(1, 10)) + shape
        case 5:
            shape = [array.size]
        case _:
            shape[axis] = 0
            shape.append(pick(rng, [1 << 20, 1 << 31, 1 << 40]))
    if 0 in shape:
        fits_numpy = np.prod([size for size in shape if size], dtype=np.float64) < MOST_ELEMENTS
        return _with(call, name, np.zeros(shape, array.dtype)) if fits_numpy else call
    small = np.prod(shape, dtype=np.float64) * array.itemsize < MOST_BYTES
    return _with(call, name, np.resize(array, shape)) if small and array.size else call


def spoil_type(rng: Rng, call: Call) -> Call:
    name = _some(rng, call)
    return _with(call, name, call.inputs[name].astype(pick(rng, DTYPES)))


def spoil_values(rng: Rng, call: Call) -> Call:
    name = _some(rng, call)
    array = call.inputs[name].copy()
    if not array.size:
        return call
    at = np.unravel_index(int(rng.integers(array.size)), array.shape)
    if array.dtype.kind == "f":
        array[at] = np.float16(0.25) if array.dtype == np.float16 else odd_float(rng)
        return _with(call, name, array, is_finite=bool(abs(array[at]) < 1e3))
    if array.dtype.kind in "iu":
        array[at] = np.array(odd_integer(rng, int(array[at]))).astype(array.dtype)
        return _with(call, name, array, is_finite=array.dtype != np.uint8 or not name.startswith("past"))
    return call


def spoil_presence(rng: Rng, call: Call) -> Call:
    if rng.integers(3) == 0:
        other = call.inputs[_some(rng, call)]
        return _with(call, _some(rng, call), other)
    return _with(call, _some(rng, call), None)


def spoil_outputs(rng: Rng, call: Call) -> Call:
    kept = [name for name in call.outputs if rng.integers(3)]
    return replace(call, outputs={name: call.outputs[name] for name in kept} or call.outputs)


SPOILS: list[Spoil] = [
    *(spoil_attribute, spoil_attribute, spoil_shape, spoil_shape, spoil_values, spoil_values),
    *(spoil_type, spoil_presence, spoil_outputs),
]


@dataclass
class Fuzzer:
    """Sessions are kept: most spoilt calls differ in their arrays alone."""

    sessions: dict[str, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)

    def check(self, call: Call) -> str | None:
        """What is wrong."""
        try:
            got = self._run(call)
        except Exception as error:  # onnxruntime's and numpy's, of any class
            self.counts["refused"] += 1
            return f"no words: {error!r}" if not str(error).strip() else None
        self.counts["ran"] += 1
        if not call.is_finite or (call.op, tuple(call.outputs)) not in BASE_OUTPUTS:
            return None
        self.counts["compared"] += 1
        return self._compare(call, got, expected(call.op, list(call.inputs.values()), call.attributes))

    def _run(self, call: Call) -> list[npt.NDArray[Any]]:
        varying = {n: a for n, a in call.inputs.items() if a is not None and n not in call.constants}
        if not varying:
            raise ValueError("everything is constant")
        kinds = {n: (str(a.dtype), a.ndim) for n, a in varying.items()}
        names = [name for name, array in call.inputs.items() if array is not None]
        key = None if call.constants else f"{call.op} {call.attributes} {list(call.outputs)} {names} {kinds}"
        session = self.sessions.get(key) if key else None
        if session is None:
            session = open_operator(call.op, call.inputs, call.outputs, call.attributes, constants=call.constants)
            if key:
                self.sessions[key] = session
            if len(self.sessions) > MOST_SESSIONS:
                del self.sessions[next(iter(self.sessions))]
        return session.run(None, varying)

    def _compare(self, call: Call, got: list[npt.NDArray[Any]], want: list[npt.NDArray[Any]]) -> str | None:
        # Behind a sum that was left out there is nothing to be compared.
        for index, (mine, other) in enumerate(zip(got, want, strict="sum" not in call.outputs)):
            values = dequantize_rows(mine) if call.op.endswith("AttentionInt8") and index > 0 else mine
            if values.shape != other.shape:
                return f"output {index} is {list(values.shape)}, not {list(other.shape)}"
            error = c_api_fuzz.difference(values, other)
            if error is None:
                continue
            self.worst[call.op] = max(self.worst.get(call.op, 0.0), error)
            if not error <= bound(call.op):
                return f"output {index} is off by {error:.1e}"
        return None


BASES = base_calls()
BASE_OUTPUTS = {(call.op, tuple(call.outputs)) for call in BASES}


def fuzzed_call(rng: Rng) -> Call:
    call = pick(rng, BASES)
    for _ in range(int(rng.integers(0, 4))):
        if not any(array is not None for array in call.inputs.values()):
            break
        call = pick(rng, SPOILS)(rng, call)
    if rng.integers(6) == 0:
        call = replace(call, constants=frozenset(n for n in call.inputs if rng.integers(2)))
    return call


def main() -> int:
    parser = argparse.ArgumentParser()
    for name, default in (("--cases", 2000), ("--seconds", 0), ("--seed", 1)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--place", default=os.devnull)
    options = parser.parse_args()
    ort.set_default_logger_severity(4)
    np.seterr(all="ignore")
    end = time.monotonic() + options.seconds if options.seconds else None
    fuzzer, place = Fuzzer(), os.open(options.place, os.O_WRONLY | os.O_CREAT, 0o600)
    case = 0
    while time.monotonic() < end if end else case < options.cases:
        rng = np.random.default_rng([options.seed, case])
        os.pwrite(place, f"{case:<20}".encode(), 0)
        if case % 4 == 3:
            wrong, said = c_api_fuzz.check(rng, fuzzer.counts), "the C interface"
        else:
            call = fuzzed_call(rng)
            wrong, said = fuzzer.check(call), call.described()
        if wrong:
            print(f"case {case} of seed {options.seed}: {wrong}: {said}")
            return 1
        case += 1
    print(json.dumps({"cases": case, **fuzzer.counts, "worst": fuzzer.worst}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
