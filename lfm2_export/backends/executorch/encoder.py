"""Runs an exported encoder on ExecuTorch's Python runtime.

In: token ids and a mask [B, T]. Out: the head's outputs as float32. A program takes one row: a batch is run row by row,
each without its padding.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lfm2_export.backends.base import RunnerOptions
from lfm2_export.backends.encoder import vocab_size_of, widths_of
from lfm2_export.backends.executorch.runner import check_version
from lfm2_export.backends.executorch.session import FORWARD, Session
from lfm2_export.errors import RunnerError
from lfm2_export.heads import PADDING, SENTENCE
from lfm2_export.manifest import MODEL, Program


class ExecutorchEncoder:
    """The EncoderRunner protocol (backends/encoder.py) for ``executorch/*.pte``.

    Raises:
        RunnerError: the file is damaged, for another executorch, or no encoder's.
        ResourceError: the memory is too small for it.
    """

    def __init__(self, folder: Path, program: Program, options: RunnerOptions | None = None):
        check_version(folder, program)
        path = folder / program.graphs[MODEL]
        self._session = Session(path, threads=(options or RunnerOptions()).threads)
        self._widths = widths_of(program)
        self._context_length = program.context_length
        self._vocab_size = vocab_size_of(program)
        self._lock = threading.Lock()
        found = len(self._session.input_shapes(FORWARD)), len(self._session.output_shapes(FORWARD))
        if found != (2, len(self._widths)):
            raise RunnerError(
                f"{path}: has {found[0]} inputs and {found[1]} outputs, 2 and {len(self._widths)} expected; export "
                "again"
            )

    @property
    def widths(self) -> Mapping[str, int]:
        return self._widths

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def context_length(self) -> int:
        return self._context_length

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
        rows = [self._row(ids, mask) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return {name: np.stack([row[name] for row in rows]) for name in self._widths}

    def _row(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        """One row's outputs, 0 where it has padding."""
        places = np.flatnonzero(mask != PADDING)
        places = places if len(places) else np.arange(len(ids))
        with self._lock:
            found = self._session.call(FORWARD, [ids[places][None], mask[places][None]])
        outputs = {}
        for name, values in zip(self._widths, found, strict=True):
            if name == SENTENCE:
                outputs[name] = values[0].copy()
                continue
            outputs[name] = np.zeros((len(ids), values.shape[-1]), np.float32)
            outputs[name][places] = values[0]
        return outputs
