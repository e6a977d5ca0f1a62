"""What is read back from an artifact's files is what its exporter says that it wrote, in every layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.backends import get_backend
from lfm2_export.backends.onnx.stored import StoredWeights
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.errors import ArtifactError
from lfm2_export.parity.storage import relative_errors
from tests.checkpoints import tiny_config
from tests.conftest import Exported

CONFIG = tiny_config(
    "lfm2_moe", layer_types=["conv", "full_attention"], num_hidden_layers=2, moe_intermediate_size=96, conv_bias=True
)
FP32, Q4 = "model.onnx", "model_q4.onnx"


@pytest.fixture
def found(random_artifact: Callable[..., Exported]) -> Exported:
    return random_artifact(CONFIG, ("fp32", "q4"), group_size=32)  # uniform: linear layers have zero points


def opened(found: Exported, scheme: str) -> tuple[Checkpoint, StoredWeights]:
    checkpoint = lfm2_export.open_checkpoint(found.checkpoint)
    artifact = Artifact.open(found.artifact)
    stored = get_backend("onnx").stored_weights(artifact.path, artifact.program("onnx", scheme), checkpoint.config)
    assert isinstance(stored, StoredWeights)
    return checkpoint, stored


def test_fp32_weights_are_the_checkpoints_to_the_last_bit(found: Exported) -> None:
    checkpoint, stored = opened(found, "fp32")
    assert stored.tensors.keys() == checkpoint.tensors.keys()
    for name, info in checkpoint.tensors.items():
        assert stored.tensors[name].shape == info.shape
        assert stored.tensors[name].dtype == "float32"
        assert np.array_equal(stored.read(name), checkpoint.read(name)), name


def test_q4_weights_are_as_far_off_as_the_manifest_says(found: Exported) -> None:
    checkpoint, stored = opened(found, "q4")
    said = {t.name: t for t in Artifact.open(found.artifact).program("onnx", "q4").tensors}
    for name, tensor in stored.tensors.items():
        if (entry := said.get(name) or said.get(name.removesuffix(".weight"))) is None:
            continue  # experts are said of as one tensor
        weight = checkpoint.read(name)
        error = relative_errors(stored.read(name).reshape(1, -1), weight.reshape(1, -1))[0]
        assert tensor.dtype == entry.dtype
        assert error == pytest.approx(entry.error or 0.0, rel=1e-4), name
    experts = [name for name in stored.tensors if ".experts." in name]
    worst = max(relative_errors(stored.read(name), checkpoint.read(name)).max() for name in experts)
    print(f"{len(experts)} experts' matrices, worst row {worst:.3f}")
    assert 0.02 < worst < 0.2


@pytest.mark.parametrize("scheme", ["fp32", "q4"])
def test_ranges_of_rows_are_parts_of_the_whole(found: Exported, scheme: str) -> None:
    _, stored = opened(found, scheme)
    for name, tensor in stored.tensors.items():
        whole, rows = stored.read(name), tensor.shape[0]
        assert whole.dtype == np.float32
        for part in (slice(0, 1), slice(rows // 3, rows // 2), slice(rows - 1, rows), slice(rows // 2, None)):
            assert np.array_equal(stored.read(name, part), whole[part]), (name, part)


def test_the_graph_decides_and_not_the_plan(found: Exported, tmp_path: Path) -> None:
    """Without its zero point, a MatMulNBits computes with other weights, and so does the reader."""
    folder, model = copied(found, tmp_path, Q4)
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits" and len(n.input) > 3 and n.input[3])
    name = node.input[1].removesuffix(".qdata") + ".weight"
    node.input[3] = ""
    onnx.save(model, folder / Q4)
    checkpoint = lfm2_export.open_checkpoint(found.checkpoint)
    stored = StoredWeights(folder / Q4, checkpoint.config)
    assert relative_errors(stored.read(name), checkpoint.read(name)).max() > 0.3


def copied(found: Exported, folder: Path, graph: str) -> tuple[Path, onnx.ModelProto]:
    copy = shutil.copytree(found.artifact / "onnx", folder / "onnx")
    return copy, onnx.load(copy / graph, load_external_data=False)


def test_a_truncated_data_file_is_named(found: Exported, tmp_path: Path) -> None:
    folder, _ = copied(found, tmp_path, FP32)
    (folder / f"{FP32}_data").write_bytes((folder / f"{FP32}_data").read_bytes()[:5000])
    with pytest.raises(ArtifactError, match=r"model\.onnx_data: ends inside model\.embed_tokens\.weight"):
        StoredWeights(folder / FP32, lfm2_export.open_checkpoint(found.checkpoint).config)


@pytest.mark.parametrize("location", ["../model.onnx_data", "/nonexistent/x", "a\\b", ".."])
def test_a_data_file_outside_the_folder_is_refused(found: Exported, tmp_path: Path, location: str) -> None:
    folder, model = copied(found, tmp_path, FP32)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, folder / "changed.onnx")
    with pytest.raises(ArtifactError, match=r"names the data file .* which is not beside it"):
        StoredWeights(folder / "changed.onnx", lfm2_export.open_checkpoint(found.checkpoint).config)


def test_a_weight_that_no_node_reads_is_missed(found: Exported, tmp_path: Path) -> None:
    folder, model = copied(found, tmp_path, FP32)
    node = next(n for n in model.graph.node if n.op_type == "CausalConvWithState")
    node.input[1] = "val_0"
    onnx.save(model, folder / FP32)
    with pytest.raises(ArtifactError, match=r"no node reads model\.layers\.0\.conv\.conv\.weight"):
        StoredWeights(folder / FP32, lfm2_export.open_checkpoint(found.checkpoint).config)


def test_a_tied_head_on_other_bytes_is_refused(found: Exported, tmp_path: Path) -> None:
    folder, model = copied(found, tmp_path, FP32)
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "lm_head.weight")
    next(entry for entry in head.external_data if entry.key == "offset").value = "64"
    onnx.save(model, folder / FP32)
    with pytest.raises(ArtifactError, match="lm_head does not read the bytes of the embedding"):
        StoredWeights(folder / FP32, lfm2_export.open_checkpoint(found.checkpoint).config)


def test_another_config_is_refused(found: Exported) -> None:
    other = {**CONFIG, "intermediate_size": 128}
    config = lfm2_export.open_checkpoint(found.checkpoint).family.parse_config(other)
    with pytest.raises(ArtifactError, match=r"is stored as \[96, 64\], its config asks for \[128, 64\]"):
        StoredWeights(found.artifact / "onnx" / FP32, config)
