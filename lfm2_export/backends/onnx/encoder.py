"""Runs an exported encoder on onnxruntime's CPU kernels.

In: token ids and a mask [B, T]. Out: the head's outputs as float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lfm2_export import memory, paths
from lfm2_export.backends.arguments import LESS
from lfm2_export.backends.base import RunnerOptions
from lfm2_export.backends.encoder import vocab_size_of, widths_of
from lfm2_export.backends.onnx.session import open_session
from lfm2_export.errors import ResourceError, RunnerError
from lfm2_export.heads import LOGITS, SENTENCE
from lfm2_export.manifest import MODEL, Program
from lfm2_export.messages import shown

_INPUTS = {"input_ids", "attention_mask"}


class OnnxEncoder:
    """The EncoderRunner protocol (backends/encoder.py) for ``onnx/*.onnx``.

    Raises:
        RunnerError: onnxruntime cannot load the graph, or its inputs and outputs are not those of the manifest.
        ResourceError: the memory is too small for it.
    """

    def __init__(self, folder: Path, program: Program, options: RunnerOptions | None = None):
        self._path = folder / program.graphs[MODEL]
        self._session = open_session(self._path, threads=(options or RunnerOptions()).threads)
        self._widths = widths_of(program)
        self._context_length = program.context_length
        self._vocab_size = vocab_size_of(program)
        self._check()

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
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask}
        names = list(self._widths)
        try:
            return dict(zip(names, self._session.run(names, feeds), strict=True))
        except Exception as error:  # onnxruntime's exceptions have no common base class of their own
            if memory.ran_out(error):
                raise ResourceError(
                    f"{paths.shown(self._path)}: the memory is too small for {input_ids.shape[0]} rows of "
                    f"{input_ids.shape[1]} tokens; {LESS}"
                ) from error
            raise RunnerError(f"{paths.shown(self._path)}: onnxruntime fails ({shown(str(error))})") from error

    def _check(self) -> None:
        """The graph's inputs and outputs, before anything is run."""
        inputs = {one.name for one in self._session.get_inputs()}
        found = {one.name: one for one in self._session.get_outputs()}
        if inputs != _INPUTS or set(found) != set(self._widths):
            raise RunnerError(
                f"{paths.shown(self._path)}: the graph has other inputs or outputs than an encoder "
                f"({shown(sorted(inputs | set(found)), 80)}); export again"
            )
        for name, one in found.items():
            axes = 2 if name == SENTENCE else 3
            if one.type != "tensor(float)" or len(one.shape) != axes or one.shape[-1] != self._widths[name]:
                raise RunnerError(
                    f"{paths.shown(self._path)}: {name} is {one.type} {shown(one.shape)}; float32 of {axes} axes, the "
                    f"last {self._widths[name]}, expected; export again"
                )
        if self._widths.get(LOGITS, self._vocab_size) != self._vocab_size:
            raise RunnerError(f"{paths.shown(self._path)}: has another vocabulary than the manifest; export again")
