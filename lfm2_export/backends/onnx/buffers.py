"""The state of an ONNX program in memory, bound in place.

In: a CacheSpec, the number of rows and of positions. Out: the OrtValues that a run reads and writes. Keys and values
are one buffer each, past and present at once: GroupQueryAttention then writes the new positions where they belong
instead of copying everything (measured: half its time). So are the rings of sliding layers (cache.py), which do not
grow. Conv states are small and replaced as a whole, so each has a front (read) and a back (written) that swap once the
run has succeeded: a failed run changes nothing, nor does one of up to RING_ROOM tokens change what a ring holds of
those before them.

There may be room for more rows than there are: the state is the first of them, which is contiguous in every buffer.
So a row comes or goes by copying that row, or the last one, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from lfm2_export.backends.arguments import check_state_fits
from lfm2_export.cache import CacheSpec

# A multiple of what vectorized kernels read at once; also keeps tiny prompts from growing at every step.
CAPACITY_STEP = 64


class StateBuffers:
    """Rows of state by past_name: ``kv`` [B, kv_heads, capacity, head_dim], ``rings`` [B, kv_heads, R, head_dim] and
    ``conv`` [B, L-1, hidden].

    ``lengths`` int64 [B] counts the tokens that each row holds; only those positions of ``kv`` mean anything.
    """

    def __init__(self, spec: CacheSpec, batch_size: int, capacity: int):
        self.spec = spec
        self.lengths = np.zeros(batch_size, dtype=np.int64)
        self._capacity = capacity
        self._bindings: dict[tuple[ort.InferenceSession, bool, frozenset[str]], ort.IOBinding] = {}
        self._swapped = False
        self._room = _Room(spec, batch_size, capacity)
        self._show()

    def _show(self) -> None:
        """The rows that there are, of all that there is room for."""
        rows, room = len(self.lengths), self._room
        front, back = reversed(room.conv) if self._swapped else room.conv
        self.kv, self.rings = _first(room.kv, rows), _first(room.rings, rows)
        self.conv, self._back = _first(front, rows), _first(back, rows)
        self._bindings.clear()

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Of all that there is room for."""
        return self._room.nbytes

    def row(self, index: int) -> StateBuffers:
        """Row ``index`` as a state of one row on the same memory, but with a length of its own (see ``take_row``)."""
        rows = slice(index, index + 1)
        view = object.__new__(StateBuffers)
        view.spec, view._capacity, view._bindings, view._swapped = self.spec, self._capacity, {}, False
        view.lengths = self.lengths[rows].copy()
        # Rows are contiguous in every buffer, so these are views that ONNX Runtime can write to.
        view.kv = {name: array[rows] for name, array in self.kv.items()}
        view.rings = {name: array[rows] for name, array in self.rings.items()}
        view.conv = {name: array[rows] for name, array in self.conv.items()}
        view._back = {name: array[rows] for name, array in self._back.items()}
        return view

    def take_row(self, index: int, view: StateBuffers) -> None:
        """Makes what ``row(index)`` became this state's row; its keys and values are here already."""
        self.lengths[index] = view.lengths[0]
        for name, array in self.conv.items():
            if view._swapped:
                array[index] = view.conv[name][0]

    def ensure(self, positions: int, limit: int) -> None:
        """Makes room for ``positions`` per row, at least doubling (up to ``limit``) so that growing stays rare."""
        if positions <= self._capacity or not self.kv:
            return
        wanted = max(positions, 2 * self._capacity, CAPACITY_STEP)
        self._resize(self._room.rows, min(-(-wanted // CAPACITY_STEP) * CAPACITY_STEP, limit))

    def _resize(self, rows: int, capacity: int) -> None:
        """Room for so many rows and positions. All buffers or none: a run has to find them of one size."""
        check_state_fits(self.spec, rows, capacity)
        room = _Room(self.spec, rows, capacity)
        for index, length in enumerate(self.lengths.tolist()):
            room.take(index, {**self.kv, **self.rings, **self.conv}, index, length)
        self._room, self._capacity, self._swapped = room, capacity, False
        self._show()

    def join(self, tensors: Mapping[str, np.ndarray], lengths: np.ndarray, limit: int) -> None:
        """Copies of the rows of ``tensors``, which hold ``lengths`` tokens, come behind the present ones. Where there
        is no room for them, there is for at least twice as many rows from then on."""
        before, rows = self.batch_size, self.batch_size + len(lengths)
        self.ensure(int(lengths.max()), limit)
        if rows > self._room.rows:
            self._resize(max(rows, 2 * self._room.rows), self._capacity)
        for index, length in enumerate(lengths.tolist()):
            self._room.take(before + index, tensors, index, length, swapped=self._swapped)
        self.lengths = np.concatenate([self.lengths, lengths])
        self._show()

    def leave(self, row: int) -> None:
        """A row goes, and the last one takes its place."""
        last = self.batch_size - 1
        if row != last:
            tensors = {**self.kv, **self.rings, **self.conv}
            self._room.take(row, tensors, last, int(self.lengths[last]), swapped=self._swapped)
            self.lengths[row] = self.lengths[last]
        self.lengths = self.lengths[:last].copy()
        self._show()

    def clear(self) -> None:
        """Empty rows; keys and values that grow need no clearing, since nothing reads past ``lengths``. Of a ring the
        whole is read, though what no token sees weighs nothing: there it must be a number."""
        self.lengths[:] = 0
        for array in (*self.conv.values(), *self.rings.values()):
            array[:] = 0

    def commit(self, new_tokens: np.ndarray) -> None:
        """Accepts what the last run wrote: the new conv states, and ``new_tokens`` int64 [B] more positions."""
        self.conv, self._back = self._back, self.conv
        self._swapped = not self._swapped
        self.lengths += new_tokens

    def copy_conv(self) -> dict[str, np.ndarray]:
        return {name: array.copy() for name, array in self.conv.items()}

    def copy_fixed(self) -> dict[str, np.ndarray]:
        return {**self.copy_conv(), **{name: array.copy() for name, array in self.rings.items()}}

    def set_place(self, lengths: np.ndarray, fixed: Mapping[str, np.ndarray]) -> None:
        """Goes back to ``lengths`` and the ``fixed`` states of the same rows. Keys and values that grow are still
        there; so is all that a ring has to hold, if no more than RING_ROOM tokens came since: it may be left out."""
        self.lengths[:] = lengths
        for name, array in fixed.items():
            (self.rings if name in self.rings else self.conv)[name][:] = array

    def copy_row(self, row: int) -> dict[str, np.ndarray]:
        """Copies of one row's tensors, keys and values trimmed to it."""
        used, rows = int(self.lengths[row]), slice(row, row + 1)
        fixed = {name: array[rows].copy() for name, array in (*self.conv.items(), *self.rings.items())}
        return {**fixed, **{name: array[rows, :, :used].copy() for name, array in self.kv.items()}}

    def copy_used(self) -> dict[str, np.ndarray]:
        """Copies of all tensors, keys and values trimmed to the longest row."""
        used = int(self.lengths.max())
        return {**self.copy_fixed(), **{name: array[:, :, :used].copy() for name, array in self.kv.items()}}

    @classmethod
    def from_tensors(
        cls,
        spec: CacheSpec,
        tensors: Mapping[str, np.ndarray],
        lengths: np.ndarray,
        rows: np.ndarray,
        capacity: int,
    ) -> StateBuffers:
        """A state whose row i is a copy of row ``rows[i]`` of ``tensors``."""
        state = cls(spec, len(rows), capacity)
        state.lengths[:] = lengths[rows]
        for index, row in enumerate(rows.tolist()):
            state._room.take(index, tensors, row, int(lengths[row]))
        return state

    def binding(self, session: ort.InferenceSession, others: Collection[str] = ()) -> ort.IOBinding:
        """An IOBinding of ``session`` with every state tensor bound; kept: most steps differ in three values only.
        ``others``: further outputs that will be bound; each set of them has one of its own."""
        key = (session, self._swapped, frozenset(others))
        if key not in self._bindings:
            self._bindings[key] = self._bind(session)
        return self._bindings[key]

    def _bind(self, session: ort.InferenceSession) -> ort.IOBinding:
        binding = session.io_binding()
        in_place = {**self.kv, **self.rings}
        for tensor in self.spec.positions:
            value = as_ortvalue(in_place[tensor.past_name])
            binding.bind_ortvalue_input(tensor.past_name, value)
            binding.bind_ortvalue_output(tensor.present_name, value)
        for tensor in self.spec.conv:
            binding.bind_ortvalue_input(tensor.past_name, as_ortvalue(self.conv[tensor.past_name]))
            binding.bind_ortvalue_output(tensor.present_name, as_ortvalue(self._back[tensor.past_name]))
        return binding


class _Room:
    """Buffers of so many rows and positions, zeros, of which memory is taken when they are written to. ``conv``: two
    alike."""

    def __init__(self, spec: CacheSpec, rows: int, capacity: int):
        self.rows = rows
        self.kv = {t.past_name: t.zeros(rows, capacity) for t in spec.growing}
        self.rings = {t.past_name: t.zeros(rows) for t in spec.bounded}
        self.conv = tuple({t.past_name: t.zeros(rows) for t in spec.conv} for _ in range(2))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for part in (self.kv, self.rings, *self.conv) for array in part.values())

    def take(self, to: int, tensors: Mapping[str, np.ndarray], row: int, length: int, *, swapped: bool = False) -> None:
        """Row ``to`` becomes a copy of a row of ``tensors`` that holds ``length`` tokens."""
        for name, array in self.kv.items():
            array[to, :, :length] = tensors[name][row, :, :length]
        for name, array in (*self.rings.items(), *self.conv[swapped].items()):
            array[to] = tensors[name][row]


def _first(arrays: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    return {name: array[:rows] for name, array in arrays.items()}


def as_ortvalue(array: np.ndarray) -> Any:
    """``array`` without a copy. The OrtValue keeps the array, and the IOBinding keeps the OrtValue: both must live."""
    return ort.OrtValue.ortvalue_from_numpy(array)
