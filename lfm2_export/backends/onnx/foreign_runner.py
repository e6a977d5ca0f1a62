"""Runs an ONNX decoder that others exported, whatever it does with its state.

In: token ids, one row. Out: float32 logits. Nothing is bound in place: each run gets the state that the last one gave,
with keys and values of exactly as many positions. So a step copies them, which our own programs do not.

What is taken for granted is the layout that Liquid and onnx-community publish: ``input_ids``, ``attention_mask``,
optionally ``position_ids`` and a number of logits to keep; ``past_conv.N`` and ``past_key_values.N.key/value`` in,
``present_conv.N`` and ``present.N.key/value`` out. A conv state may be [1, hidden, L] or ours, [1, L-1, hidden]: either
begins with zeros. Every name and size is compared with config.json before anything is run.

Shape suffixes: T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from lfm2_export import memory, paths
from lfm2_export.backends.arguments import LESS, check_context_length, check_logits_fit, check_state_fits
from lfm2_export.backends.base import Kernels, KvCache, Mark, RunnerOptions
from lfm2_export.backends.onnx.session import open_session
from lfm2_export.backends.runner_base import RunnerBase
from lfm2_export.cache import BATCH, CONV_STATE, KEY_STATE, PAST, VALUE_STATE, CacheSpec, StateTensor
from lfm2_export.config import CONV
from lfm2_export.errors import ArtifactError, ResourceError, RunnerError
from lfm2_export.manifest import MODEL
from lfm2_export.messages import listed, shown

if TYPE_CHECKING:
    from lfm2_export.config import ModelConfig
    from lfm2_export.manifest import Program

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
_POSITIONS = "position_ids"
_KEEP = ("num_logits_to_keep", "logits_to_keep")
_REMEDY = "export the checkpoint with lfm2-export instead"


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What a run gave; its arrays are never written to."""

    length: int
    state: Mapping[str, np.ndarray]


