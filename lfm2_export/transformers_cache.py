"""The state of an exported program as the cache object that transformers hands from step to step.

A runner holds one state; transformers' callers may hold several caches (two ``generate`` calls at once, guidance
with a negative prompt, a cache kept for later). So a cache owns its state and lends it to the runner while it is
used: only when another cache needs the runner is the state copied out, and copied back in when its turn comes
again.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from lfm2_export.backends.base import Runner, Snapshot
from lfm2_export.errors import GenerationError


class StateDesk:
    """One runner and the cache whose state it holds at the moment. ``lock`` guards both."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.lock = threading.RLock()
        self._holder: weakref.ref[ExportedCache] | None = None

    def holds(self, cache: ExportedCache) -> bool:
        return self._holder is not None and self._holder() is cache

    def bring_in(self, cache: ExportedCache, batch_size: int) -> None:
        """Makes the runner's state that of ``cache``; an unused cache starts with ``batch_size`` empty rows."""
        if self.holds(cache):
            return
        self.put_away()
        self._holder = weakref.ref(cache)
        if cache.parked is None:
            self.runner.reset(batch_size)
        else:
            self.runner.restore(cache.parked)
            cache.parked = None

    def put_away(self) -> None:
        """Copies the state out, so that the runner may be used for something else."""
        if (holder := self._holder() if self._holder else None) is not None:
            holder.parked = self.runner.snapshot()
        self._holder = None

    def borrow(self) -> ExportedCache:
        """A cache for one call, for a forward pass that keeps no state."""
        return ExportedCache(self)


class ExportedCache(Cache):
    """transformers' Cache over a runner's state.

    ``columns`` counts positions as transformers does, padding included; ``lengths`` int64 [B] the tokens that each row
    really holds. Padding never enters the state. ``chunk_size``: new tokens that the runner takes at a time.
    """

    is_compileable = False
    is_croppable = False
    is_initialized = True
    is_linear = (False,)  # of its layers: what keeps columns is given the new ones only

    def __init__(self, desk: StateDesk):
        super().__init__(layers=[])
        self.desk = desk
        self.parked: Snapshot | None = None
        self.columns = 0
        self.lengths = np.zeros(0, dtype=np.int64)
        self.chunk_size: int | None = None

    def __repr__(self) -> str:
        return f"ExportedCache(batch_size={self.batch_size}, tokens={self.lengths.tolist()})"

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward pass."""
        return len(self.lengths) or -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.desk.runner.context_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def appended(self, columns: int) -> None:
        """Takes note of what the runner did with this cache's state."""
        self.columns += columns
        self.lengths = self.desk.runner.lengths

    def reset(self) -> None:
        with self.desk.lock:
            if self.desk.holds(self):
                self.desk.runner.reset(max(1, len(self.lengths)))
            self.parked, self.columns = None, 0
            self.lengths = np.zeros(0, dtype=np.int64)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes a copy of row ``beam_idx[i]``: conv states, keys and values alike."""
        self._reorder(beam_idx.cpu().numpy())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = indices.cpu().numpy()
        self._reorder(np.flatnonzero(rows) if rows.dtype == bool else rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._reorder(np.repeat(np.arange(len(self.lengths)), repeats))

    def _reorder(self, rows: np.ndarray) -> None:
        if not len(self.lengths):
            return
        with self.desk.lock:
            self.desk.bring_in(self, len(self.lengths))
            self.desk.runner.reorder(rows)
            self.lengths = self.desk.runner.lengths

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise GenerationError(
                "a conv state cannot be rewound, so tokens cannot be removed from this cache; copy.deepcopy it before"
            )

    def activate_past_recording(self) -> None:
        raise GenerationError(
            "a cache does not record its past here; generate's prompt_lookup_num_tokens and assistant_model need none"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportedCache:
        """A cache that goes its own way from here on."""
        copy = ExportedCache(self.desk)
        with self.desk.lock:
            copy.parked = self.desk.runner.snapshot() if self.desk.holds(self) else self.parked
            copy.columns, copy.lengths = self.columns, self.lengths.copy()
        return copy
