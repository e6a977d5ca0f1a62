"""Traces a lowered model and turns it into a .pte.

In: a lowered model, its CacheSpec, the context's length. Out: the program's bytes and what it is made of. The method
``forward(tokens int64 [1, T], start_pos int64 [1]) -> logits [1, 1, V]`` of the last token, T dynamic, is all that the
stock LLM runners see. The state lies in buffers inside: all conv states in one [layers, L-1, D], keys and values [1, S,
K, H] each; ``read_state() -> buffers`` and ``write_state(buffers)`` share them, for runners that take snapshots.

A call at position 0 starts from empty conv states whatever the buffer holds: the stock LLM runners reset by setting
their position back and nothing else (executorch issue #21858). ``torch.where`` rather than a product, since 0 times NaN
is NaN; keys and values need nothing, since positions beyond the last are never read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lfm2_export.backends.executorch.lower import longest_call
from lfm2_export.backends.executorch.quiet import quiet
from lfm2_export.backends.executorch.retracing import decompose_once_, remember_outputs_, shared_provenance
from lfm2_export.backends.executorch.session import FORWARD, READ_STATE, WRITE_STATE
from lfm2_export.backends.executorch.spill import Spill
from lfm2_export.cache import CacheSpec
from lfm2_export.config import ModelConfig
from lfm2_export.models.decoder import DecoderForCausalLM, Recorder
from lfm2_export.models.lfm2_bidirectional import Lfm2BidirectionalModel

_TRACED_TOKENS = 5


@dataclass(frozen=True, kw_only=True)
class PteProgram:
    """``manager`` writes the file. ``delegates``: calls into XNNPACK. ``operators``: calls of everything else, by the
    name
    that the runtime knows."""

    manager: Any
    delegates: int
    operators: Mapping[str, int]


class ExecutorchProgram(nn.Module):
    """The traced signature; owns the state."""

    def __init__(self, causal_lm: DecoderForCausalLM, cache: CacheSpec, capacity: int):
        super().__init__()
        self.causal_lm, self.cache = causal_lm, cache
        if cache.conv:
            shape = cache.conv[0].concrete_shape(len(cache.conv), 0)
            self.conv_state = nn.Buffer(torch.zeros(shape))
        for tensor in (*cache.bounded, *cache.growing):
            # Entries are kept position by position, as the cache operators want them.
            _, heads, positions, width = tensor.concrete_shape(1, capacity)
            self.register_buffer(_buffer_name(tensor.past_name), torch.zeros(1, positions, heads, width))

    @property
    def state_names(self) -> list[str]:
        """The buffers in the order of ``read_state`` and ``write_state``."""
        convs = ["conv_state"] if self.cache.conv else []
        return convs + [_buffer_name(tensor.past_name) for tensor in (*self.cache.bounded, *self.cache.growing)]

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        model = self.causal_lm.model
        stream = model.embed_tokens(tokens)
        layout = model.layout(stream, None, start_pos, 0)
        recorder = Recorder(hidden_states=False, attentions=False, router_logits=False)
        hidden, present = model.run_layers(stream, self._past(start_pos), layout, recorder)
        if self.cache.conv:
            self.conv_state.copy_(torch.cat([present[t.past_name] for t in self.cache.conv]))
        for tensor in self.cache.bounded:
            self.get_buffer(_buffer_name(tensor.past_name)).copy_(present[tensor.past_name])
        return self.causal_lm.lm_head(hidden[:, -1:])

    def _past(self, start_pos: Tensor) -> dict[str, Tensor]:
        past = {t.past_name: getattr(self, _buffer_name(t.past_name)) for t in self.cache.growing}
        for tensor in self.cache.bounded:
            kept = self.get_buffer(_buffer_name(tensor.past_name))
            past[tensor.past_name] = torch.where(start_pos == 0, torch.zeros(1), kept)
        if self.cache.conv:
            state = torch.where(start_pos == 0, torch.zeros(1), self.conv_state)
            past |= {t.past_name: state[i : i + 1] for i, t in enumerate(self.cache.conv)}
        return past


class ExecutorchEncoderProgram(nn.Module):
    """The traced signature of an encoder."""

    def __init__(self, encoder: Lfm2BidirectionalModel):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.encoder(input_ids, attention_mask).named().values())


def _buffer_name(past_name: str) -> str:
    return past_name.replace(".", "_")


def make_pte(
    causal_lm: DecoderForCausalLM, config: ModelConfig, cache: CacheSpec, max_context: int, spill: Spill
) -> PteProgram:
    """Traces, lowers and emits; what lies in ``spill`` is read when the program is written."""
    program = ExecutorchProgram(causal_lm, cache, buffer_positions(max_context)).eval()

    def methods() -> dict[str, torch.export.ExportedProgram]:
        return {FORWARD: trace(program, max_context), **_state_methods(program)}

    return _emitted(methods, metadata(config, max_context), spill)


def make_encoder_pte(encoder: Lfm2BidirectionalModel, max_context: int, spill: Spill) -> PteProgram:
    """The same of an encoder: ``forward(input_ids int64 [1, T], attention_mask int64 [1, T])`` returns what its head
    names, T dynamic; there is no state."""
    program = ExecutorchEncoderProgram(encoder).eval()
    constants = {
        "get_max_seq_len": max_context,
        "get_vocab_size": encoder.config.vocab_size,
        "enable_dynamic_shape": True,
    }
    return _emitted(lambda: {FORWARD: _trace_encoder(program, max_context)}, constants, spill)


def _emitted(
    methods: Callable[[], dict[str, torch.export.ExportedProgram]], constants: dict[str, Any], spill: Spill
) -> PteProgram:
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    from lfm2_export.backends.executorch.xnnpack import WHOLE, few_passes, partitioner

    with torch.no_grad(), quiet(), few_passes(), shared_provenance(), spill.emitting():
        edge = to_edge_transform_and_lower(
            {name: decompose_once_(method, whole=WHOLE) for name, method in methods().items()},
            partitioner={FORWARD: [partitioner()]},
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=constants,
        )
        remember_outputs_(edge)
        memory = MemoryPlanningPass(alloc_graph_input=False, share_mutable_buffers=True)
        made = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=memory, extract_delegate_segments=True))
    delegates, operators = _count(made.executorch_program)
    return PteProgram(manager=made, delegates=delegates, operators=operators)


class _ReadState(nn.Module):
    """All buffers of the state, in their order."""

    def __init__(self, program: ExecutorchProgram):
        super().__init__()
        self.names = program.state_names
        for name in self.names:
            self.register_buffer(name, program.get_buffer(name))

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(self.get_buffer(name).clone() for name in self.names)


class _WriteState(_ReadState):
    """Replaces all buffers of the state."""

    def forward(self, *values: Tensor) -> Tensor:  # type: ignore[override]
        for name, value in zip(self.names, values, strict=True):
            self.get_buffer(name).copy_(value)
        return torch.zeros(1)


def _state_methods(program: ExecutorchProgram) -> dict[str, torch.export.ExportedProgram]:
    reader, writer = _ReadState(program).eval(), _WriteState(program).eval()
    values = tuple(torch.zeros_like(program.get_buffer(name)) for name in program.state_names)
    return {
        READ_STATE: torch.export.export(reader, (), strict=False),
        WRITE_STATE: torch.export.export(writer, values, strict=False),
    }


def buffer_positions(max_context: int) -> int:
    """Positions that the buffers hold: tracing takes a call to have two tokens or more, so that the bound on its first
    position is one too low."""
    return max_context + 1


def trace(program: ExecutorchProgram, max_context: int) -> torch.export.ExportedProgram:
    """The exported program, with shapes written so that XNNPACK takes them."""
    arguments = (torch.zeros(1, min(_TRACED_TOKENS, max_context), dtype=torch.long), torch.tensor([0]))
    longest = longest_call(program.causal_lm.config, max_context)
    dynamic = ({1: torch.export.Dim("T", min=1, max=longest)}, None)
    exported = torch.export.export(program, arguments, dynamic_shapes=dynamic, strict=False)
    infer_dynamic_sizes(exported.graph)
    exported.graph_module.recompile()
    return exported


def _trace_encoder(program: ExecutorchEncoderProgram, max_context: int) -> torch.export.ExportedProgram:
    ids = torch.zeros(1, min(_TRACED_TOKENS, max_context), dtype=torch.long)
    tokens = torch.export.Dim("T", min=1, max=max_context)
    exported = torch.export.export(
        program, (ids, torch.ones_like(ids)), dynamic_shapes=({1: tokens}, {1: tokens}), strict=False
    )
    infer_dynamic_sizes(exported.graph)
    exported.graph_module.recompile()
    return exported


def infer_dynamic_sizes(graph: torch.fx.Graph) -> int:
    """Pass: what only changes a tensor's shape, which has one symbolic size, becomes a view with -1 in that place:
    XNNPACK
    takes no symbols; returns how many."""
    count = 0
    for node in graph.nodes:
        if node.target in _RESHAPING:
            sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
            if sizes.count(-1) == 1:
                node.target, node.args, node.kwargs = torch.ops.aten.view.default, (node.args[0], sizes), {}
                count += 1
    graph.eliminate_dead_code()
    return count


_RESHAPING = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.unflatten.int,
    torch.ops.aten.flatten.using_ints,
)


def metadata(config: ModelConfig, max_context: int) -> dict[str, Any]:
    """Constant methods, as the stock LLM runners ask for them."""
    found: dict[str, Any] = {
        "get_max_seq_len": longest_call(config, max_context),
        "get_max_context_len": max_context,
        "get_vocab_size": config.vocab_size,
        "get_eos_ids": list(config.eos_token_id),
        "enable_dynamic_shape": True,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": bool(config.attention_layers),
    }
    return found if config.bos_token_id is None else found | {"get_bos_id": config.bos_token_id}


def _count(program: Any) -> tuple[int, dict[str, int]]:
    """Calls of delegates and of each operator in ``forward``, as the runtime will make them."""
    plan = next(plan for plan in program.execution_plan if plan.name == FORWARD)
    calls = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    kernels = [plan.operators[call.op_index] for call in calls if type(call).__name__ == "KernelCall"]
    names = Counter(f"{one.name}.{one.overload}" if one.overload else one.name for one in kernels)
    return sum(type(call).__name__ == "DelegateCall" for call in calls), dict(sorted(names.items()))
