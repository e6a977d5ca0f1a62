"""Attention over a cache: calls to run it on, float64 beside them, and the rows of an int8 cache.

Shapes: B rows, T new tokens, S positions of the mask, C the cache's capacity, H query heads, G heads of the cache, D
head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto

from tests.kernels.one_operator import Arrays, DoubleArray, open_operator, run_operator

INT8_ZERO = 128


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
