"""Runs the eager PyTorch model behind the Runner protocol: the reference that exported programs are compared with.

In: an eager model and token ids, row by row. Out: float32 logits. It is written to be right rather than fast: every row
is computed on its own, so that nothing depends on padding or on its neighbours, and a row's state is never changed in
place, so that an error or an interrupt leaves everything as it was.

Shape suffixes: B rows, T new tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfm2_export.backends.arguments import check_context_length, check_state_fits
from lfm2_export.backends.base import Mark
from lfm2_export.backends.runner_base import RunnerBase
from lfm2_export.cache import CacheSpec, StateTensor
from lfm2_export.models.decoder import Cache, DecoderForCausalLM, empty_cache

_NUMPY_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "float32"}


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What one row holds: a cache of batch size 1 that is replaced, never written to."""

    length: int
    cache: Cache


class EagerRunner(RunnerBase):
    """The Runner protocol (backends/base.py) for an eager model.

    Args:
        model: put into evaluation mode; its dtype is the state's (a snapshot of a bf16 state holds float32).
        context_length: the most tokens that a row may hold; default: what the config says.
        program_id: names the model in snapshots; default: a fingerprint of its config and weights.
    """

    def __init__(self, model: DecoderForCausalLM, *, context_length: int | None = None, program_id: str | None = None):
        config = model.config
        self._model = model.eval()
        self._dtype = model.lm_head.weight.dtype
        super().__init__(
            vocab_size=config.vocab_size,
            cache=CacheSpec.from_config(config, _NUMPY_DTYPES[self._dtype]),
            context_length=check_context_length(
                config.max_position_embeddings if context_length is None else context_length
            ),
            program_id=program_id or _fingerprint(model),
        )
        self._rows = [self._empty_row()]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([row.length for row in self._rows], dtype=np.int64)

    def _reset(self, batch_size: int) -> None:
        check_state_fits(self._cache, batch_size, 0)
        self._rows = [self._empty_row() for _ in range(batch_size)]

    def _prefill(self, rows: list[np.ndarray], chunk_size: int) -> np.ndarray:
        return np.concatenate(self._append(rows, chunk_size, logits_to_keep=1))

    def _prefill_scored(self, rows: list[np.ndarray], chunk_size: int) -> list[np.ndarray]:
        return self._append(rows, chunk_size, logits_to_keep=0)

    def _score(self, rows: list[np.ndarray], chunk_size: int) -> np.ndarray:
        return np.stack([self._run(self._empty_row(), row, chunk_size, logits_to_keep=0)[1] for row in rows])

    def _copy_state(self) -> dict[str, np.ndarray]:
        return {tensor.past_name: self._gather(tensor) for tensor in self._cache.tensors}

    def _copy_fixed(self) -> dict[str, np.ndarray]:
        """The conv states alone: what else is of fixed size comes back with the rows."""
        return {tensor.past_name: self._gather(tensor) for tensor in self._cache.conv}

    def _place(self) -> list[_Row]:
        return self._rows

    def _restore(self, tensors: Mapping[str, np.ndarray], lengths: np.ndarray) -> None:
        self._rows = [self._row_of(tensors, index, length) for index, length in enumerate(lengths.tolist())]

    def _rewind(self, mark: Mark, place: Any) -> None:
        self._rows = place

    def _reorder(self, rows: np.ndarray) -> None:
        self._rows = [self._rows[index] for index in rows]

    def _empty_row(self) -> _Row:
        device = self._model.lm_head.weight.device
        return _Row(length=0, cache=empty_cache(self._model.config, 1, self._dtype, device))

    def _append(self, tokens: list[np.ndarray], chunk_size: int, *, logits_to_keep: int) -> list[np.ndarray]:
        """Appends to every row; the new state is taken over when all rows are done. Returns [1 or T, V] per row."""
        pairs = zip(self._rows, tokens, strict=True)
        done = [self._run(row, new, chunk_size, logits_to_keep=logits_to_keep) for row, new in pairs]
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

    def _row_of(self, tensors: Mapping[str, np.ndarray], index: int, length: int) -> _Row:
        cache = {t.past_name: self._tensor(t, tensors, index, length) for t in self._cache.tensors}
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
