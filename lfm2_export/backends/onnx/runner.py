"""Runs an exported ONNX program on onnxruntime's CPU kernels.

In: token ids, row by row. Out: float32 logits; the conv and KV state stays here between calls. Rows may differ in
length: each row's next token goes to its own next slot ("compact" rows: the mask is ones up to the row's length, then
zeros), so nothing is ever padded on the left.

Shape suffixes: B rows, T new tokens, S positions of the mask, V vocabulary.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from lfm2_export import memory
from lfm2_export.backends.arguments import (
    LESS,
    check_batch_size,
    check_chunk_size,
    check_context_length,
    check_equal_rows,
    check_fits,
    check_indices,
    check_logits_fit,
    check_rows,
    check_state_fits,
    check_threads,
    check_tokens,
    short_of_memory,
)
from lfm2_export.backends.base import Mark, RunnerOptions, Snapshot, TokenRows, check_snapshot
from lfm2_export.backends.guard import guarded
from lfm2_export.backends.onnx.buffers import StateBuffers, as_ortvalue
from lfm2_export.backends.onnx.session import check_program, open_session
from lfm2_export.backends.onnx.variants import choose
from lfm2_export.cache import CacheSpec
from lfm2_export.errors import ResourceError, RunnerError

if TYPE_CHECKING:
    from lfm2_export.manifest import Program

# Long enough to use matrix kernels fully, short enough that activations stay small: a prompt of 2048 tokens at a width
# of 1024 took as long in chunks of 512 as in one piece, and 190 MB less.
DEFAULT_CHUNK_SIZE = 512


@guarded
class OnnxRunner:
    """The Runner protocol (backends/base.py) for ``onnx/*.onnx``.

    Args:
        path: the graph; its external data lies beside it.
        cache: names, shapes and dtypes of its state.
        context_length: the most tokens that a row may hold.
        threads: default: every core that this process may use.
        scoring_path: the graph with the logits of every position, loaded on first use.
        library: our operators, for graphs that have them.
        program_id: names the program in snapshots; default: a hash of the graph's bytes and place.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        cache: CacheSpec,
        context_length: int,
        threads: int | None = None,
        scoring_path: str | Path | None = None,
        library: Path | None = None,
        program_id: str | None = None,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
    ):
        self._path = Path(path)
        self._cache = cache
        self._context_length = check_context_length(context_length)
        self._threads = check_threads(threads)
        self._chunk_size = check_chunk_size(chunk_size, DEFAULT_CHUNK_SIZE)
        self._library = library
        self._session = open_session(self._path, threads=threads, library=library)
        self._vocab_size = check_program(self._session, self._path, cache)
        self._scoring_path = None if scoring_path is None else Path(scoring_path)
        self._scoring: ort.InferenceSession | None = None
        self._program_id = program_id or _default_program_id(self._path)
        self._state = StateBuffers(cache, 1, 0)
        self._marks: weakref.WeakSet[Mark] = weakref.WeakSet()

    @classmethod
    def from_program(cls, folder: Path, program: Program, options: RunnerOptions | None = None) -> OnnxRunner:
        """The runner of a program in an artifact's ``folder``, on the graph that is fastest here, or the one that
        ``options`` ask for."""
        options = options or RunnerOptions()
        variant = choose(folder, program, options)
        kept = "" if variant.cache == program.cache else f"+{options.kv_cache}"
        digest = hashlib.sha256("".join(entry.sha256 for _, entry in sorted(program.files.items())).encode())
        return cls(
            variant.path,
            cache=variant.cache,
            context_length=program.context_length,
            threads=options.threads,
            scoring_path=variant.scoring_path,
            library=variant.library,
            program_id=f"{program.backend}/{program.scheme}@{digest.hexdigest()[:16]}{kept}",
        )

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def max_batch_size(self) -> None:
        return None

    @property
    def batch_size(self) -> int:
        return self._state.batch_size

    @property
    def lengths(self) -> np.ndarray:
        return self._state.lengths.copy()

    @property
    def can_score(self) -> bool:
        return self._scoring_path is not None

    @property
    def cache(self) -> CacheSpec:
        return self._cache

    @property
    def program_id(self) -> str:
        return self._program_id

    @property
    def threads(self) -> int:
        return self._session.get_session_options().intra_op_num_threads

    @property
    def state_nbytes(self) -> int:
        """Bytes allocated for the state."""
        return self._state.nbytes

    @short_of_memory("reset")
    def reset(self, batch_size: int = 1) -> None:
        rows = check_batch_size(batch_size, self.max_batch_size)
        if rows == self.batch_size:
            self._state.clear()
        else:
            self._state = self._empty(rows)
        self._marks.clear()

    def _empty(self, rows: int) -> StateBuffers:
        check_state_fits(self._cache, rows, 0)
        return StateBuffers(self._cache, rows, 0)

    @short_of_memory("prefill")
    def prefill(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> np.ndarray:
        chunk, rows = self._chunk(chunk_size), self._check_new(input_ids)
        logits_BV = np.empty((self.batch_size, self.vocab_size), dtype=np.float32)
        with _Transaction(self._state):
            self._prefill(rows, chunk, logits_BV)
        return logits_BV

    def _prefill(self, rows: list[np.ndarray], chunk: int, logits_BV: np.ndarray) -> None:
        state, counts = self._state, _counts(rows)
        # GroupQueryAttention takes several rows at once in a first prompt or a single step, but not in a later chunk.
        if counts.max() == 1 or (not state.lengths.any() and counts.max() <= chunk):
            run(self._session, state, _pad(rows), counts, logits_BV[:, None])
            return
        for index, tokens in enumerate(rows):
            view = state.row(index)
            for part in _chunks(tokens, chunk):
                run(self._session, view, part[None], _counts([part]), logits_BV[index][None, None])
            state.take_row(index, view)

    @short_of_memory("prefill")
    def prefill_scored(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> list[np.ndarray]:
        chunk, rows = self._chunk(chunk_size), self._check_new(input_ids)
        check_logits_fit(rows, self.vocab_size)
        session = self._scoring_session()
        with _Transaction(self._state):
            return [self._score_row(session, i, row, chunk) for i, row in enumerate(rows)]

    def _score_row(self, session: ort.InferenceSession, index: int, tokens: np.ndarray, chunk: int) -> np.ndarray:
        view = self._state.row(index)
        logits_TV = np.empty((len(tokens), self.vocab_size), dtype=np.float32)
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            run(session, view, part[None], _counts([part]), logits_TV[None, start : start + len(part)])
        self._state.take_row(index, view)
        return logits_TV

    @short_of_memory("decode")
    def decode(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = self._check_new(check_tokens(tokens))
        logits_BV = np.empty((self.batch_size, self.vocab_size), dtype=np.float32)
        run(self._session, self._state, _pad(rows), _counts(rows), logits_BV[:, None])
        return logits_BV

    @short_of_memory("score")
    def score(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> np.ndarray:
        rows = check_equal_rows(input_ids, self.vocab_size, self._context_length)
        kept, self._state = self._state, self._empty(len(rows))
        try:
            return np.stack(self.prefill_scored(rows, chunk_size=chunk_size))
        finally:
            self._state = kept

    @short_of_memory("snapshot")
    def snapshot(self) -> Snapshot:
        return Snapshot(program_id=self._program_id, lengths=self.lengths, tensors=self._state.copy_used())

    @short_of_memory("restore")
    def restore(self, snapshot: Snapshot) -> None:
        lengths = check_snapshot(
            snapshot,
            program_id=self._program_id,
            cache=self._cache,
            context_length=self._context_length,
            max_batch_size=self.max_batch_size,
        )
        self._replace(snapshot.tensors, lengths, np.arange(len(lengths)))

    def mark(self) -> Mark:
        mark = Mark(lengths=self.lengths, conv=self._state.copy_conv())
        self._marks.add(mark)
        return mark

    def is_valid(self, mark: Mark) -> bool:
        return isinstance(mark, Mark) and mark in self._marks

    def rewind(self, mark: Mark) -> None:
        if not self.is_valid(mark):
            raise RunnerError("this mark is of a state that is no more; restore a snapshot or prefill again")
        self._state.set_place(mark.lengths, mark.conv)
        # What was marked further on will be overwritten.
        for other in [m for m in self._marks if (m.lengths > mark.lengths).any()]:
            self._marks.discard(other)

    @short_of_memory("reorder")
    def reorder(self, indices: Sequence[int] | np.ndarray) -> None:
        rows = check_indices(indices, self.batch_size)
        if np.array_equal(rows, np.arange(self.batch_size)):
            return
        state = self._state
        self._replace({**state.conv, **state.kv}, state.lengths, rows)

    def _replace(self, tensors: Mapping[str, np.ndarray], lengths: np.ndarray, rows: np.ndarray) -> None:
        capacity = max(self._state.capacity, int(lengths.max(initial=0)))
        check_state_fits(self._cache, len(rows), capacity)
        self._state = StateBuffers.from_tensors(self._cache, tensors, lengths, rows, capacity)
        self._marks.clear()

    def _check_new(self, input_ids: TokenRows) -> list[np.ndarray]:
        rows = check_rows(input_ids, self.batch_size, self.vocab_size)
        counts = _counts(rows)
        check_fits(self._state.lengths, counts.tolist(), self._context_length)
        self._state.ensure(int((self._state.lengths + counts).max()), self._context_length)
        return rows

    def _chunk(self, chunk_size: int | None) -> int:
        return check_chunk_size(chunk_size, self._chunk_size)

    def _scoring_session(self) -> ort.InferenceSession:
        if self._scoring_path is None:
            raise RunnerError(f"{self._path}: the artifact has no scoring graph for this scheme; export it again")
        if self._scoring is None:
            session = open_session(self._scoring_path, threads=self._threads, library=self._library)
            check_program(session, self._scoring_path, self._cache)
            self._scoring = session
        return self._scoring


class _Transaction:
    """Puts lengths and conv states back if a prefill of several runs fails on the way, an interrupt included."""

    def __init__(self, state: StateBuffers):
        self._state = state

    def __enter__(self) -> None:
        self._lengths, self._conv = self._state.lengths.copy(), self._state.copy_conv()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._state.set_place(self._lengths, self._conv)


def run(
    session: ort.InferenceSession,
    state: StateBuffers,
    ids_BT: np.ndarray,
    counts: np.ndarray,
    logits: np.ndarray,
) -> None:
    """Appends ``counts[b]`` tokens (the rest of ``ids_BT`` is right padding) and fills ``logits`` [B, 1 or T, V]."""
    binding = state.binding(session)
    binding.bind_ortvalue_input("input_ids", as_ortvalue(ids_BT))
    binding.bind_ortvalue_input("attention_mask", as_ortvalue(_mask(state.lengths + counts)))
    binding.bind_ortvalue_output("logits", as_ortvalue(logits))
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime's exceptions have no common base class of their own
        if memory.ran_out(error):
            raise ResourceError(f"the memory is too small for a run on {ids_BT.size} tokens; {LESS}") from error
        raise RunnerError(
            f"onnxruntime failed on {ids_BT.size} tokens: {' '.join(str(error).split())[:300]}"
        ) from error
    state.commit(counts)


def _mask(lengths: np.ndarray) -> np.ndarray:
    """int64 [B, S], S the longest row's length: ones for each row's tokens, then zeros."""
    return (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)


def _pad(rows: list[np.ndarray]) -> np.ndarray:
    """The rows as int64 [B, T], padded on the right with zeros, which the mask excludes."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def _counts(rows: list[np.ndarray]) -> np.ndarray:
    return np.array([len(row) for row in rows], dtype=np.int64)


def _chunks(tokens: np.ndarray, size: int) -> list[np.ndarray]:
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def _default_program_id(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes() + str(path.resolve()).encode())
    return f"{path.name}@{digest.hexdigest()[:16]}"
