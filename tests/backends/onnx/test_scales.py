"""Scales are float16 in the data file and float32 where onnxruntime computes with them; artifacts that were exported
with float32 scales open, run and are read as they ever were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.backends.onnx import variants
from lfm2_export.backends.onnx.session import session_options
from lfm2_export.backends.onnx.stored import StoredWeights
from lfm2_export.errors import ArtifactError
from tests.checkpoints import tiny_config
from tests.conftest import Exported

# Rows of several groups of each size: 128 in the table, 64 and 32 in the experts, 32 elsewhere.
CONFIG = tiny_config(
    "lfm2_moe",
    layer_types=["conv", "full_attention", "conv"],
    num_hidden_layers=3,
    hidden_size=256,
    moe_intermediate_size=128,
)
SCHEMES = ("q4", "q8")
# Where a node has its codes and the scales of them.
OPERANDS = {
    "MatMulNBits": [(1, 2)],
    "GatherBlockQuantized": [(0, 2)],
    "QMoE": [(2, 3), (5, 6)],
    "SparseMoe": [(3, 4), (6, 7)],
    "FeedForward": [(1, 2), (4, 5), (7, 8)],
    "Projections": [(1, 2), (4, 5), (7, 8)],
}
STOCK, OWN = ("model", "scoring"), ("lfm2", "lfm2_scoring", "lfm2_kv8", "lfm2_kv8_scoring")
LEVELS = ("ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")

each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
needs_library = pytest.mark.skipif(variants.own_library() is None, reason="our operators cannot be had here")


@pytest.fixture(scope="module")
def found(random_artifact: Callable[..., Exported]) -> Exported:
    return random_artifact(CONFIG, SCHEMES)


@pytest.fixture(scope="module")
def old(found: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact as it was made before: float32 scales, each matrix with its own."""
    folder = tmp_path_factory.mktemp("old")
    for path in (found.artifact / "onnx").glob("*.onnx"):
        onnx.save(in_the_old_layout(onnx.load(path)), folder / path.name)
    return folder


def graphs_of(found: Exported, scheme: str) -> dict[str, Path]:
    program = Artifact.open(found.artifact, verify=False).program("onnx", scheme)
    return {role: found.artifact / name for role, name in program.graphs.items()}


def scales_of(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, int, int]]:
    """Nodes, and which of their inputs are codes and scales."""
    for node in model.graph.node:
        yield from ((node, codes, scales) for codes, scales in OPERANDS.get(node.op_type, ()))


def casts_of(model: onnx.ModelProto) -> dict[str, str]:
    """What is cast, by what the Cast makes."""
    return {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}


def in_the_old_layout(model: onnx.ModelProto) -> onnx.ModelProto:
    casts = casts_of(model)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    added: dict[str, onnx.TensorProto] = {}
    for node, codes, index in list(scales_of(model)):
        halves = numpy_helper.to_array(values[casts.get(node.input[index], node.input[index])])
        name = node.input[codes].removesuffix(".qdata") + ".scale"
        added[name] = numpy_helper.from_array(halves.astype(np.float32), name)
        node.input[index] = name
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in added]
    nodes = [node for node in model.graph.node if node.op_type != "Cast" or node.input[0] not in values]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend([*kept, *added.values()])
    model.graph.node.extend(nodes)
    return model


def logits_of(path: Path, level: str = "ORT_ENABLE_ALL", tokens: int = 6) -> np.ndarray:
    options = session_options(1, variants.own_library() if "lfm2" in path.name else None)
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(3, CONFIG["vocab_size"], (1, tokens))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs()[2:]:
        shape = [size if isinstance(size, int) else {"batch_size": 1}.get(size, 0) for size in value.shape]
        feeds[value.name] = np.zeros(shape, {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}[value.type])
    return session.run(["logits"], feeds)[0]


