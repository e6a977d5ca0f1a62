"""Reads a checkpoint's weights into the tensors that a .pte stores, one matrix at a time, and keeps account of them.

In: a checkpoint, a ``WeightPlan``, an algorithm. Out: torch tensors (codes and scales, or numbers), and for every
published tensor its format, the error of storing it and the SHA-256 of the bytes that the file will hold: by these the
weights are found in the finished file again (``stored.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfm2_export.backends.executorch.plan import WeightPlan
from lfm2_export.checkpoint import Checkpoint, check_finite
from lfm2_export.families.tensors import EMBEDDING, HEAD
from lfm2_export.manifest import StoredTensor
from lfm2_export.quant.algorithms import Algorithm
from lfm2_export.quant.formats import (
    FloatFormat,
    IntFormat,
    QuantizedTensor,
    StorageError,
    WeightFormat,
    storage_error,
    to_float,
)
from lfm2_export.quant.schemes import FormatChoice

# The conv kernel [channels, 1, width] as XNNPACK keeps it: [width, channels].
FLOAT, CONV, INT4, EMBEDDING_BYTE, EMBEDDING_4BIT, EXPERT = (
    "float",
    "conv",
    "int4",
    "embedding8",
    "embedding4",
    "expert",
)


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A quantized matrix: ``qdata`` int8 [rows, columns], signed; ``scale`` float32 [rows, groups]."""

    qdata: Tensor
    scale: Tensor
    group_size: int


@dataclass
class _Account:
    """What is known of one stored weight while its parts are read."""

    choice: FormatChoice
    shape: tuple[int, ...]
    error: StorageError = field(default_factory=StorageError)
    parts: list[dict[str, Any]] = field(default_factory=list)


