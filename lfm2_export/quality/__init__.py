"""``lfm2-export quality``: what quantized models lose, side by side, on the same tokens.

In: artifacts and GGUF files, the checkpoint that they were made of, a text (or a base file of llama.cpp's perplexity
tool). Out: a ``QualityReport``: for each the divergence from the checkpoint in fp32 and the bytes that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lfm2_export import interrupts
from lfm2_export.checkpoint import CheckpointRequest
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.leftovers import swept
from lfm2_export.packages import explained
from lfm2_export.quality.report import Quality, QualityReport

__all__ = ["Quality", "QualityReport", "measure_quality"]

DEFAULT_MAX_TOKENS = 8192


@explained
def measure_quality(
    models: Sequence[str | Path],
    checkpoint: str | Path,
    *,
    text: str | Path | None = None,
    base: str | Path | None = None,
    write_base: str | Path | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    revision: str | None = None,
    offline: bool = False,
    config_from: str | Path | None = None,
    lora: str | Path | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> QualityReport:
    """Compares every program of every artifact, and every GGUF file, with the checkpoint in fp32.

    An artifact runs in its runtime, activations and all, and so does a GGUF file where llama-cpp-python is installed.
    Where it is not, the file's weights are computed with in fp32: what llama.cpp's kernels lose beyond that is not in
    its figures.

    Args:
        models: folders of artifacts and .gguf files, also of the Hub's (``organization/name[/FILE.gguf]``).
        checkpoint: what they were made of: a directory, a GGUF file, a Hub id, or a bundled name.
        text: a UTF-8 file that neither training nor calibration saw; default: the bundled held-out text.
        base: a file of ``llama-perplexity --kl-divergence-base``, whose tokens and probabilities stand for text and
            checkpoint.
        lora: the adapter that was merged into it, as it was given to ``export``.
        write_base: a file to write, in that format, for llama-perplexity.
        max_tokens: how much of the text is used.
        threads: of the runners; default: every core.
        progress: told what is measured next.

    Raises:
        ArtifactError: no such artifact, files were changed, or it was made of another checkpoint.
        CheckpointError: the checkpoint or a GGUF file cannot be opened, or is of another shape.
        ResourceError: the memory is too small.
        Lfm2ExportError: the text or the base file cannot be read or is too short.
    """
    from lfm2_export.quality import measure

    if not models:
        raise Lfm2ExportError("quality: give at least one artifact's folder or .gguf file")
    if text is not None and base is not None:
        raise Lfm2ExportError("quality: a base file has its own tokens; pass either --text or --base")
    with interrupts.lasting(), swept():
        return measure.measure(
            models,
            CheckpointRequest(name=checkpoint, revision=revision, offline=offline, config_from=config_from, lora=lora),
            measure.QualityRequest(
                text=text,
                base=None if base is None else Path(base),
                write_base=None if write_base is None else Path(write_base),
                max_tokens=max_tokens,
                threads=threads,
                progress=progress or (lambda step: None),
            ),
        )
