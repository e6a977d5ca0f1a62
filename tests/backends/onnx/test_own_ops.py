"""What stands in the graphs on our operators, and which graph is opened where."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import lfm2_export
from lfm2_export import cli
from lfm2_export.artifact import Artifact
from lfm2_export.backends.base import Kernels, KvCache, RunnerOptions
from lfm2_export.backends.onnx import variants
from lfm2_export.backends.onnx.session import open_session, session_options
from lfm2_export.backends.onnx.variants import choose, runnable
from lfm2_export.errors import RunnerError
from lfm2_export.kernels import build, targets
from lfm2_export.manifest import Program

Exported = Callable[[str], Path]

ROLES = ("lfm2", "lfm2_scoring", "lfm2_kv8", "lfm2_kv8_scoring")
SCHEMES = ("q4", "q8")
CASES = [(checkpoint, scheme) for checkpoint in ("tiny-moe", "tiny-dense") for scheme in SCHEMES]
each_program = pytest.mark.parametrize(("checkpoint", "scheme"), CASES)

# Of the bundled checkpoints, counted by hand: 6 layers, of them 2 attention (q, k and v together; out) and 4 conv (in,
# out), and one head. Feed-forward blocks are dense in 2 layers of tiny-moe and in all of tiny-dense.
OWN = {"MatMulNBits": 2 + 4 * 2 + 1, "Projections": 2, "GatedConv": 4, "TokenLayout": 1}
# Where experts are, their router is part of them.
FEED_FORWARDS = {"tiny-moe": {"FeedForward": 2, "SparseMoe": 4}, "tiny-dense": {"FeedForward": 6}}
# What is left of the runtime's own: the embedding, whose scales are restored, and the norm before the head, which comes
# before a row is chosen, or those that are scored.
STOCK = {"GatherBlockQuantized": 1, "Cast": 1, "SkipSimplifiedLayerNormalization": 1}

needs_library = pytest.mark.skipif(variants.own_library() is None, reason="our operators cannot be had here")


def program_of(folder: Path, scheme: str) -> Program:
    return Artifact.open(folder, verify=False).program("onnx", scheme)


def graph_of(folder: Path, scheme: str, role: str) -> onnx.ModelProto:
    return onnx.load(folder / program_of(folder, scheme).graphs[role], load_external_data=False)


@each_program
@pytest.mark.parametrize("role", ROLES)
def test_every_layer_became_our_operators(artifact: Exported, checkpoint, scheme, role):
    model = graph_of(artifact(checkpoint), scheme, role)
    attention = "AttentionInt8" if role.startswith("lfm2_kv8") else "Attention"
    counts = Counter((node.domain, node.op_type) for node in model.graph.node)
    own = {op: count for (domain, op), count in counts.items() if domain == "lfm2"}
    print(own)
    assert own == OWN | FEED_FORWARDS[checkpoint] | {attention: 2}
    stock = Counter(node.op_type for node in model.graph.node if node.domain != "lfm2")
    assert stock == STOCK | ({"Slice": 1} if role.endswith("scoring") else {"GatherND": 1})
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("lfm2_export.rows", "independent")]
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    assert opsets == {"": 21, "com.microsoft": 1, "lfm2": 1}


@each_program
def test_every_weight_is_read_from_where_the_portable_graph_reads_it(artifact: Exported, checkpoint, scheme):
    def places(role: str) -> dict[str, object]:
        found = {}
        for tensor in graph_of(artifact(checkpoint), scheme, role).graph.initializer:
            entries = [(entry.key, entry.value) for entry in tensor.external_data]
            if entries:
                found[tensor.name] = (tuple(tensor.dims), tensor.data_type, entries)
        return found

    portable = places("model")
    assert len(portable) > 50
    for role in ROLES:
        assert places(role) == portable


def boundary(session: ort.InferenceSession) -> list[dict[str, tuple[str, list[int | str]]]]:
    return [{v.name: (v.type, v.shape) for v in values} for values in (session.get_inputs(), session.get_outputs())]


@needs_library
@each_program
def test_inputs_and_outputs_are_the_portable_graphs_but_for_an_int8_cache_and_the_residual_streams(
    artifact: Exported, checkpoint, scheme
):
    folder, program = artifact(checkpoint), program_of(artifact(checkpoint), scheme)
    options = session_options(1, variants.own_library())

    def of_role(role: str) -> list[dict[str, tuple[str, list[int | str]]]]:
        return boundary(ort.InferenceSession(folder / program.graphs[role], options))

    portable = of_role("model")
    rows = ["batch_size", "sequence_length"]
    streams = {f"residual.{layer}": ("tensor(float)", [*rows, 256]) for layer in range(6)}
    assert of_role("lfm2") == portable
    quantized = [
        {
            name: ("tensor(uint8)", [*shape[:-1], 32 + 4]) if name.endswith((".key", ".value")) else (kind, shape)
            for name, (kind, shape) in found.items()
        }
        for found in portable
    ]
    assert of_role("lfm2_kv8") == quantized
    for role, (inputs, outputs) in (("lfm2_scoring", portable), ("lfm2_kv8_scoring", quantized)):
        kind, shape = outputs["logits"]
        logits = {"logits": (kind, ["batch_size", "scored_length", shape[-1]])}
        conv = {name.replace("present_", ""): value for name, value in outputs.items() if "conv" in name}
        windows = {
            f"conv_window.{name.split('.')[1]}": (kind, [b, None, d]) for name, (kind, (b, _, d)) in conv.items()
        }
        assert of_role(role) == [inputs, outputs | logits | windows | streams]


def test_only_whole_numbers_on_float_activations_have_such_graphs(artifact: Exported):
    for scheme in ("fp32", "fp16", "q4f16"):
        assert not set(ROLES) & set(program_of(artifact("tiny-moe"), scheme).graphs)


def test_a_session_without_the_library_cannot_open_them(artifact: Exported):
    folder = artifact("tiny-dense")
    with pytest.raises(RunnerError, match=r"model_q4_lfm2\.onnx: onnxruntime .* cannot load it; .*lfm2"):
        open_session(folder / program_of(folder, "q4").graphs["lfm2"], threads=1)


@needs_library
def test_ours_are_chosen_where_they_can_be_had(artifact: Exported):
    folder = artifact("tiny-moe")
    program, library = program_of(folder, "q4"), variants.own_library()
    for kernels in (Kernels.AUTO, Kernels.LFM2):
        found = choose(folder, program, RunnerOptions(kernels=kernels))
        assert (found.path.name, found.library) == ("model_q4_lfm2.onnx", library)
        assert found.scoring_path is not None
        assert found.scoring_path.name == "model_q4_lfm2_scoring.onnx"
    stock = choose(folder, program, RunnerOptions(kernels=Kernels.STOCK))
    assert (stock.path.name, stock.library) == ("model_q4_cpu.onnx", None)
    quantized = choose(folder, program, RunnerOptions(kv_cache=KvCache.INT8))
    assert (quantized.path.name, quantized.library) == ("model_q4_lfm2_kv8.onnx", library)
    assert quantized.scoring_path is not None
    assert quantized.scoring_path.name == "model_q4_lfm2_kv8_scoring.onnx"
    assert set(runnable(program)) == {f"onnx/model_q4{end}.onnx" for end in ("", "_cpu", "_lfm2")}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    variants.own_kernels.cache_clear()
    monkeypatch.setattr(build, "onnx_library_path", lambda: None)
    monkeypatch.setattr(build, "_compiler", lambda: None)
    yield
    variants.own_kernels.cache_clear()


def without_own_graphs(program: Program) -> Program:
    return replace(program, graphs={role: name for role, name in program.graphs.items() if role not in ROLES})


def test_without_a_compiler_the_runtimes_own_kernels_are_chosen(artifact: Exported, no_compiler):
    folder = artifact("tiny-moe")
    program = program_of(folder, "q4")
    found = choose(folder, program)
    assert (found.path.name, found.library) == ("model_q4_cpu.onnx", None)
    assert set(runnable(program)) == {"onnx/model_q4.onnx", "onnx/model_q4_cpu.onnx"}
    tokens = [[20, 30, 40]]
    auto, stock = (lfm2_export.load_runner(folder, scheme="q4", threads=1, kernels=k) for k in ("auto", "stock"))
    np.testing.assert_array_equal(auto.prefill(tokens), stock.prefill(tokens))


@pytest.mark.parametrize("options", [{"kernels": "lfm2"}, {"kv_cache": "int8"}])
def test_without_a_compiler_ours_are_refused_with_what_they_need(artifact: Exported, no_compiler, options, caplog):
    with pytest.raises(RunnerError, match="our kernels cannot be had here") as raised:
        lfm2_export.load_runner(artifact("tiny-moe"), scheme="q4", **options)
    wanted = os.environ.get("CXX") or "c++ or g++ or clang++"
    assert str(raised.value) == (
        f"our kernels cannot be had here: liblfm2_onnx.so cannot be built without a C++20 compiler ({wanted}); "
        "pass --kernels stock and no --kv-cache"
    )
    assert caplog.records == []  # nothing falls back


def test_a_build_that_fails_is_said_and_the_runtimes_own_kernels_are_chosen(artifact, no_compiler, monkeypatch, caplog):
    def fails() -> Path:
        raise build.KernelBuildError("cmake failed with exit code 1: its output is in a.log")

    monkeypatch.setattr(build, "onnx_library_path", fails)
    for _ in range(2):
        assert choose(artifact("tiny-moe"), program_of(artifact("tiny-moe"), "q4")).library is None
    assert [record.getMessage() for record in caplog.records] == [
        "cmake failed with exit code 1: its output is in a.log; onnxruntime's own kernels run instead"
    ]


def test_a_library_that_cannot_be_loaded_is_said_and_the_runtimes_own_kernels_are_chosen(
    artifact, no_compiler, monkeypatch, tmp_path, caplog
):
    (tmp_path / "liblfm2_onnx.so").write_text("no library")
    monkeypatch.setattr(build, "onnx_library_path", lambda: tmp_path / "liblfm2_onnx.so")
    assert choose(artifact("tiny-moe"), program_of(artifact("tiny-moe"), "q4")).library is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tmp_path}/liblfm2_onnx.so: cannot be loaded (")
    assert line.endswith("); delete it to have it built again; onnxruntime's own kernels run instead")


@needs_library
def test_a_runtime_that_they_do_not_fit_is_said_and_its_own_kernels_are_chosen(artifact, monkeypatch, caplog):
    """What the library says of which runtime: tests/kernels/test_interface.py."""
    library = variants.own_library()
    assert variants._misfit(library) == ""
    variants.own_kernels.cache_clear()
    monkeypatch.setattr(variants, "_misfit", lambda path: "" if path != library else "ONNX Runtime 1.32.0: no")
    for _ in range(2):
        assert choose(artifact("tiny-moe"), program_of(artifact("tiny-moe"), "q4")).library is None
    assert [record.getMessage() for record in caplog.records] == [
        "ONNX Runtime 1.32.0: no; onnxruntime's own kernels run instead"
    ]
    variants.own_kernels.cache_clear()


def test_a_processor_without_fast_kernels_has_no_library_and_says_so(no_compiler, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(build, "onnx_library_path", lambda: tmp_path / "liblfm2_onnx.so")
    monkeypatch.setattr(targets, "runnable", lambda library: ["scalar"])
    assert variants.own_library() is variants.own_library() is None
    assert [record.getMessage() for record in caplog.records] == [
        f"this processor lacks what our kernels are for ({targets.WANTED}); onnxruntime's own kernels run instead"
    ]


@needs_library
def test_kernels_are_taken_by_name_and_another_name_is_refused(artifact: Exported, monkeypatch):
    variants.own_kernels.cache_clear()
    slowest = targets.runnable(build.onnx_library_path())[-1]
    monkeypatch.setenv("LFM2_KERNELS", slowest)
    assert (variants.own_kernels().name, slowest) == ("scalar", "scalar")
    variants.own_kernels.cache_clear()
    monkeypatch.setenv("LFM2_KERNELS", "avx1024")
    with pytest.raises(RunnerError, match=r"LFM2_KERNELS=avx1024: this processor runs .*scalar; unset it, or name one"):
        choose(artifact("tiny-moe"), program_of(artifact("tiny-moe"), "q4"))
    monkeypatch.delenv("LFM2_KERNELS")
    variants.own_kernels.cache_clear()
    assert variants.own_kernels().name == targets.runnable(build.onnx_library_path())[0]


def test_an_older_artifact_runs_and_says_what_ours_would_need(artifact: Exported):
    folder = artifact("tiny-moe")
    program = without_own_graphs(program_of(folder, "q4"))
    assert choose(folder, program).path.name == "model_q4_cpu.onnx"
    assert set(runnable(program)) == {"onnx/model_q4.onnx", "onnx/model_q4_cpu.onnx"}
    with pytest.raises(RunnerError, match=r"has no graph for our kernels.*export .*\(again\), or pass --kernels stock"):
        choose(folder, program, RunnerOptions(kernels=Kernels.LFM2))
    with pytest.raises(RunnerError, match="--kv-cache int8 is for q4 and q8 on our kernels"):
        choose(folder, program, RunnerOptions(kv_cache=KvCache.INT8))


@needs_library
@pytest.mark.parametrize("options", [("--kernels", "lfm2"), ("--kernels", "stock"), ("--kv-cache", "int8")])
def test_run_takes_the_choice(artifact: Exported, capsys: pytest.CaptureFixture[str], options):
    arguments = (
        "run",
        str(artifact("tiny-moe")),
        "--scheme",
        "q4",
        "--prompt",
        "What is a list?",
        "--temperature",
        "0",
    )
    assert cli.main([*arguments, "--max-new-tokens", "4", *options]) == 0
    said = capsys.readouterr().out
    assert said.strip()
    if options != ("--kv-cache", "int8"):  # the checkpoint is sure of its first words, whatever computes them
        assert cli.main([*arguments, "--max-new-tokens", "4"]) == 0
        assert capsys.readouterr().out == said


@needs_library
def test_bench_takes_the_choice(artifact: Exported, capsys: pytest.CaptureFixture[str]):
    arguments = ("bench", str(artifact("tiny-dense")), "--scheme", "q8", "--prompt-tokens", "4", "--new-tokens", "2")
    assert cli.main([*arguments, "--rounds", "1", "--kernels", "lfm2", "--kv-cache", "int8"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kernels", "fast"), ("'fast'", "auto", "lfm2", "stock")),
        (("--kv-cache", "int4"), ("'int4'", "float", "int8")),
        (
            ("--scheme", "q4", "--kv-cache", "int8", "--kernels", "stock"),
            ("--kv-cache int8", "without --kernels stock"),
        ),
        (("--scheme", "fp32", "--kv-cache", "int8"), ("--kv-cache int8 is for q4 and q8",)),
        (("--scheme", "fp32", "--kernels", "lfm2"), ("has no graph for our kernels", "--kernels stock")),
    ],
)
def test_a_choice_that_cannot_be_had_is_one_line(
    artifact: Exported, capsys: pytest.CaptureFixture[str], options, words
):
    try:
        code = cli.main(["run", str(artifact("tiny-moe")), "--prompt", "x", *options])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    print(line)
    assert (code, captured.out) == (2, "")
    assert all(word in line for word in words)


def test_a_pte_has_no_int8_cache():
    runner = pytest.importorskip("lfm2_export.backends.executorch.runner")
    from tests.artifacts import program

    with pytest.raises(RunnerError, match=r"a \.pte holds its keys and values in float32; leave --kv-cache out"):
        runner.choose(program("executorch", "8da4w"), RunnerOptions(kv_cache=KvCache.INT8))
