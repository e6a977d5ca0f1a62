"""Runs every model over the same tokens and compares it with the checkpoint in fp32.

In: paths and a checkpoint. Out: a ``QualityReport``. The checkpoint's logits are computed once and kept; the models are
opened one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from lfm2_export.backends.eager import EagerRunner
from lfm2_export.checkpoint import Checkpoint, CheckpointRequest
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.models.loading import load_model
from lfm2_export.packages import recorded_versions
from lfm2_export.parity.divergence import Divergence, compare
from lfm2_export.parity.lowering import score
from lfm2_export.parity.sample import Sample, Window, read_sample
from lfm2_export.quality.kld_file import Base, read_base, write_base
from lfm2_export.quality.report import Quality, QualityReport
from lfm2_export.quality.routing import Chosen, agreement, chosen_experts
from lfm2_export.quality.subjects import Scorer, Subject, find_subjects
from lfm2_export.resources import check_memory

_MEMORY_BASE = 1 << 30
_MOST_CHUNKS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reference:
    """Windows with the checkpoint's logits (or log probabilities, which serve as well) from ``first`` on, and the
    experts that its routers choose."""

    description: str
    windows: tuple[Window, ...]
    logits: tuple[np.ndarray, ...]
    first: int
    experts: Chosen

    def compare(self, logits_of: Scorer) -> list[Divergence]:
        """A model's divergence in each window."""
        return [
            compare(logits, logits_of(window)[self.first :], window.targets[self.first :])
            for window, logits in zip(self.windows, self.logits, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class QualityRequest:
    """What ``measure_quality`` was asked for, beside the models and their checkpoint."""

    text: str | Path | None
    base: Path | None
    write_base: Path | None
    max_tokens: int
    threads: int | None
    progress: Callable[[str], None]


def measure(models: list[Path], source: CheckpointRequest, request: QualityRequest) -> QualityReport:
    """As ``measure_quality`` says."""
    opened = source.open()
    opened.check_decoder("quality --checkpoint")
    subjects = [
        subject
        for model in models
        for subject in find_subjects(model, opened, request.threads, config_from=source.config_from)
    ]
    _check_memory(opened, request.max_tokens, subjects)
    reference = _reference_of(opened, request, min(subject.context_length for subject in subjects))
    if request.write_base is not None:
        _write(request.write_base, reference)
    found = []
    for subject in subjects:
        request.progress(subject.name)
        windows = reference.compare(subject.open())
        same_experts = _same_experts(reference, subject)
        found.append(Quality.of(subject.name, subject.kind, windows, subject.size, subject.errors, same_experts))
    own = Divergence.joined(
        [
            compare(logits, logits, window.targets[reference.first :])
            for window, logits in zip(reference.windows, reference.logits, strict=True)
        ]
    )
    return QualityReport(
        checkpoint=opened.name,
        text=reference.description,
        tokens=own.count,
        perplexity=own.perplexity,
        models=tuple(found),
        versions=recorded_versions(),
    )


def _same_experts(reference: _Reference, subject: Subject) -> dict[int, float]:
    """Empty for a dense model, whose weights are not read."""
    if not reference.experts:
        return {}
    return agreement(reference.experts, chosen_experts(load_model(subject.weights()), reference.windows))


def memory_needed(checkpoint: Checkpoint, max_tokens: int, largest: int = 0) -> int:
    """Bytes of memory: the model in fp32, or the largest of what is compared with it, and the logits of the text."""
    fp32 = 4 * checkpoint.parameter_count
    logits = 4 * max_tokens * checkpoint.config.vocab_size
    return _MEMORY_BASE + max(fp32, largest) + logits


def _check_memory(checkpoint: Checkpoint, max_tokens: int, subjects: Sequence[Subject]) -> None:
    check_memory(
        memory_needed(checkpoint, max_tokens, max(subject.size.file_bytes for subject in subjects)),
        purpose="comparing models",
        remedy="pass a smaller --max-tokens, or use a larger machine",
    )


def _reference_of(checkpoint: Checkpoint, request: QualityRequest, context_length: int) -> _Reference:
    if request.base is not None:
        base = read_base(request.base, checkpoint.config.vocab_size)
        return _from_base(base, checkpoint, request.max_tokens, context_length)
    request.progress(f"{checkpoint.name} in fp32")
    sample = read_sample(checkpoint, request.text, max_tokens=request.max_tokens, context_length=context_length)
    return _computed(checkpoint, sample)


def _computed(checkpoint: Checkpoint, sample: Sample) -> _Reference:
    model = load_model(checkpoint)
    eager = EagerRunner(model)
    return _Reference(
        description=f"{sample.tokens} tokens of {sample.description}",
        windows=sample.windows,
        logits=tuple(score(eager, window) for window in sample.windows),
        first=0,
        experts=chosen_experts(model, sample.windows),
    )


def _from_base(base: Base, checkpoint: Checkpoint, max_tokens: int, context: int) -> _Reference:
    """As llama-perplexity has it: bos in the place of a chunk's first token, the second half of each chunk counts."""
    length = base.tokens.shape[1]
    if length - 1 > context:
        raise Lfm2ExportError(
            f"{base.path}: its chunks have {length} tokens, more than the context of {context}; make it with -c "
            f"{context}"
        )
    count = min(len(base.tokens), max(1, max_tokens // length), _MOST_CHUNKS)
    rows = base.tokens[:count].copy()
    if (bos := checkpoint.config.bos_token_id) is not None:
        rows[:, 0] = bos
    windows = tuple(Window(inputs=row[:-1], targets=row[1:]) for row in rows)
    return _Reference(
        description=f"{count} chunks of {length} tokens of {base.path.name}",
        windows=windows,
        logits=tuple(islice(base.log_probabilities(), count)),
        first=base.first,
        experts=chosen_experts(load_model(checkpoint), windows) if checkpoint.config.moe_layers else {},
    )


def _write(path: Path, reference: _Reference) -> None:
    """The whole windows, of which a base file has all of one length."""
    if reference.first:
        raise Lfm2ExportError("quality: --write-base writes what was computed here; leave --base out")
    length = len(reference.windows[0].inputs)
    whole = [index for index, window in enumerate(reference.windows) if len(window.inputs) == length]
    tokens = np.stack([np.append(reference.windows[i].inputs, reference.windows[i].targets[-1]) for i in whole])

    def logits() -> Iterator[np.ndarray]:
        yield from (reference.logits[index] for index in whole)

    write_base(path, tokens, logits())
