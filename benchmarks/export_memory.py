"""Exports the first layers of the 8B at real width and measures what it takes; beside it, a plain copy of the same
file.

Two dense and four MoE layers of LFM2-8B-A1B's shape with random weights (3.3 GB of bf16). The export runs in a
process of its own, so that its peak resident memory is measured alone. The copy reads and writes the same bytes
through the same page cache: it is what the disk allows at this moment.

    python benchmarks/export_memory.py [--algorithm round|refit] [--scheme q4] [--shape 8b-head]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.synthetic import REAL_SHAPES, stored_bytes, write_random_checkpoint
from lfm2_export.resources import check_disk, check_memory

# Checkpoint, artifact, and a copy of the checkpoint.
_DISK_FACTOR = 2.6
_MEMORY_BYTES = 2_500_000_000

_CHILD = """
import json, sys, time
import lfm2_export
from lfm2_export.bench import peak_memory
from lfm2_export.progress import Progress
marks = []
progress = Progress(advance=lambda nbytes: marks.append((time.perf_counter(), nbytes)))
started = time.perf_counter()
lfm2_export.export(sys.argv[1], scheme=sys.argv[3], output=sys.argv[2], algorithm=sys.argv[4], progress=progress)
done = time.perf_counter()
print(json.dumps({"total_s": done - started, "weights_s": marks[-1][0] - marks[0][0], "peak_bytes": peak_memory()}))
"""


def measure(
    folder: Path, *, shape: str = "8b-head", scheme: str = "q4", algorithm: str = "round", copy: bool = True
) -> dict[str, Any]:
    """Writes the checkpoint into ``folder``, exports it, copies it unless told not to; sizes in bytes, times in
    seconds.

    Raises:
        ResourceError: the disk or the memory is short.
    """
    raw_config = REAL_SHAPES[shape]
    nbytes = stored_bytes(raw_config)
    check_disk(folder, int(nbytes * _DISK_FACTOR), purpose="this benchmark")
    check_memory(_MEMORY_BYTES, purpose="this benchmark")
    checkpoint = write_random_checkpoint(folder / "checkpoint", raw_config, seed=0)
    command = [sys.executable, "-c", _CHILD, str(checkpoint), str(folder / "artifact"), scheme, algorithm]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    artifact = sum(path.stat().st_size for path in (folder / "artifact").rglob("*") if path.is_file())
    found |= {"copy_mb_per_s": nbytes / _copy(checkpoint / "model.safetensors", folder / "copy") / 1e6} if copy else {}
    return {
        "shape": shape,
        "scheme": scheme,
        "algorithm": algorithm,
        "checkpoint_bytes": nbytes,
        "artifact_bytes": artifact,
        **found,
        "mb_per_s": nbytes / found["total_s"] / 1e6,
        "weights_mb_per_s": nbytes / found["weights_s"] / 1e6,
    }


def _copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        while block := reader.read(1 << 22):
            writer.write(block)
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(REAL_SHAPES), default="8b-head")
    parser.add_argument("--scheme", default="q4")
    parser.add_argument("--algorithm", default="round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lfm2-export-") as folder:
        found = measure(Path(folder), **vars(options))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
