"""Takes an ONNX program's steps apart with onnxruntime's own profiler.

In: a program of an artifact and a prompt. Out: ``Profile`` by operator type, as onnxruntime runs the graph: after its
own fusions. The profiler belongs to a session and writes one file when it ends, so the program is opened once more for
it. It counts whole microseconds: what a graph of many small nodes loses by that is found outside of operators.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from lfm2_export.backends.base import RunnerOptions
from lfm2_export.backends.onnx.buffers import StateBuffers
from lfm2_export.backends.onnx.runner import run
from lfm2_export.backends.onnx.session import check_program, new_session, session_options
from lfm2_export.backends.onnx.variants import Variant, choose
from lfm2_export.backends.profile import NOTHING, Profile, Spent, Step, Trace, summarize, take_steps
from lfm2_export.backends.runner_base import DEFAULT_CHUNK_SIZE
from lfm2_export.errors import RunnerError

if TYPE_CHECKING:
    from lfm2_export.manifest import Program

_KERNEL = "_kernel_time"


def profile_program(
    folder: Path, program: Program, prompt: Sequence[int], options: RunnerOptions | None = None
) -> Profile:
    """A profile of the graph that ``OnnxRunner`` opens.

    Raises:
        RunnerError: the program cannot be loaded, or its runs were not all traced.
        ContextLimitError: the prompt and one token more do not fit.
    """
    options = options or RunnerOptions()
    variant = choose(folder, program, options)
    with tempfile.TemporaryDirectory(prefix="lfm2-export-") as scratch:
        session = _open(variant, Path(scratch) / "profile", options.threads)
        try:
            steps = _take_steps(session, variant, program, prompt)
        finally:
            written = session.end_profiling()
        traces = read_traces(json.loads(Path(written).read_text(encoding="utf-8")))
    return summarize(steps, traces, prompt_tokens=len(prompt))


def _open(variant: Variant, prefix: Path, threads: int | None) -> ort.InferenceSession:
    options = session_options(threads, variant.library)
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    try:
        return new_session(variant.path, options)
    except Exception as error:  # onnxruntime's exceptions have no common base class of their own
        raise RunnerError(f"{variant.path}: cannot be profiled: {' '.join(str(error).split())[:300]}") from error


def _take_steps(session: ort.InferenceSession, variant: Variant, program: Program, prompt: Sequence[int]) -> list[Step]:
    state = StateBuffers(variant.cache, 1, 0)
    state.ensure(min(2 * len(prompt), program.context_length), program.context_length)
    logits = np.empty((1, 1, check_program(session, variant.path, variant.cache)), dtype=np.float32)

    def step(tokens: np.ndarray, position: int) -> None:
        if position == 0:
            state.clear()
        state.ensure(position + len(tokens), program.context_length)
        run(session, state, tokens[None], np.array([len(tokens)], dtype=np.int64), logits)

    return take_steps(step, prompt, context_length=program.context_length, chunk_size=DEFAULT_CHUNK_SIZE)


def read_traces(events: Sequence[dict[str, Any]]) -> list[Trace]:
    """What each run spent in kernels, by operator type; matrix products also by the size of their weight."""
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")
    traces: list[dict[tuple[str, ...], Spent]] = [{} for _ in runs]
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_KERNEL):
            continue
        index = bisect_right(runs, event["ts"], key=lambda span: span[0]) - 1
        if index >= 0 and event["ts"] <= runs[index][1]:
            for key in _keys(event["args"]):
                traces[index][key] = traces[index].get(key, NOTHING).plus(1e-3 * event["dur"])
    return list(traces)


def _keys(args: dict[str, Any]) -> list[tuple[str, ...]]:
    operator = args["op_name"]
    if not operator.startswith("MatMul"):
        return [(operator,)]
    inside, outside = (next(iter(args[which][0].values()))[-1] for which in ("input_type_shape", "output_type_shape"))
    return [(operator,), (operator, f"{inside} to {outside}")]
