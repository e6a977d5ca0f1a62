"""What every runner here does alike: arguments checked, marks kept, snapshots refused or taken, calls made to wait.

In: token ids, row by row. Out: what the Runner protocol (backends/base.py) says. A backend's runner brings the steps
that its runtime has to take; they are given arguments that are right already.

Shape suffixes: B rows, T new tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lfm2_export.backends.arguments import (
    check_batch_size,
    check_chunk_size,
    check_count,
    check_equal_rows,
    check_fits,
    check_indices,
    check_logits_fit,
    check_one_row,
    check_rows,
    check_tokens,
    short_of_memory,
)
from lfm2_export.backends.base import Mark, Snapshot, TokenRows, check_snapshot
from lfm2_export.backends.guard import guard_of, guarded
from lfm2_export.cache import CacheSpec
from lfm2_export.errors import RunnerError

if TYPE_CHECKING:
    from lfm2_export.manifest import Program

# Long enough to use matrix kernels fully, short enough that activations stay small: on ONNX Runtime a prompt of 2048
# tokens at a width of 1024 took as long in chunks of 512 as in one piece, and 190 MB less.
DEFAULT_CHUNK_SIZE = 512
# Tokens to verify whose logits fit where a program does.
_FEW = 64


@guarded
class RunnerBase(ABC):
    """The public half of a runner. A subclass overrides the steps below, not the calls: only those here wait for each
    other (backends/guard.py).

    Args:
        vocab_size: tokens that the program knows.
        cache: names, shapes and dtypes of the state.
        context_length: the most tokens that a row may hold, checked.
        program_id: names the program in snapshots.
        chunk_size: tokens that a prefill takes at a time where it is not told, checked.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        cache: CacheSpec,
        context_length: int,
        program_id: str,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
    ):
        self._vocab_size = vocab_size
        self._cache = cache
        self._context_length = context_length
        self._program_id = program_id
        self._chunk_size = chunk_size
        self._marks: weakref.WeakKeyDictionary[Mark, Any] = weakref.WeakKeyDictionary()
        self._block: _Block | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._vocab_size:,} tokens known, {int(self.lengths.max(initial=0)):,} of "
            f"{self._context_length:,} held)"
        )

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def cache(self) -> CacheSpec:
        return self._cache

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def program_id(self) -> str:
        return self._program_id

    @property
    def max_batch_size(self) -> int | None:
        return None

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Tokens held per row, int64 [B]; a copy."""

    @property
    def can_score(self) -> bool:
        return True

    @short_of_memory("reset")
    def reset(self, batch_size: int = 1) -> None:
        self._reset(check_batch_size(batch_size, self.max_batch_size))
        self._marks.clear()

    @short_of_memory("prefill")
    def prefill(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> np.ndarray:
        size, rows = self._chunk(chunk_size), self._check_new(input_ids)
        return self._prefill(rows, size)

    @short_of_memory("prefill")
    def prefill_scored(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> list[np.ndarray]:
        size, rows = self._chunk(chunk_size), self._check_new(input_ids)
        check_logits_fit(rows, self.vocab_size)
        return self._prefill_scored(rows, size)

    @property
    def verifies_exactly(self) -> bool:
        return False

    @short_of_memory("verify")
    def verify(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        check_one_row(self.batch_size)
        (row,) = self._check_new(cast("TokenRows", [tokens]))
        if len(row) > _FEW:  # asking for the memory takes as long as a small model's step
            check_logits_fit([row], self.vocab_size)
        length = int(self.lengths[0])
        logits_TV, place = self._verify(row)
        self._block = _Block(length=length, tokens=row, place=place, uses=guard_of(self).uses)
        return logits_TV

    @short_of_memory("accept")
    def accept(self, count: int) -> None:
        block = self._block
        if block is None or guard_of(self).uses != block.uses + 1:
            raise RunnerError("accept: nothing was verified, or something else came between; call verify first")
        kept = check_count(count, len(block.tokens))
        if kept < len(block.tokens):
            self._accept(block.tokens[:kept], block.length, block.place)
        self._block = None
        for mark in [m for m in self._marks if m.lengths[0] > block.length + kept]:
            del self._marks[mark]

    @short_of_memory("decode")
    def decode(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._decode(self._check_new(check_tokens(tokens)))

    @short_of_memory("score")
    def score(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> np.ndarray:
        size = self._chunk(chunk_size)
        rows = check_equal_rows(input_ids, self.vocab_size, self.context_length)
        check_logits_fit(rows, self.vocab_size)
        return self._score(rows, size)

    @short_of_memory("snapshot")
    def snapshot(self) -> Snapshot:
        return Snapshot(program_id=self.program_id, lengths=self.lengths, tensors=self._copy_state())

    @short_of_memory("restore")
    def restore(self, snapshot: Snapshot) -> None:
        lengths = self._lengths_of(snapshot)
        self._restore(snapshot.tensors, lengths)
        self._marks.clear()

    def _lengths_of(self, snapshot: Snapshot) -> np.ndarray:
        """Of its rows, if it is this program's."""
        return check_snapshot(
            snapshot,
            program_id=self.program_id,
            cache=self.cache,
            context_length=self.context_length,
            max_batch_size=self.max_batch_size,
        )

    @short_of_memory("mark")
    def mark(self) -> Mark:
        mark = Mark(lengths=self.lengths, conv=self._copy_fixed())
        self._marks[mark] = self._place()
        return mark

    def is_valid(self, mark: Mark) -> bool:
        return isinstance(mark, Mark) and mark in self._marks

    @short_of_memory("rewind")
    def rewind(self, mark: Mark) -> None:
        if not self.is_valid(mark):
            raise RunnerError("this mark is of a state that is no more; restore a snapshot or prefill again")
        self._rewind(mark, self._marks[mark])
        # What was marked further on will be overwritten.
        for other in [m for m in self._marks if (m.lengths > mark.lengths).any()]:
            del self._marks[other]

    @short_of_memory("reorder")
    def reorder(self, indices: Sequence[int] | np.ndarray) -> None:
        rows = check_indices(indices, self.batch_size)
        check_batch_size(len(rows), self.max_batch_size)
        if not np.array_equal(rows, np.arange(self.batch_size)):
            self._reorder(rows)
            self._marks.clear()

    def _chunk(self, chunk_size: int | None) -> int:
        return check_chunk_size(chunk_size, self._chunk_size)

    def _check_new(self, input_ids: TokenRows) -> list[np.ndarray]:
        rows = check_rows(input_ids, self.batch_size, self.vocab_size)
        check_fits(self.lengths, [len(row) for row in rows], self.context_length)
        return rows

    # The steps of a backend. Each leaves the state as it was when it raises.

    @abstractmethod
    def _reset(self, batch_size: int) -> None:
        """That many empty rows."""

    @abstractmethod
    def _prefill(self, rows: list[np.ndarray], chunk_size: int) -> np.ndarray:
        """Appends int64 [T_b] to each row; returns float32 [B, V] after the last of each."""

    @abstractmethod
    def _prefill_scored(self, rows: list[np.ndarray], chunk_size: int) -> list[np.ndarray]:
        """The same; returns float32 [T_b, V] for each row."""

    def _verify(self, tokens: np.ndarray) -> tuple[np.ndarray, Any]:
        """``_prefill_scored`` of int64 [T] in one piece, and what ``_accept`` needs to go back into it."""
        place = Mark(lengths=self.lengths, conv=self._copy_fixed()), self._place()
        return self._prefill_scored([tokens], len(tokens))[0], place

    def _accept(self, kept: np.ndarray, length: int, place: Any) -> None:
        """Keeps the tokens ``kept`` of those that were verified behind ``length`` others. Here by going back and
        appending them again; where that fails, none of them stays."""
        self._rewind(*place)
        if len(kept):
            self._prefill([kept], len(kept))

    def _decode(self, rows: list[np.ndarray]) -> np.ndarray:
        """``_prefill`` of one token a row."""
        return self._prefill(rows, 1)

    @abstractmethod
    def _score(self, rows: list[np.ndarray], chunk_size: int) -> np.ndarray:
        """float32 [B, T, V] of rows of one length, from an empty state; the runner's own is afterwards what it was."""

    @abstractmethod
    def _copy_state(self) -> Mapping[str, np.ndarray]:
        """As ``Snapshot.tensors``."""

    @abstractmethod
    def _copy_fixed(self) -> Mapping[str, np.ndarray]:
        """As ``Mark.conv``."""

    def _place(self) -> Any:
        """What a mark stands for beside what it holds, kept as long as the mark is valid."""
        return None

    @abstractmethod
    def _restore(self, tensors: Mapping[str, np.ndarray], lengths: np.ndarray) -> None:
        """Takes over a copy of ``Snapshot.tensors``, with int64 [B] tokens in each row."""

    @abstractmethod
    def _rewind(self, mark: Mark, place: Any) -> None:
        """Goes back to a mark of this state, for which ``_place`` returned ``place``."""

    @abstractmethod
    def _reorder(self, rows: np.ndarray) -> None:
        """New row i becomes a copy of old row ``rows[i]``."""


@dataclass(frozen=True, kw_only=True)
class _Block:
    """What was verified: ``tokens`` behind ``length`` others; ``uses``: the guard's count when it was."""

    length: int
    tokens: np.ndarray
    place: Any
    uses: int


def program_id_of(program: Program) -> str:
    """What names an artifact's program in snapshots: by what its files hold."""
    digest = hashlib.sha256("".join(entry.sha256 for _, entry in sorted(program.files.items())).encode())
    return f"{program.backend}/{program.scheme}@{digest.hexdigest()[:16]}"
