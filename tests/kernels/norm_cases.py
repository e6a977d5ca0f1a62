"""Operators that norm what they read, perhaps a sum that they return too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from tests.kernels.matrix_cases import (
    FEED_FORWARD_CASES,
    MOE_CASES,
    PRODUCT_CASES,
    PROJECTIONS_CASES,
    PROJECTIONS_OUT,
    FeedForwardCase,
    Matrix,
    MoeCase,
    ProductCase,
    ProjectionsCase,
)
from tests.kernels.one_operator import FLOAT_OUT, Arrays, DoubleArray, FloatArray, random_inputs, run_operator


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
