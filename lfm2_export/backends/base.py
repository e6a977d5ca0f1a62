"""What every backend offers to the rest: the Runner protocol and the state that it hands out.

In: token ids, row by row. Out: logits as float32. Generation, benchmarks, parity and the transformers class know
runners by this protocol alone, so a new backend needs nothing from them. No backend is imported here.

Shape suffixes: B rows of a batch, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from lfm2_export.backends.arguments import as_array
from lfm2_export.backends.arguments import check_batch_size as check_batch_size
from lfm2_export.backends.arguments import check_fits as check_fits
from lfm2_export.backends.arguments import check_indices as check_indices
from lfm2_export.backends.arguments import check_rows as check_rows
from lfm2_export.backends.arguments import check_tokens as check_tokens
from lfm2_export.cache import PAST, CacheSpec, StateTensor
from lfm2_export.errors import RunnerError
from lfm2_export.messages import shown


class Kernels(StrEnum):
    """Whose kernels a runner uses where a program can run on either."""

    AUTO = "auto"  # ours where they can be had here
    LFM2 = "lfm2"  # ours, or an error
    STOCK = "stock"  # the runtime's own


class KvCache(StrEnum):
    """How keys and values are kept while a program runs."""

    FLOAT = "float"  # as the program's activations
    INT8 = "int8"  # a scale per position and head: a quarter of float32's memory


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """How a program is run here. ``threads`` None: every core that this process may use."""

    threads: int | None = None
    kernels: Kernels = Kernels.AUTO
    kv_cache: KvCache = KvCache.FLOAT

    @classmethod
    def parse(
        cls, *, threads: int | None = None, kernels: str | None = None, kv_cache: str | None = None
    ) -> RunnerOptions:
        """The choices by their names; None leaves one to its default.

        Raises:
            RunnerError: there is no such choice.
        """
        return cls(
            threads=threads,
            kernels=Kernels.AUTO if kernels is None else _one_of(Kernels, kernels, "kernels"),
            kv_cache=KvCache.FLOAT if kv_cache is None else _one_of(KvCache, kv_cache, "kv_cache"),
        )


_Choice = TypeVar("_Choice", bound=StrEnum)


def _one_of(choices: type[_Choice], name: str, what: str) -> _Choice:
    try:
        return choices(name)
    except ValueError:
        raise RunnerError(f"{what} {name!r}: give one of {', '.join(choices)}") from None


# One list of token ids per row; an int64 array [B, T] is one too.
TokenRows = Sequence[Sequence[int]] | Sequence[np.ndarray] | np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """A copy of a runner's whole state: it outlives the runner's own and can be restored any number of times.

    ``tensors`` by ``past_name``: conv states [B, L-1, hidden], keys and values [B, kv_heads, max(lengths), head_dim]
    (trimmed: they fit a runner of any capacity; of bounded layers as many positions as the CacheSpec says). ``lengths``
    int64 [B]: tokens held per row.
    """

    program_id: str
    lengths: np.ndarray
    tensors: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class Mark:
    """A place in a runner's current state to come back to, far smaller than a Snapshot.

    It holds the states of fixed size only: conv states, and keys and values of bounded layers. Those that grow stay in
    the runner, where later tokens never touch earlier ones. It therefore dies with that state (``reset``, ``restore``,
    ``reorder``, ``join``, ``leave``, or a ``rewind`` to an earlier place).
    """

    lengths: np.ndarray
    conv: Mapping[str, np.ndarray] = field(repr=False)

    def __post_init__(self) -> None:
        for array in (self.lengths, *self.conv.values()):
            array.setflags(write=False)


@runtime_checkable
class NamesKernels(Protocol):
    """A runner that says whose kernels it uses here, and for which instructions ("lfm2 avx2", "onnxruntime")."""

    @property
    def kernels(self) -> str: ...


def kernels_of(runner: Runner) -> str:
    """What a runner says of its kernels; empty where it says nothing."""
    return runner.kernels if isinstance(runner, NamesKernels) else ""


# Told how many tokens the row held before a pass, and the residual streams of those that it appended, float32 [T,
# width].
StreamSink = Callable[[int, np.ndarray], None]


@runtime_checkable
class TapsStreams(Protocol):
    """A runner whose program gives the residual streams behind its layers."""

    def tap(self, layers: Sequence[int], sink: StreamSink | None) -> int:
        """From here on ``sink`` is told of every pass that appends tokens to the only row, before the call that made it
        returns; it must not call the runner. Tokens may be taken back later: then a pass is told of that begins before
        them. None ends it.

        Returns:
            The width of the layers' streams side by side.

        Raises:
            RunnerError: the program does not give the stream behind one of ``layers``.
        """


@runtime_checkable
class Runner(Protocol):
    """Runs one exported program and keeps its state between calls. Not safe for use by two threads at once.

    Every method checks its arguments first, with ``backends/arguments.py``. Whatever it raises leaves the state as it
    was: RunnerError, ContextLimitError, or ResourceError where the memory is too small for what was asked.
    """

    @property
    def program_id(self) -> str:
        """Names the program, by what its files hold: what snapshots and saved states belong to."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def cache(self) -> CacheSpec:
        """The state that it keeps, tensor by tensor."""

    @property
    def context_length(self) -> int:
        """The most tokens that one row can hold."""

    @property
    def max_batch_size(self) -> int | None:
        """The most rows that the program takes at once; None where only memory limits them."""

    @property
    def batch_size(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens held per row, int64 [B]; a copy."""

    @property
    def can_score(self) -> bool:
        """Whether the artifact has a graph with the logits of every position."""

    def reset(self, batch_size: int = 1) -> None:
        """Forgets everything; ``batch_size`` empty rows from here on."""

    def prefill(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> np.ndarray:
        """Appends one list of tokens to each row (the lists may differ in length).

        Returns:
            float32 [B, V]: the logits after each row's last token.
        """

    def prefill_scored(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> list[np.ndarray]:
        """``prefill`` that returns the logits after every new token: one float32 [T_b, V] per row."""

    @property
    def verifies_exactly(self) -> bool:
        """Whether ``verify`` gives each token the bits that ``decode`` gives it."""

    def verify(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Appends T tokens, of which only some may stay, to the only row; returns the logits after each, float32
        [T, V]. ``accept`` may follow as the next call that changes the state."""

    def accept(self, count: int) -> None:
        """Keeps the first ``count`` (0 to T) of the tokens that ``verify`` appended, as if the others had never been
        there; a RunnerError where something else came between."""

    def decode(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Appends one token to each row; returns float32 [B, V]."""

    def score(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> np.ndarray:
        """The logits after every token of rows of one length, float32 [B, T, V]; leaves the state alone."""

    def snapshot(self) -> Snapshot:
        """A copy of the state."""

    def restore(self, snapshot: Snapshot) -> None:
        """Replaces the state, the number of rows included, by a copy of ``snapshot``."""

    def mark(self) -> Mark:
        """The current place, to ``rewind`` to."""

    def rewind(self, mark: Mark) -> None:
        """Forgets what was appended after ``mark``; a RunnerError where the state has been replaced since."""

    def is_valid(self, mark: Mark) -> bool:
        """Whether ``rewind(mark)`` is possible."""

    def reorder(self, indices: Sequence[int] | np.ndarray) -> None:
        """New row i becomes a copy of old row ``indices[i]``: beam search, repeated or dropped rows."""


@runtime_checkable
class JoinsRows(Runner, Protocol):
    """A runner whose rows come and go while the others are decoded: what a server needs to answer several at once."""

    @property
    def rows_are_independent(self) -> bool:
        """Whether each row gets the bits that it gets alone, whatever other rows there are, and however its tokens were
        cut into calls."""

    def beside(self) -> JoinsRows:
        """Another runner of this program on the same weights in memory, with one empty row of its own."""

    def copy_row(self, row: int) -> Snapshot:
        """A copy of one row: a state of one row."""

    def join(self, snapshot: Snapshot) -> None:
        """Copies of the rows of ``snapshot`` come behind the present ones."""

    def leave(self, row: int) -> None:
        """One of several rows goes, and the last one takes its place and number. Where this is interrupted (Ctrl-C),
        what that row holds is undefined; all others are as they were."""


def check_snapshot(
    snapshot: Snapshot, *, program_id: str, cache: CacheSpec, context_length: int, max_batch_size: int | None
) -> np.ndarray:
    """The lengths of a snapshot's rows, int64 [B], once all of it is what this program's runners make.

    Raises:
        RunnerError: it is no snapshot, of another program, or was changed.
        ContextLimitError: it was made by a runner with a longer context.
    """
    if not isinstance(snapshot, Snapshot):
        raise RunnerError(f"restore: {shown(snapshot, 40)} is not a snapshot; pass what snapshot() returned")
    if not isinstance(snapshot.program_id, str) or snapshot.program_id != program_id:
        raise RunnerError(
            f"snapshot of program {shown(snapshot.program_id)[1:-1]}, but this runner has {program_id}; "
            "a state only fits the program that made it"
        )
    lengths = as_array(snapshot.lengths, "snapshot: lengths")
    if lengths.ndim != 1 or lengths.size == 0 or lengths.dtype.kind not in "iu" or lengths.min() < 0:
        raise RunnerError(f"snapshot: lengths are {shown(snapshot.lengths, 40)}; pass what snapshot() returned")
    check_batch_size(len(lengths), max_batch_size)
    check_fits(np.zeros(len(lengths), dtype=np.int64), lengths.tolist(), context_length)
    for tensor in cache.tensors:
        _check_state_tensor(snapshot, tensor, len(lengths), int(lengths.max()))
    return lengths.astype(np.int64)


def _check_state_tensor(snapshot: Snapshot, tensor: StateTensor, batch_size: int, length: int) -> None:
    tensors = snapshot.tensors if isinstance(snapshot.tensors, Mapping) else {}
    held, wanted = tensors.get(tensor.past_name), tensor.concrete_shape(batch_size, length)
    if not isinstance(held, np.ndarray):
        raise RunnerError(f"snapshot: has no array {tensor.past_name}; pass what snapshot() returned")
    sizes = zip(tensor.shape, held.shape, wanted, strict=False)
    fits = all(found >= needed if axis == PAST else found == needed for axis, found, needed in sizes)
    if held.ndim != len(wanted) or not fits or held.dtype != tensor.dtype:
        raise RunnerError(
            f"snapshot: {tensor.past_name} is {held.dtype} {list(held.shape)}, {tensor.dtype} {list(wanted)} expected; "
            "pass what snapshot() returned"
        )
