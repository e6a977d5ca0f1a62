"""The data files of exported programs, read back through the graphs' own offsets."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import external_data_helper, numpy_helper

import lfm2_export
from benchmarks.synthetic import write_random_checkpoint
from lfm2_export.artifact import Artifact
from lfm2_export.backends.onnx import weights
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import CheckpointError, QuantizationError
from lfm2_export.manifest import Program
from tests.artifacts import snapshot
from tests.checkpoints import tiny_config
from tests.conftest import SCHEMES
from tests.graphs import Graph

FAMILIES = ("tiny-moe", "tiny-dense")
# Widths that divide by 128, two of them by no more; experts whose rows have more than one group of any size.
WIDE = tiny_config(
    "lfm2_moe",
    hidden_size=256,
    intermediate_size=128,
    moe_intermediate_size=256,
    num_hidden_layers=2,
    layer_types=["conv", "full_attention"],
    num_attention_heads=8,
)

Exported = Callable[[str], Path]


class Place:
    """Where a graph says that an initializer lies."""

    def __init__(self, tensor: onnx.TensorProto):
        info = external_data_helper.ExternalDataInfo(tensor)
        self.file, self.offset, self.length = info.location, info.offset or 0, info.length
        self.shape, self.dtype = tuple(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)

    def read(self, folder: Path) -> np.ndarray:
        count = self.length // self.dtype.itemsize
        return np.fromfile(folder / self.file, self.dtype, count, offset=self.offset).reshape(self.shape)


def load(folder: Path, scheme: str) -> tuple[Program, onnx.ModelProto, dict[str, Place]]:
    program = Artifact.open(folder, verify=False).program("onnx", scheme)
    model = onnx.load(folder / program.graphs["model"], load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    return program, model, {tensor.name: Place(tensor) for tensor in outside}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_places_are_aligned_and_fill_the_file(artifact: Exported, checkpoint, scheme):
    folder = artifact(checkpoint)
    _, _, places = load(folder, scheme)
    (file,) = {place.file for place in places.values()}
    ranges = sorted({(place.offset, place.length) for place in places.values()})
    end = 0
    for offset, length in ranges:
        alignment = 65536 if length >= 1 << 20 else 64
        assert offset % alignment == 0, f"onnxruntime maps files: {offset} is not a multiple of {alignment}"
        assert end <= offset < end + alignment, "tensors overlap, or leave a gap"
        end = offset + length
    assert (folder / "onnx" / file).stat().st_size == end


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_tied_embedding_is_stored_once(artifact: Exported, scheme):
    folder = artifact("tiny-moe")
    program, _, places = load(folder, scheme)
    table, head = (
        {(p.offset, p.length) for name, p in places.items() if name.startswith(start)}
        for start in ("model.embed_tokens.", "lm_head.")
    )
    quantized = scheme not in ("fp32", "fp16")
    assert head <= table
    assert len(head) == 1  # codes or numbers; the scales that it reads are the table's by name too
    assert len(table) == 1 + quantized
    stored = sum(length for _, length in {(p.offset, p.length) for p in places.values()})
    entries = [entry.bytes for name, entry in program.files.items() if "_data" in name]
    vocabulary = sum(length for _, length in table)
    print(f"{scheme}: {sum(entries)} bytes, of them {vocabulary} the vocabulary's, once")
    assert stored <= sum(entries) < stored + vocabulary / 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_graphs_hold_no_weights_and_nothing_of_this_machine(artifact: Exported, scheme):
    folder = artifact("tiny-moe")
    program, _, _ = load(folder, scheme)
    for name in program.graphs.values():
        model = onnx.load(folder / name, load_external_data=False)
        inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert sum(numpy_helper.to_array(t).nbytes for t in inside) < 1000
        assert not model.doc_string
        assert not model.graph.doc_string
        assert not [n.name for n in model.graph.node if n.doc_string or n.metadata_props]
        assert not [v.name for v in (*model.graph.value_info, *model.graph.initializer) if v.doc_string]
        raw = (folder / name).read_bytes()
        for trace in (str(Path.home()), str(Path(lfm2_export.__file__).parent), tempfile.gettempdir(), ".py", "File "):
            assert trace.encode() not in raw, f"{name} names {trace}"


@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_fp32_stores_the_checkpoint_bit_by_bit(artifact: Exported, checkpoint):
    folder = artifact(checkpoint)
    source, (_, _, places) = open_checkpoint(checkpoint), load(folder, "fp32")

    def stored(name: str) -> np.ndarray:
        return places[name].read(folder / "onnx")

    compared = 0
    for name, info in source.tensors.items():
        values = source.read(name)
        layer, _, rest = name.partition(".feed_forward.experts.")
        if rest:
            expert, part = rest.split(".")[:2]
            stack = stored(f"{layer}.feed_forward.experts.{'down' if part == 'w2' else 'gate_up'}.weight")[int(expert)]
            found = {"w1": stack[0::2], "w2": stack, "w3": stack[1::2]}[part]
        elif name == "model.embed_tokens.weight":
            found = stored("model.embed_tokens.weight")
            np.testing.assert_array_equal(stored("lm_head.weight"), values)
        else:
            found = stored(name)
            if len(info.shape) == 2:
                found = found.T
        np.testing.assert_array_equal(found, values, err_msg=name)
        compared += values.size
    print(f"{checkpoint}: {compared} weights are the checkpoint's")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_manifest_names_every_stored_tensor(artifact: Exported, scheme):
    program, _, places = load(artifact("tiny-moe"), scheme)
    stems = {name.rsplit(".", 1)[0] if name.endswith((".qdata", ".scale", ".zero_point")) else name for name in places}
    names = {tensor.name for tensor in program.tensors}
    assert {s for s in stems if not s.startswith("rope.")} <= names | {f"{name}.weight" for name in names}
    for tensor in program.tensors:
        assert tensor.reason, f"{tensor.name}: why is it stored as {tensor.dtype}?"
        assert (tensor.granularity is None) == (not tensor.dtype.startswith("int"))


@pytest.mark.parametrize("group_size", [64, 128])
def test_group_size_and_exclude_reach_the_artifact(random_artifact, tmp_path, group_size):
    checkpoint = random_artifact(WIDE).checkpoint
    pattern = "model.layers.0.conv.*_proj.weight"
    lfm2_export.export(checkpoint, scheme="q4", group_size=group_size, exclude=[pattern], output=tmp_path / "artifact")
    program, model, places = load(tmp_path / "artifact", "q4")
    sizes = [
        onnx.helper.get_node_attr_value(node, "block_size")
        for node in model.graph.node
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized", "QMoE")
    ]
    # q, k, v, out; w1, w2, w3; head, embedding; experts
    assert sizes == [group_size] * (4 + 3 + 2 + 1)
    tensors = {tensor.name: tensor for tensor in program.tensors}
    for part in ("in_proj", "out_proj"):
        tensor = tensors[f"model.layers.0.conv.{part}"]
        assert (tensor.dtype, tensor.granularity) == ("float32", None)
        assert tensor.reason == f"excluded by --exclude {pattern}"
        name = f"model.layers.0.conv.{part}.weight"
        np.testing.assert_array_equal(
            places[name].read(tmp_path / "artifact" / "onnx").T, open_checkpoint(checkpoint).read(name)
        )
    assert tensors["model.layers.1.feed_forward.experts.down"].granularity.startswith(f"group {group_size}, ")
    assert program.options["exclude"] == [pattern]
    graph, rows = Graph(tmp_path / "artifact", "q4"), np.arange(12)[None]
    assert np.isfinite(graph(rows, np.ones_like(rows), graph.empty(1))[0]).all()


def test_large_programs_are_split_into_files_that_a_browser_can_hold(random_artifact, tmp_path, monkeypatch):
    made = random_artifact(WIDE)
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 400_000)
    lfm2_export.export(made.checkpoint, scheme="fp32", output=tmp_path / "artifact")
    program, _, _ = load(tmp_path / "artifact", "fp32")
    data = sorted(name for name in program.files if "_data" in name)
    count = len(data)
    assert count >= 3
    assert data == sorted(f"onnx/model.onnx_data{f'_{i}' if i else ''}" for i in range(count))
    section = json.loads((tmp_path / "artifact" / "config.json").read_text())["transformers.js_config"]
    assert section["use_external_data_format"] == {"model.onnx": count}
    whole, split = Graph(made.artifact, "fp32"), Graph(tmp_path / "artifact", "fp32")
    rows = np.arange(20)[None]
    logits = [graph(rows, np.ones_like(rows), graph.empty(1))[0] for graph in (whole, split)]
    np.testing.assert_array_equal(*logits)


def test_the_same_export_gives_the_same_bytes(random_artifact, tmp_path):
    """In another process, or after other exports in this one."""
    made = random_artifact(WIDE, ("q4", "fp16"))
    lfm2_export.export(made.checkpoint, scheme=["fp16", "q4"], output=tmp_path / "artifact")
    first, second = snapshot(made.artifact), snapshot(tmp_path / "artifact")
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


def put_bits(checkpoint: Path, tensor: str, row: int, column: int, bits: int) -> None:
    info = open_checkpoint(checkpoint).tensors[tensor]
    with open(info.file, "r+b") as file:
        file.seek(info.offset + 2 * (row * info.shape[1] + column))
        file.write(bits.to_bytes(2, "little"))


@pytest.mark.parametrize("part", ["w1", "w2", "w3"])
@pytest.mark.parametrize("scheme", ["q4", "fp16"])
def test_weights_that_are_not_finite_are_named_as_in_the_checkpoint(tmp_path, scheme, part):
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", WIDE, seed=0, tokenizer_from="tiny-moe")
    name = f"model.layers.1.feed_forward.experts.1.{part}.weight"
    put_bits(checkpoint, name, 200, 13, 0xFF80)
    with pytest.raises(CheckpointError) as caught:
        lfm2_export.export(checkpoint, scheme=scheme, output=tmp_path / "artifact")
    assert str(caught.value) == (
        f"{name}: 1 of 65536 values are not finite, first -inf at [200, 13]; "
        "the weights are damaged, download or train them again"
    )


@pytest.mark.parametrize(
    ("part", "stored", "row"), [("w1", "gate_up", 400), ("w3", "gate_up", 401), ("w2", "down", 200)]
)
def test_a_scale_that_does_not_fit_is_named_by_the_row_of_its_expert(tmp_path, part, stored, row):
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", WIDE, seed=0, tokenizer_from="tiny-moe")
    put_bits(checkpoint, f"model.layers.1.feed_forward.experts.1.{part}.weight", 200, 13, 0x4A80)  # 4194304
    with pytest.raises(QuantizationError) as caught:
        lfm2_export.export(checkpoint, scheme="q4", group_size=64, output=tmp_path / "artifact")
    assert str(caught.value).startswith(
        f"model.layers.1.feed_forward.experts.{stored}: row {row} needs a scale of 524288"
    )
