"""What a layer's input says about its weights: which of their errors its output feels.

In: the Hessian of a linear layer's squared output error, H = XᵀX / tokens over the inputs X [tokens, n] that it met, or
its diagonal. Out: ``InputStatistics``, what the ``gptq`` algorithm works with: H with a floor under it, the order in
which columns are rounded, and the factor that carries the error of one on to the next.

An error dW of the weights costs trace(dW H dWᵀ): the mean squared error of the layer's output.

Shape suffixes: N in_features, R rows of a weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2_export.errors import QuantizationError
from lfm2_export.quant.formats import FloatArray

# Added to the diagonal, as a share of its mean, as in GPTQ (arXiv:2210.17323), which has 0.01. KL over refit's on
# tiny-moe and tiny-dense, 10,240 held-out tokens, standard error 0.01: 0.686 and 0.670 at 0.01, 0.686 and 0.665 at
# 0.03, 0.670 and 0.661 at 0.1, 0.672 and 0.664 at 0.3; the worst row is then off by 0.18 of its size, not by 0.33.
DAMPING = 0.1
_COLUMNS = 512  # of H that are float64 at a time
_SMALL = 64  # of a triangle's half, which is not halved again


@contextlib.contextmanager
def one_thread_products() -> Iterator[None]:
    """Within it numpy's products take one thread each: where several work side by side, BLAS's own threads would wait
    for each other (ten times slower on a busy machine), and sums would depend on the number of cores."""
    try:
        import threadpoolctl
    except ImportError:  # of the export extra; without it results are as good
        yield
        return
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield


@dataclass(frozen=True, kw_only=True, eq=False)
class InputStatistics:
    """The input of a weight [R, N].

    ``hessian_NN`` float32, damped. ``order_N``: the columns by falling mean square of their input (activation order).
    ``factor_NN``: unit upper triangular U, float32, in that order, with H = U D Uᵀ.
    """

    hessian_NN: FloatArray
    order_N: npt.NDArray[np.int64]
    factor_NN: FloatArray

    @property
    def in_features(self) -> int:
        return len(self.order_N)


def input_statistics(hessian: npt.NDArray[np.floating[Any]], *, name: str = "statistics") -> InputStatistics:
    """What follows from H [N, N], or from its diagonal [N]. The factor is computed in float64.

    Raises:
        QuantizationError: it is not finite, has a negative diagonal, or is no matrix of products at all.
    """
    diagonal_N = np.array(hessian if hessian.ndim == 1 else np.diagonal(hessian), np.float64)
    if not np.isfinite(hessian.min(initial=0) + hessian.max(initial=0)) or diagonal_N.min(initial=0) < 0:
        raise QuantizationError(f"{name}: the statistics are damaged (not finite, or squares below 0); calibrate again")
    floor = DAMPING * float(diagonal_N.mean()) or 1.0  # an input that is always zero
    order_N = np.argsort(-diagonal_N, kind="stable")
    if hessian.ndim == 1:
        damped = np.diag(diagonal_N + floor).astype(np.float32)
        return InputStatistics(hessian_NN=damped, order_N=order_N, factor_NN=np.eye(len(order_N), dtype=np.float32))
    factor_NN = _unit_upper_factor(hessian, order_N, floor, name)
    damped = np.array(hessian, np.float32)
    damped[np.diag_indices(len(order_N))] += np.float32(floor)
    return InputStatistics(hessian_NN=damped, order_N=order_N, factor_NN=factor_NN)


def _unit_upper_factor(hessian: np.ndarray, order_N: np.ndarray, floor: float, name: str) -> FloatArray:
    """U of H = U D Uᵀ with the columns in ``order_N``: Cholesky's factor of H with everything in reverse, reversed.

    GPTQ takes the inverse's factor and updates the weights that are left; carrying errors over with U instead gives
    the same codes (LDLQ, arXiv:2307.13304) without an inverse.
    """
    lower = _reversed_factor(hessian, order_N, floor, name)
    np.divide(lower, np.diagonal(lower).copy(), out=lower)
    return np.ascontiguousarray(lower[::-1, ::-1], np.float32)


def _reversed_factor(hessian: np.ndarray, order_N: np.ndarray, floor: float, name: str) -> npt.NDArray[np.float64]:
    """Cholesky's lower factor of H with the last columns of ``order_N`` first."""
    reverse_N = order_N[::-1]
    turned = hessian[np.ix_(reverse_N, reverse_N)].astype(np.float64)
    turned[np.diag_indices(len(order_N))] += floor
    try:
        lower: npt.NDArray[np.float64] = np.linalg.cholesky(turned)
    except np.linalg.LinAlgError:
        raise QuantizationError(
            f"{name}: the statistics are damaged (not positive definite); calibrate again"
        ) from None
    return lower


def energy(rows_RN: np.ndarray, hessian: np.ndarray) -> float:
    """trace(W H Wᵀ) of rows of a weight, H [N, N] or its diagonal [N]: the mean squares of their outputs, summed.

    In float64, so that a few digits of it are the same on every machine.
    """
    wide_RN = rows_RN.astype(np.float64)
    if hessian.ndim == 1:
        return float((np.square(wide_RN) @ hessian.astype(np.float64)).sum())
    total = 0.0
    for start in range(0, len(hessian), _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        total += float(((wide_RN @ hessian[:, columns].astype(np.float64)) * wide_RN[:, columns]).sum())
    return total


def energy_of_rounding(hessian: np.ndarray, *, name: str = "statistics") -> float:
    """trace(dW H dWᵀ) of a row that GPTQ rounds, over the squared error that plain rounding to its grid would have.

    The rounding errors r of GPTQ's columns are as large as plain rounding's and know nothing of each other; carried on,
    they become dW = r U⁻¹. So it is trace(U⁻¹ H U⁻ᵀ) / N, which is trace(D) less the floor's share of it. On four
    trained models the logarithm of this agrees with that of what the algorithm really does, correlation 0.998.

    Raises:
        QuantizationError: as ``input_statistics``.
    """
    diagonal_N = np.array(hessian if hessian.ndim == 1 else np.diagonal(hessian), np.float64)
    if hessian.ndim == 1:
        return float(diagonal_N.mean())
    floor = DAMPING * float(diagonal_N.mean()) or 1.0
    lower = _reversed_factor(hessian, np.argsort(-diagonal_N, kind="stable"), floor, name)
    scale_N = np.diagonal(lower).copy()
    np.divide(lower, scale_N, out=lower)
    return float(np.square(scale_N).sum() - floor * np.square(_inverse(lower)).sum()) / len(scale_N)


def _inverse(lower: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """Of a lower triangle, by halves: as many products as Cholesky takes, where a general inverse takes six times as
    many."""
    half = len(lower) // 2
    if half < _SMALL:
        return np.linalg.inv(lower)
    found = np.zeros_like(lower)
    found[:half, :half] = _inverse(lower[:half, :half])
    found[half:, half:] = _inverse(lower[half:, half:])
    found[half:, :half] = -(found[half:, half:] @ (lower[half:, :half] @ found[:half, :half]))
    return found
