"""Artifacts whose files were changed by someone who also knows to change the manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

MANIFEST = "lfm2_export.json"


def with_file(artifact: Path, target: Path, name: str, content: bytes) -> Path:
    """A copy of an artifact with another content of a file, hashed again."""
    shutil.copytree(artifact, target)
    (target / name).write_bytes(content)
    manifest = json.loads((target / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (target / MANIFEST).write_text(json.dumps(manifest))
    return target
