"""What goes from token to token without a matrix: the gated short convolution, and where tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from tests.kernels.one_operator import Arrays, DoubleArray, random_inputs, run_operator


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
