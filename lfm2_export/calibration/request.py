"""What an export was asked to calibrate on, from the request to the statistics.

In: ``calibrate`` (a text) and ``statistics`` (a file). Out: ``Calibration``, which refuses what can be refused before
any work, says what the work will take, and hands out ``Statistics``: those of the file where they are there, else
collected, and kept in the file where one was named.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_export import paths
from lfm2_export.calibration import text as texts
from lfm2_export.calibration.collect import collect
from lfm2_export.calibration.estimate import Estimate, estimate, quantizing_memory
from lfm2_export.calibration.inputs import inputs
from lfm2_export.calibration.statistics import Statistics
from lfm2_export.calibration.text import SELF, Text
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.errors import CalibrationError, QuantizationError
from lfm2_export.manifest import CheckpointRecord
from lfm2_export.progress import Progress
from lfm2_export.quant.algorithms import CALIBRATED_ALGORITHM, DEFAULT_ALGORITHM, get_algorithm
from lfm2_export.resources import available_memory, check_disk, check_memory

logger = logging.getLogger(__name__)

_NAME = "statistics.safetensors"


def choose_algorithm(algorithm: str | None, calibrate: str | Path | None, statistics: str | Path | None) -> str:
    """The algorithm that was named, else the best one for what is given.

    Raises:
        QuantizationError: it is unknown, lacks statistics, or would not look at them.
    """
    given = next(
        (option for option, value in (("--calibrate", calibrate), ("--statistics", statistics)) if value), None
    )
    name = algorithm or (DEFAULT_ALGORITHM if given is None else CALIBRATED_ALGORITHM)
    needs = get_algorithm(name).needs_statistics
    if needs and given is None:
        raise QuantizationError(
            f"algorithm {name} needs statistics of the layers' inputs; pass --calibrate default, or --statistics FILE"
        )
    if given is not None and not needs:
        raise QuantizationError(f"algorithm {name} uses no statistics; leave {given} out, or pass --algorithm gptq")
    return name


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """``text`` is None where the model writes it, and where there is none but a file of statistics: ``source`` tells.
    ``kept`` is the file that was named."""

    checkpoint: Checkpoint
    source: str | None
    text: Text | None
    kept: Path | None

    @classmethod
    def asked(
        cls, checkpoint: Checkpoint, calibrate: str | Path | None, statistics: str | Path | None
    ) -> Calibration | None:
        """None where nothing was asked for.

        Raises:
            CalibrationError: the text or the file is not usable.
            CheckpointError: the checkpoint is an encoder.
            ResourceError: the memory is too small to let the model write the text.
        """
        for option, value in (("--calibrate", calibrate), ("--statistics", statistics)):
            if value is not None:
                checkpoint.check_decoder(option)
        kept = None if statistics is None else Path(texts.check_name(statistics, "statistics"))
        if calibrate is None:
            return None if kept is None else cls(checkpoint=checkpoint, source=None, text=None, kept=kept)
        source = texts.check_name(calibrate, "calibrate")
        if kept is not None and not paths.is_folder(kept.absolute().parent, CalibrationError):
            raise CalibrationError(f"{paths.shown(kept)}: its folder does not exist; make it, or name another file")
        if source != SELF:
            return cls(checkpoint=checkpoint, source=source, text=texts.read_text(checkpoint, source), kept=kept)
        texts.check_sampling(checkpoint)
        return cls(checkpoint=checkpoint, source=source, text=None, kept=kept)

    def key(self) -> Mapping[str, Any]:
        """What an export follows from."""
        if self.source is None:
            return {"statistics": self._open(self._path(None)).key}
        return {"source": SELF, "tokens": texts.TOKENS} if self.text is None else self.text.describe()

    def existing(self, folder: Path) -> Statistics | None:
        """Those that need not be collected; ``folder`` is where they are where no file was named.

        Raises:
            CalibrationError: the file is damaged, of another checkpoint, or of another text than was asked for.
        """
        path = self._path(folder)
        if self.source is not None and not paths.exists(path, CalibrationError):
            return None
        found = self._open(path)
        if self.source is not None and not self._is_asked_for(found):
            raise CalibrationError(
                f"{paths.shown(path)}: holds statistics of another text ({found.description.source}, "
                f"{found.description.tokens:,} tokens); leave --calibrate out to use them, or name another file"
            )
        return found

    def collected(self, folder: Path, progress: Progress) -> Statistics:
        """Collects them, after having said what that takes.

        Raises:
            CalibrationError, CheckpointError, ResourceError: as ``collect``.
        """
        needs, path = self.estimate(), self._path(folder)
        check_memory(needs.memory_bytes, purpose="calibrating")
        check_disk(path.parent, needs.disk_bytes, purpose="calibrating")
        progress.told(str(needs))
        text = texts.sample(self.checkpoint) if self.text is None else self.text
        record = CheckpointRecord.of(self.checkpoint)
        collect(self.checkpoint, text, path, record=record, diagonal=needs.diagonal, progress=progress)
        return self._open(path)

    def estimate(self) -> Estimate:
        """What collecting will take."""
        length = texts.row_length(self.checkpoint, texts.TOKENS)
        rows, length = (texts.TOKENS // length, length) if self.text is None else self.text.rows_BT.shape
        sampled = self.source == SELF
        return estimate(self.checkpoint, rows, length, available=available_memory(), sampled=sampled)

    def quantizing_memory(self) -> int:
        """Bytes that an export needs beside what it needs without statistics."""
        found = inputs(self.checkpoint.config, self.checkpoint.model_tensors)
        return quantizing_memory(one.width for one in found.values())

    def _is_asked_for(self, found: Statistics) -> bool:
        told = found.description
        if self.text is None:
            return told.source == SELF
        return (told.source == SELF, told.sha256, told.tokens) == (False, self.text.sha256, self.text.tokens)

    def _path(self, folder: Path | None) -> Path:
        if self.kept is not None:
            return self.kept
        assert folder is not None
        return folder / _NAME

    def _open(self, path: Path) -> Statistics:
        return Statistics(path, self.checkpoint, CheckpointRecord.of(self.checkpoint))
