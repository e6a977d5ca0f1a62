"""Replaces the few composite operators of a trace by the ones that the ONNX exporter would decompose them into.

In: an exported program. Out: the same, in place, with what ``torch.onnx.export`` translates as it stands. To get there
by itself the exporter traces the whole model twice more (``run_decompositions``), which takes as long as all the rest
of the trace; here it is a matter of changing some nodes. Where an operator is met that is not known here, the exporter
decomposes the program as ever: slower, and right.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable

import torch
from torch import fx
from torch.export import ExportedProgram

logger = logging.getLogger(__name__)

_aten = torch.ops.aten

# What the exporter translates without a decomposition, as it was seen to do with programs that it had decomposed.
_TRANSLATED = frozenset(
    f"aten.{name}"
    for name in (
        "_assert_tensor_metadata.default",
        "_to_copy.default",
        "add.Tensor",
        "amax.default",
        "arange.default",
        "cat.default",
        "clamp.default",
        "cumsum.default",
        "embedding.default",
        "eq.Scalar",
        "exp.default",
        "expand.default",
        "gather.default",
        "log.default",
        "matmul.default",
        "maximum.default",
        "mul.Tensor",
        "neg.default",
        "ones.default",
        "reciprocal.default",
        "rsqrt.default",
        "scatter.src",
        "select.int",
        "sigmoid.default",
        "silu.default",
        "slice.Tensor",
        "split.Tensor",
        "sub.Tensor",
        "sum.dim_IntList",
        "sym_size.int",
        "topk.default",
        "unsqueeze.default",
        "view.default",
        "where.ScalarSelf",
        "zeros.default",
    )
) | {"onnx_symbolic._symbolic.default", "onnx_symbolic._symbolic_multi_out.default"}
_PYTHON = (operator.getitem, operator.mul, operator.sub, operator.add)


def decompose_(exported: ExportedProgram) -> int:
    """Rewrites the nodes of composite operators and tells the exporter where nothing is left for it to do.

    Returns:
        How many nodes were rewritten.
    """
    count = _Rewriter(exported).run()
    left = {str(node.target) for node in exported.graph.nodes if not _is_translated(node)}
    if left:
        logger.debug("left to the exporter's own decomposition for %s", ", ".join(sorted(left)))
    else:
        exported.run_decompositions = lambda decomp_table=None: exported
    return count


def _is_translated(node: fx.Node) -> bool:
    return node.op != "call_function" or node.target in _PYTHON or str(node.target) in _TRANSLATED


class _Rewriter:
    """One walk over a program's nodes."""

    def __init__(self, exported: ExportedProgram):
        self.exported, self.graph = exported, exported.graph
        self.sizes: dict[object, fx.Node] = {}  # by the expression of a symbolic size
        self.rules: dict[object, Callable[[fx.Node], None]] = {
            _aten.to.dtype: self._cast,
            _aten.rsub.Scalar: self._subtract_from,
            _aten.chunk.default: self._chunk,
            _aten.flatten.using_ints: self._view,
            _aten.unflatten.int: self._view,
            _aten.view_as.default: self._view,
        }

    def run(self) -> int:
        count = 0
        for node in list(self.graph.nodes):
            if isinstance(node.meta.get("val"), torch.SymInt):
                self._remember(node)
            elif node.target in self.rules:
                self.rules[node.target](node)
                count += 1
        self.graph.eliminate_dead_code()
        return count

    def _remember(self, node: fx.Node) -> None:
        """A size that is computed a second time is the first one."""
        known = self.sizes.setdefault(node.meta["val"].node.expr, node)
        if known is not node:
            self._replace(node, known)

    def _cast(self, node: fx.Node) -> None:
        source, dtype = node.args[:2]
        assert isinstance(source, fx.Node)
        if source.meta["val"].dtype == dtype:
            self._replace(node, source)
        else:
            node.target, node.args, node.kwargs = _aten._to_copy.default, (source,), {"dtype": dtype}

    def _subtract_from(self, node: fx.Node) -> None:
        node.target, node.args = _aten.sub.Tensor, (node.args[1], node.args[0])

    def _chunk(self, node: fx.Node) -> None:
        source, _, axis = node.args
        assert isinstance(axis, int)
        node.target, node.args = _aten.split.Tensor, (source, node.meta["val"][0].shape[axis], axis)

    def _view(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        shape = [self._size(size, node, source) for size in node.meta["val"].shape]
        node.target, node.args = _aten.view.default, (source, shape)

    def _size(self, size: int | torch.SymInt, node: fx.Node, source: fx.Node) -> int | fx.Node:
        """The node that computes a size; one that is not there yet is the product of the first two of ``source``."""
        if isinstance(size, int):
            return size
        if size.node.expr not in self.sizes:
            factors = tuple(self._size(factor, node, source) for factor in source.meta["val"].shape[:2])
            with self.graph.inserting_before(node):
                product = self.graph.call_function(operator.mul, factors)
            product.meta["val"] = size
            self.sizes[size.node.expr] = product
        return self.sizes[size.node.expr]

    def _replace(self, node: fx.Node, by: fx.Node) -> None:
        node.replace_all_uses_with(by)
        self.exported.graph_signature.replace_all_uses(node.name, by.name)
        self.graph.erase_node(node)
