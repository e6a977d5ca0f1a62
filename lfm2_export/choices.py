"""The names that the public functions take where there is a choice, as types: an editor offers them, a type checker
finds a slip. What is registered is what counts when a function is called; a test compares the two.
"""

from __future__ import annotations

from typing import Literal

BackendName = Literal["onnx", "executorch"]
SchemeName = Literal["fp32", "fp16", "q8", "q4", "q4f16", "8da4w"]
AlgorithmName = Literal["refit", "round", "gptq"]
BudgetName = Literal["file", "step"]
KernelsName = Literal["auto", "lfm2", "stock"]
KvCacheName = Literal["float", "int8"]
