"""Products by matrices of int4 and int8 and what is made of them: projections, feed-forwards, experts. With float64
beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from lfm2_export.backends.onnx.packing import pack_codes
from tests.kernels.one_operator import FLOAT_OUT, Arrays, DoubleArray, FloatArray, given_x, random_inputs, run_operator


@dataclass(frozen=True)
class Matrix:
    """[rows, columns] in codes, and its inputs to an operator."""

    rows: int
    columns: int
    bits: int = 4
    group: int = 32
    symmetric: bool = False
    half: bool = False
    outer: tuple[int, ...] = ()  # axes before the rows
    seed: int = 0

    @cached_property
    def parts(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any], npt.NDArray[np.uint8] | None]:
        """Codes [..., rows, columns], scales and zero points [..., rows, columns / group]."""
        rng = np.random.default_rng(self.seed + self.rows * 31 + self.columns)
        shape = (*self.outer, self.rows, self.columns)
        scales = (*shape[:-1], self.columns // self.group)
        codes = rng.integers(0, 1 << self.bits, shape, dtype=np.uint8)
        points = None if self.symmetric or self.bits == 8 else rng.integers(0, 16, scales, dtype=np.uint8)
        unit = 0.3 / (1 << self.bits) / np.sqrt(self.columns / 64)
        kind = np.float16 if self.half else np.float32
        return codes, (rng.uniform(0.3, 1.5, scales) * unit).astype(kind), points

    def inputs(self, name: str) -> Arrays:
        codes, scales, points = self.parts
        packed = None if points is None else pack_codes(points, 4)
        return {
            f"{name}_codes": pack_codes(codes, 4 if self.bits == 4 else 8),
            f"{name}_scales": scales,
            f"{name}_points": packed,
        }

    @cached_property
    def values(self) -> DoubleArray:
        codes, scales, points = self.parts
        zero = np.float64(1 << (self.bits - 1)) if points is None else points[..., None].astype(np.float64)
        groups = codes.reshape(*scales.shape, self.group).astype(np.float64) - zero
        return (groups * scales[..., None].astype(np.float64)).reshape(codes.shape)

    def rounded(self, values: npt.NDArray[np.floating]) -> DoubleArray:
        """What enters a product by it."""
        return rounded(values, self.group)


def rounded(values: npt.NDArray[np.floating], group: int) -> DoubleArray:
    """Int8 in groups of 32, or of 16 where the weights' are: as the kernels round what enters a product."""
    groups = values.astype(np.float32).reshape(-1, min(group, 32))
    greatest = np.abs(groups).max(-1, keepdims=True)
    codes = np.rint(groups * (np.float32(127) / np.where(greatest == 0, 1, greatest)))
    return (codes.astype(np.float64) * (greatest / np.float32(127))).reshape(values.shape)


def silu(x: DoubleArray) -> DoubleArray:
    return x / (1 + np.exp(-x))


@dataclass(frozen=True, kw_only=True)
class ProductCase:
    tokens: int
    w: Matrix
    bias: bool = False
    threads: int = 1

    @property
    def label(self) -> str:
        w = self.w
        return (
            f"MatMulNBits tokens={self.tokens} {w.rows}x{w.columns} bits={w.bits} group={w.group} bias={self.bias} "
            f"symmetric={w.symmetric} half={w.half} threads={self.threads}"
        )

    @property
    def inputs(self) -> Arrays:
        bias = random_inputs(self.w.rows) if self.bias else None
        return {"x": random_inputs(1, self.tokens, self.w.columns), **self.w.inputs("w"), "bias": bias}

    @property
    def attributes(self) -> dict[str, Any]:
        return {"N": self.w.rows, "K": self.w.columns, "bits": self.w.bits, "block_size": self.w.group}

    def run(self) -> list[npt.NDArray[Any]]:
        return run_operator("MatMulNBits", self.inputs, FLOAT_OUT, self.attributes, threads=self.threads)

    def expected(self, x: FloatArray | None = None) -> DoubleArray:
        bias = self.inputs["bias"]
        x = given_x(self.inputs, x)
        return self.w.rounded(x) @ self.w.values.T + (0 if bias is None else bias.astype(np.float64))


