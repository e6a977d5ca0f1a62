"""What can be exported where: families × schemes × backends, as the tests export and run them.

In: the registries. Out: rows for ``lfm2-export support`` and the README's table, which is checked against this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lfm2_export.backends import BACKENDS, get_backend
from lfm2_export.models import FAMILIES
from lfm2_export.quant.schemes import get_scheme


@dataclass(frozen=True, kw_only=True)
class Supported:
    """One line of the table. ``runtimes``: what the tests open this program with."""

    family: str
    backend: str
    scheme: str
    file: str
    runtimes: str


_RUNTIMES = {
    ("onnx", "fp32"): "lfm2-export, onnxruntime, onnxruntime-genai, Transformers.js (Node)",
    ("onnx", "fp16"): "lfm2-export, onnxruntime",
    ("onnx", "q8"): "lfm2-export, onnxruntime, onnxruntime-genai, Transformers.js (Node)",
    ("onnx", "q4"): "lfm2-export, onnxruntime, onnxruntime-genai, Transformers.js (Node)",
    ("onnx", "q4f16"): "lfm2-export, onnxruntime (made for WebGPU, which no test has run)",
    ("executorch", "fp32"): "lfm2-export, ExecuTorch's TextLLMRunner",
    ("executorch", "8da4w"): "lfm2-export, ExecuTorch's TextLLMRunner",
}


def supported() -> Iterator[Supported]:
    """Every combination that can be exported."""
    for family in FAMILIES:
        for backend in BACKENDS:
            for scheme in get_backend(backend).SCHEMES:
                yield Supported(
                    family=family,
                    backend=backend,
                    scheme=scheme,
                    file=get_scheme(scheme).programs[backend],
                    runtimes=_RUNTIMES[backend, scheme],
                )
