"""onnxruntime's profile of the bundled checkpoints' programs: against the graphs that it made of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.backends.base import Kernels, RunnerOptions
from lfm2_export.backends.onnx import profile_program
from lfm2_export.backends.onnx.profile import read_traces
from lfm2_export.backends.onnx.session import session_options
from lfm2_export.backends.profile import Spent
from lfm2_export.errors import ContextLimitError, RunnerError
from lfm2_export.manifest import Program
from tests.profiles import calls, check_profile, clean_up  # noqa: F401  (a fixture)

PROMPT = np.random.default_rng(0).integers(16, 2660, 40).tolist()
EXPECTED = {
    ("tiny-moe", "q4"): {"QMoE", "MatMulNBits", "GroupQueryAttention", "CausalConvWithState", "GatherBlockQuantized"},
    ("tiny-moe", "fp32"): {"MoE", "MatMul", "GroupQueryAttention", "CausalConvWithState"},
    ("tiny-dense", "q4"): {"MatMulNBits", "GroupQueryAttention", "CausalConvWithState", "GatherBlockQuantized"},
}


def program_of(folder: Path, scheme: str) -> Program:
    return Artifact.open(folder, verify=False).program("onnx", scheme)


def nodes(path: Path, folder: Path) -> Counter[str]:
    """The operators of the graph as onnxruntime runs it."""
    options = session_options(1)
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize(("checkpoint", "scheme"), list(EXPECTED))
@pytest.mark.usefixtures("clean_up")
def test_calls_are_the_nodes_of_the_graph(
    artifact, tmp_path_factory: pytest.TempPathFactory, checkpoint: str, scheme: str
) -> None:
    folder = artifact(checkpoint)
    program = program_of(folder, scheme)
    found = profile_program(folder, program, PROMPT, RunnerOptions(threads=1, kernels=Kernels.STOCK))
    check_profile(found, len(PROMPT))
    path = folder / program.graphs.get("cpu", program.graphs["model"])
    expected = nodes(path, tmp_path_factory.mktemp("optimized"))
    assert calls(found.prefill) == expected
    assert calls(found.decode) == expected
    assert expected.keys() >= EXPECTED[checkpoint, scheme]


@pytest.mark.usefixtures("clean_up")
def test_matrix_products_are_told_apart_by_size(artifact) -> None:
    folder = artifact("tiny-moe")
    found = profile_program(folder, program_of(folder, "q4"), PROMPT, RunnerOptions(threads=1, kernels=Kernels.STOCK))
    product = next(entry for entry in found.decode.operators if entry.operator == "MatMulNBits")
    assert sum(part.calls for part in product.parts) == product.calls
    assert sum(part.ms for part in product.parts) <= product.ms * 1.5  # Medians need not add up.
    vocabulary = lfm2_export.load_runner(folder, scheme="q4", threads=1).vocab_size
    (head,) = [part for part in product.parts if part.operator.endswith(f" to {vocabulary}")]
    assert head.calls == 1


@pytest.mark.usefixtures("clean_up")
def test_a_prompt_of_several_chunks_is_one_prefill(artifact) -> None:
    folder = artifact("tiny-dense")
    program = program_of(folder, "q4")
    once = calls(profile_program(folder, program, PROMPT, RunnerOptions(threads=1)).prefill)
    long = np.random.default_rng(1).integers(16, 2660, 600).tolist()
    found = profile_program(folder, program, long, RunnerOptions(threads=1))
    check_profile(found, 600)
    assert calls(found.prefill) == {name: 2 * count for name, count in once.items()}


@pytest.mark.usefixtures("clean_up")
def test_a_runner_beside_it_goes_on_as_if_nothing_had_been(artifact) -> None:
    folder = artifact("tiny-moe")
    runner = lfm2_export.load_runner(folder, scheme="q4", threads=1)
    runner.prefill([PROMPT])
    before = runner.snapshot()
    expected = [runner.decode([token]) for token in PROMPT[:4]]
    runner.restore(before)
    profile_program(folder, program_of(folder, "q4"), PROMPT, RunnerOptions(threads=1))
    for token, logits in zip(PROMPT[:4], expected, strict=True):
        np.testing.assert_array_equal(runner.decode([token]), logits)


@pytest.mark.usefixtures("clean_up")
def test_a_context_that_is_full_but_for_one_token(artifact) -> None:
    folder = artifact("tiny-dense")
    program = replace(program_of(folder, "q4"), context_length=len(PROMPT) + 1)
    assert profile_program(folder, program, PROMPT, RunnerOptions(threads=1)).decode.steps == 3
    with pytest.raises(ContextLimitError, match="do not fit the context limit"):
        profile_program(folder, program, [*PROMPT, 1], RunnerOptions(threads=1))


@pytest.mark.usefixtures("clean_up")
def test_a_program_that_cannot_be_loaded_is_named(artifact) -> None:
    folder = artifact("tiny-dense")
    program = replace(program_of(folder, "q4"), graphs={"model": "onnx/nothing.onnx"})
    with pytest.raises(RunnerError, match=r"onnx/nothing\.onnx: cannot be profiled: .*"):
        profile_program(folder, program, PROMPT, RunnerOptions(threads=1))


def test_events_belong_to_the_run_that_they_fall_into() -> None:
    def kernel(ts: int, dur: int, **args: object) -> dict[str, object]:
        return {"cat": "Node", "name": "X_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": "Add", **args}}

    def run(ts: int, dur: int) -> dict[str, object]:
        return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}}

    sizes = {"input_type_shape": [{"float": [1, 4, 8]}], "output_type_shape": [{"float": [1, 4, 16]}]}
    events = [
        kernel(5, 1),  # While loading, for instance when a constant is folded.
        kernel(100, 3),
        kernel(104, 5),
        run(100, 20),
        kernel(121, 7),
        kernel(130, 2, op_name="MatMul", **sizes),
        run(130, 2),
        {"cat": "Node", "name": "X_fence_before", "ts": 130, "dur": 1, "args": {"op_name": "Add"}},
        {"cat": "Session", "name": "session_initialization", "ts": 1, "dur": 50, "args": {}},
    ]
    assert read_traces(events) == [
        {("Add",): Spent(2, pytest.approx(0.008))},
        {("MatMul",): Spent(1, 0.002), ("MatMul", "8 to 16"): Spent(1, 0.002)},
    ]
