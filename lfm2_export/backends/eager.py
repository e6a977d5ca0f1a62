"""Runs the eager PyTorch model behind the Runner protocol: the reference that exported programs are compared with.

In: an eager model and token ids, row by row. Out: float32 logits. It is written to be right rather than fast: every row
is computed on its own, so that nothing depends on padding or on its neighbours, and a row's state is never changed in
place, so that an error or an interrupt leaves everything as it was.

Shape suffixes: B rows, T new tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lfm2_export.backends.arguments import (
    check_batch_size,
    check_chunk_size,
    check_context_length,
    check_equal_rows,
    check_fits,
    check_indices,
    check_logits_fit,
    check_rows,
    check_state_fits,
    check_tokens,
    short_of_memory,
)
from lfm2_export.backends.base import Mark, Snapshot, TokenRows, check_snapshot
from lfm2_export.backends.guard import guarded
from lfm2_export.cache import CacheSpec, StateTensor
from lfm2_export.errors import RunnerError
from lfm2_export.models.decoder import Cache, DecoderForCausalLM, empty_cache

DEFAULT_CHUNK_SIZE = 512
_NUMPY_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "float32"}


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What one row holds: a cache of batch size 1 that is replaced, never written to."""

    length: int
    cache: Cache


@guarded
class EagerRunner:
    """The Runner protocol (backends/base.py) for an eager model.

    Args:
        model: put into evaluation mode; its dtype is the state's (a snapshot of a bf16 state holds float32).
        context_length: the most tokens that a row may hold; default: what the config says.
        program_id: names the model in snapshots; default: a fingerprint of its config and weights.
    """

    def __init__(self, model: DecoderForCausalLM, *, context_length: int | None = None, program_id: str | None = None):
        self._model = model.eval()
        self._dtype = model.lm_head.weight.dtype
        self._cache = CacheSpec.from_config(model.config, _NUMPY_DTYPES[self._dtype])
        self._context_length = check_context_length(
            model.config.max_position_embeddings if context_length is None else context_length
        )
        self._program_id = program_id or _fingerprint(model)
        self._rows = [self._empty_row()]
        self._marks: weakref.WeakKeyDictionary[Mark, list[_Row]] = weakref.WeakKeyDictionary()

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def max_batch_size(self) -> None:
        return None

    @property
    def batch_size(self) -> int:
        return len(self._rows)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([row.length for row in self._rows], dtype=np.int64)

    @property
    def can_score(self) -> bool:
        return True

    @property
    def cache(self) -> CacheSpec:
        return self._cache

    @property
    def program_id(self) -> str:
        return self._program_id

    @short_of_memory("reset")
    def reset(self, batch_size: int = 1) -> None:
        rows = check_batch_size(batch_size, self.max_batch_size)
        check_state_fits(self._cache, rows, 0)
        self._replace([self._empty_row() for _ in range(rows)])

    def prefill(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> np.ndarray:
        return np.concatenate(self._append(input_ids, chunk_size, logits_to_keep=1))

    def prefill_scored(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> list[np.ndarray]:
        return self._append(input_ids, chunk_size, logits_to_keep=0)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.concatenate(self._append(check_tokens(tokens), None, logits_to_keep=1))

    @short_of_memory("score")
    def score(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> np.ndarray:
        rows = check_equal_rows(input_ids, self.vocab_size, self._context_length)
        size = check_chunk_size(chunk_size, DEFAULT_CHUNK_SIZE)
        check_logits_fit(rows, self.vocab_size)
        return np.stack([self._run(self._empty_row(), row, size, logits_to_keep=0)[1] for row in rows])

    @short_of_memory("snapshot")
    def snapshot(self) -> Snapshot:
        tensors = {tensor.past_name: self._gather(tensor) for tensor in self._cache.tensors}
        return Snapshot(program_id=self._program_id, lengths=self.lengths, tensors=tensors)

    @short_of_memory("restore")
    def restore(self, snapshot: Snapshot) -> None:
        lengths = check_snapshot(
            snapshot,
            program_id=self._program_id,
            cache=self._cache,
            context_length=self._context_length,
            max_batch_size=self.max_batch_size,
        )
        self._replace([self._row_of(snapshot, index, length) for index, length in enumerate(lengths.tolist())])

    def mark(self) -> Mark:
        conv = {tensor.past_name: self._gather(tensor) for tensor in self._cache.conv}
        mark = Mark(lengths=self.lengths, conv=conv)
        self._marks[mark] = self._rows
        return mark

    def is_valid(self, mark: Mark) -> bool:
        return isinstance(mark, Mark) and mark in self._marks

    def rewind(self, mark: Mark) -> None:
        if not self.is_valid(mark):
            raise RunnerError("this mark is of a state that is no more; restore a snapshot or prefill again")
        self._rows = self._marks[mark]
        for other in [m for m in self._marks if (m.lengths > mark.lengths).any()]:
            del self._marks[other]

    def reorder(self, indices: Sequence[int] | np.ndarray) -> None:
        rows = check_indices(indices, self.batch_size)
        if not np.array_equal(rows, np.arange(self.batch_size)):
            self._replace([self._rows[index] for index in rows])

    def _replace(self, rows: list[_Row]) -> None:
        self._rows = rows
        self._marks.clear()

    def _empty_row(self) -> _Row:
        device = self._model.lm_head.weight.device
        return _Row(length=0, cache=empty_cache(self._model.config, 1, self._dtype, device))

    @short_of_memory("prefill")
    def _append(
        self, input_ids: TokenRows | np.ndarray, chunk_size: int | None, *, logits_to_keep: int
    ) -> list[np.ndarray]:
        """Appends to every row; the new state is taken over when all rows are done. Returns [1 or T, V] per row."""
        tokens = check_rows(input_ids, self.batch_size, self.vocab_size)
        check_fits(self.lengths, [len(new) for new in tokens], self._context_length)
        size = check_chunk_size(chunk_size, DEFAULT_CHUNK_SIZE)
        if not logits_to_keep:
            check_logits_fit(tokens, self.vocab_size)
        pairs = zip(self._rows, tokens, strict=True)
        done = [self._run(row, new, size, logits_to_keep=logits_to_keep) for row, new in pairs]
        self._rows = [row for row, _ in done]
        return [logits for _, logits in done]

    @torch.inference_mode()
    def _run(self, row: _Row, tokens: np.ndarray, chunk_size: int, *, logits_to_keep: int) -> tuple[_Row, np.ndarray]:
        cache: Cache | None = row.cache
        ids, logits = torch.from_numpy(tokens).to(self._model.lm_head.weight.device), []
        for part in ids.split(chunk_size):
            out = self._model(
                part[None],
                cache=cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
                output_hidden_states=False,
                output_attentions=False,
                output_router_logits=False,
            )
            cache = out.cache
            logits.append(out.logits[0].float().cpu().numpy())
        assert cache is not None
        kept = logits[-1] if logits_to_keep else np.concatenate(logits)
        return _Row(length=row.length + len(tokens), cache=cache), kept

    def _gather(self, tensor: StateTensor) -> np.ndarray:
        """One state tensor of all rows, [B, ...]; keys and values padded with zeros to the longest row."""
        array = tensor.zeros(self.batch_size, int(self.lengths.max()))
        for index, row in enumerate(self._rows):
            held = row.cache[tensor.past_name][0]
            if held.dtype == torch.bfloat16:  # numpy has none; float32 holds its values exactly
                held = held.float()
            array[(index, slice(None), slice(row.length)) if tensor.grows else index] = held.cpu().numpy()
        return array

    def _row_of(self, snapshot: Snapshot, index: int, length: int) -> _Row:
        cache = {t.past_name: self._tensor(t, snapshot.tensors, index, length) for t in self._cache.tensors}
        return _Row(length=length, cache=cache)

    def _tensor(self, tensor: StateTensor, tensors: Mapping[str, np.ndarray], index: int, length: int) -> Tensor:
        array = tensors[tensor.past_name][index : index + 1]
        if tensor.grows:
            array = array[:, :, :length]
        return torch.tensor(array, dtype=self._dtype, device=self._model.lm_head.weight.device)


def _fingerprint(model: DecoderForCausalLM) -> str:
    """Tells models apart by their config, dtype and the beginning of every parameter; cheap at any size."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:64].float().cpu().numpy()
        digest.update(f"{name} {parameter.dtype}".encode() + head.tobytes())
    return f"eager-{model.config.model_type}@{digest.hexdigest()[:16]}"
