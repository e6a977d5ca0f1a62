"""The kernels for ONNX Runtime's weights against float64 arithmetic, and against each other.

Sums are added up in another order for every instruction set, so they do not give the same bits; those of one are the
same on any number of threads, and for a token whatever the others are. What feeds the last matrix of a feed-forward is
rounded to int8 once more, where a sum that differs in its last bit may go to the next code: few tokens meet that, and
their error is bounded apart.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest

from tests.kernels import c_api
from tests.kernels.c_api import FloatArray, RowMatrix

DoubleArray = npt.NDArray[np.float64]

BOUND = 1.2e-5  # three times the most that was seen on any processor
ROUNDED_BOUND = 1e-2  # of a token with a value that went to the next code
ROWS = (1, 17, 33, 70)
COLUMNS = (32, 96, 160, 1344, 1792, 2048, 7168)
TOKENS = (1, 2, 3, 5, 8, 9, 14, 37, 64)  # from 9 on some kernels rearrange the weights
THREADS = (1, 2, 5)
FORMATS = [
    (bits, group, columns)
    for bits, group, columns in itertools.product((4, 8), (16, 32, 64, 128, 256), COLUMNS)
    if columns % group == 0
]


def random_matrix(
    rng: np.random.Generator, rows: int, columns: int, *, bits: int, group: int, points: bool, half: bool
) -> RowMatrix:
    scales = rng.uniform(0.5, 2, (rows, columns // group)) / np.sqrt(columns) / (5 if bits == 4 else 74)
    return RowMatrix(
        codes=rng.integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8),
        scales=scales.astype(np.float16 if half else np.float32),
        zero_points=rng.integers(0, 256, (rows, (columns // group + 1) // 2), dtype=np.uint8) if points else None,
        bits=bits,
        group=group,
    )


def in_float64(w: RowMatrix) -> DoubleArray:
    """[N, K]"""
    rows, columns = w.shape
    codes = apart(w.codes) if w.bits == 4 else w.codes
    points = np.full((rows, columns // w.group), 1 << (w.bits - 1))
    if w.zero_points is not None:
        points = apart(w.zero_points)[:, : columns // w.group]
    centered = codes.reshape(rows, -1, w.group).astype(np.float64) - points[:, :, None]
    return (centered * w.scales.astype(np.float64)[:, :, None]).reshape(rows, columns)


def apart(pairs: c_api.ByteArray) -> c_api.ByteArray:
    return np.stack([pairs & 15, pairs >> 4], -1).reshape(len(pairs), -1)


def rounded(values: npt.NDArray[np.floating], group: int) -> DoubleArray:
    """Int8 in groups of 32, or of 16 where the weights' are, in float32 as the kernels do it."""
    groups = values.astype(np.float32).reshape(-1, min(group, 32))
    greatest = np.abs(groups).max(-1, keepdims=True)
    codes = np.rint(groups * (np.float32(127) / greatest))
    return (codes.astype(np.float64) * (greatest / np.float32(127))).reshape(values.shape)


def errors_of(got: FloatArray, want: DoubleArray) -> DoubleArray:
    """Of each token."""
    return np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)


