"""Hands out a program's weights as the tensors that a lowered model holds, and keeps account of where they will lie.

In: a ``PtePlan`` and the files that its stream has filled. Out: torch tensors (codes and scales, or numbers) on maps of
these files, and for every weight the SHA-256 of the bytes that the program will hold: by these the weights are found in
the finished file again (``stored.py``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfm2_export.backends.executorch.plan import Layout, MoeOp, PtePlan
from lfm2_export.backends.executorch.spill import Spill
from lfm2_export.backends.executorch.stream import BLOBS, Places
from lfm2_export.backends.weights.pieces import CHUNK_VALUES
from lfm2_export.backends.weights.plan import StoredWeight
from lfm2_export.families.tensors import EMBEDDING
from lfm2_export.quant.formats import IntFormat

# The conv kernel [channels, 1, width] as XNNPACK keeps it: [width, channels].
FLOAT, CONV, INT4, INT8, EMBEDDING_BYTE, EMBEDDING_4BIT = "float", "conv", "int4", "int8", "embedding8", "embedding4"


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A quantized matrix: ``qdata`` int8 [rows, columns], signed; ``scale`` float32 [rows, groups], a row being one
    where ``group_size`` is None."""

    qdata: Tensor
    scale: Tensor
    group_size: int | None


class ProgramWeights:
    """Hands out weights by published name; ``lm_head.weight`` is there where the checkpoint ties it, too."""

    def __init__(self, plan: PtePlan, places: Places, spill: Spill):
        self.plan, self._places, self._spill = plan, places, spill
        self._parts: dict[str, list[dict[str, Any]]] = {name: [] for name in plan}

    def has(self, name: str) -> bool:
        return name in self.plan

    def numbers(self, name: str, kind: str = FLOAT, rows: slice | None = None) -> Tensor:
        """A tensor that is not quantized, or a part of it, as float32."""
        values = self._array(name, "weight", rows)
        self._parts[name].append(_part(kind, sha256(values.T if kind == CONV else values), rows))
        return torch.from_numpy(values)

    def linear(self, name: str, rows: slice | None = None) -> Tensor | Codes:
        """A linear layer's weight or some of its rows."""
        form = self.plan[name].format
        if not isinstance(form, IntFormat):
            return self.numbers(name, rows=rows)
        codes, scale = self._array(name, "qdata", rows), torch.from_numpy(self._array(name, "scale", rows))
        if form.group_size is None:
            part = _part(INT8, sha256(codes), rows) | {"scale": sha256(scale.numpy())}
        else:
            part = _part(INT4, _nibbles_sha256(codes, form), rows) | {
                "scale": sha256(scale.to(torch.bfloat16).view(torch.int16).numpy()),
                "group_size": form.group_size,
            }
        self._parts[name].append(part)
        return Codes(qdata=torch.from_numpy(codes), scale=scale, group_size=form.group_size)

    def embedding(self) -> Tensor | Codes:
        """The token table; with 4 bits ``qdata`` is uint8 with two codes a byte, the first in the upper half."""
        weight = self.plan[EMBEDDING]
        form = weight.format
        if not isinstance(form, IntFormat):
            return self.numbers(EMBEDDING)
        codes, scale = self._array(EMBEDDING, "qdata"), self._array(EMBEDDING, "scale")
        kind = EMBEDDING_4BIT if weight.layout is Layout.NIBBLES else EMBEDDING_BYTE
        self._parts[EMBEDDING].append(
            _part(kind, sha256(codes)) | {"scale": sha256(scale), "group_size": form.group_size}
        )
        return Codes(qdata=torch.from_numpy(codes), scale=torch.from_numpy(scale), group_size=form.group_size)

    def experts(self, prefix: str) -> tuple[Tensor, Tensor]:
        """All experts of a layer, whose names begin with ``prefix``, as their operator takes them: w1 and w3 of all,
        and w2 of all; uint8, the first axis the experts' (``packing``, ``kernels.packing``)."""
        return self._blob(prefix, 0), self._blob(prefix, 1)

    def _blob(self, prefix: str, number: int) -> Tensor:
        name, matrices = BLOBS[self.plan.moe_op][number]
        there = self._places.blobs[f"{prefix}{name}"]
        blob = {"data": self._spill.sha256(there), "shape": list(there.shape)}
        for index, matrix in enumerate(matrices):
            for expert in range(there.shape[0]):
                weight = self.plan[f"{prefix}{expert}.{matrix}.weight"]
                part = self._stock_part if self.plan.moe_op is MoeOp.STOCK else self._our_part
                self._parts[weight.name].append(part(weight, blob, index, len(matrices)) | {"expert": expert})
        return torch.from_numpy(self._spill.array(there))

    def _stock_part(self, weight: StoredWeight, blob: dict[str, Any], index: int, count: int) -> dict[str, Any]:
        """Matrices of equal height lie one below the other."""
        assert isinstance(weight.format, IntFormat)
        rows, columns = weight.shape
        where = {"group_size": weight.format.group_size, "columns": columns}
        return {"kind": "stock", **blob, **where, "blob_rows": [index * rows, (index + 1) * rows]}

    def _our_part(self, weight: StoredWeight, blob: dict[str, Any], index: int, count: int) -> dict[str, Any]:
        """Blocks of their rows alternate."""
        return {"kind": "lfm2", **blob, "first": index, "step": count}

    def places(self) -> dict[str, list[dict[str, Any]]]:
        """Per weight that was handed out: its parts' kinds and the SHA-256 of their bytes."""
        return {name: parts for name, parts in self._parts.items() if parts}

    def _array(self, name: str, role: str, rows: slice | None = None) -> np.ndarray:
        found = self._spill.array(self._places.tensors[self.plan[name].tensor(role)])
        return found if rows is None else found[rows]


def sha256(array: np.ndarray) -> str:
    """Of the values' bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _nibbles_sha256(codes: np.ndarray, form: IntFormat) -> str:
    """Of signed 4-bit codes [rows, columns] as XNNPACK packs them: unsigned, two in a byte, the first in the lower
    half. Some rows at a time: a vocabulary's table is large."""
    digest, step = hashlib.sha256(), max(1, CHUNK_VALUES // codes.shape[1])
    for start in range(0, len(codes), step):
        unsigned = codes[start : start + step].view(np.uint8) + np.uint8(form.middle_code)
        digest.update(np.ascontiguousarray(unsigned[:, 0::2] | unsigned[:, 1::2] << 4).data)
    return digest.hexdigest()


def _part(kind: str, digest: str, rows: slice | None = None) -> dict[str, Any]:
    part: dict[str, Any] = {"kind": kind, "data": digest}
    return part if rows is None else part | {"rows": [rows.start, rows.stop]}
