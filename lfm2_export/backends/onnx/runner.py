"""Runs an exported ONNX program on onnxruntime's CPU kernels.

In: token ids, row by row. Out: float32 logits; the conv and KV state stays here between calls. Rows may differ in
length: each row's next token goes to its own next slot ("compact" rows: the mask is ones up to the row's length, then
zeros), so nothing is ever padded on the left.

Shape suffixes: B rows, T new tokens, S positions of the mask, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from lfm2_export import memory, paths
from lfm2_export.backends.arguments import (
    LESS,
    check_chunk_size,
    check_context_length,
    check_state_fits,
)
from lfm2_export.backends.base import KvCache, Mark, RunnerOptions, StreamSink
from lfm2_export.backends.guard import guard_of
from lfm2_export.backends.joining import JoiningRunner
from lfm2_export.backends.onnx.buffers import StateBuffers, as_ortvalue
from lfm2_export.backends.onnx.session import Sessions, check_program, has_independent_rows, windows
from lfm2_export.backends.onnx.tap import Tap
from lfm2_export.backends.onnx.variants import choose, own_kernels
from lfm2_export.backends.runner_base import DEFAULT_CHUNK_SIZE, program_id_of
from lfm2_export.cache import RING_ROOM, CacheSpec
from lfm2_export.errors import ResourceError, RunnerError

if TYPE_CHECKING:
    from lfm2_export.manifest import Program


# Of a prompt whose residual streams are wanted, and with them the logits of every position: 32 MB of them on the 1.2B.
_TAPPED_CHUNK = 128


class OnnxRunner(JoiningRunner):
    """The Runner protocol (backends/base.py) for ``onnx/*.onnx``, and ``JoinsRows``.

    Args:
        path: the graph; its external data lies beside it.
        cache: names, shapes and dtypes of its state.
        context_length: the most tokens that a row may hold.
        threads: default: every core that this process may use.
        scoring_path: the graph with the logits of every position, loaded on first use.
        library: our operators, for graphs that have them.
        program_id: names the program in snapshots; default: a hash of the graph's bytes and place.
        sessions: of another runner of this program, with which threads, scoring_path and library are known.
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
        sessions: Sessions | None = None,
    ):
        context_length = check_context_length(context_length)
        chunk_size = check_chunk_size(chunk_size, DEFAULT_CHUNK_SIZE)
        self._path = Path(path)
        scoring_path = None if scoring_path is None else Path(scoring_path)
        self._sessions = sessions or Sessions(self._path, scoring_path, threads=threads, library=library)
        self._session = self._sessions.main
        super().__init__(
            vocab_size=check_program(self._session, self._path, cache),
            cache=cache,
            context_length=context_length,
            program_id=program_id or _default_program_id(self._path),
            chunk_size=chunk_size,
        )
        self._state = StateBuffers(cache, 1, 0)
        self._tap: Tap | None = None

    @classmethod
    def from_program(cls, folder: Path, program: Program, options: RunnerOptions | None = None) -> OnnxRunner:
        """The runner of a program in an artifact's ``folder``, on the graph that is fastest here, or the one that
        ``options`` ask for."""
        options = options or RunnerOptions()
        variant = choose(folder, program, options)
        kept = "" if options.kv_cache is KvCache.FLOAT else f"+{options.kv_cache}"
        rings = "+rings" if variant.cache.bounded else ""  # what other graphs of the program do not have
        return cls(
            variant.path,
            cache=variant.cache,
            context_length=program.context_length,
            threads=options.threads,
            scoring_path=variant.scoring_path,
            library=variant.library,
            program_id=f"{program_id_of(program)}{kept}{rings}",
        )

    @property
    def lengths(self) -> np.ndarray:
        return self._state.lengths.copy()

    @property
    def can_score(self) -> bool:
        return self._sessions.scoring_path is not None

    @property
    def kernels(self) -> str:
        return "onnxruntime" if self._sessions.library is None else f"lfm2 {own_kernels().name}".strip()

    @property
    def threads(self) -> int:
        return self._session.get_session_options().intra_op_num_threads

    @property
    def state_nbytes(self) -> int:
        """Bytes allocated for the state."""
        return self._state.nbytes

    def tap(self, layers: Sequence[int], sink: StreamSink | None) -> int:
        """As ``TapsStreams`` says (backends/base.py)."""
        with guard_of(self).lock:
            self._tap = None
            if sink is None:
                return 0
            self._tap = Tap(self._scoring_session(), self._cache, layers, sink, paths.shown(self._path))
            return self._tap.width

    def _reset(self, batch_size: int) -> None:
        if batch_size == self.batch_size:
            self._state.clear()
        else:
            self._state = self._empty(batch_size)

    def _empty(self, rows: int) -> StateBuffers:
        check_state_fits(self._cache, rows, 0)
        return StateBuffers(self._cache, rows, 0)

    def _prefill(self, rows: list[np.ndarray], chunk_size: int) -> np.ndarray:
        state = self._make_room(rows)
        logits_BV = np.empty((self.batch_size, self.vocab_size), dtype=np.float32)
        if self._tap is not None:
            chunk_size = min(chunk_size, _TAPPED_CHUNK)
        with _Transaction(state, rows):
            self._append(rows, chunk_size, logits_BV)
        return logits_BV

    def _append(self, rows: list[np.ndarray], chunk_size: int, logits_BV: np.ndarray) -> None:
        state, counts = self._state, _counts(rows)
        # GroupQueryAttention takes several rows at once in a first prompt or a single step, but not in a later chunk.
        if counts.max() == 1 or (not state.lengths.any() and counts.max() <= chunk_size):
            self._run_last(state, _pad(rows), counts, logits_BV)
            return
        for index, tokens in enumerate(rows):
            view = state.row(index)
            for part in _chunks(tokens, chunk_size):
                self._run_last(view, part[None], _counts([part]), logits_BV[index][None])
            state.take_row(index, view)

    def _run_last(self, state: StateBuffers, ids_BT: np.ndarray, counts: np.ndarray, logits_BV: np.ndarray) -> None:
        """One pass, with the logits after each row's last token; where streams are wanted, through the scoring graph,
        which alone gives them."""
        if self._tap is None or self.batch_size != 1:
            run(self._session, state, ids_BT, counts, logits_BV[:, None])
            return
        logits_BTV = np.empty((*ids_BT.shape, self.vocab_size), dtype=np.float32)
        self._run(self._scoring_session(), state, ids_BT, counts, logits_BTV)
        logits_BV[:] = logits_BTV[:, -1]

    def _run(
        self,
        session: ort.InferenceSession,
        state: StateBuffers,
        ids_BT: np.ndarray,
        counts: np.ndarray,
        logits: np.ndarray,
        others: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """``run``, and the tap is told of it."""
        tap = self._tap if self.batch_size == 1 else None
        if tap is None:
            run(session, state, ids_BT, counts, logits, others)
            return
        before, streams = int(state.lengths[0]), tap.room(int(counts[0]))
        run(session, state, ids_BT, counts, logits, {**(others or {}), **streams})
        tap.tell(before, streams)

    def _prefill_scored(self, rows: list[np.ndarray], chunk_size: int) -> list[np.ndarray]:
        session, state = self._scoring_session(), self._make_room(rows)
        with _Transaction(state, rows):
            return [self._score_row(session, i, row, chunk_size) for i, row in enumerate(rows)]

    @property
    def verifies_exactly(self) -> bool:
        return self.can_score and self.rows_are_independent

    @property
    def rows_are_independent(self) -> bool:
        return has_independent_rows(self._session)

    def beside(self) -> OnnxRunner:
        return OnnxRunner(
            self._path,
            cache=self.cache,
            context_length=self.context_length,
            program_id=self.program_id,
            chunk_size=self._chunk_size,
            sessions=self._sessions,
        )

    def _verify(self, tokens: np.ndarray) -> tuple[np.ndarray, Any]:
        """With a graph that returns the conv states of every position, what they are kept in; unless so many tokens
        would be written over what a ring has to hold if they are taken back."""
        session = self._scoring_session()
        if not windows(session, self._cache) or (self._cache.bounded and len(tokens) > RING_ROOM):
            return super()._verify(tokens)
        state = self._make_room([tokens])
        logits_TV = np.empty((len(tokens), self.vocab_size), dtype=np.float32)
        window = {
            t.window_name: np.empty((1, int(t.shape[1]) + len(tokens), int(t.shape[2])), dtype=t.dtype)
            for t in self._cache.conv
        }
        self._run(session, state, tokens[None], _counts([tokens]), logits_TV[None], window)
        return logits_TV, window

    def _accept(self, kept: np.ndarray, length: int, place: Any) -> None:
        if not isinstance(place, dict):
            super()._accept(kept, length, place)
            return
        count = len(kept)
        conv = {t.past_name: place[t.window_name][:, count : count + int(t.shape[1])] for t in self._cache.conv}
        self._state.set_place(np.array([length + count]), conv)

    def _score_row(self, session: ort.InferenceSession, index: int, tokens: np.ndarray, chunk: int) -> np.ndarray:
        view = self._state.row(index)
        logits_TV = np.empty((len(tokens), self.vocab_size), dtype=np.float32)
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            self._run(session, view, part[None], _counts([part]), logits_TV[None, start : start + len(part)])
        self._state.take_row(index, view)
        return logits_TV

    def _decode(self, rows: list[np.ndarray]) -> np.ndarray:
        """One run, which is done or is not: nothing to put back."""
        state = self._make_room(rows)
        logits_BV = np.empty((self.batch_size, self.vocab_size), dtype=np.float32)
        self._run_last(state, _pad(rows), _counts(rows), logits_BV)
        return logits_BV

    def _score(self, rows: list[np.ndarray], chunk_size: int) -> np.ndarray:
        kept, tap, self._state, self._tap = self._state, self._tap, self._empty(len(rows)), None
        try:
            return np.stack(self._prefill_scored(rows, chunk_size))
        finally:
            self._state, self._tap = kept, tap

    def _copy_state(self) -> dict[str, np.ndarray]:
        return self._state.copy_used()

    def _copy_fixed(self) -> dict[str, np.ndarray]:
        return self._state.copy_fixed()

    def _restore(self, tensors: Mapping[str, np.ndarray], lengths: np.ndarray) -> None:
        self._replace(tensors, lengths, np.arange(len(lengths)))

    def _rewind(self, mark: Mark, place: Any) -> None:
        self._state.set_place(mark.lengths, mark.conv)

    def _reorder(self, rows: np.ndarray) -> None:
        state = self._state
        self._replace({**state.conv, **state.rings, **state.kv}, state.lengths, rows)

    def _copy_row(self, row: int) -> dict[str, np.ndarray]:
        return self._state.copy_row(row)

    def _join(self, tensors: Mapping[str, np.ndarray], lengths: np.ndarray) -> None:
        self._state.join(tensors, lengths, self._context_length)

    def _leave(self, row: int) -> None:
        self._state.leave(row)

    def _replace(self, tensors: Mapping[str, np.ndarray], lengths: np.ndarray, rows: np.ndarray) -> None:
        capacity = max(self._state.capacity, int(lengths.max(initial=0)))
        check_state_fits(self._cache, len(rows), capacity)
        self._state = StateBuffers.from_tensors(self._cache, tensors, lengths, rows, capacity)

    def _make_room(self, rows: list[np.ndarray]) -> StateBuffers:
        self._state.ensure(int((self._state.lengths + _counts(rows)).max()), self._context_length)
        return self._state

    def _scoring_session(self) -> ort.InferenceSession:
        return self._sessions.scoring(self._cache)


class _Transaction:
    """Puts lengths and states of fixed size back if a prefill of ``rows``, in several runs, fails on the way, an
    interrupt included."""

    def __init__(self, state: StateBuffers, rows: list[np.ndarray]):
        self._state = state
        self._overwrites = _counts(rows).max() > RING_ROOM

    def __enter__(self) -> None:
        state = self._state
        self._lengths, self._fixed = state.lengths.copy(), state.copy_fixed() if self._overwrites else state.copy_conv()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._state.set_place(self._lengths, self._fixed)


def run(
    session: ort.InferenceSession,
    state: StateBuffers,
    ids_BT: np.ndarray,
    counts: np.ndarray,
    logits: np.ndarray,
    others: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Appends ``counts[b]`` tokens (the rest of ``ids_BT`` is right padding) and fills ``logits`` [B, 1 or T, V], and
    other outputs of the graph."""
    others = others or {}
    binding = state.binding(session, others)
    for name, array in others.items():
        binding.bind_ortvalue_output(name, as_ortvalue(array))
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
