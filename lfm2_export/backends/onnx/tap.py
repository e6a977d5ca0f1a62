"""Hands out the residual streams of a program's passes, for a drafter that reads them.

In: which layers. Out: buffers that a run fills, and their contents side by side for whoever asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

from lfm2_export.backends.base import StreamSink
from lfm2_export.backends.onnx.session import residuals
from lfm2_export.cache import CacheSpec, residual_name
from lfm2_export.errors import RunnerError

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Tap:
    """Args:
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
        types = {output.name: output.type for output in session.get_outputs()}
        self._dtype = _DTYPES[types[names[0]]]

    @property
    def width(self) -> int:
        """Of all streams side by side."""
        return sum(self._widths.values())

    def room(self, tokens: int) -> dict[str, np.ndarray]:
        """Buffers for a pass on the only row."""
        return {name: np.empty((1, tokens, width), self._dtype) for name, width in self._widths.items()}

    def tell(self, before: int, streams: Mapping[str, np.ndarray]) -> None:
        """Hands on what a pass behind ``before`` tokens left in its buffers."""
        self._sink(before, np.concatenate([streams[name][0] for name in self._widths], axis=-1, dtype=np.float32))
