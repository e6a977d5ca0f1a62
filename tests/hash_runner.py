"""A runner without a model, for tests of what uses runners: its logits are a hash of the whole row.

Any mistake in what a row holds, in whatever order tokens arrived, therefore changes every later token.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

import lfm2_export
from lfm2_export.backends.base import Mark, Snapshot, check_batch_size, check_fits, check_indices, check_rows
from lfm2_export.backends.guard import guarded
from lfm2_export.cache import CacheSpec
from lfm2_export.errors import RunnerError
from lfm2_export.text import Tokenizer

TOKENIZER = Tokenizer.from_dir(Path(lfm2_export.__file__).parent / "assets" / "tiny-moe")


@guarded
class HashRunner:
    """The Runner protocol; ``rows`` are the tokens held, ``prefilled`` the lengths of all prefills so far."""

    def __init__(self, vocab_size: int = 40, context_length: int = 10_000, max_batch_size: int | None = None):
        self.vocab_size, self.context_length, self.max_batch_size = vocab_size, context_length, max_batch_size
        self.can_score = False
        self.program_id = "hash"
        self.verifies_exactly = True
        self.verified: list[int] = []
        self.rows: list[list[int]] = [[]]
        self.prefilled: list[list[int]] = []
        self.marks: list[Mark] = []

    @property
    def cache(self) -> CacheSpec:
        return CacheSpec(tensors=())

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows], dtype=np.int64)

    def logits_of(self, row: list[int]) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(str(row).encode()).digest()[:8], "little")
        return np.random.default_rng(seed).normal(0, 3, self.vocab_size).astype(np.float32)

    def reset(self, batch_size: int = 1) -> None:
        check_batch_size(batch_size, self.max_batch_size)
        self.rows, self.marks = [[] for _ in range(batch_size)], []

    def prefill(self, input_ids, *, chunk_size=None) -> np.ndarray:
        rows = check_rows(input_ids, self.batch_size, self.vocab_size)
        check_fits(self.lengths, [len(row) for row in rows], self.context_length)
        self.prefilled.append([len(row) for row in rows])
        return self._append(rows)

    def decode(self, tokens) -> np.ndarray:
        rows = check_rows([[t] for t in tokens], self.batch_size, self.vocab_size)
        check_fits(self.lengths, [1] * len(rows), self.context_length)
        return self._append(rows)

    def verify(self, tokens) -> np.ndarray:
        if not self.can_score:
            raise RunnerError("no scoring graph")
        (new,) = check_rows([tokens], self.batch_size, self.vocab_size)
        check_fits(self.lengths, [len(new)], self.context_length)
        self.verified.append(len(new))
        self._before = len(self.rows[0])
        return np.concatenate([self._append([new[i : i + 1]]) for i in range(len(new))])

    def accept(self, count: int) -> None:
        self.rows = [self.rows[0][: self._before + count]]
        self.marks = [m for m in self.marks if m.lengths[0] <= len(self.rows[0])]

    def _append(self, rows) -> np.ndarray:
        self.rows = [held + new.tolist() for held, new in zip(self.rows, rows, strict=True)]
        return np.stack([self.logits_of(row) for row in self.rows])

    def prefill_scored(self, input_ids, *, chunk_size=None):
        raise RunnerError("no scoring graph")

    def score(self, input_ids, *, chunk_size=None) -> np.ndarray:
        if not self.can_score:
            raise RunnerError("no scoring graph")
        return np.stack([np.stack([self.logits_of(list(row[: i + 1])) for i in range(len(row))]) for row in input_ids])

    def snapshot(self) -> Snapshot:
        rows = {"rows": np.array(self.rows, dtype=object)}
        return Snapshot(program_id="hash", lengths=self.lengths, tensors=rows)

    def restore(self, snapshot: Snapshot) -> None:
        self.rows, self.marks = [list(row) for row in snapshot.tensors["rows"]], []

    def mark(self) -> Mark:
        self.marks.append(Mark(lengths=self.lengths, conv={}))
        return self.marks[-1]

    def is_valid(self, mark: Mark) -> bool:
        return any(mark is m for m in self.marks)

    def rewind(self, mark: Mark) -> None:
        assert self.is_valid(mark)
        self.rows = [row[:length] for row, length in zip(self.rows, mark.lengths, strict=True)]
        self.marks = [m for m in self.marks if (m.lengths <= mark.lengths).all()]

    def reorder(self, indices) -> None:
        self.rows = [list(self.rows[i]) for i in check_indices(indices, self.batch_size)]
        self.marks = []