class WeightReader:
    """Hands out weights by published name. ``report`` is told the bytes of checkpoint that each step consumed."""

    def __init__(self, checkpoint: Checkpoint, plan: WeightPlan, quantize: Algorithm, report: Callable[[int], None]):
        self.checkpoint, self.plan, self.quantize, self.report = checkpoint, plan, quantize, report
        self._accounts: dict[str, _Account] = {}

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def numbers(self, name: str, kind: str = FLOAT, rows: slice | None = None) -> Tensor:
        """A tensor that is never quantized, or a part of it, as float32."""
        values = self._read(name, rows)
        account = self._account(name, self.plan.choices[name])
        account.parts.append(_place(values.T if kind == CONV else values, kind, rows))
        return torch.from_numpy(values)

    def linear(self, name: str, rows: slice | None = None) -> Tensor | Codes:
        """A linear layer's weight or some of its rows; ``lm_head.weight`` is the embedding's where the two are tied."""
        if name == HEAD and not self.has(HEAD):
            return self._linear(HEAD, self._read(EMBEDDING), self.plan.head, None)
        return self._linear(name, self._read(name, rows), self.plan.choices[name], rows)

    def _linear(self, name: str, values: np.ndarray, choice: FormatChoice, rows: slice | None) -> Tensor | Codes:
        account = self._account(name, choice)
        if isinstance(choice.format, FloatFormat):
            account.parts.append(_place(values, FLOAT, rows))
            return torch.from_numpy(to_float(values, choice.format, fqn=name))
        stored = self._quantized(name, values, choice.format, account)
        scale = torch.from_numpy(stored.scale.astype(np.float32))
        place = _place(pack_nibbles(stored.qdata), INT4, rows)
        place |= {
            "scale": sha256(scale.to(torch.bfloat16).view(torch.int16).numpy()),
            "group_size": stored.format.group_size,
        }
        account.parts.append(place)
        return Codes(qdata=_signed(stored), scale=scale, group_size=stored.format.group_size)

    def embedding(self) -> Tensor | Codes:
        """The token table; with 4 bits ``qdata`` is uint8 with two codes a byte, the first in the upper half."""
        values, choice = self._read(EMBEDDING), self.plan.choices[EMBEDDING]
        account = self._account(EMBEDDING, choice)
        if isinstance(choice.format, FloatFormat):
            account.parts.append(_place(values, FLOAT))
            return torch.from_numpy(to_float(values, choice.format, fqn=EMBEDDING))
        stored = self._quantized(EMBEDDING, values, choice.format, account)
        is_byte = choice.format.bits == 8
        packed = _signed(stored).numpy() if is_byte else stored.qdata[:, 0::2] << 4 | stored.qdata[:, 1::2]
        scale = stored.scale.astype(np.float32)
        place = _place(packed, EMBEDDING_BYTE if is_byte else EMBEDDING_4BIT)
        account.parts.append(place | {"scale": sha256(scale), "group_size": stored.format.group_size})
        return Codes(qdata=torch.from_numpy(packed), scale=torch.from_numpy(scale), group_size=stored.format.group_size)

    def expert(self, name: str) -> QuantizedTensor:
        """One matrix of one expert, for any thread; where it lies in the file is told by ``stacked`` afterwards."""
        choice = self.plan.choices[name]
        assert isinstance(choice.format, IntFormat)
        return self._quantized(name, self._read(name), choice.format, self._account(name, choice), threads=1)

    def stacked(self, name: str, place: dict[str, Any]) -> None:
        """Records where an expert's matrix lies: in a blob of several, as the operator wants them."""
        self._accounts[name].parts.append(place)

    def _quantized(
        self, name: str, values: np.ndarray, form: WeightFormat, account: _Account, threads: int | None = None
    ) -> QuantizedTensor:
        assert isinstance(form, IntFormat)
        stored = self.quantize(values, form, fqn=name, threads=threads)
        account.error += storage_error(values, stored)
        return stored

    def _read(self, name: str, rows: slice | None = None) -> np.ndarray:
        values = self.checkpoint.read(name, rows)
        check_finite(name, values)
        info = self.checkpoint.tensors[name]
        self.report(values.size * info.nbytes // max(info.count, 1))
        return values

    def _account(self, name: str, choice: FormatChoice) -> _Account:
        if name not in self._accounts:
            shape = tuple(self.checkpoint.tensors[name if self.has(name) else EMBEDDING].shape)
            self._accounts[name] = _Account(choice, shape)
        return self._accounts[name]

    def records(self) -> tuple[StoredTensor, ...]:
        """One record per stored weight."""
        return tuple(_record(name, account) for name, account in self._in_order())

    def places(self) -> dict[str, list[dict[str, Any]]]:
        """Per stored weight: its parts' kinds and the SHA-256 of their bytes."""
        return {name: account.parts for name, account in self._in_order()}

    def _in_order(self) -> list[tuple[str, _Account]]:
        """The checkpoint's order, whichever thread came first; a tied head comes last."""
        order = {name: index for index, name in enumerate(self.checkpoint.tensors)}
        return sorted(self._accounts.items(), key=lambda item: order.get(item[0], len(order)))


def sha256(array: np.ndarray) -> str:
    """Of the values' bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Unsigned 4-bit codes [rows, columns], two in a byte, the first in the lower half."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _place(values: np.ndarray, kind: str, rows: slice | None = None) -> dict[str, Any]:
    place: dict[str, Any] = {"kind": kind, "data": sha256(values)}
    return place if rows is None else place | {"rows": [rows.start, rows.stop]}


def _signed(stored: QuantizedTensor) -> Tensor:
    return torch.from_numpy((stored.qdata - np.uint8(stored.format.middle_code)).view(np.int8))


def _record(name: str, account: _Account) -> StoredTensor:
    form, reason = account.choice
    granularity = (
        f"group {form.group_size}, symmetric, {form.scale_dtype} scales" if isinstance(form, IntFormat) else None
    )
    return StoredTensor(
        name=name,
        shape=account.shape,
        dtype=form.dtype,
        granularity=granularity,
        error=account.error.relative_rms,
        reason=reason or None,
    )
