"""How much of the residual stream a feed-forward makes: errors of those that add little do little harm.

In: a checkpoint. Out: per layer, the energy of what its feed-forward adds over the energy of the stream behind it, for
random inputs: no data is needed. In trained models the first layer's feed-forward makes nearly all of the stream, and
later ones a hundredth to a fifth, which is what their errors' KL divergence goes by (measured: it differs by a factor
of 50 between the layers of a model before this is divided out, of 3 after). For convolutions and attention, whose
outputs hang on how tokens relate, random inputs say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from lfm2_export.checkpoint import Checkpoint, check_finite, is_finite
from lfm2_export.families.tensors import EMBEDDING, block_prefix, feed_forward_prefix
from lfm2_export.quant.formats import FloatArray

_INPUTS = 16
_EXPERTS = 2  # of a layer: the first and the last
# Rows that are looked at: of the token table, and of the last matrix; in so many places.
_TABLE_ROWS, _OUTPUT_ROWS, _PLACES = 4096, 256, 4
# So coarse that no machine's way to multiply matrices shows.
_DIGITS = 2


def feed_forward_shares(checkpoint: Checkpoint) -> dict[int, float]:
    """By layer.

    Raises:
        CheckpointError: a tensor cannot be read, or holds NaN or infinity.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # weights of 1e19 have no share to speak of
        return _shares(checkpoint)


def _shares(checkpoint: Checkpoint) -> dict[int, float]:
    inputs = np.random.default_rng(0).standard_normal((_INPUTS, checkpoint.config.hidden_size), dtype=np.float32)
    inputs /= np.sqrt(np.square(inputs).mean(axis=1, keepdims=True))
    stream = _mean_square(_some_rows(checkpoint, EMBEDDING, _TABLE_ROWS))
    shares = {}
    for layer in range(checkpoint.config.num_hidden_layers):
        normed = inputs * _read(checkpoint, f"{block_prefix(layer)}ffn_norm.weight")
        outputs = [_mean_square(_swiglu(checkpoint, prefix, normed)) for prefix in _blocks(checkpoint, layer)]
        energy = sum(outputs) / len(outputs)
        stream += energy
        share = energy / stream if stream else 0.0
        shares[layer] = float(f"{share:.{_DIGITS - 1}e}") if math.isfinite(share) else 1.0
    return shares


def _blocks(checkpoint: Checkpoint, layer: int) -> Iterable[str]:
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
    outputs: FloatArray = hidden @ _some_rows(checkpoint, f"{prefix}w2.weight", _OUTPUT_ROWS).T
    return outputs


def _some_rows(checkpoint: Checkpoint, name: str, count: int) -> FloatArray:
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
