"""The kernels against each other, bit for bit, and against float64 arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from lfm2_export.kernels.packing import PackedExperts, unpack_expert
from tests.kernels import c_api
from tests.kernels.toy_program import random_experts

DoubleArray = npt.NDArray[np.float64]


@dataclass
class Case:
    tokens: int
    width: int
    inner: int
    experts: int
    top_k: int
    crowd: int = 0  # how many experts get tokens at all; 0: all
    with_bias: bool = True

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.tokens * 1009 + self.width + self.inner * 31 + self.experts)
        self.packed: PackedExperts = random_experts(rng, self.experts, self.width, self.inner)
        self.x = rng.normal(size=(self.tokens, self.width)).astype(np.float32)
        self.logits = (rng.normal(size=(self.tokens, self.experts)) * 2).astype(np.float32)
        self.bias = (rng.normal(size=self.experts) * 0.3).astype(np.float32) if self.with_bias else None
        if self.crowd and self.bias is not None:
            self.bias[self.crowd :] = -10

    def run(self, kernels: str, threads: int = 1, normalize: bool = True, scale: float = 1.0) -> c_api.FloatArray:
        gate_up, down = self.packed.gate_up, self.packed.down
        return c_api.moe_ffn(
            kernels, self.x, self.logits, self.bias, gate_up, down,
            top_k=self.top_k, normalize=normalize, scale=scale, threads=threads,
        )  # fmt: skip


CASES = [
    Case(1, 64, 96, 4, 2),
    Case(1, 2048, 1792, 4, 4),
    Case(2, 32, 32, 1, 1),
    Case(3, 160, 224, 8, 1),
    Case(7, 96, 160, 6, 2, crowd=2),
    Case(33, 64, 64, 5, 5),
    Case(65, 32, 96, 3, 1, crowd=1),
    Case(200, 64, 32, 4, 2, with_bias=False),
    Case(1100, 32, 32, 2, 1),
]
each_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"T{c.tokens}-D{c.width}-I{c.inner}-k{c.top_k}of{c.experts}"
)


def in_float64(case: Case, *, int8: bool, normalize: bool = True, scale: float = 1.0) -> DoubleArray:
    """The same feed-forward in float64 with the weights as they are stored.

    ``int8``: activations are rounded as the kernels round them.
    """
    enter = rounded if int8 else np.float64
    scores = 1 / (1 + np.exp(-case.logits.astype(np.float64)))
    ranked = scores if case.bias is None else scores + case.bias
    x, out = enter(case.x), np.zeros(case.x.shape)
    weights = [
        [matrix.dequantize().astype(np.float64) for matrix in unpack_expert(case.packed.gate_up, case.packed.down, e)]
        for e in range(case.experts)
    ]
    for token in range(case.tokens):
        chosen = np.argsort(-ranked[token], kind="stable")[: case.top_k]
        shares = scores[token, chosen] / (scores[token, chosen].sum() + 1e-6 if normalize else 1)
        for expert, share in zip(chosen, shares * scale, strict=True):
            w1, w3, w2 = weights[expert]
            gate = w1 @ x[token]
            out[token] += share * (w2 @ enter(gate / (1 + np.exp(-gate)) * (w3 @ x[token])))
    return out


def rounded(values: npt.NDArray[np.floating]) -> DoubleArray:
    """Int8 in groups of 32."""
    groups = values.astype(np.float32).reshape(-1, 32)
    greatest = np.abs(groups).max(-1, keepdims=True)
    codes = np.rint(groups * (np.float32(127) / greatest))
    return (codes.astype(np.float64) * (greatest / np.float32(127))).reshape(values.shape)


def relative_error(got: npt.NDArray[np.floating], want: DoubleArray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@each_case
def test_every_kernel_gives_the_scalar_ones_bits(case: Case):
    scalar = case.run("scalar")
    for kernels in c_api.runnable_kernels():
        for threads in (1, 2, 5):
            np.testing.assert_array_equal(case.run(kernels, threads).view(np.int32), scalar.view(np.int32), kernels)


@each_case
def test_the_result_is_that_of_float64_up_to_the_int8_activations(case: Case):
    got = case.run(c_api.runnable_kernels()[0])
    tight, loose = (relative_error(got, in_float64(case, int8=int8)) for int8 in (True, False))
    print(f"relative error {tight:.1e} with the same int8 activations, {loose:.1e} without")
    # A float32 sum may round an inner value to the next int8 code, which is why the first is not smaller.
    assert tight < 2e-3
    assert loose < 0.02


@pytest.mark.parametrize("normalize", [True, False])
def test_routing_options_are_honoured(normalize: bool):
    case = Case(9, 64, 64, 5, 3)
    got = case.run("scalar", normalize=normalize, scale=2.5)
    assert relative_error(got, in_float64(case, int8=True, normalize=normalize, scale=2.5)) < 2e-3


def test_what_is_not_finite_stays_in_its_token():
    case = Case(8, 64, 64, 4, 2)
    clean = case.run("scalar")
    case.x[2, 40], case.x[5, 0], case.logits[6] = np.nan, -np.inf, np.nan
    for kernels in c_api.runnable_kernels():
        got = case.run(kernels)
        spoilt = np.isnan(got).any(axis=1)
        assert spoilt.nonzero()[0].tolist() == [2, 5, 6]
        np.testing.assert_array_equal(got[~spoilt], clean[~spoilt])


def test_zeros_stay_zeros():
    case = Case(3, 64, 32, 2, 1)
    case.x[:] = 0
    for kernels in c_api.runnable_kernels():
        assert not case.run(kernels).any()
