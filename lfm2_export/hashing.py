"""SHA-256 of files, and a memory of which files were hashed before.

In: paths. Out: hex digests. Hashing a 5 GB artifact at every load would take seconds, so a digest is remembered in the
user's cache folder next to the file's size, times and inode, and taken from there while all of them are unchanged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lfm2_export import files
from lfm2_export.errors import ArtifactError, Lfm2ExportError, ResourceError

logger = logging.getLogger(__name__)

# A file that changed less than this before it was hashed may change again without its times moving (kernels and file
# systems keep them in coarse steps, FAT in steps of two seconds), so its digest is not remembered.
_SETTLED_NS = 2_000_000_000

_THREADS = 4


def sha256_file(path: Path) -> str:
    """The hex SHA-256 of a file's bytes, streamed.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with files.open_real(Path(os.path.realpath(path))) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(
    paths: Iterable[Path], kind: type[Lfm2ExportError] = ArtifactError, *, remembered: bool = False
) -> dict[Path, str]:
    """Hex SHA-256 by path, several files at a time; ``remembered`` takes known digests from the user's cache.

    Raises:
        kind: a file cannot be read, or is no regular file.
    """
    unique = list(dict.fromkeys(paths))
    known_or_read = _remembered_sha256 if remembered else sha256_file

    def digest(path: Path) -> str:
        try:
            return known_or_read(path)
        except OSError as error:
            raise files.unreadable(path, error, kind) from error

    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(unique, pool.map(digest, unique), strict=True))


def cache_folder() -> Path:
    """Where this package keeps what it can make again: ``$XDG_CACHE_HOME/lfm2-export``.

    Raises:
        ResourceError: this user has no home folder, and none is set.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "lfm2-export"
    try:
        return Path.home() / ".cache" / "lfm2-export"
    except RuntimeError as error:
        raise ResourceError(f"cache folder: {error}; set XDG_CACHE_HOME to a folder of your own") from error


def _remembered_sha256(path: Path) -> str:
    resolved = Path(os.path.realpath(path))
    stamp = _stamp(resolved)
    record = _record_path(resolved)
    if record is None:
        return sha256_file(resolved)
    known = _read_record(record)
    if known is not None and known.get("stamp") == stamp and isinstance(known.get("sha256"), str):
        return known["sha256"]
    started = time.time_ns()
    digest = sha256_file(resolved)
    settled = started - max(stamp["mtime_ns"], stamp["ctime_ns"]) > _SETTLED_NS
    if settled and _stamp(resolved) == stamp:
        _write_record(record, {"path": str(resolved), "stamp": stamp, "sha256": digest})
    return digest


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
        "device": status.st_dev,
    }


def _record_path(path: Path) -> Path | None:
    """Where a file's digest is remembered; None where there is no place for it, which costs time, not correctness."""
    try:
        folder = cache_folder()
    except ResourceError as error:
        logger.debug("digests are not remembered: %s", error)
        return None
    return folder / "sha256" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"


def _read_record(record: Path) -> dict | None:
    try:
        known = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None


def _write_record(record: Path, known: dict) -> None:
    """Best effort: a cache folder that cannot be written costs time, not correctness."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=record.parent)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(known, file)
        os.replace(name, record)
    except OSError as error:
        logger.debug("digest not remembered in %s: %s", record, error)
