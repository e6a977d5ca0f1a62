"""Changes of a graph that several rewrites make: a node in the place of others, and the domain of our operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

DOMAIN, VERSION = "lfm2", 1


def producer(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node


def insert(model: ir.Model, made: ir.Node, outputs: Mapping[ir.Value, int], *, before: ir.Node) -> None:
    """Puts ``made`` into the graph, its outputs in the place of others."""
    model.graph.insert_before(before, made)
    for old, index in outputs.items():
        new, name = made.outputs[index], old.name
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = None, name


def finish(model: ir.Model, count: int) -> int:
    """Removes what nothing reads any more."""
    _import_domain(model, count)
    if count:
        common_passes.RemoveUnusedNodesPass()(model)
    return count


def padded(inputs: Sequence[ir.Value | None], count: int) -> list[ir.Value | None]:
    return [*inputs, *[None] * (count - len(inputs))]


def only_reader(model: ir.Model, name: str) -> ir.Node:
    (use,) = model.graph.initializers[name].uses()
    return use.node


def replace(
    model: ir.Model, node: ir.Node, op: str, inputs: Sequence[ir.Value | None], attributes: dict[str, object]
) -> None:
    kept = list(inputs)
    while kept[-1] is None:
        kept.pop()
    made = ir.node(op, kept, attributes, domain=DOMAIN, name=node.name)
    insert(model, made, {node.outputs[0]: 0}, before=node)
    model.graph.remove(node, safe=True)


def _import_domain(model: ir.Model, nodes: int) -> None:
    if nodes:
        model.graph.opset_imports[DOMAIN] = VERSION
