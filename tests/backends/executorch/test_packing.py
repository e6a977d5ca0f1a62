"""The stock operator's layout, proven by the operator."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("executorch")

import torch
import torch.nn.functional as F

from lfm2_export.backends.executorch import ops
from lfm2_export.backends.executorch.packing import pack_stock, stock_bytes, unpack_stock
from lfm2_export.errors import QuantizationError
from lfm2_export.quant.algorithms import get_algorithm
from lfm2_export.quant.formats import IntFormat, QuantizedTensor


def quantized(rows: int, columns: int, group_size: int, seed: int) -> QuantizedTensor:
    form = IntFormat(bits=4, group_size=group_size, symmetric=True, scale_dtype="float16")
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return get_algorithm("round")(values, form)


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(8, 32, 32), (24, 128, 64), (13, 96, 32), (40, 64, 16)])
def test_unpack_inverts_pack(rows: int, columns: int, group_size: int) -> None:
    tensor = quantized(rows, columns, group_size, 0)
    blob = pack_stock(tensor)
    assert blob.nbytes == stock_bytes(rows, columns, group_size)
    unpacked = unpack_stock(blob, columns, group_size)
    np.testing.assert_array_equal(unpacked[:rows], tensor.dequantize())
    assert not unpacked[rows:].any()


@pytest.mark.parametrize(
    ("width", "inner", "experts", "top_k", "group_size", "tokens"),
    [(64, 32, 4, 2, 32, 5), (96, 64, 5, 1, 32, 1), (256, 128, 8, 2, 64, 33), (64, 96, 3, 3, 32, 7)],
)
def test_operator_reads_what_was_packed(
    width: int, inner: int, experts: int, top_k: int, group_size: int, tokens: int
) -> None:
    torch.manual_seed(0)
    matrices = [
        tuple(
            quantized(*shape, group_size, 3 * e + i) for i, shape in enumerate([(inner, width)] * 2 + [(width, inner)])
        )
        for e in range(experts)
    ]
    w13 = torch.from_numpy(np.stack([pack_stock(one, three) for one, three, _ in matrices]))
    w2 = torch.from_numpy(np.stack([pack_stock(two) for *_, two in matrices]))
    x, gate, bias = torch.randn(tokens, width), torch.randn(experts, width) * 0.1, torch.randn(experts) * 0.1
    found = ops.stock_experts(x, gate, bias, w13, w2, top_k=top_k, inner=inner, group_size=group_size, scale=1.5)
    scores = (x @ gate.T).sigmoid()
    chosen = (scores + bias).topk(top_k).indices
    share = scores.gather(1, chosen)
    share = share / share.sum(1, keepdim=True) * 1.5
    expected = torch.zeros_like(found)
    for token in range(tokens):
        for place in range(top_k):
            one, three, two = (torch.from_numpy(m.dequantize()) for m in matrices[chosen[token, place]])
            expected[token] += share[token, place] * (F.silu(one @ x[token]) * (three @ x[token])) @ two.T
    error = float((found - expected).abs().max() / expected.abs().max())
    print(f"relative error {error:.1e}")
    assert error < 2e-6


def test_other_formats_are_refused() -> None:
    form = IntFormat(bits=8, group_size=32, symmetric=True)
    with pytest.raises(QuantizationError, match="symmetric int4 in groups of a multiple of 16"):
        pack_stock(get_algorithm("round")(np.ones((8, 32), np.float32), form))
