"""What every backend offers to run an encoder: the EncoderRunner protocol.

In: token ids and a mask, padded to one length. Out: what the program's head gives, as float32. Nothing is kept between
calls. No backend is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from lfm2_export.errors import RunnerError
from lfm2_export.manifest import Program
from lfm2_export.messages import named


@runtime_checkable
class EncoderRunner(Protocol):
    """Runs one exported encoder. Safe for use by several threads at once."""

    @property
    def widths(self) -> Mapping[str, int]:
        """The last axis of each output that ``run`` returns, by its name (``heads.py``), in the program's order."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int:
        """The most tokens that one row can hold."""

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Mapping[str, np.ndarray]:
        """The outputs of rows of one length.

        Args:
            input_ids: int64 [B, T] of ids in the vocabulary, T up to ``context_length``; what stands in padding does
                not count.
            attention_mask: int64 [B, T] of PADDING, ATTENDED and EXPANSION; padding on the left or the right.

        Raises:
            RunnerError: the runtime fails.
            ResourceError: the memory is too small.
        """


def widths_of(program: Program) -> dict[str, int]:
    """The last axis of each output, as an encoder's manifest says.

    Raises:
        RunnerError: one has no fixed size.
    """
    found = {spec.name: spec.shape[-1] if spec.shape else None for spec in program.outputs}
    for name, width in found.items():
        if not isinstance(width, int):
            raise RunnerError(f"{program}: the manifest gives {named(name)} no size for its last axis; export again")
    return {name: int(width) for name, width in found.items() if isinstance(width, int)}


def vocab_size_of(program: Program) -> int:
    """The tokens that an encoder's program knows, as its manifest says."""
    size: int = program.options["vocab_size"]
    return size