@dataclass(frozen=True, kw_only=True)
class ProjectionsCase:
    tokens: int
    w: tuple[Matrix, Matrix, Matrix]
    threads: int = 1

    @property
    def label(self) -> str:
        first, rows = self.w[0], ",".join(str(w.rows) for w in self.w)
        return (
            f"Projections tokens={self.tokens} {rows}x{first.columns} bits={','.join(str(w.bits) for w in self.w)} "
            f"group={','.join(str(w.group) for w in self.w)} "
            f"threads={self.threads}"
        )

    @property
    def inputs(self) -> Arrays:
        q, k, v = self.w
        x = random_inputs(1, self.tokens, q.columns)
        return {"x": x, **q.inputs("q"), **k.inputs("k"), **v.inputs("v")}

    @property
    def attributes(self) -> dict[str, Any]:
        first = self.w[0]
        rows = {f"N{index}": w.rows for index, w in enumerate(self.w)}
        others = {
            f"N{index}_{name}": value
            for index, w in enumerate(self.w)
            for name, value in (("bits", w.bits), ("block_size", w.group))
            if (w.bits, w.group) != (first.bits, first.group)
        }
        return {"K": first.columns, "bits": first.bits, "block_size": first.group, **rows, **others}

    def run(self) -> list[npt.NDArray[Any]]:
        inputs, attributes = self.inputs, self.attributes
        return run_operator("Projections", inputs, PROJECTIONS_OUT, attributes, threads=self.threads)

    def expected(self, x: FloatArray | None = None) -> list[DoubleArray]:
        x = given_x(self.inputs, x)
        return [w.rounded(x) @ w.values.T for w in self.w]


@dataclass(frozen=True, kw_only=True)
class FeedForwardCase:
    tokens: int
    w1: Matrix
    w3: Matrix
    w2: Matrix
    threads: int = 1

    @property
    def label(self) -> str:
        w1, w2 = self.w1, self.w2
        return (
            f"FeedForward tokens={self.tokens} {w1.columns}-{w1.rows} bits={w1.bits},{self.w3.bits},{w2.bits} "
            f"group={w1.group},{self.w3.group},{w2.group} threads={self.threads}"
        )

    @property
    def inputs(self) -> Arrays:
        x = random_inputs(1, self.tokens, self.w1.columns)
        return {"x": x, **self.w1.inputs("w1"), **self.w3.inputs("w3"), **self.w2.inputs("w2")}

    @property
    def attributes(self) -> dict[str, Any]:
        w1, w3, w2 = self.w1, self.w3, self.w2
        differs = (w3.bits, w3.group) != (w1.bits, w1.group)
        return {
            **({"up_bits": w3.bits, "up_block_size": w3.group} if differs else {}),
            "inner": w1.rows,
            "bits": w1.bits,
            "block_size": w1.group,
            "down_bits": w2.bits,
            "down_block_size": w2.group,
        }

    def run(self) -> list[npt.NDArray[Any]]:
        return run_operator("FeedForward", self.inputs, FLOAT_OUT, self.attributes, threads=self.threads)

    def expected(self, x: FloatArray | None = None) -> DoubleArray:
        x = given_x(self.inputs, x)
        inner = silu(self.w1.rounded(x) @ self.w1.values.T) * (self.w3.rounded(x) @ self.w3.values.T)
        return self.w2.rounded(inner) @ self.w2.values.T


@dataclass(frozen=True, kw_only=True)
class MoeCase:
    tokens: int
    gate_up: Matrix  # rows 2i are w1's, rows 2i + 1 w3's
    down: Matrix
    top_k: int
    bias: bool = True
    normalize: bool = True
    scale: float = 1.0
    makes_logits: bool = False  # of x, with a router's matrix
    threads: int = 1

    @property
    def experts(self) -> int:
        return self.down.outer[0]

    @property
    def label(self) -> str:
        return (
            f"SparseMoe tokens={self.tokens} {self.top_k} of {self.experts} bits={self.down.bits} "
            f"group={self.down.group} bias={self.bias} normalize={self.normalize} scale={self.scale} "
            f"half={self.down.half} router={self.makes_logits} threads={self.threads}"
        )

    @property
    def inputs(self) -> Arrays:
        return {
            "x": random_inputs(1, self.tokens, self.gate_up.columns),
            "logits": None if self.makes_logits else 2 * random_inputs(self.tokens, self.experts),
            "expert_bias": 0.3 * random_inputs(self.experts) if self.bias else None,
            **self.gate_up.inputs("gate_up"),
            **self.down.inputs("down"),
            "router": random_inputs(self.gate_up.columns, self.experts) / 4 if self.makes_logits else None,
        }

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "top_k": self.top_k,
            "normalize": int(self.normalize),
            "routed_scaling_factor": self.scale,
            "bits": self.down.bits,
            "block_size": self.down.group,
        }

    def run(self) -> list[npt.NDArray[Any]]:
        return run_operator("SparseMoe", self.inputs, FLOAT_OUT, self.attributes, threads=self.threads)

    def expected(self, x: FloatArray | None = None) -> DoubleArray:
        logits, router, bias = (self.inputs[name] for name in ("logits", "router", "expert_bias"))
        x = given_x(self.inputs, x)
        if router is not None:
            logits = x[0] @ router
        assert logits is not None
        scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
        ranked, inputs = scores if bias is None else scores + bias, self.gate_up.rounded(x)[0]
        out = np.zeros(x.shape[1:])
        for token in range(self.tokens):
            chosen = np.argsort(-ranked[token], kind="stable")[: self.top_k]
            shares = scores[token, chosen] / (scores[token, chosen].sum() + 1e-6 if self.normalize else 1)
            for expert, share in zip(chosen, shares * self.scale, strict=True):
                both = self.gate_up.values[expert] @ inputs[token]
                out[token] += share * (self.down.values[expert] @ self.down.rounded(silu(both[0::2]) * both[1::2]))
        return out[None]