def normal(rng: np.random.Generator, *shape: int) -> FloatArray:
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("bits", "group", "columns"), FORMATS)
def test_a_matrix_is_that_of_float64_up_to_the_order_of_sums(bits: int, group: int, columns: int):
    rng = np.random.default_rng(bits * 100000 + group * 1000 + columns)
    x_all, bias_all = normal(rng, max(TOKENS), columns), normal(rng, max(ROWS))
    x_all += 0.5  # sums of inputs that are not near 0, as after an activation function
    matrices = [
        random_matrix(rng, max(ROWS), columns, bits=bits, group=group, points=points and bits == 4, half=half)
        for points, half in itertools.product((False, True), (False, True))
    ]
    exact = [in_float64(matrix) for matrix in matrices]
    worst = dict.fromkeys(c_api.runnable_kernels(), 0.0)
    for i, (rows, tokens) in enumerate(itertools.product(ROWS, TOKENS)):
        w, w_exact = matrices[i % 4].rows(slice(rows)), exact[i % 4][:rows]
        x, bias = x_all[:tokens].copy(), bias_all[:rows] if i // 4 % 2 else None
        x_exact = rounded(x, group)
        want = x_exact @ w_exact.T + (0 if bias is None else bias)
        size = np.sqrt(np.sum(x_exact**2 @ w_exact.T**2))  # of the products: their sum may happen to be nearly 0
        for kernels in worst:
            first, *others = [c_api.matmul_nbits(kernels, x, w, bias, threads=threads) for threads in THREADS]
            worst[kernels] = max(worst[kernels], float(np.linalg.norm(first - want) / size))
            for other in others:
                np.testing.assert_array_equal(other.view(np.int32), first.view(np.int32), kernels)
    print(" ".join(f"{kernels} {error:.1e}" for kernels, error in worst.items()))
    assert max(worst.values()) < BOUND


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 64])
def test_one_changed_code_is_beyond_the_bound(bits: int, tokens: int):
    rng = np.random.default_rng(bits)
    w = random_matrix(rng, max(ROWS), max(COLUMNS), bits=bits, group=128, points=False, half=True)
    x = normal(rng, tokens, max(COLUMNS))
    want = rounded(x, w.group) @ in_float64(w).T
    w.codes[40, 1000] ^= 4 if bits == 4 else 64
    for kernels in c_api.runnable_kernels():
        error = errors_of(c_api.matmul_nbits(kernels, x, w), want).max()
        print(f"{kernels} {error:.1e}")
        assert error > 30 * BOUND


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [5, 14])
@pytest.mark.parametrize("group", [16, 32])
def test_what_is_not_finite_stays_in_its_token(bits: int, tokens: int, group: int):
    rng = np.random.default_rng(tokens)
    w = random_matrix(rng, 40, 96, bits=bits, group=group, points=bits == 4, half=False)
    x = normal(rng, tokens, 96)
    for kernels in c_api.runnable_kernels():
        clean = c_api.matmul_nbits(kernels, x, w)
        spoilt = x.copy()
        spoilt[1, 40], spoilt[3, 0] = np.nan, -np.inf
        got = c_api.matmul_nbits(kernels, spoilt, w)
        assert np.isnan(got[[1, 3]]).all()
        others = np.setdiff1d(np.arange(tokens), [1, 3])
        np.testing.assert_array_equal(got[others], clean[others], kernels)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 14])
def test_zeros_give_zeros(bits: int, tokens: int):
    rng = np.random.default_rng(tokens)
    w = random_matrix(rng, 33, 160, bits=bits, group=32, points=bits == 4, half=True)
    for kernels in c_api.runnable_kernels():
        assert not c_api.matmul_nbits(kernels, np.zeros((tokens, 160), np.float32), w).any()


