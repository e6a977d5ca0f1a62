"""What each of our ONNX operators computes, in float64, of its inputs as a session hands them over.

In: the arrays in their order (None: left out) and the attributes, of a call that the operator took. Out: its outputs.
Nothing is shared with the cases of onnx_operators.py but how activations and cache rows are rounded: shapes are those
of the arrays, so that a call may be any that the operator lets through.

Shapes: B rows, T new tokens, S positions of the mask, C the cache's capacity, H query heads, G heads of the cache, D
head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.attention_cases import dequantize_rows, quantize_rows
from tests.kernels.matrix_cases import rounded, silu
from tests.kernels.norm_cases import normalized, sum_of
from tests.kernels.one_operator import DoubleArray
from tests.kernels.token_cases import token_layout

Inputs = Sequence[npt.NDArray[Any] | None]
Attributes = Mapping[str, Any]
INPUTS_OF_A_SCALE = 32
# Inputs before those of a norm: what is added to x, and the norm's weights.
_BEFORE_NORM = {"MatMulNBits": 5, "Projections": 10, "FeedForward": 10, "SparseMoe": 10}


def expected(op: str, inputs: Inputs, attributes: Attributes) -> list[npt.NDArray[Any]]:
    """The outputs; of AttentionInt8 the caches are the float64 values that are stored."""
    padded = [*inputs, *[None] * 12]
    before = _BEFORE_NORM.get(op)
    if before is None or padded[before + 1] is None:
        return _OPERATORS[op](padded, attributes)
    x, delta, gamma, delta_gamma = padded[0], *padded[before : before + 3]
    assert x is not None
    assert gamma is not None
    said = attributes.get("epsilon")
    epsilon = float(np.float32(said)) if isinstance(said, float) else 0.0  # of another type: as if it were not there
    own = None if delta_gamma is None else delta_gamma.reshape(-1)
    total = sum_of(x, None if delta is None else delta.reshape(x.shape), own, epsilon)
    rows = normalized(total, gamma.reshape(-1), epsilon)
    found = _OPERATORS[op]([rows, *padded[1:]], attributes)
    return found if delta is None else [*found, total]


def _matrix(inputs: Inputs, first: int, rows: int, columns: int, bits: int, group: int) -> DoubleArray:
    """[rows, columns] of codes, scales and zero points from input ``first`` on."""
    codes, scales, points = inputs[first : first + 3]
    assert codes is not None
    assert scales is not None
    whole = _unpacked(codes.reshape(rows, -1), columns, bits).astype(np.float64).reshape(rows, columns // group, group)
    zero: Any = float(1 << (bits - 1))
    if points is not None:
        zero = _unpacked(points.reshape(rows, -1), columns // group, 4)[..., None].astype(np.float64)
    return ((whole - zero) * scales.astype(np.float64).reshape(rows, -1, 1)).reshape(rows, columns)


def _unpacked(packed: npt.NDArray[np.uint8], count: int, bits: int) -> npt.NDArray[np.uint8]:
    """Rows of ``count`` codes; of 4 bits the earlier one lies in a byte's lower half."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)[:, :count]


def _x(inputs: Inputs) -> tuple[npt.NDArray[Any], tuple[int, ...]]:
    """Rows of x, and the shape that they had."""
    x = inputs[0]
    assert x is not None
    return x.reshape(-1, x.shape[-1]), x.shape


def _times(x: npt.NDArray[Any], w: DoubleArray, group: int) -> DoubleArray:
    """x as int8 activations, by a matrix in groups of such a size."""
    return (rounded(x, group) if x.size else x.astype(np.float64)) @ w.T


def _product(inputs: Inputs, a: Attributes) -> list[npt.NDArray[Any]]:
    x, shape = _x(inputs)
    out = _times(x, _matrix(inputs, 1, a["N"], a["K"], a["bits"], a["block_size"]), a["block_size"])
    bias = inputs[4]
    return [(out + (0 if bias is None else bias.reshape(-1).astype(np.float64))).reshape(*shape[:-1], a["N"])]


def _format(a: Attributes, prefix: str) -> tuple[int, int]:
    """Bits and group of a further matrix: the first one's where the node says nothing, or no integer."""
    own, first = ([a.get(f"{start}{name}") for name in ("bits", "block_size")] for start in (prefix, ""))
    bits, group = (one if isinstance(one, int) else other for one, other in zip(own, first, strict=True))
    return bits, group