class ForeignRunner(RunnerBase):
    """The Runner protocol (backends/base.py) for such a graph; one row.

    Args:
        path: the graph; its external data lies beside it.
        config: what the graph has to be.
        program_id: names the program in snapshots.
        threads: default: every core that this process may use.
    """

    def __init__(self, path: Path, config: ModelConfig, *, program_id: str, threads: int | None = None):
        self._path = path
        self._session = open_session(path, threads=threads)
        layout = _Layout(path, self._session.get_inputs(), self._session.get_outputs(), config)
        self._inputs, self._keep = layout.inputs, layout.keep
        cache = layout.cache()
        check_state_fits(cache, 1, 0)
        super().__init__(
            vocab_size=config.vocab_size,
            cache=cache,
            context_length=check_context_length(config.max_position_embeddings),
            program_id=program_id,
        )
        self._row = self._empty()

    @classmethod
    def from_program(cls, folder: Path, program: Program, config: ModelConfig, options: RunnerOptions) -> ForeignRunner:
        """The runner of a program in a ``ForeignArtifact``'s folder.

        Raises:
            RunnerError: our kernels or an int8 cache were asked for, or the graph is none of this layout.
        """
        path = folder / program.graphs[MODEL]
        if options.kernels is Kernels.LFM2 or options.kv_cache is not KvCache.FLOAT:
            raise RunnerError(
                f"{paths.shown(path)}: others exported it, without graphs for our kernels; leave --kernels and "
                f"--kv-cache out, or {_REMEDY}"
            )
        identity = "|".join(f"{name} {entry.bytes}" for name, entry in sorted(program.files.items()))
        return cls(
            path, config, program_id=f"foreign:{paths.real(path, ArtifactError)}|{identity}", threads=options.threads
        )

    @property
    def kernels(self) -> str:
        return "onnxruntime"

    @property
    def max_batch_size(self) -> int | None:
        return 1

    @property
    def lengths(self) -> np.ndarray:
        return np.array([self._row.length], dtype=np.int64)

    def _empty(self) -> _Row:
        return _Row(length=0, state=self._cache.zeros(1))

    def _reset(self, batch_size: int) -> None:
        self._row = self._empty()

    def _prefill(self, rows: list[np.ndarray], chunk_size: int) -> np.ndarray:
        self._row, logits_TV = self._append(self._row, rows[0], keep=1)
        return logits_TV[-1:]

    def _prefill_scored(self, rows: list[np.ndarray], chunk_size: int) -> list[np.ndarray]:
        self._row, logits_TV = self._append(self._row, rows[0], keep=None)
        return [logits_TV]

    def _score(self, rows: list[np.ndarray], chunk_size: int) -> np.ndarray:
        return np.stack([self._append(self._empty(), row, keep=None)[1] for row in rows])

    def _copy_state(self) -> dict[str, np.ndarray]:
        return {name: array.copy() for name, array in self._row.state.items()}

    def _copy_fixed(self) -> dict[str, np.ndarray]:
        return {tensor.past_name: self._row.state[tensor.past_name].copy() for tensor in self._cache.conv}

    def _place(self) -> _Row:
        return self._row

    def _restore(self, tensors: Mapping[str, np.ndarray], lengths: np.ndarray) -> None:
        self._row = _Row(length=int(lengths[0]), state={name: np.array(array) for name, array in tensors.items()})

    def _rewind(self, mark: Mark, place: Any) -> None:
        self._row = place

    def _reorder(self, rows: np.ndarray) -> None:
        """There is one row."""

    def _append(self, row: _Row, tokens: np.ndarray, *, keep: int | None) -> tuple[_Row, np.ndarray]:
        """The row with more tokens, and their logits: all where ``keep`` is None, else at least the last ones.

        A prompt goes in one piece, more tokens one by one: graphs that compute a conv over several tokens often do so
        from an empty state alone.
        """
        parts = [tokens] if row.length == 0 else [tokens[start : start + 1] for start in range(len(tokens))]
        logits = []
        for part in parts:
            row, found = self._run(row, part, len(part) if keep is None else keep)
            logits.append(found)
        return row, np.concatenate(logits)

    def _run(self, row: _Row, tokens: np.ndarray, keep: int) -> tuple[_Row, np.ndarray]:
        total = row.length + len(tokens)
        if self._keep is None:
            check_logits_fit([tokens], self.vocab_size)
        feeds = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, total), dtype=np.int64),
            _POSITIONS: np.arange(row.length, total, dtype=np.int64)[None],
            **row.state,
        }
        if self._keep is not None:
            feeds[self._keep.name] = np.full([1] * len(self._keep.shape), keep, dtype=np.int64)
        outputs = ["logits", *(tensor.present_name for tensor in self._cache.tensors)]
        try:
            found = self._session.run(outputs, {name: value for name, value in feeds.items() if name in self._inputs})
        except Exception as error:  # onnxruntime's exceptions have no common base class of their own
            if memory.ran_out(error):
                raise ResourceError(f"the memory is too small for a run on {len(tokens)} tokens; {LESS}") from error
            reason = " ".join(str(error).split())[:200]
            raise RunnerError(f"onnxruntime failed on {len(tokens)} tokens: {reason}; {_REMEDY}") from error
        state = {t.past_name: array for t, array in zip(self._cache.tensors, found[1:], strict=True)}
        self._check_given(found[0], state, len(tokens), keep, total)
        return _Row(length=total, state=state), found[0][0].astype(np.float32)

    def _check_given(
        self, logits: np.ndarray, state: Mapping[str, np.ndarray], new: int, keep: int, total: int
    ) -> None:
        """What a graph gives has the sizes that its next run needs, whatever it promised."""
        shapes = {t.past_name: t.concrete_shape(1, total) for t in self._cache.tensors}
        wrong = [name for name, array in state.items() if array.shape != shapes[name]]
        if logits.ndim != 3 or logits.shape[1] not in (keep, new) or logits.shape[::2] != (1, self.vocab_size):
            wrong.append("logits")
        if wrong:
            raise RunnerError(
                f"{paths.shown(self._path)}: after {total} tokens the graph gave other shapes than it should for "
                f"{listed(wrong)}; {_REMEDY}"
            )


