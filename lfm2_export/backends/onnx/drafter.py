"""Runs an exported drafter on onnxruntime's CPU kernels, with our products where they can be had.

In: the target's residual streams and its newest token. Out: proposals. The cache is one buffer for each layer's keys
and values, with room for more than it holds: the graph reads the buffers as they are and returns new positions alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lfm2_export import memory, paths
from lfm2_export.backends.arguments import LESS
from lfm2_export.backends.base import Kernels, RunnerOptions
from lfm2_export.backends.drafter import ProposedBlock
from lfm2_export.backends.onnx.draft_graph import (
    ANCHOR,
    CONFIDENCE,
    PAST_LENGTH,
    STREAMS,
    TOKENS,
    cache_names,
)
from lfm2_export.backends.onnx.session import open_session
from lfm2_export.backends.onnx.variants import LFM2, own_library
from lfm2_export.errors import ResourceError, RunnerError
from lfm2_export.manifest import MODEL, Program
from lfm2_export.messages import shown

# Positions; runs on a cache of another size make onnxruntime plan anew.
_FIRST_ROOM = 256


class OnnxDrafter:
    """The DraftRunner protocol (backends/drafter.py) for ``onnx/*.onnx``.

    Raises:
        RunnerError: onnxruntime cannot load the graph, or it is not that of a drafter as the manifest describes it.
        ResourceError: the memory is too small for it.
    """

    def __init__(self, folder: Path, program: Program, options: RunnerOptions | None = None):
        options, made = options or RunnerOptions(), program.options["drafter"]
        library = None if options.kernels is Kernels.STOCK or LFM2 not in program.graphs else own_library()
        self._path = folder / program.graphs[MODEL if library is None else LFM2]
        self._session = open_session(self._path, threads=options.threads, library=library)
        self.target: str = made["target"]
        self.target_name: str = made["target_name"]
        self.layers: tuple[int, ...] = tuple(made["target_layers"])
        self.block_size: int = made["block_size"]
        self.width, shape = self._check()
        self.held = 0
        self._cache = {name: np.zeros((1, shape[0], 0, shape[1]), np.float32) for name in self._past}

    def cut(self, count: int) -> None:
        self.held = min(self.held, count)

    def propose(self, streams: np.ndarray, anchor: int) -> ProposedBlock:
        count = len(streams)
        self._make_room(self.held + count)
        feeds: dict[str, np.ndarray] = {
            STREAMS: np.ascontiguousarray(streams[None], np.float32),
            ANCHOR: np.array([anchor], np.int64),
            PAST_LENGTH: np.array([self.held], np.int64),
            **self._cache,
        }
        found = self._run(feeds, count)
        self._check_results(found, count)
        for name, new in zip(self._past, self._new, strict=True):
            self._cache[name][:, :, self.held : self.held + count] = found[new]
        self.held += count
        tokens = found[TOKENS]
        return ProposedBlock(tokens=tokens, confidence=found.get(CONFIDENCE, np.ones(len(tokens), np.float32)))

    def _run(self, feeds: dict[str, np.ndarray], count: int) -> dict[str, Any]:
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        except Exception as error:  # onnxruntime's exceptions have no common base class of their own
            if memory.ran_out(error):
                raise ResourceError(
                    f"{paths.shown(self._path)}: the memory is too small for {count} positions; {LESS}"
                ) from error
            raise RunnerError(f"{paths.shown(self._path)}: onnxruntime fails ({shown(str(error))})") from error

    def _check_results(self, found: Mapping[str, np.ndarray], count: int) -> None:
        """A graph may say one thing of its outputs and do another."""
        shapes = {
            name: (1, old.shape[1], count, old.shape[3])
            for name, old in zip(self._new, self._cache.values(), strict=True)
        }
        block: dict[str, tuple[int, ...]] = {name: (self.block_size,) for name in (TOKENS, CONFIDENCE) if name in found}
        for name, shape in {**shapes, **block}.items():
            kind = "i" if name == TOKENS else "f"
            if found[name].shape != shape or found[name].dtype.kind != kind:
                raise RunnerError(
                    f"{paths.shown(self._path)}: {name} came out as {found[name].dtype} {list(found[name].shape)}, "
                    f"{list(shape)} expected; export again"
                )

    def _make_room(self, positions: int) -> None:
        """At least doubles, so that growing stays rare."""
        room = next(iter(self._cache.values())).shape[2]
        if positions <= room:
            return
        grown = max(positions, 2 * room, _FIRST_ROOM)
        for name, old in self._cache.items():
            new = np.zeros((1, old.shape[1], grown, old.shape[3]), np.float32)
            new[:, :, : self.held] = old[:, :, : self.held]
            self._cache[name] = new

    def _check(self) -> tuple[int, tuple[int, int]]:
        """The graph's inputs and outputs, before anything is run: the streams' width, and heads and head size."""
        shapes = {one.name: one.shape for one in self._session.get_inputs()}
        self._outputs = [one.name for one in self._session.get_outputs()]
        layers = range((len(shapes) - 3) // 2)
        self._past = [name for layer in layers for name in cache_names("past", layer)]
        self._new = [name for layer in layers for name in cache_names("new", layer)]
        names = [STREAMS, ANCHOR, PAST_LENGTH, *self._past]
        fits = set(shapes) == set(names) and layers and {*self._outputs} - {CONFIDENCE} == {TOKENS, *self._new}
        sizes = [shapes[STREAMS][-1], *shapes[self._past[0]][1::2]] if fits else []
        if len(sizes) != 3 or not all(isinstance(size, int) for size in sizes):
            raise RunnerError(
                f"{paths.shown(self._path)}: the graph has other inputs or outputs than a drafter "
                f"({shown(sorted(shapes), 80)}); export again"
            )
        return sizes[0], (sizes[1], sizes[2])
