"""What every backend offers to run an encoder: the EncoderRunner protocol.

In: token ids and a mask, padded to one length. Out: what the program's head gives, as float32. Nothing is kept between
calls. No backend is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class EncoderRunner(Protocol):
    """Runs one exported encoder. Safe for use by several threads at once."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what ``run`` returns (``heads.py``)."""

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