@dataclass(frozen=True)
class _Layout:
    """A graph's inputs and outputs beside what config.json asks for."""

    path: Path
    given: Sequence[ort.NodeArg]
    outputs: Sequence[ort.NodeArg]
    config: ModelConfig

    @property
    def inputs(self) -> dict[str, ort.NodeArg]:
        return {one.name: one for one in self.given}

    @property
    def keep(self) -> ort.NodeArg | None:
        """The input that says how many logits are wanted, where there is one."""
        return next((one for one in self.given if one.name in _KEEP), None)

    def cache(self) -> CacheSpec:
        """The state.

        Raises:
            RunnerError: an input or output is missing, left over or of another size.
        """
        wanted = [(layer, kind) for layer, name in enumerate(self.config.layer_types) for kind in _kinds(name)]
        names = [StateTensor.names(layer, kind) for layer, kind in wanted]
        self._check_names("inputs", self.inputs, {"input_ids", "attention_mask", *(past for past, _ in names)})
        self._check_names("outputs", {o.name for o in self.outputs}, {"logits", *(present for _, present in names)})
        self._check_integers()
        self._check_logits()
        return CacheSpec(tensors=tuple(self._tensor(layer, kind) for layer, kind in wanted))

    def _check_names(self, kind: str, found: Mapping[str, Any] | set[str], expected: set[str]) -> None:
        optional = {_POSITIONS, *_KEEP} if kind == "inputs" else set()
        missing, extra = expected - set(found), set(found) - expected - optional
        if missing or extra:
            raise RunnerError(
                f"{paths.shown(self.path, 100)}: the graph's {kind} are not those of a text decoder of its config.json "
                f"(missing: {listed(missing, room=60) or 'none'}; left over: {listed(extra, room=60) or 'none'}); "
                f"{_REMEDY}"
            )

    def _check_integers(self) -> None:
        for name in ("input_ids", "attention_mask", _POSITIONS, *_KEEP):
            one = self.inputs.get(name)
            most = 1 if name in _KEEP else 2
            if one is not None and (one.type != "tensor(int64)" or len(one.shape) > most):
                raise self._other(one, f"int64 of {most} axes at most")

    def _check_logits(self) -> None:
        (one,) = (one for one in self.outputs if one.name == "logits")
        size = one.shape[-1] if len(one.shape) == 3 else 0
        if one.type not in _DTYPES or (isinstance(size, int) and size != self.config.vocab_size):
            raise self._other(one, f"[batch, tokens, {self.config.vocab_size}]")

    def _tensor(self, layer: int, kind: str) -> StateTensor:
        past, present = StateTensor.names(layer, kind)
        one, config = self.inputs[past], self.config
        if one.type not in _DTYPES:
            raise self._other(one, " or ".join(_DTYPES))
        sizes = tuple(axis if isinstance(axis, int) else None for axis in one.shape)
        shape: tuple[int | str, ...]
        if kind == CONV_STATE:
            width, hidden = config.conv_L_cache, config.hidden_size
            allowed = [pair for kept in (width, width - 1) for pair in ((hidden, kept), (kept, hidden))]
            if len(sizes) != 3 or sizes[1:] not in allowed:
                raise self._other(one, f"[batch, {hidden}, {width}]")
            shape = (BATCH, *one.shape[1:])
        else:
            heads, head_dim = config.num_key_value_heads, config.head_dim
            if len(sizes) != 4 or sizes[1:] != (heads, None, head_dim):
                raise self._other(one, f"[batch, {heads}, past, {head_dim}]")
            shape = (BATCH, heads, PAST, head_dim)
        return StateTensor(
            layer=layer, kind=kind, past_name=past, present_name=present, shape=shape, dtype=_DTYPES[one.type]
        )

    def _other(self, one: ort.NodeArg, expected: str) -> RunnerError:
        return RunnerError(
            f"{paths.shown(self.path, 100)}: the graph's {one.name} is {one.type} {shown(list(one.shape), 60)}, where "
            f"its config.json means {expected}; {_REMEDY}"
        )


def _kinds(layer_type: str) -> tuple[str, ...]:
    return (CONV_STATE,) if layer_type == CONV else (KEY_STATE, VALUE_STATE)
