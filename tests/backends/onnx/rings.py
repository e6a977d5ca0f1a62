"""Graphs on our operators as they were before rings, and with other windows: edited copies of exported ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from lfm2_export.artifact import Artifact
from lfm2_export.backends.onnx import variants
from lfm2_export.backends.onnx.runner import OnnxRunner
from lfm2_export.cache import CacheSpec
from lfm2_export.manifest import Program

Edit = Callable[[onnx.ModelProto], None]


def program_of(folder: Path, scheme: str = "q4") -> Program:
    return Artifact.open(folder, verify=False).program("onnx", scheme)


def sliding(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type.startswith("SlidingAttention")]


def keep_everything(model: onnx.ModelProto, portable: CacheSpec) -> None:
    """No rings: sliding layers' keys and values grow, as the portable graph's do."""
    for node in sliding(model):
        kept = [attribute for attribute in node.attribute if attribute.name != "ring"]
        assert len(kept) < len(node.attribute)
        del node.attribute[:]
        node.attribute.extend(kept)
    axes = {t.past_name: t.shape[2] for t in portable.growing}
    axes |= {t.present_name: t.present_shape[2] for t in portable.growing}
    for value in (*model.graph.input, *model.graph.output):
        if value.name in axes:
            value.type.tensor_type.shape.dim[2].dim_param = axes[value.name]


def set_window(model: onnx.ModelProto, window: int) -> None:
    for node in sliding(model):
        next(a for a in node.attribute if a.name == "window").i = window


def write_edited(folder: Path, program: Program, role: str, to: str, edit: Edit) -> Path:
    """The graph of a role, edited, beside the data files that it shares."""
    path = folder / program.graphs[role]
    model = onnx.load(path, load_external_data=False)
    edit(model)
    edited = path.with_name(f"{to}_{path.name}")
    onnx.save(model, edited)
    return edited


def open_edited(
    folder: Path, cache: str, to: str, edit: Edit, *, grows: bool, context_length: int, threads: int = 1
) -> OnnxRunner:
    """A runner on edited graphs; ``cache`` "float" or "int8"; ``grows``: whether sliding layers keep everything."""
    program = program_of(folder)
    role = variants.LFM2 if cache == "float" else variants.LFM2_KV8
    paths = [write_edited(folder, program, name, to, edit) for name in (role, f"{role}_scoring")]
    spec = variants.cache_of(program, role)
    if grows:
        spec = program.cache if cache == "float" else program.cache.with_int8_positions()
    return OnnxRunner(
        paths[0],
        cache=spec,
        context_length=context_length,
        threads=threads,
        scoring_path=paths[1],
        library=variants.own_library(),
    )
