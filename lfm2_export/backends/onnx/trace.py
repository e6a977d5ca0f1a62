"""Traces a lowered model under fake weights into an ONNX graph without a byte of weight in it.

In: a model's config and a weight plan. Out: an ``onnx_ir.Model`` whose inputs, outputs and axes carry the
artifact's names and whose initializers have names, shapes and dtypes but no values yet. Cost does not depend on the
model's width.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lfm2_export.backends.onnx import ops
from lfm2_export.backends.onnx.decompose import decompose_
from lfm2_export.backends.onnx.draft_graph import draft_inputs, draft_outputs
from lfm2_export.backends.onnx.lower import Lowering
from lfm2_export.backends.onnx.lower_encoder import EncoderLowering
from lfm2_export.backends.weights.plan import WeightPlan
from lfm2_export.cache import CacheSpec
from lfm2_export.config import ModelConfig
from lfm2_export.models import get_draft_net, get_encoder, get_net
from lfm2_export.models.decoder import DecoderForCausalLM, Recorder
from lfm2_export.models.lfm2_bidirectional import Lfm2BidirectionalModel
from lfm2_export.models.lfm2_dspark import Lfm2DSparkDraftModel

OPSET = 21


class OnnxProgram(nn.Module):
    """The traced signature: ids, mask and the state's tensors in; logits [B, 1, V] and the new state out."""

    def __init__(self, causal_lm: DecoderForCausalLM, cache: CacheSpec):
        super().__init__()
        self.net, self.cache = causal_lm, cache

    def forward(self, input_ids: Tensor, attention_mask: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        model = self.net.model
        stream = model.embed_tokens(input_ids)
        layout = model.layout(stream, attention_mask, None, 0)
        past = {tensor.past_name: value for tensor, value in zip(self.cache.tensors, state, strict=True)}
        recorder = Recorder(hidden_states=False, attentions=False, router_logits=False)
        hidden, present = model.run_layers(stream, past, layout, recorder)
        last = ops.gather_rows(hidden, layout.last)
        logits = self.net.lm_head(last).float()
        return (logits, *(present[tensor.past_name] for tensor in self.cache.tensors))


class OnnxEncoderProgram(nn.Module):
    """The traced signature: ids and mask in; the outputs that the head names out."""

    def __init__(self, encoder: Lfm2BidirectionalModel):
        super().__init__()
        self.net = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.net(input_ids, attention_mask).named().values())


class OnnxDraftProgram(nn.Module):
    """The traced signature: the target's streams, the newest token and the cache in; proposals, their confidence and
    the streams' keys and values out."""

    def __init__(self, drafter: Lfm2DSparkDraftModel):
        super().__init__()
        self.net = drafter

    def forward(
        self, streams: Tensor, anchor: Tensor, past_length: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, ...]:
        found, new = self.net(streams, anchor, dict(enumerate(past)), past_length)
        scores = () if found.confidence is None else (found.confidence,)
        return (found.tokens, *scores, *(tensor for layer in sorted(new) for tensor in new[layer]))


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Keeps the garbage collector off: tracing makes millions of objects that live on, and walking them again and again
    takes a fifth of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def trace(config: ModelConfig, plan: WeightPlan, cache: CacheSpec) -> ir.Model:
    """The ONNX graph of a decoder, initializers without values."""
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        causal_lm = get_net(config.model_type)(config).eval()
        Lowering(config, plan).lower_(causal_lm)
        names = ["input_ids", "attention_mask", *(t.past_name for t in cache.tensors)]
        outputs = ["logits", *(t.present_name for t in cache.tensors)]
        program = OnnxProgram(causal_lm, cache)
        return _traced(program, _example_inputs(cache), _dynamic_shapes(cache), names, outputs)


def trace_encoder(config: ModelConfig, plan: WeightPlan) -> ir.Model:
    """The ONNX graph of an encoder, initializers without values."""
    assert config.encoder is not None
    dynamic = torch.export.Dim.DYNAMIC
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        encoder = get_encoder(config.model_type)(config).eval()
        EncoderLowering(config, plan).lower_(encoder)
        ids = torch.zeros(2, 5, dtype=torch.long)
        shapes = ({0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic})
        program = OnnxEncoderProgram(encoder)
        names = ["input_ids", "attention_mask"]
        return _traced(program, (ids, torch.ones_like(ids)), shapes, names, list(config.encoder.outputs))


def trace_drafter(config: ModelConfig, plan: WeightPlan) -> ir.Model:
    """The ONNX graph of a drafter, initializers without values."""
    dynamic, count, room = torch.export.Dim.DYNAMIC, 5, 7
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        drafter = get_draft_net(config.model_type)(config).eval()
        width = drafter.fc.in_features
        Lowering(config, plan).lower_(drafter)
        one, shape = torch.zeros(1, dtype=torch.long), (1, config.num_key_value_heads, room, config.head_dim)
        # Each tensor of its own: one that is given twice is one input.
        past = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
        arguments = (torch.zeros(1, count, width), one, one.clone(), past)
        shapes: tuple[object, ...] = ({1: dynamic}, {}, {}, [({2: dynamic}, {2: dynamic}) for _ in past])
        exported = torch.export.export(OnnxDraftProgram(drafter), arguments, dynamic_shapes=shapes, strict=False)
        # A few layers, with operators that decoders have not: the exporter's own decomposition does.
        return _to_onnx(exported, list(draft_inputs(config)), list(draft_outputs(config)))


def _traced(
    program: nn.Module, arguments: tuple[object, ...], shapes: tuple[object, ...], names: list[str], outputs: list[str]
) -> ir.Model:
    exported = torch.export.export(program, arguments, dynamic_shapes=shapes, strict=False)
    decompose_(exported)
    return _to_onnx(exported, names, outputs)


def _example_inputs(cache: CacheSpec) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Fake inputs; sizes that equal no other, so that no axis is taken for another one."""
    batch, tokens, past = 2, 5, 6
    state = [
        torch.zeros(tensor.concrete_shape(batch, past), dtype=getattr(torch, tensor.dtype)) for tensor in cache.tensors
    ]
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    return ids, torch.ones(batch, past + tokens, dtype=torch.long), state


def _dynamic_shapes(cache: CacheSpec) -> tuple[object, ...]:
    dynamic = torch.export.Dim.DYNAMIC
    state = [{axis: dynamic for axis, size in enumerate(t.shape) if isinstance(size, str)} for t in cache.tensors]
    return {0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic}, state


def _to_onnx(exported: torch.export.ExportedProgram, names: list[str], outputs: list[str]) -> ir.Model:
    read_functions_once()
    with _quiet():
        program = torch.onnx.export(
            exported, dynamo=True, opset_version=OPSET, optimize=False, input_names=names, output_names=outputs
        )
    assert program is not None
    return program.model


def read_functions_once() -> None:
    """The exporter asks onnxscript for all of its functions at each export, which parses the source of each: a tenth of
    an export."""
    from torch.onnx._internal.exporter import _registration

    apis = _registration.onnxscript_apis
    vars(apis).setdefault("get_torchlib_ops", functools.cache(apis.get_torchlib_ops))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its steps and warns of our own dynamic axes; nothing there is for a user."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(previous)
