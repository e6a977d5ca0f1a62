"""What is known of a cell that was made: a small file beside the artifacts for each of its two steps.

In: what a worker found. Out: ``ExportRecord`` and ``QualityRecord``, by whose ``key`` (all that the outcome follows
from) a later sweep knows that there is nothing to do. A record that cannot be read counts for none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lfm2_export import dataclass_json, files, json_values, own_files
from lfm2_export.errors import ArtifactError, Lfm2ExportError

FOLDER = "records"
_LIMIT = 4 << 20
Kind = TypeVar("Kind", "ExportRecord", "QualityRecord")


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """``error``: the one line of what went wrong, None where nothing did. ``files``: SHA-256 of the program's, by name;
    ``nbytes`` of them all. ``notes``: warnings. ``attempt``: how often a worker had begun it, this time included."""

    cell: str
    key: str
    error: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    nbytes: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    attempt: int = 1


@dataclass(frozen=True, kw_only=True)
class Figures:
    """As in ``quality.report.Quality``; ``reference_perplexity``: the checkpoint's own in fp32; None: no number."""

    text: str
    kl: float | None
    kl_error: float | None
    kl_p99: float | None
    top1_agreement: float | None
    perplexity: float | None
    reference_perplexity: float | None
    file_bits: float
    step_bits: float
    same_experts: float | None = None


@dataclass(frozen=True, kw_only=True)
class QualityRecord:
    """``figures`` are None where ``error`` says why."""

    cell: str
    key: str
    error: str | None = None
    figures: Figures | None = None
    seconds: float = 0.0
    attempt: int = 1


def write(path: Path, record: ExportRecord | QualityRecord) -> None:
    """Raises ResourceError or Lfm2ExportError where the file cannot be written."""
    own_files.write(path, [json_values.dump(dataclass_json.encode(record)).encode()], Lfm2ExportError)


def read(path: Path, kind: type[Kind]) -> Kind | None:
    """None where there is none, or it is no such record."""
    if not path.is_file():
        return None
    try:
        found = dataclass_json.decode(kind, files.read_json_object(path, path.parent, ArtifactError, limit=_LIMIT))
    except ArtifactError:
        return None
    return found if isinstance(found, kind) else None
