"""What calibrating will take of time, memory and disk, said before it starts; what is left out where memory is short.

In: a checkpoint and how many tokens. Out: ``Estimate``. Work is counted in products of matrices, whose speed is
measured there and then; the constants beside it were measured on two cores.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from lfm2_export.calibration.activations import BATCH_TOKENS
from lfm2_export.calibration.inputs import Input, inputs
from lfm2_export.calibration.statistics import packed_size
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.config import ModelConfig
from lfm2_export.families.tensors import EMBEDDING, ModelTensor, TensorClass
from lfm2_export.quant.gptq import BUFFERS, CHUNK_WEIGHTS, ROUNDS
from lfm2_export.quant.hessian import one_thread_products
from lfm2_export.resources import human_bytes, usable_cores

# Bytes a second: weights read and converted, statistics packed and written.
READ, WRITE = 1.0e9, 0.4e9
# Of one core: values a second where columns of a chunk are updated one after another; how fast its narrow products are,
# and a factor in float64, as shares of the speed of a square one in float32.
UPDATES, NARROW, FACTOR = 0.55e9, 0.8, 0.25
# Steps that are no products: of each channel of a layer, and how many of them one core does in a second.
STEPS, STEPS_PER_SECOND = 64, 1.0e9
# Of a sampled token: a layer's operators, seconds; and bytes of weights that are read in a second.
OPERATORS, SWEEP = 4.0e-3, 8.0e9
# torch and this package.
_BASE = 300 << 20
_GROUP = 32
_MATRICES = (TensorClass.LINEAR, TensorClass.EXPERTS)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """``seconds`` and bytes of collecting; ``quantizing_seconds``: of the algorithm for every linear weight."""

    seconds: float
    quantizing_seconds: float
    memory_bytes: int
    disk_bytes: int
    diagonal: frozenset[str]

    def __str__(self) -> str:
        text = (
            f"calibrating takes about {_duration(self.seconds)}, {human_bytes(self.memory_bytes)} of memory and "
            f"{human_bytes(self.disk_bytes)} of disk; quantizing then about {_duration(self.quantizing_seconds)}"
        )
        if not self.diagonal:
            return text
        return f"{text}; memory is short: of {len(self.diagonal)} inputs only the mean squares are kept"


def estimate(
    checkpoint: Checkpoint, rows: int, length: int, *, available: int | None, sampled: bool = False
) -> Estimate:
    """For ``rows`` rows of ``length`` tokens, which the model writes itself where they are ``sampled``, in
    ``available`` bytes of memory (None: any number)."""
    found = inputs(checkpoint.config, checkpoint.model_tensors)
    diagonal = _diagonal(checkpoint, found, length, available)
    tokens, config = rows * length, checkpoint.config
    speed = measured_speed()
    file_bytes = 4 * sum(one.width if one.name in diagonal else packed_size(one.width) for one in found.values())
    flops = tokens * (_forward_flops(checkpoint) + _gram_flops(config, found.values(), diagonal))
    steps = tokens * config.num_hidden_layers * config.hidden_size * STEPS
    seconds = (flops / speed + steps / STEPS_PER_SECOND) / usable_cores()
    if sampled:
        seconds += length * (4 * checkpoint.parameter_count / SWEEP + config.num_hidden_layers * OPERATORS)
    return Estimate(
        seconds=seconds + checkpoint.total_bytes / READ + file_bytes / WRITE,
        quantizing_seconds=_quantizing_seconds(checkpoint, found, speed),
        memory_bytes=_memory(checkpoint, found, length, diagonal),
        disk_bytes=file_bytes + 2 * 4 * tokens * config.hidden_size,
        diagonal=diagonal,
    )


def quantizing_memory(widths: Iterable[int]) -> int:
    """Bytes that ``gptq`` takes beside what every algorithm does: Hessian and factor of each core, one being made."""
    widest = max(widths)
    return usable_cores() * (2 * 4 * widest**2 + BUFFERS * 4 * CHUNK_WEIGHTS) + (3 * 8 + 4) * widest**2


def measured_speed() -> float:
    """Operations a second of one core in float32 products: the best of a quarter of a second, as other work comes and
    goes."""
    left, right = np.ones((512, 512), np.float32), np.ones((512, 512), np.float32)
    best, ends = 0.0, time.perf_counter() + 0.25
    with one_thread_products():
        while not best or time.perf_counter() < ends:
            started = time.perf_counter()
            left @ right
            best = max(best, 2 * 512**3 / (time.perf_counter() - started))
    return best


def _share(config: ModelConfig, expert: int | None) -> float:
    """Of the tokens, those that a block sees."""
    return 1.0 if expert is None else config.num_experts_per_tok / config.num_experts


def _forward_flops(checkpoint: Checkpoint) -> float:
    """Operations a token."""
    config = checkpoint.config
    return sum(2 * prod(one.shape) * _share(config, one.expert) for one in _matrices(checkpoint))


def _matrices(checkpoint: Checkpoint) -> list[ModelTensor]:
    return [one for one in checkpoint.model_tensors.values() if one.kind in _MATRICES]


def _gram_flops(config: ModelConfig, found: Iterable[Input], diagonal: frozenset[str]) -> float:
    return sum(2 * one.width**2 * _share(config, one.expert) for one in found if one.name not in diagonal)


def _quantizing_seconds(checkpoint: Checkpoint, found: Mapping[str, Input], speed: float) -> float:
    products = updates = 0.0
    for one in _matrices(checkpoint):
        rows, width = one.shape
        products += 2 * rows * width**2 * (0.5 + ROUNDS)
        updates += rows * width * _GROUP * (1 + ROUNDS)
    factors = sum(one.width**3 / 3 for one in found.values())
    return ((products / NARROW + 2 * factors / FACTOR) / speed + updates / UPDATES) / usable_cores()


def _diagonal(checkpoint: Checkpoint, found: Mapping[str, Input], length: int, available: int | None) -> frozenset[str]:
    """The inputs whose Hessians do not fit: of a layer that is too large, the kind that takes most, then the next."""
    chosen: set[str] = set()
    while available is not None and _memory(checkpoint, found, length, frozenset(chosen)) > available:
        kinds: dict[tuple[bool, int], list[str]] = {}
        for one in found.values():
            if one.name not in chosen and one.layer is not None:
                kinds.setdefault((one.expert is not None, one.width), []).append(one.name)
        if not kinds:
            break
        # Of one layer; layers of a kind are alike.
        sizes = {kind: len(names) * kind[1] ** 2 for kind, names in kinds.items()}
        chosen.update(kinds[max(sizes, key=lambda kind: sizes[kind])])
    return frozenset(chosen)


def _memory(checkpoint: Checkpoint, found: Mapping[str, Input], length: int, diagonal: frozenset[str]) -> int:
    """At the peak: the largest layer with its Hessians and a batch, or the token table."""
    config = checkpoint.config
    layers: dict[int | None, int] = {}
    for tensor in checkpoint.model_tensors.values():
        if tensor.name != EMBEDDING:
            layers[tensor.layer] = layers.get(tensor.layer, 0) + 4 * prod(tensor.shape)
    largest: dict[tuple[int | None, str | None], int] = {}
    for one in found.values():
        if one.name not in diagonal:
            layers[one.layer] = layers.get(one.layer, 0) + 4 * one.width**2
            # Of each kind of a layer's input one more: the mean, or what is on its way into the file.
            largest[one.layer, one.matrix] = 2 * 4 * one.width**2
    for (layer, _), nbytes in largest.items():
        layers[layer] += nbytes
    rows = max(1, BATCH_TOKENS // length)
    attention = 4 * rows * config.num_attention_heads * length**2
    batch = 4 * rows * length * (4 * max(config.intermediate_size, config.hidden_size) + 8 * config.hidden_size)
    table = 4 * config.vocab_size * config.hidden_size
    return _BASE + max(table, max(layers.values()) + attention + batch)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
