"""Opens an ONNX program with onnxruntime and checks that it is the program that its CacheSpec describes.

In: the path of a .onnx file (its external data lies beside it). Out: an InferenceSession with the options that suit
decoding, or a RunnerError that says what to do.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from lfm2_export.backends.base import check_threads
from lfm2_export.cache import CacheSpec
from lfm2_export.errors import ArtifactError, RunnerError

# The first release whose CPU kernels cover every operator that our programs use (QMoE's accuracy_level among them).
MIN_ONNXRUNTIME = (1, 31)
# onnxruntime logs a warning for every initializer that its optimizer leaves unused, which nobody could act on, and each
# error that it raises too, which we say ourselves.
_LOG_FATAL_ONLY = 4


def open_session(path: Path, *, threads: int | None = None, library: Path | None = None) -> ort.InferenceSession:
    """Loads ``path`` for the CPU; ``library``: our operators, for a graph that has them.

    Raises:
        ArtifactError: the file is not there.
        RunnerError: a bad number of threads, or a program that this onnxruntime cannot load.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such program; export the scheme again")
    try:
        return ort.InferenceSession(path, session_options(threads, library), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base class of their own
        raise _load_error(path, error) from error


def session_options(threads: int | None = None, library: Path | None = None) -> ort.SessionOptions:
    """Sequential execution on ``threads`` threads (default: the cores that this process may use)."""
    options = ort.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.intra_op_num_threads = check_threads(threads)
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Every decode step has another mask length; a memory plan would be kept for each of them.
    options.enable_mem_pattern = False
    options.log_severity_level = _LOG_FATAL_ONLY
    return options


def check_program(session: ort.InferenceSession, path: Path, spec: CacheSpec) -> int:
    """Compares the graph's inputs and outputs with ``spec``; returns the size of its vocabulary.

    Raises:
        RunnerError: one is missing or left over, or the logits' last axis has no fixed size.
    """
    inputs = {"input_ids", "attention_mask"} | {t.past_name for t in spec.tensors}
    outputs = {"logits"} | {t.present_name for t in spec.tensors}
    _check_names(path, "inputs", {i.name for i in session.get_inputs()}, inputs)
    _check_names(path, "outputs", {o.name for o in session.get_outputs()}, outputs)
    logits = next(o for o in session.get_outputs() if o.name == "logits")
    if not isinstance(logits.shape[-1], int) or logits.type != "tensor(float)":
        raise RunnerError(
            f"{path}: logits are {logits.type} {logits.shape}; float32 with the vocabulary's size last expected; "
            "export again"
        )
    return logits.shape[-1]


def _check_names(path: Path, kind: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing = ", ".join(sorted(expected - found)) or "none"
        extra = ", ".join(sorted(found - expected)) or "none"
        raise RunnerError(
            f"{path}: the graph's {kind} differ from the manifest's cache (missing: {missing}; left over: {extra}); "
            "export again"
        )


def _load_error(path: Path, error: Exception) -> RunnerError:
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    wanted = ".".join(map(str, MIN_ONNXRUNTIME))
    reason = " ".join(str(error).split())[:300]
    remedy = (
        f"this program needs onnxruntime {wanted} or newer: pip install -U onnxruntime"
        if version < MIN_ONNXRUNTIME
        else "the program or its data file is damaged or was made for another runtime: export again"
    )
    return RunnerError(f"{path}: onnxruntime {ort.__version__} cannot load it; {remedy} ({reason})")
