"""Our operators one at a time, in onnx models of one node, and cases to run them on.

As a program (``python -m tests.kernels.onnx_operators FILE.npz``) it writes the outputs of every case: which kernels an
operator uses is decided once per process, by LFM2_KERNELS.

Shapes: B rows, T new tokens, S positions of the mask, C the cache's capacity, H query heads, G heads of the cache, D
head size.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from lfm2_export.backends.onnx.packing import pack_codes
from lfm2_export.backends.onnx.session import session_options
from lfm2_export.kernels import build

Arrays = dict[str, npt.NDArray[Any] | None]
FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

INT8_ZERO = 128


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


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """``held``: positions of each row before the call; None: a first prompt. ``lengths``: attended tokens of each row
    of a first prompt (default: all). ``capacity``: of a buffer that is past and present at once; None: two buffers.
    ``hidden``: first and end of the positions that the mask leaves out. ``sharpness``: multiplies the queries."""

    tokens: int = 1
    held: Sequence[int] | None = None
    lengths: Sequence[int] | None = None
    capacity: int | None = None
    hidden: tuple[int, int] = (0, 0)
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    sharpness: float = 1.0
    int8: bool = False
    threads: int = 1
    epsilon: float = 1e-5
    window: int | None = None

    @property
    def op(self) -> str:
        return f"{'Sliding' if self.window else ''}Attention{'Int8' if self.int8 else ''}"

    @property
    def label(self) -> str:
        fields = ("tokens", "held", "lengths", "capacity", "hidden", "heads", "kv_heads", "head_dim")
        fields = (*fields, "sharpness", "window")
        said = [f"{name}={getattr(self, name)}" for name in fields if getattr(self, name) not in (None, (0, 0), 1.0)]
        return f"{self.op} {' '.join(said)} threads={self.threads}".replace(", ", ",")

    @property
    def batch(self) -> int:
        return len(self.held or self.lengths or (0,))

    @property
    def total(self) -> int:
        return max(self.held or (0,)) + self.tokens

    @property
    def attributes(self) -> dict[str, Any]:
        window = {} if self.window is None else {"window": self.window}
        return {"num_heads": self.heads, "kv_num_heads": self.kv_heads, "epsilon": self.epsilon, **window}

    @property
    def outputs(self) -> dict[str, int]:
        kind = TensorProto.UINT8 if self.int8 else TensorProto.FLOAT
        return {"out": TensorProto.FLOAT, "present_key": kind, "present_value": kind}

    @cached_property
    def mask(self) -> npt.NDArray[np.int64]:
        """[B, S]"""
        ends = [h + self.tokens for h in self.held] if self.held else (self.lengths or [self.tokens])
        mask = (np.arange(self.total) < np.array(ends)[:, None]).astype(np.int64)
        mask[:, slice(*self.hidden)] = 0
        return mask

    @cached_property
    def inputs(self) -> Arrays:
        rng = np.random.default_rng(self.tokens * 7 + self.total * 13 + self.head_dim)

        def normal(*shape: int) -> npt.NDArray[np.float32]:
            return rng.normal(size=shape).astype(np.float32)

        batch, tokens, dim = self.batch, self.tokens, self.head_dim
        angles = np.arange(self.total + 3)[:, None] / 1e4 ** (np.arange(dim // 2) / (dim // 2))
        last = (self.mask * np.arange(self.total)).max(-1)
        first = np.zeros(batch, np.int64) if self.held is None else last + 1 - tokens
        room = self.capacity or max(self.held or (0,))
        return {
            "q": normal(batch, tokens, self.heads * dim),
            "k": normal(batch, tokens, self.kv_heads * dim),
            "v": normal(batch, tokens, self.kv_heads * dim),
            "q_norm": (1 + 0.2 * normal(dim)) * np.float32(self.sharpness),
            "k_norm": 1 + 0.2 * normal(dim),
            "past_key": self._cache(normal(batch, self.kv_heads, room, dim)),
            "past_value": self._cache(normal(batch, self.kv_heads, room, dim)),
            "seqlens_k": last.astype(np.int32),
            "attention_mask": self.mask,
            "cos": np.cos(angles).astype(np.float32),
            "sin": np.sin(angles).astype(np.float32),
            "position_ids": first[:, None] + np.arange(tokens),
        }

    def _cache(self, values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        return quantize_rows(values) if self.int8 else values

    def run(self, inputs: Arrays | None = None) -> list[npt.NDArray[Any]]:
        """out [B, T, H * D], present key and value [B, G, S or C, ...]."""
        given = inputs or self.inputs
        if self.capacity is None:
            return run_operator(self.op, given, self.outputs, self.attributes, threads=self.threads)
        return in_one_buffer(self, given, self.attributes)

    def slots(self) -> npt.NDArray[np.int64]:
        """[B, T]: where each token's key and value go."""
        begin = np.zeros(self.batch, np.int64) if self.held is None else np.array(self.held)
        return begin[:, None] + np.arange(self.tokens)

    def new_rows(self) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
        """Of the new tokens, in float64: queries [B, T, H, D] (scaled), keys and values [B, T, G, D]."""
        x: dict[str, Any] = {n: None if a is None else a.astype(np.float64) for n, a in self.inputs.items()}
        positions = self.inputs["position_ids"]
        cos, sin = x["cos"][positions][:, :, None], x["sin"][positions][:, :, None]

        def turned(values: DoubleArray, heads: int, norm: DoubleArray) -> DoubleArray:
            rows = values.reshape(self.batch, self.tokens, heads, self.head_dim)
            rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + self.epsilon) * norm
            a, b = np.split(rows, 2, axis=-1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        q = turned(x["q"], self.heads, x["q_norm"]) / np.sqrt(self.head_dim)
        k = turned(x["k"], self.kv_heads, x["k_norm"])
        return q, k, x["v"].reshape(k.shape)

    def expected_present(self) -> tuple[DoubleArray, DoubleArray]:
        """The float cache [B, G, S or C, D] in float64; NaN where nothing was ever written."""
        found = []
        for name, new in zip(("past_key", "past_value"), self.new_rows()[1:], strict=True):
            past = self.inputs[name]
            assert past is not None
            held = dequantize_rows(past) if self.int8 else past.astype(np.float64)
            present = np.full((self.batch, self.kv_heads, self.capacity or self.total, self.head_dim), np.nan)
            present[:, :, : held.shape[2]] = held
            for row, slots in enumerate(self.slots()):
                present[row][:, slots] = new[row].swapaxes(0, 1)
            found.append(present)
        return found[0], found[1]

    def expected_out(self, key: DoubleArray, value: DoubleArray) -> DoubleArray:
        """[B, T, H * D] in float64, over a cache [B, G, S or C, D]."""
        queries, group = self.new_rows()[0], self.heads // self.kv_heads
        out = np.zeros((self.batch, self.tokens, self.heads, self.head_dim))
        for row, slots in enumerate(self.slots()):
            for token, slot in enumerate(slots):
                seen = np.flatnonzero(self.mask[row, : slot + 1])[-(self.window or self.total) :]
                if not len(seen):
                    continue
                for head in range(self.heads):
                    scores = key[row, head // group, seen] @ queries[row, token, head]
                    weights = np.exp(scores - scores.max())
                    out[row, token, head] = weights @ value[row, head // group, seen] / weights.sum()
        return out.reshape(self.batch, self.tokens, -1)


def in_one_buffer(case: AttentionCase, inputs: Arrays, attributes: Mapping[str, Any]) -> list[npt.NDArray[Any]]:
    """A call whose past and present share their memory."""
    session = open_operator(case.op, inputs, case.outputs, attributes, threads=case.threads)
    binding = session.io_binding()
    values = {n: ort.OrtValue.ortvalue_from_numpy(a.copy()) for n, a in inputs.items() if a is not None}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("out", "cpu")
    for part in ("key", "value"):
        binding.bind_ortvalue_output(f"present_{part}", values[f"past_{part}"])
    session.run_with_iobinding(binding)
    return [v.numpy().copy() for v in (binding.get_outputs()[0], values["past_key"], values["past_value"])]


def quantize_rows(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """[..., D] as rows of an int8 cache: [..., D + 4]."""
    scale = np.abs(values).max(-1, keepdims=True).astype(np.float32) / np.float32(127)
    codes = (np.rint(values / np.where(scale == 0, 1, scale)) + INT8_ZERO).astype(np.uint8)
    return np.concatenate([codes, np.ascontiguousarray(scale).view(np.uint8)], axis=-1)


def dequantize_rows(rows: npt.NDArray[np.uint8]) -> DoubleArray:
    scale = np.ascontiguousarray(rows[..., -4:]).view(np.float32).astype(np.float64)
    return (rows[..., :-4].astype(np.float64) - INT8_ZERO) * scale


def _attention_cases() -> list[AttentionCase]:
    """Grids that meet every border: of lanes (16), steps (64), pieces (1024), tiles (16 queries)."""
    lengths = (1, 15, 16, 17, 63, 64, 65, 1000, 5000)
    steps = [{"held": (n - 1,), "capacity": n + 3} for n in lengths if n > 1]
    chunks = [{"held": (n - 3,), "tokens": 3, "capacity": n} for n in lengths[1:]]
    shapes = [{"head_dim": d, "held": (70,)} for d in (16, 48, 64, 80, 128, 256)]
    groups = [
        {"heads": h, "kv_heads": g, "held": (100,)} for h, g in ((1, 1), (3, 3), (5, 1), (16, 1), (6, 2), (40, 2))
    ]
    found: list[dict[str, Any]] = [
        *({"tokens": n} for n in (1, 2, 16, 33, 64, 65, 200)),
        *steps,
        *chunks,
        *shapes,
        *({**shape, "tokens": 9} for shape in shapes),
        *groups,
        *({**group, "tokens": 7} for group in groups),
        {"tokens": 20, "lengths": (20, 3, 1, 17)},  # a first prompt, padded on the right
        {"tokens": 20, "hidden": (0, 3)},  # on the left
        {"held": (11, 4, 1, 90), "capacity": 128},  # rows of different length
        {"held": (11, 4, 1, 90)},
        {"held": (70,), "hidden": (3, 41)},
        {"held": (200,), "hidden": (60, 140), "tokens": 5},  # a whole step
        {"held": (3000,), "hidden": (0, 2500), "heads": 8, "kv_heads": 1},  # whole pieces
        {"held": (5000, 40, 2000), "capacity": 5100, "heads": 2, "kv_heads": 1},
        {"held": (300,), "sharpness": 30.0},
        {"tokens": 40, "sharpness": 100.0},
        {"held": (2200,), "sharpness": 30.0, "kv_heads": 1},
        *({"window": w, "tokens": 40} for w in (1, 3, 16, 39, 40, 200)),
        *({"window": w, "held": (300,), "capacity": 310} for w in (1, 63, 64, 65, 256)),
        {"window": 70, "held": (200,), "tokens": 90, "hidden": (100, 150), "heads": 6, "kv_heads": 2},
        {"window": 5, "held": (30,), "hidden": (20, 30)},  # fewer attended positions than slots
        {"window": 5, "tokens": 20, "lengths": (20, 3, 1, 17)},
        {"window": 8, "held": (11, 4, 1, 90), "capacity": 128},
        {"window": 2000, "held": (4000,), "tokens": 3, "heads": 8, "kv_heads": 1},
    ]
    cases = [AttentionCase(**case, int8=int8) for case in found for int8 in (False, True)]
    threaded = [AttentionCase(**case, threads=2) for case in (found[6], steps[-1], chunks[-1], groups[-1])]
    return cases + threaded


ATTENTION_CASES = _attention_cases()


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


def random_inputs(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def given_x(inputs: Arrays, x: FloatArray | None) -> FloatArray:
    """``x``, or where it is None that of the inputs."""
    found = inputs["x"] if x is None else x
    assert found is not None
    return found


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


FLOAT_OUT = {"out": TensorProto.FLOAT}
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


@dataclass(frozen=True, kw_only=True)
class NormedCase:
    """A product of a norm, perhaps of a sum that it returns too."""

    case: ProductCase | ProjectionsCase | FeedForwardCase | MoeCase
    is_sum: bool
    norms_delta: bool = False
    epsilon: float = 1e-5

    @property
    def op(self) -> str:
        return self.case.label.partition(" ")[0]

    @property
    def label(self) -> str:
        return (
            f"{self.case.label} norm of {'a sum' if self.is_sum else 'x'}{' with a norm' if self.norms_delta else ''}"
        )

    @property
    def inputs(self) -> Arrays:
        x = self.case.inputs["x"]
        assert x is not None
        gamma = 1 + 0.3 * random_inputs(x.shape[-1])
        delta = 3 * random_inputs(*x.shape, 1)[..., 0] if self.is_sum else None
        return {
            **self.case.inputs,
            "delta": delta,
            "gamma": gamma,
            "delta_gamma": gamma[::-1].copy() if self.norms_delta else None,
        }

    @property
    def attributes(self) -> dict[str, Any]:
        return {**self.case.attributes, "epsilon": self.epsilon}

    @property
    def outputs(self) -> dict[str, int]:
        outputs = PROJECTIONS_OUT if isinstance(self.case, ProjectionsCase) else FLOAT_OUT
        return {**outputs, **({"sum": TensorProto.FLOAT} if self.is_sum else {})}

    def run(self) -> list[npt.NDArray[Any]]:
        return run_operator(self.op, self.inputs, self.outputs, self.attributes, threads=self.case.threads)

    def sum(self) -> FloatArray:
        return sum_of(self.inputs["x"], self.inputs["delta"], self.inputs["delta_gamma"], self.epsilon)

    def expected(self) -> list[DoubleArray]:
        gamma = self.inputs["gamma"]
        assert gamma is not None
        found = self.case.expected(normalized(self.sum(), gamma, self.epsilon))
        return [*(found if isinstance(found, list) else [found]), *([self.sum()] if self.is_sum else [])]


def sum_of(x: Any, delta: Any, delta_gamma: Any, epsilon: float) -> FloatArray:
    """What is normalized: x and what is added to it, which may be a norm itself."""
    if delta is None:
        return x
    return x + (delta if delta_gamma is None else normalized(delta, delta_gamma, epsilon))


def normalized(x: npt.NDArray[Any], gamma: npt.NDArray[Any], epsilon: float) -> FloatArray:
    """The RMS norm as the kernels compute it, to the bit: int8 codes are made of it. 16 chains of float32, whose
    products are added without being rounded first."""
    chains = np.zeros((*x.shape[:-1], 16), np.float32)
    for part in np.split(x.astype(np.float32), x.shape[-1] // 16, axis=-1):
        chains = (part.astype(np.float64) ** 2 + chains).astype(np.float32)
    while chains.shape[-1] > 1:
        chains = np.add(*np.split(chains, 2, axis=-1))
    inverse = np.float32(1) / np.sqrt(chains / np.float32(x.shape[-1]) + np.float32(epsilon))
    return x.astype(np.float32) * inverse * gamma.astype(np.float32)


NORMED_CASES = [
    NormedCase(case=case, is_sum=is_sum)
    for case in (
        *PRODUCT_CASES[:2],
        PRODUCT_CASES[4],
        *PROJECTIONS_CASES[-3:],
        *FEED_FORWARD_CASES[:2],
        FEED_FORWARD_CASES[-1],
        MOE_CASES[-1],
        MoeCase(
            tokens=1030,
            gate_up=Matrix(64, 64, outer=(3,)),
            down=Matrix(64, 32, outer=(3,)),
            top_k=2,
            makes_logits=True,
        ),
    )
    for is_sum in (False, True)
]
NORMED_CASES += [replace(case, norms_delta=True) for case in (NORMED_CASES[3], NORMED_CASES[11], NORMED_CASES[13])]


@dataclass(frozen=True, kw_only=True)
class ConvCase:
    """``lengths``: attended tokens of each row."""

    tokens: int
    taps: int
    lengths: Sequence[int] = ()
    width: int = 48
    bias: bool = False
    threads: int = 1

    @property
    def label(self) -> str:
        return f"GatedConv tokens={self.tokens} taps={self.taps} lengths={self.lengths} bias={self.bias}"

    @cached_property
    def inputs(self) -> Arrays:
        lengths = np.array(self.lengths or [self.tokens])
        batch, held = len(lengths), self.taps - 1
        return {
            "projected": random_inputs(batch, self.tokens, 3 * self.width),
            "weight": random_inputs(self.width, 1, self.taps),
            "bias": random_inputs(self.width) if self.bias else None,
            "state": random_inputs(batch, held, self.width),
            "attended": (np.arange(self.tokens) < lengths[:, None]).astype(np.float32)[..., None],
            "rows": lengths[:, None] + np.arange(held),
        }

    def run(self) -> list[npt.NDArray[Any]]:
        outputs = {"out": TensorProto.FLOAT, "present": TensorProto.FLOAT}
        return run_operator("GatedConv", self.inputs, outputs, {}, threads=self.threads)

    def expected(self) -> tuple[DoubleArray, DoubleArray]:
        x: dict[str, Any] = {n: None if a is None else a.astype(np.float64) for n, a in self.inputs.items()}
        b, c, inner = np.split(x["projected"], 3, axis=-1)
        window = np.concatenate([x["state"], b * inner * x["attended"]], axis=1)
        taps = np.stack([window[:, i : i + self.tokens] for i in range(self.taps)], axis=-1)
        convolved = (taps * x["weight"][:, 0]).sum(-1) + (0 if x["bias"] is None else x["bias"])
        rows = self.inputs["rows"]
        assert rows is not None
        return c * convolved, np.stack([window[i, row] for i, row in enumerate(rows)])


CONV_CASES = [
    ConvCase(tokens=1, taps=3),
    ConvCase(tokens=1, taps=2, lengths=(1, 1, 1), bias=True),
    ConvCase(tokens=5, taps=7, lengths=(5, 1, 3)),
    ConvCase(tokens=16, taps=4, bias=True),
    ConvCase(tokens=17, taps=3, lengths=(17, 2), width=33),
    ConvCase(tokens=100, taps=3, threads=2),
]


@dataclass(frozen=True, kw_only=True)
class LayoutCase:
    """``mask``: a string of 0 and 1 for each row."""

    mask: Sequence[str]
    tokens: int
    taps: int = 3

    @property
    def label(self) -> str:
        return f"TokenLayout mask={','.join(self.mask)} tokens={self.tokens} taps={self.taps}"

    @property
    def inputs(self) -> Arrays:
        mask = np.array([[int(one) for one in row] for row in self.mask], np.int64)
        return {"attention_mask": mask, "input_ids": np.zeros((len(mask), self.tokens), np.int64)}

    @property
    def attributes(self) -> dict[str, Any]:
        return {"taps": self.taps}

    def run(self) -> list[npt.NDArray[Any]]:
        return run_operator("TokenLayout", self.inputs, LAYOUT_OUT, self.attributes)

    def expected(self) -> list[npt.NDArray[Any]]:
        return token_layout(self.inputs["attention_mask"], self.tokens, self.taps)


def token_layout(mask: Any, tokens: int, taps: int) -> list[npt.NDArray[Any]]:
    """What the portable graph computes, said otherwise: row by row."""
    if not len(mask):
        shapes = ((0,), (0, tokens), (0, tokens, 1), (0, taps - 1), (0, 1, 1))
        kinds = (np.int32, np.int64, np.float32, np.int64, np.int64)
        return [np.zeros(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    there = mask != 0
    first = mask.shape[1] - tokens
    own = there[:, first:] | (tokens == 1)
    found = []
    for row, attended in zip(there, own, strict=True):
        begin = int(row.argmax()) if row.any() else len(row)  # padding on the left counts, and everything behind it
        positions = [i if i < begin else begin + int(row[begin : i + 1].sum()) - 1 for i in range(len(row))]
        seen, kept = np.flatnonzero(row), np.flatnonzero(attended)
        end = int(kept[-1]) + 1 if len(kept) else 0
        found.append((int(seen[-1]) if len(seen) else 0, positions[first:], attended, range(end, end + taps - 1), end))
    last_seen, where, attended_rows, conv_rows, ends = zip(*found, strict=True)
    last = np.maximum(np.array(ends) - 1, 0).reshape(-1, 1, 1)
    return [
        np.array(last_seen, np.int32),
        np.array(where, np.int64).reshape(len(found), tokens),
        np.array(attended_rows, np.float32).reshape(len(found), tokens, 1),
        np.array([list(rows) for rows in conv_rows], np.int64).reshape(len(found), taps - 1),
        last,
    ]


LAYOUT_OUT = {
    "seqlens_k": TensorProto.INT32,
    "position_ids": TensorProto.INT64,
    "attended": TensorProto.FLOAT,
    "conv_rows": TensorProto.INT64,
    "last": TensorProto.INT64,
}
LAYOUT_CASES = [
    LayoutCase(mask=("111",), tokens=3),
    LayoutCase(mask=("1110", "0011", "0110", "0000"), tokens=4),
    LayoutCase(mask=("110011", "001111", "111110"), tokens=2, taps=7),
    LayoutCase(mask=("1101", "0000", "1110"), tokens=1, taps=1),
]

CASES = [
    *ATTENTION_CASES,
    *PRODUCT_CASES,
    *PROJECTIONS_CASES,
    *FEED_FORWARD_CASES,
    *MOE_CASES,
    *NORMED_CASES,
    *CONV_CASES,
    *LAYOUT_CASES,
]

if __name__ == "__main__":
    outputs = {f"{case.label} output {index}": array for case in CASES for index, array in enumerate(case.run())}
    np.savez(sys.argv[1], **outputs)
