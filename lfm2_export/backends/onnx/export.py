"""Exports one scheme of a checkpoint as an ONNX program: graphs, data files, and what the manifest says of them.

In: an ``ExportRequest``. Out: files under ``onnx/`` of its folder and an ``ExportedProgram``. Traces first and writes
weights after, so that what cannot be lowered costs no disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from lfm2_export.backends.onnx.graphs import Graphs, make_graphs
from lfm2_export.backends.onnx.plan import make_plan
from lfm2_export.backends.onnx.variants import graph_name
from lfm2_export.backends.onnx.weights import (
    OnnxPacking,
    attach,
    computed_tensors,
    data_file_names,
    data_file_sizes,
    place,
)
from lfm2_export.backends.program import Estimate, ExportedProgram, ExportRequest
from lfm2_export.backends.weights.pieces import CHUNK_VALUES, Placement, pieces
from lfm2_export.backends.weights.plan import WeightPlan
from lfm2_export.backends.weights.stream import FIGURES, WeightStream, bytes_on_disk
from lfm2_export.backends.weights.widths import describe
from lfm2_export.cache import CacheSpec
from lfm2_export.ledger import Ledger
from lfm2_export.manifest import TensorSpec
from lfm2_export.quant.algorithms import get_algorithm
from lfm2_export.resources import export_memory_needed, usable_cores

FOLDER = "onnx"


def estimate(request: ExportRequest) -> Estimate:
    """Disk and memory that the export will need; refuses widths that do not fit the group size.

    Raises:
        QuantizationError: the scheme does not fit this checkpoint.
    """
    plan = make_plan(request.checkpoint.config, request.scheme)
    placements = place(plan, request.checkpoint.config)
    ends = {(there.file, there.offset): there.nbytes for there in placements.values()}
    work = pieces(plan)
    done = work[: len(_ledger(request, plan, placements).done)]
    return Estimate(
        disk_bytes=max(0, sum(ends.values()) - sum(map(bytes_on_disk, _data_paths(request, placements)))),
        memory_bytes=export_memory_needed(max(piece.values for piece in work), at_once=usable_cores()),
        done_bytes=sum(piece.stored_bytes(request.checkpoint) for piece in done),
    )


def _data_paths(request: ExportRequest, placements: Mapping[str, Placement]) -> list[Path]:
    return [request.folder / FOLDER / name for name in data_file_names(request.file_name, placements)]


def _ledger(request: ExportRequest, plan: WeightPlan, placements: Mapping[str, Placement]) -> Ledger:
    names = [f"{FOLDER}/{path.name}" for path in _data_paths(request, placements)]
    statistics = None if request.statistics is None else request.statistics.key
    key = repr((request.algorithm, statistics, CHUNK_VALUES, plan, placements))
    return Ledger(
        None if request.ledgers is None else request.ledgers / f"{request.file_name}.ledger",
        root=request.folder,
        sizes=data_file_sizes(names, placements),
        key=hashlib.sha256(key.encode()).hexdigest(),
        steps=len(pieces(plan)),
        figures=FIGURES,
    )


def export_program(request: ExportRequest) -> ExportedProgram:
    """Writes graphs and data files.

    Raises:
        ExportError, QuantizationError: the checkpoint cannot be lowered under this scheme.
        CheckpointError: a tensor is damaged.
    """
    config, scheme = request.checkpoint.config, request.scheme
    plan = make_plan(config, scheme)
    cache = CacheSpec.from_config(config, scheme.activation_dtype)
    graphs = make_graphs(config, plan, cache)
    own_cache = graphs.own_cache
    placements = place(plan, config)
    data_files = data_file_names(request.file_name, placements)
    folder = request.folder / FOLDER
    folder.mkdir(exist_ok=True)
    for model in graphs.by_role.values():
        attach(model, placements, data_files)
    stream = WeightStream(
        checkpoint=request.checkpoint,
        placements=placements,
        paths=[folder / name for name in data_files],
        packing=OnnxPacking(),
        algorithm=get_algorithm(request.algorithm),
        report=request.progress,
        ledger=_ledger(request, plan, placements),
        statistics=request.statistics,
    )
    tensors = stream.write(plan, computed_tensors(config))
    names = _save_graphs(graphs, request.file_name, folder)
    return ExportedProgram(
        graphs={role: f"{FOLDER}/{name}" for role, name in names.items()},
        files=tuple(f"{FOLDER}/{name}" for name in dict.fromkeys((*names.values(), *data_files))),
        context_length=config.max_position_embeddings,
        inputs=_describe(graphs.portable.graph.inputs),
        outputs=_describe(graphs.portable.graph.outputs),
        cache=cache,
        options=_options(request, plan),
        operators=graphs.operators,
        tensors=tensors,
        kind=request.kind,
        own_cache=None if own_cache == cache else own_cache,
    )


def _options(request: ExportRequest, plan: WeightPlan) -> dict[str, object]:
    return {
        **request.describe_algorithm(),
        **request.describe_kind(),
        "accuracy_level": plan.accuracy_level,
        **request.scheme.options(),
        **describe(plan),
    }


def _save_graphs(graphs: Graphs, file_name: str, folder: Path) -> dict[str, str]:
    """Writes the graphs beside their data files; returns the file of each role."""
    names = {role: graph_name(file_name, role) for role in graphs.by_role}
    for role, model in graphs.by_role.items():
        ir.save(model, folder / names[role])
    return names


def _describe(values: object) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=value.name,
            dtype=value.dtype.numpy().name,
            shape=tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape),
        )
        for value in values  # type: ignore[attr-defined]
    )
