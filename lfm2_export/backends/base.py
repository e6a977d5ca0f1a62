"""What every backend offers to the rest: the Runner protocol and the state that it hands out.

In: token ids, row by row. Out: logits as float32. Generation, benchmarks, parity and the transformers class know
runners by this protocol alone, so a new backend needs nothing from them. No backend is imported here.

Shape suffixes: B rows of a batch, T new tokens, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from lfm2_export.cache import CacheSpec
from lfm2_export.errors import ContextLimitError, RunnerError
from lfm2_export.resources import usable_cores


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


def parse_kernels(name: str | None) -> Kernels:
    """The choice of that name; None is "auto".

    Raises:
        RunnerError: there is no such choice.
    """
    return Kernels.AUTO if name is None else _one_of(Kernels, name, "kernels")


def parse_kv_cache(name: str | None) -> KvCache:
    """The choice of that name; None is "float".

    Raises:
        RunnerError: there is no such choice.
    """
    return KvCache.FLOAT if name is None else _one_of(KvCache, name, "kv_cache")


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
    (trimmed: they fit a runner of any capacity). ``lengths`` int64 [B]: tokens held per row.
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

    It holds the conv states only; keys and values stay in the runner, where later tokens never touch earlier ones. It
    therefore dies with that state (``reset``, ``restore``, ``reorder``, or a ``rewind`` to an earlier place).
    """

    lengths: np.ndarray
    conv: Mapping[str, np.ndarray] = field(repr=False)


@runtime_checkable
class Runner(Protocol):
    """Runs one exported program and keeps its state between calls. Not safe for use by two threads at once.

    Every method checks its arguments first: a RunnerError or ContextLimitError leaves the state as it was.
    """

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


def check_rows(input_ids: TokenRows, batch_size: int, vocab_size: int) -> list[np.ndarray]:
    """The rows as int64 arrays.

    Raises:
        RunnerError: another number of rows than the state has, an empty row, or an id that is not in the vocabulary.
    """
    if len(input_ids) != batch_size:
        rows = len(input_ids)
        raise RunnerError(f"{rows} rows of tokens for a state of {batch_size}; pass one per row or reset({rows}) first")
    return [_check_row(row, index, vocab_size) for index, row in enumerate(input_ids)]


def _check_row(row: Sequence[int] | np.ndarray, index: int, vocab_size: int) -> np.ndarray:
    tokens = np.asarray(row)
    if tokens.size == 0:
        raise RunnerError(
            f"row {index} is empty; a prompt needs at least one token (the tokenizer's bos, for instance)"
        )
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise RunnerError(
            f"row {index}: expected a list of token ids, found {tokens.dtype} values of shape {list(tokens.shape)}"
        )
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise RunnerError(
            f"row {index}: token id {outside[0]} is not in the vocabulary of {vocab_size}; "
            "use the tokenizer that came with this artifact"
        )
    return tokens.astype(np.int64)


def check_fits(lengths: np.ndarray, new_tokens: Sequence[int], context_length: int) -> None:
    """Raises ContextLimitError where a row would hold more than ``context_length`` tokens."""
    for row, (held, new) in enumerate(zip(lengths.tolist(), new_tokens, strict=True)):
        if held + new > context_length:
            after = f" after {held} held" if held else ""
            raise ContextLimitError(
                f"row {row}: {new} tokens{after} do not fit the context limit of {context_length}; "
                "shorten the prompt or start a new conversation"
            )


def check_batch_size(batch_size: int, max_batch_size: int | None) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
        raise RunnerError(f"batch_size={batch_size!r}: rows are counted by an integer from 1 up")
    if batch_size < 1:
        raise RunnerError(f"batch_size={batch_size}: a state needs at least one row")
    if max_batch_size is not None and batch_size > max_batch_size:
        raise RunnerError(f"batch_size={batch_size}: this program takes at most {max_batch_size} rows at once")


def check_indices(indices: Sequence[int] | np.ndarray, batch_size: int) -> np.ndarray:
    """Row numbers as int64 [new B]; a RunnerError where one does not exist."""
    rows = np.asarray(indices)
    if rows.ndim != 1 or rows.size == 0 or rows.dtype.kind not in "iu":
        raise RunnerError(f"reorder needs a list of row numbers, found {indices!r}")
    if rows.min() < 0 or rows.max() >= batch_size:
        raise RunnerError(f"reorder: rows {rows.tolist()} of a state that has {batch_size}")
    return rows.astype(np.int64)


def check_chunk_size(chunk_size: int | None, default: int) -> int:
    """The tokens that a prefill takes at a time; a RunnerError where they are none."""
    if chunk_size is None:
        return default
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise RunnerError(f"chunk_size={chunk_size!r}: a prefill takes at least one token at a time")
    return chunk_size


def check_threads(threads: int | None) -> int:
    """How many threads a runner takes: as many as there are usable cores, where it is not said.

    Raises:
        RunnerError: not positive, or more than the machine has cores.
    """
    if threads is None:
        return usable_cores()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise RunnerError(f"threads={threads!r}: a runner needs at least one thread")
    if threads > (cores := os.cpu_count() or threads):
        raise RunnerError(
            f"threads={threads}: this machine has {cores} cores, and more threads only wait for each other"
        )
    return threads
