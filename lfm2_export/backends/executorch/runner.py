"""Runs a .pte on ExecuTorch's Python runtime.

In: token ids of one row. Out: float32 logits; the state stays inside the program. Position 0 empties it there, so a
reset costs nothing; snapshots go through the program's ``read_state`` and ``write_state``.

Shape suffixes: T new tokens, V vocabulary, S positions that the buffers hold, K key/value heads, H head_dim.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lfm2_export.backends.arguments import (
    check_batch_size,
    check_chunk_size,
    check_context_length,
    check_equal_rows,
    check_fits,
    check_indices,
    check_logits_fit,
    check_rows,
    check_tokens,
    short_of_memory,
)
from lfm2_export.backends.base import Kernels, KvCache, Mark, RunnerOptions, Snapshot, TokenRows, check_snapshot
from lfm2_export.backends.executorch.plan import MoeOp
from lfm2_export.backends.executorch.session import (
    FORWARD,
    READ_STATE,
    WRITE_STATE,
    Session,
    load_kernels,
    version,
)
from lfm2_export.backends.guard import guarded
from lfm2_export.cache import CacheSpec, StateTensor
from lfm2_export.errors import RunnerError
from lfm2_export.kernels.build import KernelBuildError
from lfm2_export.manifest import MODEL

if TYPE_CHECKING:
    from lfm2_export.manifest import Program

logger = logging.getLogger(__name__)

DEFAULT_CHUNK_SIZE = 512
# Where ExecuTorch's operator for experts is its plain reference.
_X86 = ("x86_64", "AMD64")
# benchmarks/moe_operator.py at the 8B's shape on two cores: 209 at one token, 131 at 64.
_X86_SLOWDOWN = 100


@guarded
class ExecutorchRunner:
    """The Runner protocol (backends/base.py) for ``executorch/*.pte``: one row.

    Args:
        path: the program.
        cache: names, shapes and dtypes of its state.
        context_length: the most tokens that it may hold.
        threads: default: every core that this process may use. The pool is one for the whole process: the last runner
            that was made has set it for all.
        program_id: names the program in snapshots; default: the file's name and size.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        cache: CacheSpec,
        context_length: int,
        threads: int | None = None,
        program_id: str | None = None,
    ):
        path = Path(path)
        self._cache, self._context_length = cache, check_context_length(context_length)
        self._session = Session(path, threads=threads)
        self._vocab_size = self._session.logits_shape()[-1]
        self._longest_call = self._session.input_shapes(FORWARD)[0][-1]
        self._program_id = program_id or f"{path.name}@{path.stat().st_size}"
        self._length = 0
        self._marks: weakref.WeakSet[Mark] = weakref.WeakSet()

    @classmethod
    def from_program(cls, folder: Path, program: Program, options: RunnerOptions | None = None) -> ExecutorchRunner:
        """The runner of a program in an artifact's ``folder``, on the file whose experts run fastest here."""
        _check_version(folder, program)
        options = options or RunnerOptions()
        digest = hashlib.sha256("".join(entry.sha256 for _, entry in sorted(program.files.items())).encode())
        return cls(
            folder / choose(program, options),
            cache=program.cache,
            context_length=program.context_length,
            threads=options.threads,
            program_id=f"{program.backend}/{program.scheme}@{digest.hexdigest()[:16]}",
        )

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def max_batch_size(self) -> int:
        return 1

    @property
    def batch_size(self) -> int:
        return 1

    @property
    def lengths(self) -> np.ndarray:
        return np.array([self._length], dtype=np.int64)

    @property
    def can_score(self) -> bool:
        """Token by token: the program returns the last token's logits only."""
        return True

    @property
    def cache(self) -> CacheSpec:
        return self._cache

    @property
    def program_id(self) -> str:
        return self._program_id

    @property
    def threads(self) -> int:
        return self._session.threads

    def reset(self, batch_size: int = 1) -> None:
        check_batch_size(batch_size, self.max_batch_size)
        self._length = 0
        self._marks.clear()

    @short_of_memory("prefill")
    def prefill(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> np.ndarray:
        tokens = self._check_new(input_ids)
        chunk = min(check_chunk_size(chunk_size, DEFAULT_CHUNK_SIZE), self._longest_call)
        return self._append(tokens, chunk)[-1][None]

    @short_of_memory("prefill")
    def prefill_scored(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> list[np.ndarray]:
        tokens = self._check_new(input_ids)
        check_chunk_size(chunk_size, DEFAULT_CHUNK_SIZE)
        check_logits_fit([tokens], self.vocab_size)
        return [np.stack(self._append(tokens, 1))]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._append(self._check_new(check_tokens(tokens)), 1)[-1][None]

    @short_of_memory("score")
    def score(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> np.ndarray:
        rows = check_equal_rows(input_ids, self.vocab_size, self._context_length)
        check_chunk_size(chunk_size, DEFAULT_CHUNK_SIZE)
        check_logits_fit(rows, self.vocab_size)
        kept = self._read() if self._length else None
        length, self._length = self._length, 0
        try:
            return np.stack([self._score_row(row) for row in rows])
        finally:
            self._length = length
            if kept is not None:
                self._session.call(WRITE_STATE, kept)

    def _score_row(self, tokens: np.ndarray) -> np.ndarray:
        self._length = 0
        return np.stack(self._append(tokens, 1))

    @short_of_memory("snapshot")
    def snapshot(self) -> Snapshot:
        state = self._read() if self._length else self._zeros()
        return Snapshot(program_id=self._program_id, lengths=self.lengths, tensors=self._by_name(state))

    @short_of_memory("restore")
    def restore(self, snapshot: Snapshot) -> None:
        (length,) = check_snapshot(
            snapshot,
            program_id=self._program_id,
            cache=self._cache,
            context_length=self._context_length,
            max_batch_size=self.max_batch_size,
        ).tolist()
        self._session.call(WRITE_STATE, self._buffers(snapshot.tensors, length))
        self._length = length
        self._marks.clear()

    def mark(self) -> Mark:
        state = self._by_name(self._read() if self._length else self._zeros())
        mark = Mark(lengths=self.lengths, conv={t.past_name: state[t.past_name] for t in self._cache.fixed})
        self._marks.add(mark)
        return mark

    def is_valid(self, mark: Mark) -> bool:
        return isinstance(mark, Mark) and mark in self._marks

    def rewind(self, mark: Mark) -> None:
        if not self.is_valid(mark):
            raise RunnerError("this mark is of a state that is no more; restore a snapshot or prefill again")
        if mark.lengths[0] and self._cache.fixed:
            state = self._read()
            self._put_fixed(state, mark.conv)
            self._session.call(WRITE_STATE, state)
        self._length = int(mark.lengths[0])
        for other in [m for m in self._marks if (m.lengths > mark.lengths).any()]:
            self._marks.discard(other)

    def reorder(self, indices: Sequence[int] | np.ndarray) -> None:
        check_batch_size(len(check_indices(indices, self.batch_size)), self.max_batch_size)

    def _check_new(self, input_ids: TokenRows) -> np.ndarray:
        (tokens,) = check_rows(input_ids, self.batch_size, self.vocab_size)
        check_fits(self.lengths, [len(tokens)], self._context_length)
        return tokens

    def _append(self, tokens: np.ndarray, chunk_size: int) -> list[np.ndarray]:
        """The logits [V] after each chunk. If one fails, the state counts as it was: what was written is past its end,
        but for the conv states, which is why they are put back. One chunk after others runs or does not, also where a
        Ctrl-C arrives meanwhile: to keep a copy for that would cost every step one, so ``lengths`` say which it is."""
        before = self._length
        kept = self._read() if before > 0 and len(tokens) > chunk_size else None
        try:
            return [self._run(tokens[i : i + chunk_size]) for i in range(0, len(tokens), chunk_size)]
        except BaseException:
            if kept is not None:
                self._session.call(WRITE_STATE, kept)
            if kept is not None or before == 0:
                self._length = before
            raise

    def _run(self, tokens: np.ndarray) -> np.ndarray:
        start, done = np.array([self._length], dtype=np.int64), list[Any]()
        try:
            (logits,) = self._session.call(FORWARD, (np.ascontiguousarray(tokens[None]), start), done)
        finally:
            self._length += len(tokens) if done else 0
        return logits[0, 0]

    def _read(self) -> list[np.ndarray]:
        """The buffers, copied: conv states [layers, L-1, D], then keys and values [1, S, K, H], bounded ones first."""
        return self._session.call(READ_STATE, ())

    def _zeros(self) -> list[np.ndarray]:
        return [np.zeros(shape, np.float32) for shape in self._session.output_shapes(READ_STATE)]

    def _by_name(self, buffers: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Buffers as the CacheSpec describes the state; keys and values that grow are trimmed to the tokens held."""
        conv, bounded, growing = self._split(buffers)
        found = {t.past_name: conv[i : i + 1].copy() for i, t in enumerate(self._cache.conv)}
        found |= {t.past_name: _positions_last(b).copy() for t, b in bounded}
        found |= {t.past_name: _positions_last(b)[:, :, : self._length].copy() for t, b in growing}
        return {t.past_name: found[t.past_name] for t in self._cache.tensors}

    def _buffers(self, tensors: Mapping[str, np.ndarray], length: int) -> list[np.ndarray]:
        """The other way round."""
        buffers = self._zeros()
        self._put_fixed(buffers, tensors)
        for tensor, buffer in self._split(buffers)[2]:
            buffer[:, :length] = _positions_last(tensors[tensor.past_name][:, :, :length])
        return buffers

    def _put_fixed(self, buffers: Sequence[np.ndarray], tensors: Mapping[str, np.ndarray]) -> None:
        conv, bounded, _ = self._split(buffers)
        for index, tensor in enumerate(self._cache.conv):
            conv[index] = tensors[tensor.past_name][0]
        for tensor, buffer in bounded:
            buffer[:] = _positions_last(tensors[tensor.past_name])

    def _split(self, buffers: Sequence[np.ndarray]) -> tuple[np.ndarray, _Described, _Described]:
        """(conv states, bounded keys and values with their descriptions, growing ones)."""
        first = 1 if self._cache.conv else 0
        described = list(zip((*self._cache.bounded, *self._cache.growing), buffers[first:], strict=True))
        bounded = len(self._cache.bounded)
        return buffers[0], described[:bounded], described[bounded:]


_Described = list[tuple[StateTensor, np.ndarray]]


def _positions_last(x: np.ndarray) -> np.ndarray:
    """[1, S, K, H] as [1, K, S, H], and back."""
    return x.transpose(0, 2, 1, 3)


def choose(program: Program, options: RunnerOptions) -> str:
    """The file to run. Our own operator runs experts faster than ExecuTorch's, many times so where that is not
    optimized (x86); but it has to be built.

    Raises:
        RunnerError: the program has no file for the kernels that were asked for, or no such cache.
        KernelBuildError: our kernels were asked for and cannot be built.
    """
    if options.kv_cache is not KvCache.FLOAT:
        raise RunnerError(f"{program}: a .pte holds its keys and values in float32; leave --kv-cache out")
    stock, ours = program.graphs[MODEL], program.graphs.get(str(MoeOp.LFM2))
    if options.kernels is not Kernels.AUTO:
        return _of_kernels(program, options.kernels, stock, ours)
    if ours is None or ours == stock:
        if platform.machine() in _X86 and list(program.options.get("moe_op", {}).values()) == [MoeOp.STOCK]:
            logger.warning(
                "%s: on x86 its experts run in ExecuTorch's reference kernels, some %d times slower than in ours; "
                "export with --moe-op both",
                stock,
                _X86_SLOWDOWN,
            )
        return stock
    try:
        return ours if load_kernels() else stock
    except KernelBuildError as error:
        logger.warning("%s; running %s instead", error, stock)
        return stock


def _of_kernels(program: Program, kernels: Kernels, stock: str, ours: str | None) -> str:
    if kernels is Kernels.STOCK and ours != stock:
        return stock
    if kernels is Kernels.LFM2 and ours is not None:
        if not load_kernels():
            raise RunnerError(f"{ours}: its operator cannot be built here; pass --kernels stock")
        return ours
    raise RunnerError(
        f"{program}: has no file for the {kernels} kernels; leave --kernels out, or export with --moe-op both"
    )


def _check_version(folder: Path, program: Program) -> None:
    made, here = program.versions.get("executorch", ""), version()
    if made and here[:1].isdigit() and made.split(".")[0] != here.split(".")[0]:
        raise RunnerError(
            f"{folder / program.graphs['model']}: was made with executorch {made}, here is {here}; "
            f"install executorch {made.split('.')[0]}, or export again"
        )
