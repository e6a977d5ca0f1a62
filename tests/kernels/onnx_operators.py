"""Every case of every operator.

As a program (``python -m tests.kernels.onnx_operators FILE.npz``) it writes the outputs of every case: which kernels an
operator uses is decided once per process, by LFM2_KERNELS.
"""

from __future__ import annotations

import sys

import numpy as np

from tests.kernels.attention_cases import ATTENTION_CASES
from tests.kernels.matrix_cases import FEED_FORWARD_CASES, MOE_CASES, PRODUCT_CASES, PROJECTIONS_CASES
from tests.kernels.norm_cases import NORMED_CASES
from tests.kernels.token_cases import CONV_CASES, LAYOUT_CASES

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
