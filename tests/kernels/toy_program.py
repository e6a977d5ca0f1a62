"""A small stateful program with every kind of operator that an LFM2-MoE .pte has, exported in a second.

forward(tokens int64 [1, T], start_pos int64 [1]) -> logits [1, 1, V]: embedding, a linear for XNNPACK, attention on a
cache, a conv-like state that starts anew at position 0, experts through ``lfm2::moe_ffn``.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm2_export.kernels import ops
from lfm2_export.kernels.packing import EXPERT_FORMAT, PackedExperts
from lfm2_export.quant.formats import QuantizedTensor

VOCABULARY, WIDTH, INNER, EXPERTS, TOP_K, CONTEXT = 251, 64, 96, 6, 2, 128
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
END = 0


def random_matrix(rng: np.random.Generator, rows: int, columns: int, size: float = 0.02) -> QuantizedTensor:
    """Random int4 codes and scales of either sign."""
    return QuantizedTensor(
        qdata=rng.integers(0, 16, (rows, columns), dtype=np.uint8),
        scale=(rng.normal(size=(rows, columns // 32)) * size).astype(np.float16),
        zero_point=None,
        format=EXPERT_FORMAT,
    )


def random_experts(rng: np.random.Generator, experts: int, width: int, inner: int) -> PackedExperts:
    packed = PackedExperts(experts, width, inner)
    for expert in range(experts):
        w1, w3 = random_matrix(rng, inner, width), random_matrix(rng, inner, width)
        packed.set_expert(expert, w1, w3, random_matrix(rng, width, inner))
    return packed


class Toy(nn.Module):
    """Random weights; the state lies in buffers."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        packed = random_experts(np.random.default_rng(seed), EXPERTS, WIDTH, INNER)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, n * HEAD_DIM, bias=False) for n in (HEADS, KV_HEADS, KV_HEADS))
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.expert_bias = nn.Buffer(torch.randn(EXPERTS) * 0.1)
        self.gate_up, self.down = nn.Buffer(torch.from_numpy(packed.gate_up)), nn.Buffer(torch.from_numpy(packed.down))
        self.key, self.value = (nn.Buffer(torch.zeros(1, CONTEXT, KV_HEADS, HEAD_DIM)) for _ in range(2))
        self.last = nn.Buffer(torch.zeros(1, 1, WIDTH))

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        start = start_pos[0].item()
        torch._check(start >= 0)
        torch._check(start + tokens.shape[1] <= CONTEXT)
        x = self.embedding(tokens)
        before = torch.cat((torch.where(start_pos == 0, torch.zeros(1), self.last), x), dim=1)
        self.last.copy_(x[:, -1:])
        x = x + 0.5 * before[:, : tokens.shape[1]]
        q, k, v = (linear(x).unflatten(-1, (-1, HEAD_DIM)) for linear in self.qkv)
        torch.ops.llama.update_cache(k, self.key, start)
        torch.ops.llama.update_cache(v, self.value, start)
        attended = torch.ops.llama.custom_sdpa(q, self.key, self.value, start, None, 0.0, True)
        x = x + self.attention_out(attended.flatten(2))
        x = F.layer_norm(x, (WIDTH,))
        x = x + ops.moe_ffn(x, self.router(x), self.expert_bias, self.gate_up, self.down, TOP_K, True, 1.0)
        return self.head(x[:, -1:])


def export_toy(path: Path, seed: int = 0) -> None:
    """Writes the program."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

        model = Toy(seed).eval()
        tokens = torch.export.Dim("T", min=1, max=CONTEXT - 1)
        exported = torch.export.export(
            model,
            (torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, dtype=torch.long)),
            dynamic_shapes=({1: tokens}, None),
            strict=False,
        )
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods={"get_max_context_len": CONTEXT, "get_vocab_size": VOCABULARY, "get_eos_ids": [END]},
        )
        planning = MemoryPlanningPass(alloc_graph_input=False)
        path.write_bytes(edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer)
    logging.disable(logging.NOTSET)
