"""Runs a program with kernels that leave activations as they are: the sharpest look at how it was lowered.

In: a program that ships with accuracy_level 4, by which MatMulNBits and QMoE quantize their activations to int8. Out:
its logits without that. What remains of a difference to the eager model is rounding, so that a single wrong value
shows. The changed graph stays in memory and reads the artifact's own data file.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from lfm2_export.backends import FullPrecision
from lfm2_export.backends.onnx.initializers import read_graph
from lfm2_export.backends.onnx.session import new_session, session_options
from lfm2_export.errors import RunnerError
from lfm2_export.manifest import Program

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_ACCURACY = "accuracy_level"


def score(
    folder: Path, program: Program, rows: Sequence[np.ndarray], *, threads: int | None = None
) -> FullPrecision | None:
    """Logits of every position of each row, float32 [T, V]; not exact where activations are float16.

    None where no node quantizes its activations, and for 8-bit experts, whose kernel does at every level.

    Raises:
        RunnerError: the program has no scoring graph, or onnxruntime cannot run it.
    """
    if "scoring" not in program.graphs:
        raise RunnerError(f"{folder}: {program} has no scoring graph; export the scheme again")
    path = folder / program.graphs["scoring"]
    model = read_graph(path)
    if not _leave_activations_alone(model) or _has_8_bit_experts(model):
        return None
    options = session_options(threads)
    try:
        with _data_folder(path.parent, [name for name in program.files if "_data" in name]) as data:
            options.add_session_config_entry(_DATA_FOLDER, str(data))
            session = new_session(model.SerializeToString(), options)
            logits = tuple(_run(session, program, row) for row in rows)
    except Exception as error:  # onnxruntime's exceptions have no common base class of their own
        raise RunnerError(f"{path}: cannot run at full precision ({' '.join(str(error).split())[:300]})") from error
    return FullPrecision(logits=logits, exact=all(tensor.dtype == "float32" for tensor in program.cache.tensors))


@contextlib.contextmanager
def _data_folder(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Where onnxruntime finds a graph's data, which it takes from no link that leaves the folder: in the Hub's cache,
    where every file is one, a folder of other names for the same files, for as long as it is needed."""
    folder = folder.resolve()
    real = {Path(name).name: (folder / Path(name).name).resolve() for name in names}
    if all(file.is_relative_to(folder) for file in real.values()):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix=".lfm2-export-", dir=next(iter(real.values())).parent) as linked:
        for name, file in real.items():
            os.link(file, Path(linked, name))
        yield Path(linked).resolve()


def _leave_activations_alone(model: onnx.ModelProto) -> int:
    """Removes accuracy_level from every node (the default is 0); returns from how many."""
    count = 0
    for node in model.graph.node:
        levels = [attribute for attribute in node.attribute if attribute.name == _ACCURACY]
        for attribute in levels:
            node.attribute.remove(attribute)
        count += any(attribute.i > 0 for attribute in levels)
    return count


def _has_8_bit_experts(model: onnx.ModelProto) -> bool:
    experts = (node for node in model.graph.node if node.op_type == "QMoE")
    return any(helper.get_node_attr_value(node, "expert_weight_bits") == 8 for node in experts)


def _run(session: ort.InferenceSession, program: Program, row: np.ndarray) -> np.ndarray:
    feeds = {"input_ids": row[None], "attention_mask": np.ones((1, len(row)), np.int64), **program.cache.zeros(1)}
    return session.run(["logits"], feeds)[0][0]
