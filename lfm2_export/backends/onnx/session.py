"""Opens an ONNX program with onnxruntime and checks that it is the program that its CacheSpec describes.

In: the path of a .onnx file (its external data lies beside it). Out: an InferenceSession with the options that suit
decoding, or a RunnerError that says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from weakref import WeakSet

import onnxruntime as ort

from lfm2_export import memory, paths
from lfm2_export.backends.arguments import check_threads
from lfm2_export.backends.onnx.variants import INDEPENDENT, ROWS
from lfm2_export.cache import FIRST_SCORED, CacheSpec, residual_name
from lfm2_export.errors import ArtifactError, ResourceError, RunnerError
from lfm2_export.messages import listed, natural, shown

# The first release whose CPU kernels cover every operator that our programs use (QMoE's accuracy_level among them).
MIN_ONNXRUNTIME = (1, 31)
# onnxruntime logs a warning for every initializer that its optimizer leaves unused, which nobody could act on, and
# every error that it also raises, which we say ourselves.
_LOG_FATAL_ONLY = 4
# Workers of a session wait for its next run awake, which is quickest where one session runs: a step of a small model
# takes a third less. Where sessions run by turns (a model, its scoring graph, a drafter), those that wait take the
# processors from the one that runs: on two cores a step of the 1.2B after a pass that verified took 1.6 times as
# long. So the first one waits awake, and what is opened beside it does not.
_STOP_SPINNING = "session.force_spinning_stop"
_open: WeakSet[ort.InferenceSession] = WeakSet()
_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "uint8": "tensor(uint8)"}


def open_session(path: Path, *, threads: int | None = None, library: Path | None = None) -> ort.InferenceSession:
    """Loads ``path`` for the CPU; ``library``: our operators, for a graph that has them.

    Raises:
        ArtifactError: the file is not there.
        RunnerError: a bad number of threads, or a program that this onnxruntime cannot load.
        ResourceError: the memory is too small for it.
    """
    if not paths.is_file(path, ArtifactError):
        raise ArtifactError(f"{paths.shown(path)}: no such program; export the scheme again")
    try:
        options = session_options(threads, library)
        if _open:
            options.add_session_config_entry(_STOP_SPINNING, "1")
        session = new_session(path, options)
    except Exception as error:  # onnxruntime's exceptions have no common base class of their own
        if memory.ran_out(error):
            raise ResourceError(
                f"{paths.shown(path)}: the memory is too small to load it; close other programs or use a larger machine"
            ) from error
        raise _load_error(path, error) from error
    _open.add(session)
    return session


class Sessions:
    """What runners of one program share: its graph, and the one with the logits of every position, loaded on first use.

    Args:
        path: the graph.
        scoring_path: the other one; None: there is none.
        threads: as ``open_session`` takes them.
        library: our operators.
    """

    def __init__(self, path: Path, scoring_path: Path | None, *, threads: int | None, library: Path | None):
        check_threads(threads)
        self.path, self.scoring_path, self.library = path, scoring_path, library
        self._threads = threads
        self.main = open_session(path, threads=threads, library=library)
        self._scoring: ort.InferenceSession | None = None

    def scoring(self, cache: CacheSpec) -> ort.InferenceSession:
        """Raises: RunnerError: there is none, or it is not of that state."""
        if self.scoring_path is None:
            raise RunnerError(f"{self.path}: the artifact has no scoring graph for this scheme; export it again")
        if self._scoring is None:
            session = open_session(self.scoring_path, threads=self._threads, library=self.library)
            check_program(session, self.scoring_path, cache)
            self._scoring = session
        return self._scoring


def new_session(model: Path | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session on the CPU: raises whatever onnxruntime does, which else prints it and tries the same again."""
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)


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
    try:
        return _vocabulary(session, path, spec)
    except UnicodeDecodeError as error:
        raise RunnerError(
            f"{paths.shown(path)}: the graph has a name that is not UTF-8 text; copy it again, or export again"
        ) from error


def _vocabulary(session: ort.InferenceSession, path: Path, spec: CacheSpec) -> int:
    inputs = {"input_ids", "attention_mask"} | {t.past_name for t in spec.tensors}
    outputs = {"logits"} | {t.present_name for t in spec.tensors}
    optional = {i.name for i in session.get_overridable_initializers()} - {FIRST_SCORED}
    _check_names(path, "inputs", optional | {i.name for i in session.get_inputs()}, inputs)
    found = {o.name for o in session.get_outputs()}
    _check_names(path, "outputs", found - windows(session, spec) - set(residuals(session, spec)), outputs)
    _check_state(path, {i.name: i for i in session.get_inputs()}, spec)
    logits = next(o for o in session.get_outputs() if o.name == "logits")
    if not logits.shape or not isinstance(logits.shape[-1], int) or logits.type != "tensor(float)":
        raise RunnerError(
            f"{paths.shown(path)}: logits are {logits.type} {shown(logits.shape)}; float32 with the vocabulary's size "
            "last expected; export again"
        )
    return logits.shape[-1]


def windows(session: ort.InferenceSession, spec: CacheSpec) -> set[str]:
    """The outputs that hold the conv states of every position, if the graph has them for all of its conv layers."""
    wanted = {tensor.window_name for tensor in spec.conv}
    return wanted if wanted <= {output.name for output in session.get_outputs()} else set()


def residuals(session: ort.InferenceSession, spec: CacheSpec) -> dict[str, int]:
    """The outputs that hold the residual stream behind a layer, with its width; 0 where it has no fixed one."""
    wanted = {residual_name(tensor.layer) for tensor in spec.tensors}
    found = (output for output in session.get_outputs() if output.name in wanted and len(output.shape) == 3)
    return {one.name: one.shape[-1] if isinstance(one.shape[-1], int) else 0 for one in found}


def scores_from(session: ort.InferenceSession) -> bool:
    """Whether a run may say from which position on it wants logits; graphs of older exports give all of them."""
    return (FIRST_SCORED, "tensor(int64)") in {(one.name, one.type) for one in session.get_overridable_initializers()}


def has_independent_rows(session: ort.InferenceSession) -> bool:
    """Whether a token's logits are the same bits whatever other tokens are in a call."""
    return session.get_modelmeta().custom_metadata_map.get(ROWS) == INDEPENDENT


def _check_names(path: Path, kind: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, extra = expected - found, found - expected
        raise RunnerError(
            f"{paths.shown(path)}: the graph's {kind} differ from the manifest's cache (missing: "
            f"{listed(missing, room=60) or 'none'}; left over: {listed(extra, room=60) or 'none'}); export again",
            details=[
                *(f"missing: {name}" for name in sorted(missing, key=natural)),
                *(f"left over: {name}" for name in sorted(extra, key=natural)),
            ],
        )


def _check_state(path: Path, inputs: Mapping[str, ort.NodeArg], spec: CacheSpec) -> None:
    """Sizes and dtypes, before buffers of the spec's sizes are made."""
    for tensor in spec.tensors:
        found = inputs[tensor.past_name]
        sizes = [axis if isinstance(axis, int) else None for axis in found.shape]
        asked = [axis if isinstance(axis, int) else None for axis in tensor.shape]
        if sizes != asked or found.type != _TYPES[tensor.dtype]:
            raise RunnerError(
                f"{paths.shown(path)}: the graph's {tensor.past_name} is {found.type} {shown(found.shape)}, the "
                f"manifest's {tensor.dtype} {shown(list(tensor.shape))}; export again"
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
    return RunnerError(f"{paths.shown(path, 100)}: onnxruntime {ort.__version__} cannot load it; {remedy} ({reason})")
