"""Streams a .pte's weights into files, from which the program is put together then.

In: a checkpoint, a ``PtePlan``, a folder. Out: files there, and a record of every weight. What the program holds as one
constant (a token table, what an operator for experts takes) has a file of its own, which goes into the program without
ever being in memory (``spill``); everything else is in the first file. A ledger says what of them is done, so that a
killed export goes on from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from lfm2_export.backends.executorch.packing import HEADER_BYTES, pack_stock
from lfm2_export.backends.executorch.plan import Layout, MoeOp, PtePlan, is_packed
from lfm2_export.backends.weights.pieces import CHUNK_VALUES, Piece, Placement, pieces
from lfm2_export.backends.weights.plan import StoredWeight
from lfm2_export.backends.weights.stream import FIGURES, WeightStream, bytes_on_disk
from lfm2_export.calibration.statistics import Statistics
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.families import get_family
from lfm2_export.families.tensors import EMBEDDING, expert_stacks, feed_forward_prefix
from lfm2_export.kernels.packing import pack_matrix
from lfm2_export.ledger import Ledger
from lfm2_export.manifest import StoredTensor
from lfm2_export.quant.algorithms import get_algorithm
from lfm2_export.quant.formats import IntFormat, QuantizedTensor
from lfm2_export.quant.groups import Chunk, empty_tensor, store_chunk

_ALIGNMENT = 64
_BYTE = np.dtype(np.uint8)

# What an operator for experts takes of a layer: a name for it, and the matrices in it.
BLOBS: Mapping[MoeOp | None, Sequence[tuple[str, tuple[str, ...]]]] = {
    MoeOp.STOCK: (("w13", ("w1", "w3")), ("w2", ("w2",))),
    MoeOp.LFM2: (("gate_up", ("w1", "w3")), ("down", ("w2",))),
}


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where everything lies: ``tensors`` by name, ``blobs`` (of all experts of a layer) by name, files by size."""

    tensors: Mapping[str, Placement]
    blobs: Mapping[str, Placement]
    sizes: Sequence[int]


def place(plan: PtePlan) -> Places:
    """The place of every tensor of the plan."""
    placer = _Placer()
    for weight in plan.values():
        if not is_packed(weight):
            placer.place(weight)
    if plan.moe_op in BLOBS:
        for layer, matrices in expert_stacks(get_family(plan.config.model_type).tensors(plan.config)).items():
            weights = {key: plan[tensor.name] for key, tensor in matrices.items()}
            for name, names in BLOBS[plan.moe_op]:
                stack = [[weights[expert, matrix] for matrix in names] for expert in range(plan.config.num_experts)]
                placer.place_blob(f"{feed_forward_prefix(layer)}experts.{name}", stack)
    return Places(tensors=placer.tensors, blobs=placer.blobs, sizes=placer.sizes)


