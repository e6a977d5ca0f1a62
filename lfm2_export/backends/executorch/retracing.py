"""Spares a lowering what torch and executorch do to a graph that they have already done to it.

In: exported programs, or an edge program with delegates. Out: the same, which answer from what is known where the stock
ones would trace once more. The files that come out are the same, byte for byte.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram


def decompose_once_(method: ExportedProgram, *, whole: Collection[torch._ops.OpOverload] = ()) -> ExportedProgram:
    """``to_edge_transform_and_lower`` asks for a functional graph first, then for its decomposition; a decomposition is
    functional. ``whole``: operators that are not to be decomposed."""
    from executorch.exir.tracer import _default_decomposition_table

    exported: Any = method
    decompose = exported.run_decompositions

    def once(decomp_table: Any = None) -> ExportedProgram:
        table = {op: rule for op, rule in _default_decomposition_table().items() if op not in whole}
        decomposed = decompose(table)
        decomposed.run_decompositions = lambda decomp_table=None: decomposed
        return decomposed

    exported.run_decompositions = once
    return method


def remember_outputs_(edge: Any) -> int:
    """Each pass over a program runs its delegates' graphs to learn the shapes of what they return, which are noted in
    those graphs.

    Returns:
        How many delegates were told.
    """
    from executorch.exir.lowered_backend_module import LoweredBackendModule

    count = 0
    for method in edge.methods:
        for child in edge.exported_program(method).graph_module.children():
            if isinstance(child, LoweredBackendModule):
                _remember_outputs_(child.original_module)
                count += 1
    return count


def _remember_outputs_(delegate: Any) -> None:
    unlifted = delegate.module
    values = {node.name: node.meta.get("val") for node in delegate.graph.nodes}
    expected = [_shape(values[name]) for name in delegate.graph_signature.user_inputs]
    outputs = [values[name] for name in delegate.graph_signature.user_outputs]

    def run(*arguments: Any) -> Any:
        if [_shape(argument) for argument in arguments] != expected:
            return unlifted()(*arguments)
        return tuple(_like(output) for output in outputs)

    delegate.module = lambda: run


def _shape(value: Any) -> list[str] | None:
    """Symbols by their names: to compare the sizes themselves would claim that they are equal."""
    return [str(size) for size in value.shape] if isinstance(value, Tensor) else None


def _like(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


@contextlib.contextmanager
def shared_provenance() -> Iterator[None]:
    """Within it, what a node was made from is not copied with all that that was made from, again at each pass."""
    from torch.fx import traceback

    NodeSource: Any = traceback.NodeSource
    NodeSource.__deepcopy__ = lambda source, memo: source
    try:
        yield
    finally:
        del NodeSource.__deepcopy__
