"""The C interface against sizes that do not fit the arrays: refused, or the answer that these sizes have."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2_export.kernels import build
from tests.kernels import c_api
from tests.kernels.c_api import Array, RowFormat, RowWeights
from tests.kernels.matrix_cases import Matrix
from tests.kernels.odd_values import odd_float, odd_integer, pick
from tests.kernels.one_operator import random_inputs
from tests.kernels.operator_reference import expected
from tests.kernels.toy_program import random_experts

BOUND = 1e-2  # as in operator_fuzz.py
MOST = 1e15  # whose squares' sum a float holds
Arrays = dict[str, Any]
Sizes = dict[str, Any]


def check(rng: np.random.Generator, counts: Counter[str]) -> str | None:
    """One call; what is wrong."""
    functions = [_matmul, _feed_forward, _sparse_moe, *([_moe_ffn] if build.tools() is not None else [])]
    function = pick(rng, functions)
    return function(rng, counts)


def _spoilt(rng: np.random.Generator, arrays: Arrays, sizes: Sizes) -> tuple[Arrays, Sizes]:
    """Up to two sizes that are others, and arrays that are shorter."""
    arrays, sizes = dict(arrays), dict(sizes)
    for _ in range(int(rng.integers(3))):
        if rng.integers(3) == 0:
            name = pick(rng, sorted(arrays))
            if arrays[name] is not None:
                arrays[name] = arrays[name].reshape(-1)[: int(rng.integers(arrays[name].size + 1))].copy()
        else:
            name = pick(rng, sorted(sizes))
            odd = odd_float(rng) if isinstance(sizes[name], float) else odd_integer(rng, sizes[name])
            narrow = name in ("bits", "threads", "normalize")
            sizes[name] = int(np.array(odd).astype(np.int32)) if narrow else odd
    return arrays, sizes


@cache
def _matrices(columns: int, rows: int, outer: tuple[int, ...], bits: int) -> Matrix:
    return Matrix(rows, columns, bits=bits, outer=outer)


def _weights(arrays: Arrays, name: str) -> RowWeights:
    return RowWeights(*(Array.of(arrays[f"{name}_{part}"]) for part in ("codes", "scales", "points")))


def _result(code: int, out: Any, want: Any, counts: Counter[str], library: Any = None) -> str | None:
    """``want()``: the answer, for a call that was taken. Each library has words of its own; None is ONNX Runtime's."""
    if code:
        counts[f"C interface: {code}"] += 1
        words = (library or c_api.onnx_library()).lfm2_last_fault().decode()
        return "refused without words" if code == c_api.FAULT and not words and want is not None else None
    counts["C interface: ran"] += 1
    error = difference(out, want())
    return None if error is None or error <= BOUND else f"off by {error:.1e}"