def _projections(inputs: Inputs, a: Attributes) -> list[npt.NDArray[Any]]:
    x, shape = _x(inputs)
    found = []
    for index in range(3):
        rows = a[f"N{index}"]
        bits, group = _format(a, f"N{index}_")
        w = _matrix(inputs, 1 + 3 * index, rows, a["K"], bits, group)
        found.append(_times(x, w, group).reshape(*shape[:-1], rows))
    return found


def _feed_forward(inputs: Inputs, a: Attributes) -> list[npt.NDArray[Any]]:
    x, shape = _x(inputs)
    gate = _matrix(inputs, 1, a["inner"], shape[-1], a["bits"], a["block_size"])
    up_bits, up_group = _format(a, "up_")
    up = _matrix(inputs, 4, a["inner"], shape[-1], up_bits, up_group)
    down = _matrix(inputs, 7, shape[-1], a["inner"], a["down_bits"], a["down_block_size"])
    inner = silu(_times(x, gate, a["block_size"])) * _times(x, up, up_group)
    return [_times(inner, down, a["down_block_size"]).reshape(shape)]


def _sparse_moe(inputs: Inputs, a: Attributes) -> list[npt.NDArray[Any]]:
    x, shape = _x(inputs)
    logits, bias, codes, router = inputs[1], inputs[2], inputs[6], inputs[9]
    if router is not None:
        assert inputs[0] is not None
        logits = inputs[0].reshape(-1, shape[-1]) @ router
    assert logits is not None
    assert codes is not None
    experts, width, bits, group = logits.shape[-1], shape[-1], a["bits"], a["block_size"]
    inner = codes.size * 8 // (experts * width * bits)
    gate_up = _matrix(inputs, 3, experts * 2 * inner, width, bits, group).reshape(experts, 2 * inner, width)
    down = _matrix(inputs, 6, experts * width, inner, bits, group).reshape(experts, width, inner)
    scores = 1 / (1 + np.exp(-logits.reshape(-1, experts).astype(np.float64)))
    ranked, out = scores if bias is None else scores + bias.reshape(-1), np.zeros((len(x), width))
    for token in range(len(x)):
        chosen = np.argsort(-ranked[token], kind="stable")[: a["top_k"]]
        shares = scores[token, chosen] / (scores[token, chosen].sum() + 1e-6 if a["normalize"] else 1)
        for expert, share in zip(chosen, shares * np.float64(np.float32(a["routed_scaling_factor"])), strict=True):
            both = _times(x[token], gate_up[expert], group)
            out[token] += share * _times(silu(both[0::2]) * both[1::2], down[expert], group)
    return [out.reshape(shape)]


def _token_layout(inputs: Inputs, a: Attributes) -> list[npt.NDArray[Any]]:
    ids = inputs[1]
    assert ids is not None
    return token_layout(inputs[0], ids.shape[1], a["taps"])


def _gated_conv(inputs: Inputs, a: Attributes) -> list[npt.NDArray[Any]]:
    projected, weight, bias, state, attended, rows = (None if i is None else i.astype(np.float64) for i in inputs[:6])
    assert projected is not None
    assert weight is not None
    assert state is not None
    assert attended is not None
    assert rows is not None
    (batch, tokens, _), held = projected.shape, state.shape[1]
    b, c, inner = np.split(projected, 3, axis=-1)
    window = np.concatenate([state, b * inner * attended.reshape(batch, tokens, 1)], axis=1)
    taps = np.stack([window[:, i : i + tokens] for i in range(held + 1)], axis=-1)
    convolved = (taps * weight.reshape(-1, held + 1)).sum(-1) + (0 if bias is None else bias.reshape(-1))
    chosen = rows.reshape(batch, held).astype(np.int64)
    return [c * convolved, np.stack([window[i, chosen[i]] for i in range(batch)]) if batch else state]