PROJECTIONS_OUT = dict.fromkeys(("q", "k", "v"), TensorProto.FLOAT)

PRODUCT_CASES = [
    ProductCase(tokens=tokens, w=w, bias=bias, threads=threads)
    for tokens, w, bias, threads in (
        (1, Matrix(1, 32), False, 1),
        (1, Matrix(100, 96), True, 2),
        (2, Matrix(7, 128, group=128), True, 1),
        (8, Matrix(33, 512, group=256, symmetric=True), False, 1),
        (9, Matrix(100, 320, group=64), True, 2),
        (40, Matrix(33, 544), False, 1),
        (1, Matrix(65, 160, bits=8), True, 1),
        (40, Matrix(70, 256, bits=8, group=128), False, 2),
        (17, Matrix(32, 64, half=True), False, 1),
        (1, Matrix(37, 96, group=16, half=True), True, 2),
        (12, Matrix(37, 160, bits=8, group=16), False, 1),
    )
]
PROJECTIONS_CASES = [
    ProjectionsCase(tokens=tokens, w=w, threads=threads)
    for tokens, w, threads in (
        (1, (Matrix(64, 96), Matrix(16, 96, seed=1), Matrix(16, 96, seed=2)), 1),
        (30, (Matrix(64, 96), Matrix(17, 96, seed=1), Matrix(1, 96, seed=2)), 2),
        (2, (Matrix(32, 256, group=128), Matrix(64, 256, group=128, symmetric=True), Matrix(8, 256, group=128)), 2),
        (9, (Matrix(48, 64, bits=8), Matrix(16, 64, bits=8, seed=1), Matrix(16, 64, bits=8, seed=2)), 1),
        (1, (Matrix(64, 128, bits=8, group=128), Matrix(16, 128, half=True), Matrix(40, 128, bits=8)), 2),
        (10, (Matrix(64, 128, group=64), Matrix(16, 128, group=128, symmetric=True), Matrix(40, 128, bits=8)), 1),
        (20, (Matrix(64, 128), Matrix(16, 128, bits=8, group=64), Matrix(40, 128, bits=8)), 2),
        (10, (Matrix(64, 128, group=16), Matrix(16, 128, bits=8, group=16), Matrix(40, 128)), 2),
    )
]
FEED_FORWARD_CASES = [
    FeedForwardCase(tokens=tokens, w1=w1, w3=replaced, w2=w2, threads=threads)
    for tokens, w1, replaced, w2, threads in (
        (1, Matrix(96, 64), Matrix(96, 64, seed=1), Matrix(64, 96), 1),
        (20, Matrix(96, 64), Matrix(96, 64, seed=1), Matrix(64, 96), 2),
        (3, Matrix(128, 128, group=128), Matrix(128, 128, group=128, seed=1), Matrix(128, 128, bits=8), 1),
        (1030, Matrix(64, 64, bits=8), Matrix(64, 64, bits=8, seed=1), Matrix(64, 64, group=64), 1),
        (1, Matrix(96, 128, group=128), Matrix(96, 128, bits=8, half=True), Matrix(128, 96), 2),
        (10, Matrix(96, 128, bits=8, group=64), Matrix(96, 128, symmetric=True), Matrix(128, 96, bits=8), 1),
        (1030, Matrix(64, 64), Matrix(64, 64, bits=8, group=64), Matrix(64, 64, group=64), 1),
        (3, Matrix(96, 64, group=16), Matrix(96, 64), Matrix(64, 96, bits=8, group=16), 1),
    )
]
MOE_CASES = [
    MoeCase(
        tokens=tokens,
        gate_up=Matrix(2 * inner, width, outer=(experts,), **form),
        down=Matrix(width, inner, outer=(experts,), **form),
        top_k=top_k,
        **options,
    )
    for tokens, width, inner, experts, top_k, form, options in (
        (1, 64, 96, 4, 2, {}, {}),
        (50, 64, 96, 4, 2, {}, {"threads": 2}),
        (5, 64, 64, 3, 3, {"bits": 8}, {"bias": False, "scale": 2.5}),
        (30, 128, 128, 8, 1, {"group": 128, "symmetric": True, "half": True}, {"normalize": False}),
        (7, 64, 32, 1, 1, {}, {"normalize": False, "scale": 0.7}),
        (40, 64, 96, 3, 2, {"group": 16, "half": True}, {}),
        (40, 64, 64, 5, 2, {}, {"makes_logits": True, "threads": 2}),
    )
]
