"""Runs a .pte on ExecuTorch's Python runtime.

In: token ids of one row. Out: float32 logits; the state stays inside the program. Position 0 empties it there, so a
reset costs nothing; snapshots go through the program's ``read_state`` and ``write_state``.

Shape suffixes: T new tokens, V vocabulary, S positions that the buffers hold, K key/value heads, H head_dim.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lfm2_export.backends.arguments import check_context_length
from lfm2_export.backends.base import Kernels, KvCache, Mark, RunnerOptions
from lfm2_export.backends.executorch.plan import MoeOp
from lfm2_export.backends.executorch.session import (
    FORWARD,
    READ_STATE,
    WRITE_STATE,
    Session,
    load_kernels,
    version,
)
from lfm2_export.backends.runner_base import RunnerBase, program_id_of
from lfm2_export.cache import CacheSpec, StateTensor
from lfm2_export.errors import RunnerError
from lfm2_export.kernels.build import KernelBuildError
from lfm2_export.manifest import MODEL

if TYPE_CHECKING:
    from lfm2_export.manifest import Program

logger = logging.getLogger(__name__)

# Where ExecuTorch's operator for experts is its plain reference.
_X86 = ("x86_64", "AMD64")
# benchmarks/moe_operator.py at the 8B's shape on two cores: 209 at one token, 131 at 64.
_X86_SLOWDOWN = 100


class ExecutorchRunner(RunnerBase):
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
        path, context_length = Path(path), check_context_length(context_length)
        self._session = Session(path, threads=threads)
        self._longest_call = self._session.input_shapes(FORWARD)[0][-1]
        self._length = 0
        super().__init__(
            vocab_size=self._session.logits_shape()[-1],
            cache=cache,
            context_length=context_length,
            program_id=program_id or f"{path.name}@{path.stat().st_size}",
        )

    @classmethod
    def from_program(cls, folder: Path, program: Program, options: RunnerOptions | None = None) -> ExecutorchRunner:
        """The runner of a program in an artifact's ``folder``, on the file whose experts run fastest here."""
        check_version(folder, program)
        options = options or RunnerOptions()
        return cls(
            folder / choose(program, options),
            cache=program.cache,
            context_length=program.context_length,
            threads=options.threads,
            program_id=program_id_of(program),
        )

    @property
    def max_batch_size(self) -> int:
        return 1

    @property
    def lengths(self) -> np.ndarray:
        return np.array([self._length], dtype=np.int64)

    @property
    def threads(self) -> int:
        return self._session.threads

    def _reset(self, batch_size: int) -> None:
        self._length = 0

    def _prefill(self, rows: list[np.ndarray], chunk_size: int) -> np.ndarray:
        return self._append(rows[0], min(chunk_size, self._longest_call))[-1][None]

    def _prefill_scored(self, rows: list[np.ndarray], chunk_size: int) -> list[np.ndarray]:
        """Token by token: the program returns the last token's logits only."""
        return [np.stack(self._append(rows[0], 1))]

    def _score(self, rows: list[np.ndarray], chunk_size: int) -> np.ndarray:
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

    def _copy_state(self) -> dict[str, np.ndarray]:
        return self._by_name(self._read() if self._length else self._zeros())

    def _copy_fixed(self) -> dict[str, np.ndarray]:
        state = self._copy_state()
        return {tensor.past_name: state[tensor.past_name] for tensor in self._cache.fixed}

    def _restore(self, tensors: Mapping[str, np.ndarray], lengths: np.ndarray) -> None:
        length = int(lengths[0])
        self._session.call(WRITE_STATE, self._buffers(tensors, length))
        self._length = length

    def _rewind(self, mark: Mark, place: Any) -> None:
        length = int(mark.lengths[0])
        if length and self._cache.fixed:
            state = self._read()
            self._put_fixed(state, mark.conv)
            self._session.call(WRITE_STATE, state)
        self._length = length

    def _reorder(self, rows: np.ndarray) -> None:
        """Never called: one row has one order."""

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
        start, done, after = np.array([self._length], dtype=np.int64), list[Any](), self._length + len(tokens)
        try:
            (logits,) = self._session.call(FORWARD, (np.ascontiguousarray(tokens[None]), start), done)
        finally:
            if done:  # without a call, in whose place a Ctrl-C could be raised
                self._length = after
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


def check_version(folder: Path, program: Program) -> None:
    made, here = program.versions.get("executorch", ""), version()
    if made and here[:1].isdigit() and made.split(".")[0] != here.split(".")[0]:
        raise RunnerError(
            f"{folder / program.graphs['model']}: was made with executorch {made}, here is {here}; "
            f"install executorch {made.split('.')[0]}, or export again"
        )