@each_scheme
def test_runtimes_own_operators_read_float16_scales_through_casts(found: Exported, scheme: str) -> None:
    for role in STOCK:
        model = onnx.load(graphs_of(found, scheme)[role], load_external_data=False)
        casts, types = casts_of(model), {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        read = [casts[node.input[index]] for node, _, index in scales_of(model)]
        assert {types[name] for name in read} == {TensorProto.FLOAT16}
        table, head = (next(n for n in model.graph.node if n.input[i : i + 1] == [name]) for i, name in (
            (0, "model.embed_tokens.qdata"), (1, "lm_head.qdata")))  # fmt: skip
        assert table.input[2] == head.input[2]  # through one Cast
        assert len(set(read)) == len(read) - 1
        assert "lm_head.scale" not in types


@each_scheme
def test_our_operators_read_float16_scales_where_they_are_mapped(found: Exported, scheme: str) -> None:
    for role in OWN:
        model = onnx.load(graphs_of(found, scheme)[role], load_external_data=False)
        types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        own = [node.input[index] for node, _, index in scales_of(model) if node.domain == "lfm2"]
        assert len(own) > 10
        assert {types[name] for name in own} == {TensorProto.FLOAT16}
        assert [source for source in casts_of(model).values() if source in types] == ["model.embed_tokens.scale"]


@each_scheme
def test_every_optimization_level_gives_the_same_logits(found: Exported, scheme: str) -> None:
    """The Casts are folded from the first level on."""
    for role, path in graphs_of(found, scheme).items():
        if role in (*STOCK, "cpu"):
            first, *others = (logits_of(path, level) for level in LEVELS)
            assert all(np.array_equal(first, other) for other in others), role
            assert first.std() > 0.1


def test_without_any_optimization_the_graph_is_right_at_full_precision(found: Exported, tmp_path: Path) -> None:
    """With int8 activations onnxruntime 1.31's MatMulNBits then gives zeros on x86-64: it packs the scales with the
    codes before it runs, and here they are made by a node. docs/folder.md says so."""
    model = onnx.load(graphs_of(found, "q4")["model"])
    for node in model.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)
    onnx.save(model, tmp_path / "exact.onnx")
    plain, folded = (logits_of(tmp_path / "exact.onnx", level) for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"))
    print(f"worst difference of logits {np.abs(plain - folded).max():.1e}, their spread {folded.std():.1f}")
    assert np.abs(plain - folded).max() < 1e-4


@each_scheme
@pytest.mark.parametrize("role", ["model", pytest.param("lfm2", marks=needs_library)])
def test_graphs_of_the_old_layout_run_and_give_the_same(found: Exported, old: Path, scheme: str, role: str) -> None:
    path = graphs_of(found, scheme)[role]
    for tokens in (1, 5, 20):
        assert np.array_equal(logits_of(old / path.name, tokens=tokens), logits_of(path, tokens=tokens))


@each_scheme
@pytest.mark.parametrize("role", ["model", "lfm2"])
def test_the_reader_of_weights_takes_both_layouts(found: Exported, old: Path, scheme: str, role: str) -> None:
    path, config = graphs_of(found, scheme)[role], lfm2_export.open_checkpoint(found.checkpoint).config
    new, before = StoredWeights(path, config), StoredWeights(old / path.name, config)
    assert new.tensors.keys() == before.tensors.keys()
    for name in new.tensors:
        assert np.array_equal(new.read(name), before.read(name)), name


@pytest.mark.parametrize(
    ("to", "source", "message"),
    [
        (TensorProto.FLOAT16, None, "has no initializer Cast_"),  # would round what is wider
        (TensorProto.FLOAT, "lm_head.qdata", "its scales have the wrong element type"),
        (TensorProto.FLOAT, "input_ids", "has no initializer Cast_"),
    ],
)
def test_casts_that_change_values_are_not_followed(
    found: Exported, tmp_path: Path, to: int, source: str | None, message: str
) -> None:
    model = onnx.load(graphs_of(found, "q4")["model"])
    head = next(node for node in model.graph.node if node.input[1:2] == ["lm_head.qdata"])
    cast = next(node for node in model.graph.node if node.output[:1] == [head.input[2]])
    cast.input[0] = source or cast.input[0]
    del cast.attribute[:]
    cast.attribute.append(helper.make_attribute("to", to))
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(ArtifactError, match=message):
        StoredWeights(tmp_path / "changed.onnx", lfm2_export.open_checkpoint(found.checkpoint).config)
