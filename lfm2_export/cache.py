"""The state of a model between two calls: the one description that eager models, graphs and runners share.

A conv layer keeps its last ``conv_L_cache - 1`` gated inputs, an attention layer the keys (after q/k norm and RoPE)
and values of every position so far, or, where a program bounds its sliding layers, of the last ones that its window
reaches: moved along in a .pte, a ring in the graphs on our operators. Each is an explicit tensor with a name, a shape
and a dtype.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lfm2_export.config import CONV, ModelConfig
from lfm2_export.errors import ArtifactError
from lfm2_export.messages import shown

BATCH = "batch_size"
PAST = "past_sequence_length"
TOTAL = "total_sequence_length"
# Of a graph that scores every position, an input that a run may leave out: only positions from it on are scored, int64
# [1]. What else a pass gives, its states and residual streams, is of all positions.
FIRST_SCORED = "first_scored"

# Of a position's scale, in caches of int8: a float32 behind its codes.
SCALE_BYTES = 4

# A ring (kernels/src/attention.h) has room for so many tokens beside all that the first of them sees, so that as many
# can be taken back; and it is made of whole steps, in which attention sums up.
RING_ROOM, RING_STEP = 16, 64


def residual_name(layer: int | str) -> str:
    """The output with the residual stream behind a layer, [batch_size, tokens, hidden_size], of a graph that has it."""
    return f"residual.{layer}"


CONV_STATE, KEY_STATE, VALUE_STATE = "conv", "key", "value"


@dataclass(frozen=True, kw_only=True)
class StateTensor:
    """One tensor of the state. ``shape`` mixes sizes and the axis names ``batch_size``, ``past_sequence_length``.

    conv: [batch_size, conv_L_cache - 1, hidden_size]; key and value: [batch_size, num_key_value_heads,
    past_sequence_length, head_dim], a number in the place of past_sequence_length where the layer is bounded.
    """

    layer: int
    kind: str
    past_name: str
    present_name: str
    shape: tuple[int | str, ...]
    dtype: str

    @staticmethod
    def names(layer: int | str, kind: str) -> tuple[str, str]:
        """(past name, present name); ``layer`` may be a placeholder where a runtime wants a template."""
        if kind == CONV_STATE:
            return f"past_conv.{layer}", f"present_conv.{layer}"
        return f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"

    @property
    def window_name(self) -> str:
        """Of a conv state in a graph that returns it for every position: (state, gated inputs) of a call."""
        return f"conv_window.{self.layer}"

    @property
    def grows(self) -> bool:
        """Whether the tensor has one entry per position, unlike the fixed size of a conv state or a bounded layer."""
        return PAST in self.shape

    @property
    def present_shape(self) -> tuple[int | str, ...]:
        return tuple(TOTAL if axis == PAST else axis for axis in self.shape)

    def concrete_shape(self, batch_size: int, length: int) -> tuple[int, ...]:
        sizes = {BATCH: batch_size, PAST: length}
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.shape)

    def zeros(self, batch_size: int, length: int = 0) -> np.ndarray:
        return np.zeros(self.concrete_shape(batch_size, length), dtype=self.dtype)

    def nbytes(self, batch_size: int, length: int = 0) -> int:
        return math.prod(self.concrete_shape(batch_size, length)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """All state tensors of a model in layer order (key before value)."""

    tensors: tuple[StateTensor, ...]

    @classmethod
    def from_config(cls, config: ModelConfig, dtype: str = "float32", *, bounded: bool = False) -> CacheSpec:
        """``bounded``: sliding layers keep no more than their window, the token that is to come left out. An encoder
        has no state, and a drafter none that a caller keeps."""
        if config.encoder is not None or config.drafter is not None:
            return cls(tensors=())
        tensors: list[StateTensor] = []
        shape: tuple[int | str, ...]
        for layer in range(config.num_hidden_layers):
            if config.layer_types[layer] == CONV:
                shape = (BATCH, config.conv_L_cache - 1, config.hidden_size)
                tensors.append(_state(layer, CONV_STATE, shape, dtype))
            else:
                window = config.window(config.layer_types[layer]) if bounded else None
                positions = PAST if window is None else max(1, window - 1)
                shape = (BATCH, config.num_key_value_heads, positions, config.head_dim)
                tensors += [_state(layer, KEY_STATE, shape, dtype), _state(layer, VALUE_STATE, shape, dtype)]
        return cls(tensors=tuple(tensors))

    def with_rings(self, config: ModelConfig) -> CacheSpec:
        """The same state with a ring for each sliding layer: the last ``ring_positions`` tokens of a row, token i at
        i modulo that."""
        windows = [config.window(kind) for kind in config.layer_types]

        def ringed(tensor: StateTensor) -> StateTensor:
            window = windows[tensor.layer]
            if window is None:
                return tensor
            batch, heads, _, head_dim = tensor.shape
            return replace(tensor, shape=(batch, heads, ring_positions(window), head_dim))

        return CacheSpec(tensors=tuple(map(ringed, self.tensors)))

    def with_int8_positions(self) -> CacheSpec:
        """The same state with keys and values in int8: rows of head_dim codes and their scale, as bytes
        (kernels/src/attention.h)."""
        return CacheSpec(
            tensors=tuple(
                t
                if t.kind == CONV_STATE
                else replace(t, shape=(*t.shape[:-1], int(t.shape[-1]) + SCALE_BYTES), dtype="uint8")
                for t in self.tensors
            )
        )

    @property
    def conv(self) -> tuple[StateTensor, ...]:
        return tuple(t for t in self.tensors if t.kind == CONV_STATE)

    @property
    def fixed(self) -> tuple[StateTensor, ...]:
        """Conv states, and keys and values of bounded layers."""
        return tuple(t for t in self.tensors if not t.grows)

    @property
    def bounded(self) -> tuple[StateTensor, ...]:
        return tuple(t for t in self.fixed if t.kind != CONV_STATE)

    @property
    def positions(self) -> tuple[StateTensor, ...]:
        """Keys and values, whether they grow or not."""
        return tuple(t for t in self.tensors if t.kind != CONV_STATE)

    @property
    def growing(self) -> tuple[StateTensor, ...]:
        return tuple(t for t in self.tensors if t.grows)

    def zeros(self, batch_size: int, length: int = 0) -> dict[str, np.ndarray]:
        """An empty state by ``past_name``; keys and values with room for ``length`` positions."""
        return {t.past_name: t.zeros(batch_size, length) for t in self.tensors}

    def bytes_per_token(self) -> int:
        """Bytes that one more position of context costs in one row."""
        return sum(t.nbytes(1, 1) for t in self.growing)

    def fixed_bytes(self) -> int:
        """Bytes of one row's states of fixed size, whatever the context's length."""
        return sum(t.nbytes(1) for t in self.fixed)

    def state_bytes(self, positions: int) -> int:
        """Bytes of one row's state that holds so many positions."""
        return self.fixed_bytes() + self.bytes_per_token() * positions

    def to_json(self) -> list[dict[str, Any]]:
        return [{**asdict(t), "shape": list(t.shape)} for t in self.tensors]

    @classmethod
    def from_json(cls, entries: object) -> CacheSpec:
        """Reads what ``to_json`` wrote.

        Raises:
            ArtifactError: an entry lacks a field or has one that no model's state has, or they are not one conv state,
                or keys and values of one shape, for each layer in order.
        """
        if not isinstance(entries, list):
            raise ArtifactError(f"cache: expected a list of state tensors, found {shown(entries)}")
        tensors = tuple(_from_json(entry) for entry in entries)
        _check_layers(tensors)
        return cls(tensors=tensors)


