"""Decomposing by hand must give what the exporter's own decomposition gives, and must notice where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from lfm2_export.backends.onnx import trace as tracing
from lfm2_export.backends.onnx.decompose import decompose_
from lfm2_export.backends.onnx.graphs import make_graphs
from lfm2_export.backends.onnx.plan import make_plan
from lfm2_export.cache import CacheSpec
from lfm2_export.families import get_family
from lfm2_export.quant.schemes import get_scheme
from tests.checkpoints import tiny_config

ODD = {"conv_bias": True, "tie_word_embeddings": False, "tie_embedding": False}
ROUTING = {"use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 2.0}
CONFIGS = {
    "lfm2": tiny_config("lfm2"),
    "lfm2_moe": tiny_config("lfm2_moe"),
    "lfm2_moe odd": tiny_config("lfm2_moe", **ODD, **ROUTING),
}


def lines(raw_config: dict[str, Any], scheme: str) -> list[str]:
    """The graphs of a program, as text."""
    config = get_family(raw_config["model_type"]).parse_config(raw_config)
    found = get_scheme(scheme)
    cache = CacheSpec.from_config(config, found.activation_dtype)
    graphs = make_graphs(config, make_plan(config, found), cache)
    return [line for model in graphs.by_role.values() for line in _lines(model)]


def _lines(model: ir.Model) -> Iterator[str]:
    graph = model.graph
    yield from (f"{value.name} {value.shape} {value.type}" for value in (*graph.inputs, *graph.outputs))
    yield from (f"{name} {value.shape} {value.type}" for name, value in graph.initializers.items())
    for node in graph:
        inputs = [None if value is None else value.name for value in node.inputs]
        outputs = [value.name for value in node.outputs]
        attributes = sorted(str(attribute) for attribute in node.attributes.values())
        yield f"{node.name} {node.domain} {node.op_type} {inputs} {outputs} {attributes}"


# What is decomposed depends on the dtype of activations and, of a mixture, on how its experts run.
@pytest.mark.parametrize(
    ("name", "scheme"), [("lfm2", "q4"), ("lfm2", "q4f16"), ("lfm2_moe", "fp32"), ("lfm2_moe odd", "q4f16")]
)
def test_graphs_are_those_of_the_exporters_own_decomposition(name, scheme, monkeypatch):
    raw_config = CONFIGS[name]
    asked: list[object] = []
    real = torch.export.ExportedProgram.run_decompositions

    def run_decompositions(self: torch.export.ExportedProgram, table: Any = None) -> torch.export.ExportedProgram:
        asked.append(table)
        return real(self, table)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", run_decompositions)
    own = lines(raw_config, scheme)
    assert not asked, "something was left to the exporter: tracing takes twice as long"
    monkeypatch.setattr(tracing, "decompose_", lambda exported: 0)
    theirs = lines(raw_config, scheme)
    assert asked
    print(f"{len(own)} lines")
    assert own == theirs


class Unknown(nn.Module):
    """Holds a composite operator that is known here, and one that is not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pixel_shuffle(x.flatten(1, 2).to(torch.float32)[:, :, None, None], 1)


def test_what_is_not_known_here_is_left_to_the_exporter():
    exported = torch.export.export(Unknown(), (torch.ones(2, 3, 4),), strict=False)
    assert decompose_(exported) == 2  # the cast changes nothing and goes
    assert "run_decompositions" not in vars(exported)
    program = torch.onnx.export(exported, dynamo=True, verbose=False)
    assert program is not None
    assert program.model.graph.outputs[0].shape == ir.Shape([2, 12, 1, 1])


class Casts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (1 - x).float()


def test_a_cast_that_is_the_output_and_changes_nothing_goes():
    exported = torch.export.export(Casts(), (torch.ones(2, 3),), strict=False)
    assert decompose_(exported) == 2
    assert not [node for node in exported.graph.nodes if str(node.target) == "aten.to.dtype"]
    torch.testing.assert_close(exported.module()(torch.full((2, 3), 3.0)), torch.full((2, 3), -2.0))
