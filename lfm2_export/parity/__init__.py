"""Is an exported program the model? Measured in three hops that are reported apart, each with a control that must fail.

In: an artifact and the checkpoint that it was made of. Out: ``ParityReport``.

    1 model          transformers' eager model and ours                    parity/model.py
    2 lowering       ours with the artifact's weights and the artifact     parity/lowering.py
    3 quantization   the checkpoint's model and the artifact               parity/quantization.py

At most two fp32 copies of the model are in memory at a time: ours and transformers', later ours and the artifact's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lfm2_export import interrupts
from lfm2_export.checkpoint import CheckpointRequest
from lfm2_export.choices import BackendName, SchemeName
from lfm2_export.leftovers import swept
from lfm2_export.packages import explained
from lfm2_export.parity.report import ParityReport, ProgramParity

__all__ = ["ParityReport", "ProgramParity", "measure_parity", "record_parity"]

DEFAULT_MAX_TOKENS = 4096


@explained
def measure_parity(
    artifact: str | Path,
    checkpoint: str | Path,
    *,
    backend: BackendName | None = None,
    scheme: SchemeName | Sequence[SchemeName] | None = None,
    text: str | Path | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    revision: str | None = None,
    offline: bool = False,
    config_from: str | Path | None = None,
    lora: str | Path | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compares programs of an artifact with the checkpoint that they were made of.

    Args:
        artifact: its folder, or ``organization/name[@revision]`` on the Hub, of which the programs are fetched.
        checkpoint: a directory, a GGUF file, a Hub id, or a bundled name.
        config_from, lora: as they were given to ``export``.
        backend, scheme: which programs (one scheme or several); default: all.
        text: a UTF-8 file that the checkpoint was not trained on; default: the bundled held-out text.
        max_tokens: how much of the text is used.
        threads: of the runner; default: every core.
        progress: told what is measured next.

    Raises:
        ArtifactError: no such artifact or program, files were changed, or it was made of another checkpoint.
        CheckpointError: the checkpoint cannot be opened or is damaged.
        ResourceError: the memory is too small for two fp32 copies of the model.
        Lfm2ExportError: the text cannot be read or is too short.
    """
    from lfm2_export.parity import hops

    with interrupts.lasting(), swept():
        return hops.measure(
            artifact,
            CheckpointRequest(name=checkpoint, revision=revision, offline=offline, config_from=config_from, lora=lora),
            hops.ParityRequest(
                backend=backend,
                schemes=(scheme,) if isinstance(scheme, str) else None if scheme is None else tuple(scheme),
                text=text,
                max_tokens=max_tokens,
                threads=threads,
                progress=progress or (lambda step: None),
            ),
        )


@explained
def record_parity(
    artifact: str | Path,
    checkpoint: str | Path,
    report: ParityReport,
    *,
    revision: str | None = None,
    offline: bool = False,
    config_from: str | Path | None = None,
    lora: str | Path | None = None,
) -> None:
    """Writes a report's figures into the artifact's manifest, and into its model card unless somebody has edited it.
    The artifact is a folder; of one on the Hub, make a copy, record there and push that.

    Raises:
        ArtifactError: the folder cannot be written, an export is writing to it, or a program is gone.
        ResourceError: the disk is full.
    """
    from lfm2_export.parity import hops

    source = CheckpointRequest(name=checkpoint, revision=revision, offline=offline, config_from=config_from, lora=lora)
    hops.record(Path(artifact), source, report)
