"""What each format of each unit costs the model, measured: the KL divergence from quantizing that unit alone.

In: a checkpoint and rows of tokens. Out: damages by unit and format. What goes into every layer is kept, so that a unit
of layer i costs a pass through the layers from i on; the model is in memory as float32.

Shape suffixes: T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lfm2_export.checkpoint import Checkpoint
from lfm2_export.families.tensors import EMBEDDING, HEAD
from lfm2_export.mixing.estimate import Damages, relative_errors
from lfm2_export.mixing.units import Space, UnitShape
from lfm2_export.models.decoder import DecoderForCausalLM, empty_cache
from lfm2_export.models.layers import Recorder
from lfm2_export.models.loading import load_model
from lfm2_export.parity.sample import read_sample
from lfm2_export.quant.algorithms import Algorithm
from lfm2_export.quant.formats import FloatArray, IntFormat
from lfm2_export.resources import check_memory

TOKENS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class _Row:
    """One row of tokens: what goes into each layer (stream and what is to be added to it), and the reference."""

    tokens: Tensor
    inputs: Sequence[tuple[Tensor, Tensor | None]]
    log_probabilities_TV: Tensor


class Meter:
    """Runs the eager model with some weights replaced."""

    def __init__(self, checkpoint: Checkpoint, rows: Sequence[np.ndarray]):
        self.checkpoint = checkpoint
        self.model: DecoderForCausalLM = load_model(checkpoint)
        self._head = self.model.lm_head.weight
        self._places = {
            name: (fused_name, part)
            for fused_name, fused in checkpoint.family.fused_tensors(checkpoint.config).items()
            for name, part in fused.parts.items()
        }
        with torch.inference_mode():
            self._rows = [self._reference(torch.from_numpy(row)[None]) for row in rows]

    def kl(self, weights: Mapping[str, FloatArray], *, first_layer: int | None = None) -> float:
        """Mean KL divergence from the model with ``weights`` (by published name) in the place of its own; all of them
        are in ``first_layer`` or behind it, None: anywhere. A tied head is what the token table is, unless it is named
        itself."""
        with torch.inference_mode(), self._replaced(weights):
            found = [self._row_kl(row, first_layer) for row in self._rows]
        return float(torch.cat(found).mean())

    def token_kl(self, weights: Mapping[str, FloatArray]) -> np.ndarray:
        """The KL divergence at every position, float64, with any weights replaced."""
        with torch.inference_mode(), self._replaced(weights):
            return torch.cat([self._row_kl(row, None) for row in self._rows]).numpy()

    def _row_kl(self, row: _Row, first_layer: int | None) -> Tensor:
        ours_TV = torch.log_softmax(self._logits(row, first_layer).double(), -1)
        reference_TV = row.log_probabilities_TV
        return (reference_TV.exp() * (reference_TV - ours_TV)).sum(-1).clamp(min=0)

    def _reference(self, tokens: Tensor) -> _Row:
        inputs: list[tuple[Tensor, Tensor | None]] = []
        logits = self._run(self.model.model.embed_tokens(tokens), None, 0, inputs)
        return _Row(tokens=tokens, inputs=inputs, log_probabilities_TV=torch.log_softmax(logits.double(), -1))

    def _logits(self, row: _Row, first_layer: int | None) -> Tensor:
        if first_layer is None:
            return self._run(self.model.model.embed_tokens(row.tokens), None, 0, None)
        stream, delta = row.inputs[first_layer]
        return self._run(stream, delta, first_layer, None)

    def _run(
        self, stream: Tensor, delta: Tensor | None, first: int, inputs: list[tuple[Tensor, Tensor | None]] | None
    ) -> Tensor:
        """Logits [T, V] of one row, from a layer on."""
        net = self.model.model
        past, recorder = (
            empty_cache(net.config, 1, stream.dtype, stream.device),
            Recorder(hidden_states=False, attentions=False, router_logits=False),
        )
        layout = net.layout(stream, None, None, 0)
        for layer in net.layers[first:]:
            if inputs is not None:
                inputs.append((stream, delta))
            stream, delta = layer(stream, delta, past, {}, layout, recorder)
        hidden, _ = net.embedding_norm(stream, delta)
        logits: Tensor = self.model.lm_head(hidden)[0]
        return logits

    @contextmanager
    def _replaced(self, weights: Mapping[str, FloatArray]) -> Iterator[None]:
        if HEAD in weights:
            self.model.lm_head.weight = torch.nn.Parameter(self._head.clone(), requires_grad=False)
        before = {name: self._values(name).clone() for name in weights}
        for name, values in weights.items():
            self._values(name).copy_(torch.from_numpy(values))
        try:
            yield
        finally:
            for name, kept in before.items():
                self._values(name).copy_(kept)
            self.model.lm_head.weight = self._head

    def _values(self, name: str) -> Tensor:
        """The model's own values of a published tensor."""
        if name not in self._places:
            return self.model.get_parameter(name).data
        fused, part = self._places[name]
        return self.model.get_parameter(fused).data[part.expert, part.start : part.stop]


def quantized(
    checkpoint: Checkpoint, tensors: Sequence[str], form: IntFormat, algorithm: Algorithm
) -> dict[str, FloatArray]:
    """The values that a program computes with."""
    return {name: algorithm(read_published(checkpoint, name), form, fqn=name).dequantize() for name in tensors}


def read_published(checkpoint: Checkpoint, name: str) -> FloatArray:
    """A tensor by its published name; a tied head's values are the token table's."""
    return checkpoint.read(name if name in checkpoint.model_tensors else EMBEDDING)


def measured_damages(
    meter: Meter, space: Space, algorithm: Algorithm, report: Callable[[UnitShape], None] = lambda unit: None
) -> Damages:
    """The damage of every format of every unit, by the unit's name: measured in the unit's first format, and as much
    more or less in the others as their relative errors are (on tiny-dense most matrices do 0.0060 to 0.0069 of the
    damage at 8 bits in groups of 128, with 0.0066 of the error)."""
    found: Damages = {}
    copied = any(HEAD in unit.tensors for unit in space.units)
    for unit in space.units:
        first = unit.formats[0]
        values = quantized(meter.checkpoint, unit.tensors, first, algorithm)
        if copied and EMBEDDING in values:
            values[HEAD] = read_published(meter.checkpoint, HEAD)
        damage = meter.kl(values, first_layer=unit.weights[0].layer)
        errors = [relative_errors(meter.checkpoint, unit, weight, algorithm) for weight in unit.weights]
        sums = {form: sum(one[form] for one in errors) for form in unit.formats}
        found[unit.name] = {form: damage * error / sums[first] if error else 0.0 for form, error in sums.items()}
        report(unit)
    return found


def measure(checkpoint: Checkpoint, space: Space, algorithm: Algorithm, text: str | Path) -> Damages:
    """What the units cost on a text.

    Raises:
        Lfm2ExportError: the text cannot be read or is too short, or the checkpoint is an encoder.
        ResourceError: the memory is too small for the model in float32.
    """
    checkpoint.check_decoder("--measure")
    check_memory(4 * checkpoint.parameter_count, purpose="the model in float32 (--measure)", remedy="leave it out")
    context = checkpoint.config.max_position_embeddings
    sample = read_sample(checkpoint, text, max_tokens=TOKENS, context_length=context, option="--measure")
    meter = Meter(checkpoint, [window.inputs for window in sample.windows])
    return measured_damages(meter, space, algorithm)
