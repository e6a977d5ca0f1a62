"""Which of a program's graphs is opened: the one for our operators where these can be had, else onnxruntime's own.

In: a program and a choice of kernels. Out: a ``Variant``: the graph, its twin that scores every position, and the
library to register. All graphs of a program read the same data files.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from lfm2_export.backends.base import Kernels, KvCache, RunnerOptions
from lfm2_export.cache import CacheSpec
from lfm2_export.errors import ArtifactError, RunnerError
from lfm2_export.kernels import build, targets
from lfm2_export.manifest import MODEL, Program

logger = logging.getLogger(__name__)

# Roles of a program's graphs beside MODEL.
CPU = "cpu"  # QMoE with int8 activations, which onnxruntime before 1.31 rejects
SCORING = "scoring"  # logits of every position, otherwise as CPU
LFM2, LFM2_SCORING = "lfm2", "lfm2_scoring"  # on our operators
LFM2_KV8, LFM2_KV8_SCORING = "lfm2_kv8", "lfm2_kv8_scoring"  # on our operators, keys and values in int8
_OWN_ROLES = (LFM2, LFM2_SCORING, LFM2_KV8, LFM2_KV8_SCORING)
# In a graph's metadata: a token's logits are the same bits whatever other tokens are in a call.
ROWS, INDEPENDENT = "lfm2_export.rows", "independent"


def graph_name(file_name: str, role: str) -> str:
    """The file of a graph: ``model_q4.onnx``, ``model_q4_cpu.onnx``, ..."""
    return file_name if role == MODEL else f"{file_name.removesuffix('.onnx')}_{role}.onnx"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """``library``: the operators that a session must know to open ``path`` and ``scoring_path``. ``cache``: the state
    that the graph takes and returns."""

    path: Path
    cache: CacheSpec
    scoring_path: Path | None = None
    library: Path | None = None


def cache_of(program: Program, role: str) -> CacheSpec:
    """The state that the graph of a role takes and returns."""
    if role not in _OWN_ROLES:
        return program.cache
    cache = program.own_cache or program.cache
    return cache.with_int8_positions() if role in (LFM2_KV8, LFM2_KV8_SCORING) else cache


def choose(folder: Path, program: Program, options: RunnerOptions | None = None) -> Variant:
    """The graph that is fastest here, or the one that ``options`` ask for.

    Raises:
        RunnerError: our kernels were asked for, and the program has no graph for them or they cannot be had here.
    """
    options = options or RunnerOptions()
    if options.kv_cache is KvCache.INT8:
        return _with_int8_cache(folder, program, options.kernels)
    library = _library(program, options.kernels)
    if library is not None:
        return _variant(folder, program, LFM2, LFM2_SCORING, library)
    return _variant(folder, program, CPU if CPU in program.graphs else MODEL, SCORING, None)


def _variant(folder: Path, program: Program, role: str, scoring: str, library: Path | None) -> Variant:
    if role not in program.graphs:
        raise ArtifactError(
            f"{folder}: of {program}, the graph for the kernels that can be had here is missing; bring back "
            "onnx/model*.onnx, or export again"
        )
    named = program.graphs.get(scoring)
    return Variant(
        path=folder / program.graphs[role],
        cache=cache_of(program, role),
        scoring_path=None if named is None else folder / named,
        library=library,
    )


def _with_int8_cache(folder: Path, program: Program, kernels: Kernels) -> Variant:
    if LFM2_KV8 not in program.graphs or kernels is Kernels.STOCK:
        raise RunnerError(
            f"{program}: --kv-cache int8 is for q4 and q8 on our kernels; export such a scheme (again), without "
            "--kernels stock"
        )
    library = _library(program, Kernels.LFM2)
    return _variant(folder, program, LFM2_KV8, LFM2_KV8_SCORING, library)


def _library(program: Program, kernels: Kernels) -> Path | None:
    if kernels is Kernels.STOCK or (kernels is Kernels.AUTO and LFM2 not in program.graphs):
        return None
    if LFM2 not in program.graphs:
        raise RunnerError(
            f"{program}: has no graph for our kernels, which are for q4 and q8 in groups of 32 to 256; export "
            "such a scheme (again), or pass --kernels stock"
        )
    if kernels is Kernels.AUTO:
        return own_library()
    own = own_kernels()
    if own.library is None:
        raise RunnerError(f"our kernels cannot be had here: {own.missing}; pass --kernels stock and no --kv-cache")
    return own.library


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnKernels:
    """``library``: with our operators; None where it cannot be had, and ``missing`` says why. ``name``: the instruction
    set that its kernels use here, such as "avx2"."""

    library: Path | None = None
    name: str = ""
    missing: str = ""


def own_library() -> Path | None:
    """The library with our operators; None where it cannot be had, which is said once, with the cause.

    Raises:
        RunnerError: LFM2_KERNELS names kernels that this processor does not run.
    """
    own = own_kernels()
    if own.missing:
        _say_once(own)
    return own.library


@functools.cache
def _say_once(own: OwnKernels) -> None:
    logger.warning("%s; onnxruntime's own kernels run instead", own.missing)


@functools.cache
def own_kernels() -> OwnKernels:
    """Our operators, built at first use, or why they cannot be had.

    Raises:
        RunnerError: LFM2_KERNELS names kernels that this processor does not run.
    """
    try:
        path = build.onnx_library_path()
    except build.KernelBuildError as error:
        return OwnKernels(missing=str(error))
    if path is None:
        return OwnKernels(missing=build.missing_tools(build.ONNX_LIBRARY))
    try:
        names = targets.runnable(path)
    except OSError as error:
        return OwnKernels(missing=f"{path}: cannot be loaded ({error}); delete it to have it built again")
    if names == [targets.PLAIN]:
        return OwnKernels(missing=f"this processor lacks what our kernels are for ({targets.WANTED})")
    name = targets.chosen(names)
    if misfit := _misfit(path):
        return OwnKernels(missing=misfit)
    return OwnKernels(library=path, name=name)


def _misfit(library: Path) -> str:
    """Why onnxruntime cannot take the library's operators, found out by registering them; empty where it can."""
    from lfm2_export.backends.onnx.session import session_options  # imports onnxruntime, which an export does without

    session_options(1, library)
    reason = ctypes.CDLL(str(library)).lfm2_onnx_misfit
    reason.restype = ctypes.c_char_p
    return reason().decode()


def runnable(program: Program) -> dict[str, Program]:
    """Every shipped graph that runs here, by its file, as a program of its own; without those that score."""
    found = {}
    for role, name in program.graphs.items():
        if role not in (SCORING, *_OWN_ROLES):
            found[name] = replace(program, graphs={MODEL: name})
        elif role == LFM2 and own_library() is not None:
            found[name] = replace(program, graphs={MODEL: name, LFM2: name})
    return found