@pytest.mark.parametrize(
    ("columns", "change", "words"),
    [
        (96, {"group": 64}, "4 x 96 does not fit groups of 64"),
        (96, {"group": 24}, "block_size 24: 16, 32, 64, 128 and 256 are known"),
        (48, {"group": 16, "scales": np.zeros((4, 3), np.float32)}, "48 columns are not a multiple of 32"),
        (
            64,
            {"bits": 8, "codes": np.zeros((4, 64), np.uint8), "zero_points": np.zeros((4, 1), np.uint8)},
            "zero points are known of 4-bit",
        ),
        (64, {"scales": np.zeros((4, 1), np.float32)}, "w scales has 4 elements, not 8"),
        (64, {"zero_points": np.zeros(3, np.uint8)}, "w zero points has 3 elements, not 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(columns: int, change: dict[str, object], words: str):
    w = random_matrix(np.random.default_rng(0), 4, columns, bits=4, group=32, points=False, half=False)
    with pytest.raises(c_api.KernelError, match=words):
        c_api.matmul_nbits("scalar", np.zeros((1, columns), np.float32), replace(w, **change))


@dataclass
class Layer:
    """A feed-forward, dense or of experts. ``gate`` and ``up`` are [inner, width], ``down`` is [width, inner]."""

    tokens: int
    width: int
    inner: int
    bits: int = 4
    group: int = 32
    points: bool = False
    half: bool = False
    experts: int = 1
    top_k: int = 1
    crowd: int = 0  # how many experts get tokens at all; 0: all
    normalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.tokens * 1009 + self.width + self.inner * 31 + self.experts)
        kind = {"bits": self.bits, "group": self.group, "points": self.points, "half": self.half}
        self.gate_up = random_matrix(rng, self.experts * 2 * self.inner, self.width, **kind)
        self.down = random_matrix(rng, self.experts * self.width, self.inner, **kind)
        self.x = normal(rng, self.tokens, self.width)
        self.logits = normal(rng, self.tokens, self.experts) * 2
        self.bias = normal(rng, self.experts) * np.float32(0.3)
        self.bias[self.crowd or self.experts :] = -10

    def __str__(self) -> str:
        shape = f"T{self.tokens}-D{self.width}-I{self.inner}-q{self.bits}g{self.group}"
        return shape if self.experts == 1 else f"{shape}-k{self.top_k}of{self.experts}"

    def dense(self, kernels: str, threads: int = 1) -> FloatArray:
        gate, up = (self.gate_up.rows(slice(first, None, 2)) for first in (0, 1))
        return c_api.feed_forward(kernels, self.x, gate, up, self.down, threads=threads)

    def sparse(self, kernels: str, threads: int = 1) -> FloatArray:
        return c_api.sparse_moe_nbits(
            kernels, self.x, self.logits, self.bias, self.gate_up, self.down,
            top_k=self.top_k, normalize=self.normalize, scale=self.scale, threads=threads,
        )  # fmt: skip

    def expert_in_float64(self, expert: int, x: FloatArray) -> DoubleArray:
        both = in_float64(self.gate_up).reshape(self.experts, self.inner, 2, self.width)[expert]
        gate, up = (rounded(x, self.group) @ both[:, i].T for i in (0, 1))
        down = in_float64(self.down).reshape(self.experts, self.width, self.inner)[expert]
        return rounded(gate / (1 + np.exp(-gate)) * up, self.group) @ down.T

    def sparse_in_float64(self) -> DoubleArray:
        scores = 1 / (1 + np.exp(-self.logits.astype(np.float64)))
        chosen = np.argsort(-(scores + self.bias), kind="stable")[:, : self.top_k]
        shares = np.take_along_axis(scores, chosen, 1)
        shares *= self.scale / (shares.sum(1, keepdims=True) + 1e-6 if self.normalize else 1)
        out = np.zeros(self.x.shape)
        for expert in range(self.experts):
            tokens, places = np.nonzero(chosen == expert)
            if len(tokens):
                out[tokens] += shares[tokens, places, None] * self.expert_in_float64(expert, self.x[tokens])
        return out


DENSE = [
    Layer(1, 64, 96),
    Layer(1, 1024, 2560, group=128, half=True),
    Layer(2, 256, 512, group=256, points=True),
    Layer(3, 192, 320, group=64, bits=8),
    Layer(8, 2048, 1792, group=128, points=True, half=True),
    Layer(9, 160, 224, points=True),
    Layer(14, 256, 768, group=256, bits=8, half=True),
    Layer(37, 1344, 64, group=64),
    Layer(1, 96, 160, group=16, points=True, half=True),
    Layer(11, 160, 96, group=16, bits=8),
    Layer(1030, 64, 32),  # more than one pass
]
SPARSE = [
    Layer(1, 64, 96, experts=4, top_k=2),
    Layer(1, 2048, 1792, experts=4, top_k=4, points=True, half=True),
    Layer(2, 256, 256, experts=3, top_k=1, group=256),
    Layer(5, 160, 224, experts=8, top_k=1, normalize=False, scale=2.5),
    Layer(7, 128, 384, experts=6, top_k=2, crowd=2, group=128, bits=8, half=True),
    Layer(33, 192, 64, experts=5, top_k=5, group=64, points=True, scale=0.5),
    Layer(200, 32, 96, experts=3, top_k=1, crowd=1),  # more than one segment
    Layer(150, 64, 64, experts=4, top_k=2, crowd=3, group=64, normalize=False),
    Layer(14, 160, 96, experts=3, top_k=2, group=16, points=True, half=True),
    Layer(1100, 32, 32, experts=2, top_k=1),  # more than one pass
]


@pytest.mark.parametrize("layer", DENSE, ids=str)
def test_a_feed_forward_is_that_of_float64(layer: Layer):
    want = layer.expert_in_float64(0, layer.x)
    for kernels in c_api.runnable_kernels():
        check_on_threads(kernels, [layer.dense(kernels, threads) for threads in THREADS], want)


@pytest.mark.parametrize("layer", SPARSE, ids=str)
def test_the_experts_are_those_of_float64(layer: Layer):
    want = layer.sparse_in_float64()
    for kernels in c_api.runnable_kernels():
        check_on_threads(kernels, [layer.sparse(kernels, threads) for threads in THREADS], want)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_token_has_the_same_bits_alone_and_among_others(bits: int):
    rng = np.random.default_rng(bits)
    for group, columns in ((16, 96), (16, 1344), (32, 96), (32, 1344), (64, 2048), (256, 1792)):
        w = random_matrix(rng, 33, columns, bits=bits, group=group, points=bits == 4, half=True)
        x = normal(rng, 40, columns)
        for kernels in c_api.runnable_kernels():
            want = c_api.matmul_nbits(kernels, x, w)
            for first, count in ((0, 1), (3, 2), (5, 7), (0, 8), (9, 9), (1, 12), (20, 13), (3, 24)):
                got = c_api.matmul_nbits(kernels, x[first : first + count].copy(), w)
                np.testing.assert_array_equal(got.view(np.int32), want[first : first + count].view(np.int32), kernels)


def test_a_token_has_the_same_bits_among_others_in_feed_forwards():
    dense = Layer(37, 192, 320, group=64, points=True, half=True)
    sparse = Layer(60, 192, 96, experts=5, top_k=2, group=32, points=True)  # experts of few tokens and of many
    small = Layer(60, 192, 96, experts=3, top_k=2, group=16, points=True)
    for kernels in c_api.runnable_kernels():
        for layer, run in ((dense, dense.dense), (sparse, sparse.sparse), (small, small.sparse)):
            want, x, logits = run(kernels), layer.x, layer.logits
            for first, count in ((0, 1), (36, 1), (4, 3), (8, 9), (2, 30)):
                layer.x, layer.logits = x[first : first + count].copy(), logits[first : first + count].copy()
                np.testing.assert_array_equal(run(kernels).view(np.int32), want[first : first + count].view(np.int32))
            layer.x, layer.logits = x, logits


def check_on_threads(kernels: str, results: list[FloatArray], want: DoubleArray) -> None:
    errors = errors_of(results[0], want)
    print(f"{kernels} {np.median(errors):.1e}, at most {errors.max():.1e}")
    assert np.median(errors) < BOUND
    assert errors.max() < ROUNDED_BOUND
    for other in results[1:]:
        np.testing.assert_array_equal(other.view(np.int32), results[0].view(np.int32), kernels)


def test_an_expert_that_is_another_ones_is_beyond_the_bound():
    layer = Layer(9, 64, 64, experts=4, top_k=2)
    want = layer.sparse_in_float64()
    layer.down.codes[:64] = layer.down.codes[64:128]
    for kernels in c_api.runnable_kernels():
        assert errors_of(layer.sparse(kernels), want).max() > 10 * ROUNDED_BOUND


def test_a_spoilt_token_spoils_no_other_among_experts():
    layer = Layer(12, 64, 96, experts=3, top_k=2, points=True)
    for kernels in c_api.runnable_kernels():
        before = layer.sparse(kernels)
        kept = layer.x.copy(), layer.logits.copy()
        layer.x[2, 40], layer.x[5, 0], layer.logits[6] = np.nan, np.inf, np.nan
        got = layer.sparse(kernels)
        layer.x[:], layer.logits[:] = kept
        spoilt = np.isnan(got).any(axis=1)
        assert spoilt.nonzero()[0].tolist() == [2, 5, 6]
        np.testing.assert_array_equal(got[~spoilt], before[~spoilt])


@pytest.mark.parametrize(
    ("named", "warns"), [("scalar", False), ("no-such-kernels", True), ("", False), ("avx2", False)]
)
def test_a_name_that_only_the_other_kernels_have_is_not_called_unknown(named: str, warns: bool):
    if named and named not in {"no-such-kernels", *c_api.runnable_kernels()}:
        pytest.skip(f"this processor has no {named}")
    program = (
        "import numpy as np; from tests.kernels import c_api, test_row_kernels as t; rng = np.random.default_rng(0);"
        "w = t.random_matrix(rng, 4, 32, bits=4, group=32, points=False, half=False);"
        "c_api.matmul_nbits(None, t.normal(rng, 1, 32), w)"
    )
    environment = os.environ | {"LFM2_KERNELS": named}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("LFM2_KERNELS" in done.stderr) == warns
