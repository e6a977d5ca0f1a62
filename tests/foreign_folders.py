"""Stand-ins for ONNX folders that others publish: a checkpoint of ours behind inputs and outputs of their layout.

In: an artifact with an fp32 scoring graph. Out: a folder with config.json, tokenizer and ``onnx/model_q4.onnx``,
without a manifest: conv states are [batch, hidden, L] as in transformers, logits are of every position, and
``position_ids`` count (a wrong one moves every logit).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lfm2_export.artifact import Artifact

SHARED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_foreign(made: Path, folder: Path, *, positions: bool = True, keep: str | None = None) -> Path:
    """``positions``: with position_ids; ``keep``: the name of an input that says how many logits are wanted."""
    artifact = Artifact.open(made, verify=False)
    program = artifact.program("onnx", "fp32")
    (folder / "onnx").mkdir(parents=True)
    for name in SHARED:
        if (made / name).is_file():
            shutil.copy(made / name, folder / name)
    model = onnx.load(made / program.graphs["scoring"], load_external_data=False)
    for value in [value for value in model.graph.output if value.name.startswith("residual.")]:
        model.graph.output.remove(value)  # nobody else's have those that a drafter reads
    _rename_data(model, "model_q4.onnx_data")
    for name in program.files:
        if "_data" in name:
            shutil.copy(made / name, folder / "onnx" / "model_q4.onnx_data")
    for tensor in program.cache.conv:
        _turn_conv_state(model, tensor.past_name, tensor.present_name)
    if positions:
        _use_positions(model)
    if keep:
        _keep_logits(model, keep)
    onnx.save(model, folder / "onnx" / "model_q4.onnx")
    return folder


def _rename_data(model: onnx.ModelProto, name: str) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name


def _turn_conv_state(model: onnx.ModelProto, past: str, present: str) -> None:
    graph = model.graph
    (given,) = [one for one in graph.input if one.name == past]
    (gives,) = [one for one in graph.output if one.name == present]
    width, hidden = (axis.dim_value for axis in given.type.tensor_type.shape.dim[1:])
    for node in graph.node:
        node.input[:] = [f"{past}/ours" if name == past else name for name in node.input]
        node.output[:] = [f"{present}/ours" if name == present else name for name in node.output]
    for one, axes in ((given, (hidden, width + 1)), (gives, (hidden, width + 1))):
        for dim, size in zip(one.type.tensor_type.shape.dim[1:], axes, strict=True):
            dim.dim_value = size
    for name, values in (("starts", [1]), ("ends", [width + 1]), ("axes", [2]), ("pads", [0, 0, 1, 0, 0, 0])):
        graph.initializer.append(numpy_helper.from_array(np.array(values, dtype=np.int64), f"{past}/{name}"))
    before = [
        helper.make_node("Slice", [past, *(f"{past}/{n}" for n in ("starts", "ends", "axes"))], [f"{past}/cut"]),
        helper.make_node("Transpose", [f"{past}/cut"], [f"{past}/ours"], perm=[0, 2, 1]),
    ]
    after = [
        helper.make_node("Transpose", [f"{present}/ours"], [f"{present}/turned"], perm=[0, 2, 1]),
        helper.make_node("Pad", [f"{present}/turned", f"{past}/pads"], [present]),
    ]
    _insert(graph, before, after)


def _insert(graph: onnx.GraphProto, before: list[onnx.NodeProto], after: list[onnx.NodeProto]) -> None:
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)


def _rename_logits(graph: onnx.GraphProto, name: str) -> None:
    for node in graph.node:
        node.output[:] = [name if one == "logits" else one for one in node.output]


def _use_positions(model: onnx.ModelProto) -> None:
    """logits + (the last position - (tokens in the mask - 1)): nothing, unless positions are wrong."""
    graph = model.graph
    graph.input.append(
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    )
    _rename_logits(graph, "logits/before")
    graph.initializer.append(numpy_helper.from_array(np.array(1, dtype=np.int64), "positions/one"))
    after = [
        helper.make_node("ReduceMax", ["position_ids"], ["positions/last"], keepdims=0),
        helper.make_node("ReduceSum", ["attention_mask"], ["positions/count"], keepdims=0),
        helper.make_node("Sub", ["positions/count", "positions/one"], ["positions/right"]),
        helper.make_node("Sub", ["positions/last", "positions/right"], ["positions/off"]),
        helper.make_node("Cast", ["positions/off"], ["positions/float"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["logits/before", "positions/float"], ["logits"]),
    ]
    _insert(graph, [], after)


def _keep_logits(model: onnx.ModelProto, name: str) -> None:
    """logits[:, -keep:]."""
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, []))
    _rename_logits(graph, "logits/all")
    for key, value in (("end", [2**62]), ("axis", [1]), ("flat", [1])):
        graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.int64), f"keep/{key}"))
    after = [
        helper.make_node("Neg", [name], ["keep/negative"]),
        helper.make_node("Reshape", ["keep/negative", "keep/flat"], ["keep/start"]),
        helper.make_node("Slice", ["logits/all", "keep/start", "keep/end", "keep/axis"], ["logits"]),
    ]
    _insert(graph, [], after)