def _attention(inputs: Inputs, a: Attributes, *, int8: bool = False) -> list[npt.NDArray[Any]]:
    x: list[Any] = list(inputs[:12])
    (batch, tokens, columns), total = x[0].shape, x[8].shape[1]
    heads, kv_heads = a["num_heads"], a["kv_num_heads"]
    dim, past = columns // heads, x[5].shape[2]
    angles = [table.reshape(-1, dim // 2).astype(np.float64) for table in (x[9], x[10])]
    positions = np.clip(x[11].reshape(batch, tokens), 0, len(angles[0]) - 1)
    cos, sin = (table[positions][:, :, None] for table in angles)

    def turned(values: Any, count: int, norm: Any) -> DoubleArray:
        rows = values.astype(np.float64).reshape(batch, tokens, count, dim)
        squares = (rows**2).mean(-1, keepdims=True) + np.float64(np.float32(a["epsilon"]))
        rows = rows / np.sqrt(squares) * norm.reshape(-1).astype(np.float64)
        first, second = np.split(rows, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    last = x[7].reshape(batch).astype(np.int64)
    begin = np.zeros(batch, np.int64) if tokens == total else np.maximum(0, last + 1 - tokens)
    slots = begin[:, None] + np.arange(tokens)
    fresh = (turned(x[1], kv_heads, x[4]), x[2].astype(np.float64).reshape(batch, tokens, kv_heads, dim))
    caches = []
    for held, rows in zip((x[5], x[6]), fresh, strict=True):
        cache = np.zeros((batch, kv_heads, max(past, total), dim))
        cache[:, :, :past] = dequantize_rows(held) if int8 else held
        for row in range(batch):
            stored = dequantize_rows(quantize_rows(rows[row].astype(np.float32))) if int8 else rows[row]
            cache[row][:, slots[row]] = stored.swapaxes(0, 1)
        caches.append(cache)
    out = np.zeros((batch, tokens, heads, dim))
    queries, group = turned(x[0], heads, x[3]) / np.sqrt(dim), heads // kv_heads
    for row, token in np.ndindex(batch, tokens):
        seen = np.flatnonzero(x[8][row, : slots[row, token] + 1])[-a.get("window", total) :]
        for head in range(heads if len(seen) else 0):
            scores = caches[0][row, head // group, seen] @ queries[row, token, head]
            weights = np.exp(scores - scores.max())
            out[row, token, head] = weights @ caches[1][row, head // group, seen] / weights.sum()
    return [out.reshape(batch, tokens, -1), *caches]


def _attention_int8(inputs: Inputs, a: Attributes) -> list[npt.NDArray[Any]]:
    return _attention(inputs, a, int8=True)


def _sliding(inputs: Inputs, a: Attributes, *, int8: bool = False) -> list[npt.NDArray[Any]]:
    ring = a.get("ring")
    if not isinstance(ring, int) or ring != 1:
        return _attention(inputs, a, int8=int8)
    return _on_a_ring(inputs, a, int8=int8)


def _sliding_int8(inputs: Inputs, a: Attributes) -> list[npt.NDArray[Any]]:
    return _sliding(inputs, a, int8=True)


def _on_a_ring(inputs: Inputs, a: Attributes, *, int8: bool) -> list[npt.NDArray[Any]]:
    """``_attention`` of each row's attended tokens alone, on a cache in which the ring lies unrolled."""
    x: list[Any] = list(inputs[:12])
    (batch, tokens, _), total, size = x[0].shape, x[8].shape[1], x[5].shape[2]
    last = x[7].reshape(batch).astype(np.int64)
    begin = np.zeros(batch, np.int64) if tokens == total else np.maximum(0, last + 1 - tokens)
    out = np.zeros(x[0].shape)
    rings = [(dequantize_rows(cache) if int8 else cache).astype(np.float64) for cache in (x[5], x[6])]
    for row in range(batch):
        held = int(np.count_nonzero(x[8][row, : begin[row]]))
        own = np.flatnonzero(x[8][row, begin[row] : begin[row] + tokens])
        if not len(own):
            continue
        numbers, count = np.arange(max(0, held - size), held), held + len(own)
        alone = [part[row : row + 1, own] for part in (x[0], x[1].reshape(batch, tokens, -1))]
        alone += [x[2].reshape(batch, tokens, -1)[row : row + 1, own], x[3], x[4]]
        for cache in (x[5], x[6]):
            unrolled = np.zeros((1, cache.shape[1], count, cache.shape[3]), cache.dtype)
            unrolled[0][:, numbers] = cache[row][:, numbers % size]
            alone.append(unrolled)
        ids = x[11].reshape(batch, tokens)[row : row + 1, own]
        alone += [np.array([count - 1]), np.ones((1, count), np.int64), x[9], x[10], ids]
        found = _attention(alone, a, int8=int8)
        out[row, own] = found[0][0]
        kept = np.arange(max(held, count - size), count)
        for ring, cache in zip(rings, found[1:], strict=True):
            ring[row][:, kept % size] = cache[0][:, kept]
    return [out, *rings]


_OPERATORS = {
    "MatMulNBits": _product,
    "Projections": _projections,
    "FeedForward": _feed_forward,
    "SparseMoe": _sparse_moe,
    "GatedConv": _gated_conv,
    "TokenLayout": _token_layout,
    "Attention": _attention,
    "AttentionInt8": _attention_int8,
    "SlidingAttention": _sliding,
    "SlidingAttentionInt8": _sliding_int8,
}
