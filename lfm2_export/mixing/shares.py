"""How much of the residual stream each block makes: errors of those that add little do little harm.

In: a checkpoint, and statistics where there are any. Out: by layer and block (operator, feed-forward), the energy of
what it adds over the energy of the stream behind it. Statistics tell it: W H Wᵀ of the matrix that writes to the
stream. So does a norm behind the block, whose weights are the outputs' size. Without either, a feed-forward is given
random inputs: in trained models the first layer's makes nearly all of the stream, and later ones a hundredth to a
fifth, which is what their errors' KL divergence goes by (measured: it differs by a factor of 50 between the layers of
a model before this is divided out, of 3 after). For convolutions and attention, whose outputs hang on how tokens
relate, random inputs say nothing (a tenth to a thousandth of what they are, measured): all of them count alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from lfm2_export.calibration.statistics import Statistics
from lfm2_export.checkpoint import Checkpoint, check_finite, is_finite
from lfm2_export.families.tensors import (
    EMBEDDING,
    ModelTensor,
    block_prefix,
    feed_forward_prefix,
    in_feed_forward,
    output_norm,
    writes_stream,
)
from lfm2_export.quant.formats import FloatArray
from lfm2_export.quant.hessian import energy

_INPUTS = 16
_EXPERTS = 2  # of a layer: the first and the last
# Rows that are looked at: of the token table, and of the last matrix; in so many places.
_TABLE_ROWS, _OUTPUT_ROWS, _PLACES = 4096, 256, 4
# So coarse that no machine's way to multiply matrices shows; with statistics there are other causes, and none as large.
_DIGITS, _MEASURED_DIGITS = 2, 3
# An operator's where nothing tells: the geometric mean of three trained models.
OPERATOR_SHARE = 0.08


class Block(NamedTuple):
    """The operator of a layer, or its feed-forward."""

    layer: int
    feed_forward: bool


Shares = dict[Block, float]


def block_shares(checkpoint: Checkpoint, statistics: Statistics | None = None) -> Shares:
    """By block.

    Raises:
        CheckpointError: a tensor cannot be read, or holds NaN or infinity.
        CalibrationError: the statistics cannot be read.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # weights of 1e19 have no share to speak of
        if statistics is None:
            return _shares(checkpoint, _guessed(checkpoint), _DIGITS)
        return _shares(checkpoint, _measured(checkpoint, statistics), _MEASURED_DIGITS)


def _shares(checkpoint: Checkpoint, added: Callable[[Block], float | None], digits: int) -> Shares:
    """``added``: the mean square of what a block adds to the stream; None where nothing is known."""
    stream = _mean_square(some_rows(checkpoint, EMBEDDING, _TABLE_ROWS))
    shares = {}
    for block in _blocks(checkpoint):
        norm = output_norm(checkpoint.model_tensors, block.layer, feed_forward=block.feed_forward)
        adds = added(block) if norm is None else _mean_square(_read(checkpoint, norm))
        if adds is None:
            shares[block] = OPERATOR_SHARE
            continue
        stream += adds
        share = adds / stream if stream else 0.0
        shares[block] = float(f"{share:.{digits - 1}e}") if math.isfinite(share) else 1.0
    return shares


def _blocks(checkpoint: Checkpoint) -> Iterator[Block]:
    for layer in range(checkpoint.config.num_hidden_layers):
        yield Block(layer, feed_forward=False)
        yield Block(layer, feed_forward=True)


def _measured(checkpoint: Checkpoint, statistics: Statistics) -> Callable[[Block], float]:
    writers: dict[Block, list[ModelTensor]] = {}
    for tensor in checkpoint.model_tensors.values():
        if tensor.layer is not None and writes_stream(tensor):
            writers.setdefault(Block(tensor.layer, in_feed_forward(tensor.part)), []).append(tensor)

    def added(block: Block) -> float:
        found = writers[block]
        if found[0].expert is not None:
            found = [found[0], found[-1]]
        outputs = [_output(tensor.name) for tensor in found]
        mean = sum(outputs) / len(outputs)
        return mean if found[0].expert is None else mean * _routed(checkpoint)

    def _output(name: str) -> float:
        rows = some_rows(checkpoint, name, _OUTPUT_ROWS)
        return energy(rows, statistics.hessian(name)) / len(rows)

    return added


def _routed(checkpoint: Checkpoint) -> float:
    """Of experts' energy, what is left of it where their outputs are averaged."""
    return checkpoint.config.routed_scaling_factor**2 / checkpoint.config.num_experts_per_tok


def _guessed(checkpoint: Checkpoint) -> Callable[[Block], float | None]:
    inputs = np.random.default_rng(0).standard_normal((_INPUTS, checkpoint.config.hidden_size), dtype=np.float32)
    inputs /= np.sqrt(np.square(inputs).mean(axis=1, keepdims=True))

    def added(block: Block) -> float | None:
        if not block.feed_forward:
            return None
        normed = inputs * _read(checkpoint, f"{block_prefix(block.layer)}ffn_norm.weight")
        prefixes = _feed_forwards(checkpoint, block.layer)
        outputs = [_mean_square(_swiglu(checkpoint, prefix, normed)) for prefix in prefixes]
        return sum(outputs) / len(outputs)

    return added


def _feed_forwards(checkpoint: Checkpoint, layer: int) -> list[str]:
    """What the names of a layer's feed-forward, or of some of its experts, begin with."""
    prefix, config = feed_forward_prefix(layer), checkpoint.config
    if layer < config.num_dense_layers:
        return [prefix]
    last = config.num_experts - 1
    return [
        f"{prefix}experts.{expert}." for expert in sorted({round(i * last / (_EXPERTS - 1)) for i in range(_EXPERTS)})
    ]


def _swiglu(checkpoint: Checkpoint, prefix: str, inputs: FloatArray) -> FloatArray:
    """Some columns of a SwiGLU block's outputs."""
    gate = inputs @ _read(checkpoint, f"{prefix}w1.weight").T
    hidden = gate / (1 + np.exp(-np.clip(gate, -80, None))) * (inputs @ _read(checkpoint, f"{prefix}w3.weight").T)
    outputs: FloatArray = hidden @ some_rows(checkpoint, f"{prefix}w2.weight", _OUTPUT_ROWS).T
    return outputs


def some_rows(checkpoint: Checkpoint, name: str, count: int) -> FloatArray:
    """At most ``count`` rows of a matrix, from all over it."""
    rows, each = checkpoint.model_tensors[name].shape[0], count // _PLACES
    if rows <= count:
        return _read(checkpoint, name)
    starts = [place * (rows - each) // (_PLACES - 1) for place in range(_PLACES)]
    return np.concatenate([_read(checkpoint, name, slice(start, start + each)) for start in starts])


def _read(checkpoint: Checkpoint, name: str, rows: slice | None = None) -> FloatArray:
    values = checkpoint.read(name, rows)
    if not is_finite(values):
        check_finite(name, checkpoint.read(name))
    return values


def _mean_square(values: FloatArray) -> float:
    return float(np.square(values, dtype=np.float64).mean())
