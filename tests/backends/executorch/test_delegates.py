"""What ``support`` says of other delegates: each that can be tried here is tried."""

from __future__ import annotations

import pytest

pytest.importorskip("executorch")

import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

from lfm2_export.backends.executorch.lower import Lowering
from lfm2_export.backends.executorch.plan import make_plan
from lfm2_export.backends.executorch.quiet import quiet
from lfm2_export.backends.executorch.trace import ExecutorchProgram, buffer_positions
from lfm2_export.cache import CacheSpec
from lfm2_export.models import get_net
from lfm2_export.quant.schemes import get_scheme
from lfm2_export.support import DELEGATES
from tests.backends.executorch.programs import MAX_CONTEXT, checkpoint_of, stored


def lowered(model_type: str, scheme: str, partitioner: object, *, is_static: bool) -> list[str]:
    """The calls that are left in ``forward`` once the delegate has taken what it takes."""
    checkpoint = checkpoint_of(model_type, layer_types=("conv", "full_attention"))
    plan = make_plan(checkpoint.config, get_scheme(scheme))
    weights = stored(checkpoint, plan)
    with torch.no_grad(), quiet():
        with torch.device("meta"):
            model = get_net(model_type)(checkpoint.config).eval()
        Lowering(checkpoint.config, weights, buffer_positions(MAX_CONTEXT)).lower_(model)
        cache = CacheSpec.from_config(checkpoint.config, "float32")
        program = ExecutorchProgram(model, cache, buffer_positions(MAX_CONTEXT)).eval()
        arguments = torch.zeros(1, 1 if is_static else 5, dtype=torch.long), torch.tensor([0])
        dynamic = None if is_static else ({1: torch.export.Dim("T", min=1, max=MAX_CONTEXT)}, None)
        exported = torch.export.export(program, arguments, dynamic_shapes=dynamic, strict=False)
        config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        edge = to_edge_transform_and_lower(exported, partitioner=[partitioner], compile_config=config)
    return [str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"]


def row(name: str) -> str:
    return next(d.dense for d in DELEGATES if name in d.name)


@pytest.mark.parametrize("is_static", [True, False])
def test_vulkan_takes_the_whole_dense_graph(is_static: bool) -> None:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    calls = lowered("lfm2", "fp32", VulkanPartitioner(), is_static=is_static)
    print(calls)
    assert sum("executorch_call_delegate" in call for call in calls) == 1
    assert not [call for call in calls if "llama" in call or "linear" in call]
    assert row("Vulkan") == "fp32 lowers, never run"


@pytest.mark.parametrize(("model_type", "scheme"), [("lfm2_moe", "fp32"), ("lfm2", "8da4w")])
def test_vulkan_takes_neither_experts_nor_our_int4(model_type: str, scheme: str) -> None:
    """Where one of these passes one day, there is something to ship."""
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    with pytest.raises(Exception, match=r"An error occurred when running the 'Fuse\w+' pass"):
        lowered(model_type, scheme, VulkanPartitioner(), is_static=False)


def test_core_ml_takes_no_symbolic_position() -> None:
    partition = pytest.importorskip("executorch.backends.apple.coreml.partition")
    with pytest.raises(NotImplementedError, match="SymInt"):
        lowered("lfm2", "fp32", partition.CoreMLPartitioner(), is_static=True)
    assert row("Core ML") == "does not lower"
