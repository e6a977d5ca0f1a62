"""The container of a .pte: everything that is read of one before ExecuTorch sees it. Nothing is executed."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random

import numpy as np

from lfm2_export.backends.executorch.profile import InstructionNames
from lfm2_export.backends.executorch.pte import PteFile
from tests.fuzz.findings import attempt
from tests.fuzz.mutation import mutate_words
from tests.fuzz.workspace import workspace

_READ = 16  # places


def fuzz_one(data: bytes) -> None:
    workspace().empty()
    path = workspace().put("model.pte", data)
    file = attempt(PteFile, path)
    if file is None:
        return
    for method in ("forward", *(attempt(file.methods) or ())):
        attempt(file.operators, method)
        attempt(file.delegates, method)
        attempt(_instructions, path, method)
    attempt(_read, file)


def _instructions(path: Path, method: str) -> list[str]:
    return InstructionNames(path).instructions(method)


def _read(file: PteFile) -> None:
    for place in islice((*file.named_data.values(), *file.constants), _READ):
        file.read(place, np.dtype(np.uint8), min(place.size, 4096))


def mutate(data: bytes, rng: Random) -> bytes:
    """Offsets and counts, which lie at multiples of two bytes; mostly of the header and the tables, not of weights."""
    tables = int.from_bytes(data[16:24], "little")
    if not 64 < tables < len(data) or rng.random() < 0.1:
        return mutate_words(data, rng)
    return mutate_words(data[:tables], rng, rng.choice([4, 4, 2])) + data[tables:]
