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
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from torch.export import ExportedProgram

# The conv states are joined five at a time; a depthwise conv1d becomes a conv2d in XNNPACK's order of axes. The others
# rewrite what our graphs do not have (batch norms, static quantization, upsampling, linear layers in pieces) or fold
# constants, of which there are none.
_PASSES = [DecomposeConcatenate, Conv1dUnsqueezePass, ChannelsLastTaggedReshapePass, RemoveRedundantCopyPass]


class _Partitioner(XnnpackPartitioner):
    """Keeps linear layers whole; without a condition, so that one decomposition is enough instead of two."""

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[torch.fx.Node], bool] | None]:
        return [torch.ops.aten.linear.default], None


class _FewPasses(XNNPACKPassManager):
    def __init__(self, exported_program: ExportedProgram, passes: Any = None):
        super().__init__(exported_program, passes or list(_PASSES))


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
