"""XNNPACK's partitioner, without the work that our graphs do not need.

In: nothing. Out: ``partitioner()`` for ``to_edge_transform_and_lower``, and ``few_passes()`` to run it under. Lowering
is a matter of passes over the graph, each of which propagates shapes anew: of the 350M, the stock settings take 17 of
them over every delegate and decompose the whole graph three times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack._passes import (
    ChannelsLastTaggedReshapePass,
    Conv1dUnsqueezePass,
    DecomposeConcatenate,
    RemoveRedundantCopyPass,
    XNNPACKPassManager,
)
from executorch.backends.xnnpack._passes.xnnpack_pass import XNNPACKPass
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.pass_base import ExportPass, PassResult
from torch.export import ExportedProgram

# The conv states are joined five at a time; a depthwise conv1d becomes a conv2d in XNNPACK's order of axes. The others
# rewrite what our graphs do not have (batch norms, static quantization, upsampling, linear layers in pieces) or fold
# constants, of which there are none.
_PASSES = [DecomposeConcatenate, Conv1dUnsqueezePass, ChannelsLastTaggedReshapePass, RemoveRedundantCopyPass]


WHOLE = [torch.ops.aten.linear.default]  # what is not decomposed


class _Partitioner(XnnpackPartitioner):
    """Keeps linear layers whole; without a condition, so that one decomposition is enough instead of two."""

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[torch.fx.Node], bool] | None]:
        return WHOLE, None


class _IfChanged(XNNPACKPass):
    """Behind a pass in the order of bases: ``super().call`` retraces only a graph that the pass has put nodes into."""

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        calls = (node for node in graph_module.graph.nodes if node.op == "call_function")
        if all("val" in node.meta for node in calls):
            return PassResult(graph_module, True)
        return super().call(graph_module)


def _sparing(stock: type[ExportPass]) -> type[XNNPACKPass]:
    """The pass, which retraces what it has changed."""

    class Sparing(stock, _IfChanged):
        def __init__(self, exported_program: ExportedProgram):
            XNNPACKPass.__init__(self, exported_program)

    return Sparing


class _FewPasses(XNNPACKPassManager):
    def __init__(self, exported_program: ExportedProgram, passes: Any = None):
        super().__init__(exported_program, passes or [_sparing(stock) for stock in _PASSES])


def partitioner() -> XnnpackPartitioner:
    return _Partitioner()


@contextlib.contextmanager
def few_passes() -> Iterator[None]:
    """Within it, XNNPACK's delegates are prepared by our list of passes: its interface has no place to say so."""
    xnnpack_preprocess.XNNPACKPassManager = _FewPasses
    try:
        yield
    finally:
        xnnpack_preprocess.XNNPACKPassManager = XNNPACKPassManager