def difference(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float | None:
    """Of the norms, where floats hold what is wanted."""
    if not want.size or not np.abs(want).max() < MOST:
        return None
    return float(np.linalg.norm(got.reshape(-1) - want.reshape(-1)) / (np.linalg.norm(want) + 1e-3))


def _matmul(rng: np.random.Generator, counts: Counter[str]) -> str | None:
    w = _matrices(96, 20, (), pick(rng, (4, 8)))
    arrays = {"x": random_inputs(3, 96), **w.inputs("w"), "bias": random_inputs(20), "out": np.zeros((3, 20), "f4")}
    sizes = {"tokens": 3, "rows": 20, "columns": 96, "bits": w.bits, "group": 32, "threads": 2}
    arrays, s = _spoilt(rng, arrays, sizes)
    code = c_api.onnx_library().lfm2_matmul_nbits(
        *(None, s["threads"], Array.of(arrays["x"]), _weights(arrays, "w"), RowFormat(s["bits"], 0, s["group"])),
        *(Array.of(arrays["bias"]), s["tokens"], s["rows"], s["columns"], Array.of(arrays["out"])),
    )

    def want() -> Any:
        inputs = [arrays["x"].reshape(-1, s["columns"]), *(arrays[f"w_{p}"] for p in ("codes", "scales", "points"))]
        a = {"N": s["rows"], "K": s["columns"], "bits": s["bits"], "block_size": s["group"]}
        return expected("MatMulNBits", [*inputs, arrays["bias"]], a)[0]

    return _result(code, arrays["out"], want, counts)


def _feed_forward(rng: np.random.Generator, counts: Counter[str]) -> str | None:
    gate, down = _matrices(64, 96, (), 4), _matrices(96, 64, (), 4)
    arrays = {"x": random_inputs(3, 64), **gate.inputs("w1"), **gate.inputs("w3"), **down.inputs("w2")}
    arrays["out"] = np.zeros((3, 64), np.float32)
    arrays, s = _spoilt(rng, arrays, {"tokens": 3, "width": 64, "inner": 96, "bits": 4, "group": 32, "threads": 1})
    code = c_api.onnx_library().lfm2_feed_forward(
        *(None, s["threads"], Array.of(arrays["x"]), *(_weights(arrays, name) for name in ("w1", "w3", "w2"))),
        *(RowFormat(s["bits"], 0, s["group"]), s["tokens"], s["width"], s["inner"], Array.of(arrays["out"])),
    )

    def want() -> Any:
        a = {"inner": s["inner"], "bits": s["bits"], "block_size": s["group"]}
        parts = [arrays[f"{w}_{part}"] for w in ("w1", "w3", "w2") for part in ("codes", "scales", "points")]
        a |= {"down_bits": s["bits"], "down_block_size": s["group"]}
        return expected("FeedForward", [arrays["x"].reshape(-1, s["width"]), *parts], a)[0]

    return _result(code, arrays["out"], want, counts)


def _sparse_moe(rng: np.random.Generator, counts: Counter[str]) -> str | None:
    gate_up, down = _matrices(64, 64, (3,), 4), _matrices(32, 64, (3,), 4)
    arrays = {"x": random_inputs(3, 64), "logits": random_inputs(3, 3), "bias": random_inputs(3)}
    arrays |= {**gate_up.inputs("gate_up"), **down.inputs("down"), "out": np.zeros((3, 64), np.float32)}
    sizes = {"tokens": 3, "width": 64, "experts": 3, "top_k": 2, "normalize": 1, "scale": 1.5}
    arrays, s = _spoilt(rng, arrays, sizes | {"bits": 4, "group": 32, "threads": 1})
    code = c_api.onnx_library().lfm2_sparse_moe_nbits(
        *(None, s["threads"], *(Array.of(arrays[name]) for name in ("x", "logits", "bias"))),
        *(_weights(arrays, "gate_up"), _weights(arrays, "down"), RowFormat(s["bits"], 0, s["group"])),
        *(s["tokens"], s["width"], s["experts"], s["top_k"], s["normalize"], s["scale"], Array.of(arrays["out"])),
    )

    def want() -> Any:
        a = {"top_k": s["top_k"], "normalize": s["normalize"], "routed_scaling_factor": s["scale"]}
        parts = [arrays[f"{w}_{part}"] for w in ("gate_up", "down") for part in ("codes", "scales", "points")]
        inputs = [arrays["x"].reshape(-1, s["width"]), arrays["logits"].reshape(-1, s["experts"]), arrays["bias"]]
        return expected("SparseMoe", [*inputs, *parts], a | {"bits": s["bits"], "block_size": s["group"]})[0]

    return _result(code, arrays["out"], want, counts)


@cache
def _packed() -> Any:
    return random_experts(np.random.default_rng(0), 3, 64, 96)


def _moe_ffn(rng: np.random.Generator, counts: Counter[str]) -> str | None:
    packed = _packed()
    arrays = {"x": random_inputs(3, 64), "logits": random_inputs(3, 3), "bias": random_inputs(3)}
    arrays |= {"gate_up": packed.gate_up, "down": packed.down, "out": np.zeros((3, 64), np.float32)}
    sizes = {"tokens": 3, "width": 64, "inner": 96, "experts": 3, "top_k": 2}
    arrays, s = _spoilt(rng, arrays, sizes | {"normalize": 1, "scale": 1.5, "threads": 2})

    def run(kernels: bytes | None, threads: int, out: Any) -> int:
        given = [Array.of(arrays[name]) for name in ("x", "logits", "bias", "gate_up", "down")]
        rest = [s[name] for name in ("tokens", "width", "inner", "experts", "top_k", "normalize", "scale")]
        return c_api.library().lfm2_moe_ffn(kernels, threads, *given, *rest, Array.of(out))

    def want() -> Any:
        plain = np.zeros_like(arrays["out"])
        assert run(b"scalar", 1, plain) == 0
        return plain

    return _result(run(None, s["threads"], arrays["out"]), arrays["out"], want, counts, c_api.library())
