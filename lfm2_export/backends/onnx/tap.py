"""Hands out the residual streams of a program's passes, for a drafter that reads them.

In: which layers. Out: buffers that a run fills, and their contents side by side for whoever asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

from lfm2_export.backends.base import StreamSink
from lfm2_export.backends.onnx.session import residuals, scores_from
from lfm2_export.cache import CacheSpec, residual_name
from lfm2_export.errors import RunnerError

# What a pass may hold at a time: the streams behind every layer, until it ends, those that are handed out, with their
# copy, and in graphs of older exports the logits of every position. 315 tokens of the 1.2B.
_MOST_BYTES = 64 << 20
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Tap:
    """``scores_last``: whether a pass can leave out the logits of all tokens but its last.

    Args:
        session: of the graph that gives residual streams.
        place: the program, for messages.

    Raises:
        RunnerError: it does not give those of ``layers``.
    """

    def __init__(
        self, session: ort.InferenceSession, cache: CacheSpec, layers: Sequence[int], sink: StreamSink, place: str
    ):
        self._sink = sink
        known = residuals(session, cache)
        names = [residual_name(layer) for layer in layers]
        if missing := [layer for layer, name in zip(layers, names, strict=True) if not known.get(name)]:
            raise RunnerError(
                f"{place}: does not give the residual stream behind layer {missing[0]}, which the drafter reads; "
                "export the model again"
            )
        self._widths = {name: known[name] for name in names}
        outputs = {output.name: output for output in session.get_outputs()}
        self._dtype = np.dtype(_DTYPES[outputs[names[0]].type])
        self.scores_last = scores_from(session)
        self._nbytes = self._dtype.itemsize * (sum(known.values()) + self.width) + 4 * self.width
        if not self.scores_last:
            self._nbytes += 4 * int(outputs["logits"].shape[-1])

    @property
    def width(self) -> int:
        """Of all streams side by side."""
        return sum(self._widths.values())

    def tokens_at_once(self, most: int) -> int:
        """Of a prompt: ``most``, or as many as ``_MOST_BYTES`` have room for."""
        return max(1, min(most, _MOST_BYTES // self._nbytes))

    def room(self, tokens: int) -> dict[str, np.ndarray]:
        """Buffers for a pass on the only row."""
        return {name: np.empty((1, tokens, width), self._dtype) for name, width in self._widths.items()}

    def tell(self, before: int, streams: Mapping[str, np.ndarray]) -> None:
        """Hands on what a pass behind ``before`` tokens left in its buffers."""
        self._sink(before, np.concatenate([streams[name][0] for name in self._widths], axis=-1, dtype=np.float32))