class _Placer:
    def __init__(self) -> None:
        self.tensors: dict[str, Placement] = {}
        self.blobs: dict[str, Placement] = {}
        self.sizes = [0]

    def place(self, weight: StoredWeight) -> None:
        for role, (shape, dtype) in weight.storage().items():
            has_own_file = weight.name == EMBEDDING and role != "scale"
            there = self._file_of(shape, dtype) if has_own_file else self._next(shape, dtype)
            self.tensors[weight.tensor(role)] = there

    def place_blob(self, name: str, stack: Sequence[Sequence[StoredWeight]]) -> None:
        """A file for matrices of all experts: one expert's lie one below the other, blocks of tiles alternate."""
        shapes = [shape for weight in stack[0] for shape, _ in weight.storage().values()]
        alternate = stack[0][0].layout is Layout.TILES
        blob = self._file_of((len(stack), sum(shape[0] for shape in shapes), *shapes[0][1:]), _BYTE)
        self.blobs[name] = blob
        block, start = prod(shapes[0][1:]), 0
        for weights in stack:
            for index, weight in enumerate(weights):
                offset = start + (index * block if alternate else sum(prod(shape) for shape in shapes[:index]))
                step = len(weights) * block if alternate else None
                self.tensors[weight.tensor("qdata")] = Placement(
                    file=blob.file, offset=offset, shape=shapes[index], dtype=_BYTE, step=step
                )
            start += blob.nbytes // len(stack)

    def _file_of(self, shape: tuple[int, ...], dtype: np.dtype) -> Placement:
        found = Placement(file=len(self.sizes), offset=0, shape=shape, dtype=dtype)
        self.sizes.append(found.nbytes)
        return found

    def _next(self, shape: tuple[int, ...], dtype: np.dtype) -> Placement:
        start = -(-self.sizes[0] // _ALIGNMENT) * _ALIGNMENT
        found = Placement(file=0, offset=start, shape=shape, dtype=dtype)
        self.sizes[0] = found.end
        return found


class PtePacking:
    """Codes one per byte until a piece is complete, then as its layout has them."""

    def empty(self, weight: StoredWeight, form: IntFormat, rows: int) -> QuantizedTensor:
        return empty_tensor((rows, weight.shape[-1]), form)

    def pack(self, chunk: Chunk, rows: slice, room: QuantizedTensor) -> None:
        store_chunk(chunk, room.rows(rows))

    def packed(self, weight: StoredWeight, room: QuantizedTensor) -> dict[str, np.ndarray]:
        match weight.layout:
            case Layout.STOCK:
                return {"qdata": pack_stock(room)}
            case Layout.STOCK_BELOW:
                return {"qdata": pack_stock(room)[HEADER_BYTES:]}
            case Layout.TILES:
                return {"qdata": pack_matrix(room)}
            case Layout.NIBBLES:
                qdata = room.qdata[:, 0::2] << 4 | room.qdata[:, 1::2]
            case _:
                qdata = (room.qdata - np.uint8(room.format.middle_code)).view(np.int8)
        return {"qdata": qdata, "scale": room.scale.astype(np.float32)}

    def numbers(self, weight: StoredWeight, values: np.ndarray) -> dict[str, np.ndarray]:
        return {"weight": values}


class PteStream:
    """The weights of one program on their way.

    Args:
        name: the program's file name; the files are in a folder that is called after it, below ``root``.
        ledger: the ledger's place; None for work that is not to be continued.
        statistics: for an algorithm that needs them.
    """

    def __init__(
        self,
        plan: PtePlan,
        algorithm: str,
        *,
        name: str,
        root: Path,
        ledger: Path | None,
        statistics: Statistics | None = None,
    ):
        self.plan, self.algorithm, self.places = plan, algorithm, place(plan)
        self._statistics = statistics
        names = [f"{name}.weights/{index}" for index in range(len(self.places.sizes))]
        self.pieces = pieces(plan)
        self.paths = [root / name for name in names]
        key = repr((algorithm, None if statistics is None else statistics.key, CHUNK_VALUES, plan, self.places))
        self._ledger = Ledger(
            ledger,
            root=root,
            sizes=dict(zip(names, self.places.sizes, strict=True)),
            key=hashlib.sha256(key.encode()).hexdigest(),
            steps=len(self.pieces),
            figures=FIGURES,
        )

    @property
    def done(self) -> list[Piece]:
        """What an export that was killed has done."""
        return self.pieces[: len(self._ledger.done)]

    def missing_bytes(self) -> int:
        """Bytes of disk that the files will take beyond what they take already."""
        return max(0, sum(self.places.sizes) - sum(map(bytes_on_disk, self.paths)))

    def write(self, checkpoint: Checkpoint, report: Callable[[int], None]) -> tuple[StoredTensor, ...]:
        """Fills the files, and returns a record of every weight; raises what ``WeightStream.write`` does."""
        self.paths[0].parent.mkdir(exist_ok=True)
        stream = WeightStream(
            checkpoint=checkpoint,
            placements=self.places.tensors,
            paths=self.paths,
            packing=PtePacking(),
            algorithm=get_algorithm(self.algorithm),
            report=report,
            ledger=self._ledger,
            statistics=self._statistics,
        )
        return stream.write(self.plan, {})


def read_bytes(works: Sequence[Piece], checkpoint: Checkpoint) -> int:
    """How much of the checkpoint pieces are made of."""
    return sum(piece.stored_bytes(checkpoint) for piece in works)
