"""The state of a model between two calls: the one description that eager models, graphs and runners share.

A conv layer keeps its last ``conv_L_cache - 1`` gated inputs, an attention layer the keys (after q/k norm and RoPE)
and values of every position so far. Each is an explicit tensor with a name, a shape and a dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lfm2_export.config import ModelConfig
from lfm2_export.errors import ArtifactError

BATCH = "batch_size"
PAST = "past_sequence_length"
TOTAL = "total_sequence_length"

# Of a position's scale, in caches of int8: a float32 behind its codes.
SCALE_BYTES = 4

CONV_STATE, KEY_STATE, VALUE_STATE = "conv", "key", "value"


@dataclass(frozen=True, kw_only=True)
class StateTensor:
    """One tensor of the state. ``shape`` mixes sizes and the axis names ``batch_size``, ``past_sequence_length``.

    conv: [batch_size, conv_L_cache - 1, hidden_size]; key and value: [batch_size, num_key_value_heads,
    past_sequence_length, head_dim].
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
    def grows(self) -> bool:
        """Whether the tensor has one entry per position (keys and values), unlike a conv state's fixed size."""
        return PAST in self.shape

    @property
    def present_shape(self) -> tuple[int | str, ...]:
        return tuple(TOTAL if axis == PAST else axis for axis in self.shape)

    def concrete_shape(self, batch_size: int, length: int) -> tuple[int, ...]:
        sizes = {BATCH: batch_size, PAST: length}
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.shape)

    def zeros(self, batch_size: int, length: int = 0) -> np.ndarray:
        return np.zeros(self.concrete_shape(batch_size, length), dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """All state tensors of a model in layer order (key before value)."""

    tensors: tuple[StateTensor, ...]

    @classmethod
    def from_config(cls, config: ModelConfig, dtype: str = "float32") -> CacheSpec:
        tensors: list[StateTensor] = []
        shape: tuple[int | str, ...]
        for layer in range(config.num_hidden_layers):
            if layer in config.conv_layers:
                shape = (BATCH, config.conv_L_cache - 1, config.hidden_size)
                tensors.append(_state(layer, CONV_STATE, shape, dtype))
            else:
                shape = (BATCH, config.num_key_value_heads, PAST, config.head_dim)
                tensors += [_state(layer, KEY_STATE, shape, dtype), _state(layer, VALUE_STATE, shape, dtype)]
        return cls(tensors=tuple(tensors))

    def with_int8_positions(self) -> CacheSpec:
        """The same state with keys and values in int8: rows of head_dim codes and their scale, as bytes
        (kernels/src/attention.h)."""
        return CacheSpec(
            tensors=tuple(
                replace(t, shape=(*t.shape[:-1], int(t.shape[-1]) + SCALE_BYTES), dtype="uint8") if t.grows else t
                for t in self.tensors
            )
        )

    @property
    def conv(self) -> tuple[StateTensor, ...]:
        return tuple(t for t in self.tensors if not t.grows)

    @property
    def growing(self) -> tuple[StateTensor, ...]:
        return tuple(t for t in self.tensors if t.grows)

    def zeros(self, batch_size: int, length: int = 0) -> dict[str, np.ndarray]:
        """An empty state by ``past_name``; keys and values with room for ``length`` positions."""
        return {t.past_name: t.zeros(batch_size, length) for t in self.tensors}

    def bytes_per_token(self) -> int:
        """Bytes that one more position of context costs in one row."""
        return sum(t.zeros(1, 1).nbytes for t in self.growing)

    def fixed_bytes(self) -> int:
        """Bytes of one row's conv states, whatever the context's length."""
        return sum(t.zeros(1).nbytes for t in self.conv)

    def to_json(self) -> list[dict[str, Any]]:
        return [{**asdict(t), "shape": list(t.shape)} for t in self.tensors]

    @classmethod
    def from_json(cls, entries: object) -> CacheSpec:
        """Reads what ``to_json`` wrote.

        Raises:
            ArtifactError: an entry lacks a field or has one of the wrong type.
        """
        if not isinstance(entries, list):
            raise ArtifactError(f"cache: expected a list of state tensors, found {type(entries).__name__}")
        return cls(tensors=tuple(_from_json(entry) for entry in entries))


def _state(layer: int, kind: str, shape: tuple[int | str, ...], dtype: str) -> StateTensor:
    past, present = StateTensor.names(layer, kind)
    return StateTensor(layer=layer, kind=kind, past_name=past, present_name=present, shape=shape, dtype=dtype)


def _from_json(entry: object) -> StateTensor:
    fields = {"layer": int, "kind": str, "past_name": str, "present_name": str, "shape": list, "dtype": str}
    if not isinstance(entry, Mapping) or set(entry) != set(fields):
        raise ArtifactError(f"cache: a state tensor needs exactly the fields {', '.join(fields)}; found {entry!r}")
    for name, kind in fields.items():
        if not isinstance(entry[name], kind):
            raise ArtifactError(f"cache: {name}={entry[name]!r} is not a {kind.__name__}")
    axes = entry["shape"]
    if not all((type(a) is int and 0 < a < 2**31) or a in (BATCH, PAST) for a in axes):
        raise ArtifactError(f"cache: {entry['past_name']} has the shape {axes!r}; sizes or known axis names expected")
    if entry["dtype"] not in ("float32", "float16"):
        raise ArtifactError(
            f"cache: {entry['past_name']} has the dtype {entry['dtype']!r}; float32 or float16 expected"
        )
    return StateTensor(**{**entry, "shape": tuple(axes)})