def ring_positions(window: int) -> int:
    """Of a sliding layer: its window, the token that is to come left out, and room for a block, in whole steps."""
    return -(-(window - 1 + RING_ROOM) // RING_STEP) * RING_STEP


def _state(layer: int, kind: str, shape: tuple[int | str, ...], dtype: str) -> StateTensor:
    past, present = StateTensor.names(layer, kind)
    return StateTensor(layer=layer, kind=kind, past_name=past, present_name=present, shape=shape, dtype=dtype)


_FIELDS: dict[str, type] = {
    "layer": int,
    "kind": str,
    "past_name": str,
    "present_name": str,
    "shape": list,
    "dtype": str,
}
# What a shape of each kind begins with; what follows are sizes.
_SHAPES: dict[str, tuple[str | None, ...]] = {
    CONV_STATE: (BATCH, None, None),
    KEY_STATE: (BATCH, None, PAST, None),
    VALUE_STATE: (BATCH, None, PAST, None),
}
_BOUNDED: tuple[str | None, ...] = (BATCH, None, None, None)
# Elements of one state tensor at one position; real ones have some thousands.
_LARGEST = 2**31 - 1


def _from_json(entry: object) -> StateTensor:
    if not isinstance(entry, Mapping) or set(entry) != set(_FIELDS):
        raise ArtifactError(
            f"cache: a state tensor needs exactly the fields {', '.join(_FIELDS)}; found {shown(entry)}"
        )
    for name, type_ in _FIELDS.items():
        if type(entry[name]) is not type_:
            raise ArtifactError(f"cache: {name}={shown(entry[name])} is not a {type_.__name__}")
    layer, kind, axes = entry["layer"], entry["kind"], entry["shape"]
    if kind not in _SHAPES or not 0 <= layer <= _LARGEST:
        raise ArtifactError(
            f"cache: a state tensor has kind={shown(kind)} and layer={shown(layer)}; one of {', '.join(_SHAPES)}, and "
            "a layer from 0 expected"
        )
    names = StateTensor.names(layer, kind)
    if (entry["past_name"], entry["present_name"]) != names:
        found = f"{shown(entry['past_name'])} and {shown(entry['present_name'])}"
        raise ArtifactError(f"cache: layer {layer}'s {kind} state is named {found}; expected {' and '.join(names)}")
    if not (_is_shape(axes, _SHAPES[kind]) or (kind != CONV_STATE and _is_shape(axes, _BOUNDED))):
        expected = ", ".join(axis or "size" for axis in _SHAPES[kind])
        raise ArtifactError(f"cache: {names[0]} has the shape {shown(axes)}; [{expected}] expected")
    if entry["dtype"] not in ("float32", "float16"):
        raise ArtifactError(f"cache: {names[0]} has the dtype {shown(entry['dtype'])}; float32 or float16 expected")
    return StateTensor(**{**entry, "shape": tuple(axes)})


def _is_shape(axes: list[object], expected: tuple[str | None, ...]) -> bool:
    if len(axes) != len(expected):
        return False
    elements = 1
    for axis, name in zip(axes, expected, strict=True):
        if name is None:
            if type(axis) is not int or not 0 < axis <= _LARGEST:
                return False
            elements *= axis
        elif axis != name:
            return False
    return elements <= _LARGEST


def _check_layers(tensors: tuple[StateTensor, ...]) -> None:
    layers = [list(group) for _, group in itertools.groupby(tensors, key=lambda tensor: tensor.layer)]
    numbers = [group[0].layer for group in layers]
    if numbers != sorted(set(numbers)):
        raise ArtifactError(f"cache: its layers are {shown(numbers)}; each once and in order expected")
    for group in layers:
        kinds = [tensor.kind for tensor in group]
        if kinds not in ([CONV_STATE], [KEY_STATE, VALUE_STATE]) or len({tensor.shape for tensor in group}) > 1:
            raise ArtifactError(
                f"cache: layer {group[0].layer} has {', '.join(kinds)}; {CONV_STATE}, or {KEY_STATE} and {VALUE_STATE} "
                "of one shape expected"
            )
