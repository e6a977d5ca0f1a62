"""A GGUF file, as ``inspect`` and ``export`` read it: header, settings, tokenizer, blocks."""

from __future__ import annotations

from itertools import islice
from random import Random

from lfm2_export import companions
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.inspection import inspect
from lfm2_export.manifest import CheckpointRecord
from tests.fuzz.findings import attempt
from tests.fuzz.mutation import mutate_bytes
from tests.fuzz.workspace import workspace

_READ = 8  # of a file's tensors
_WORDS = (
    b"lfm2",
    b"lfm2moe",
    b"llama",
    b"gpt2",
    b"no_vocab",
    b"general.alignment",
    b"split.count",
    b"tokenizer.ggml.pre",
)


def mutate(data: bytes, rng: Random) -> bytes:
    """Counts, sizes and offsets are numbers of 4 and 8 bytes: half of the changes put an odd one somewhere."""
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    if rng.random() < 0.2:
        return data.replace(rng.choice(_WORDS), rng.choice(_WORDS), 1)
    size = rng.choice((4, 8))
    place = rng.randrange(max(1, min(len(data), 1 << 14) - size))
    value = rng.choice((0, 1, 2, 7, 31, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, rng.getrandbits(16)))
    return data[:place] + (value % 256**size).to_bytes(size, "little") + data[place + size :]


def fuzz_one(data: bytes) -> None:
    path = workspace().empty() / "model.gguf"
    path.write_bytes(data)
    if attempt(inspect, path) is None:
        return
    checkpoint = attempt(open_checkpoint, path)
    if checkpoint is not None:
        attempt(companions.check, checkpoint)
        attempt(CheckpointRecord.of, checkpoint)
        attempt(_read_some, checkpoint)


def _read_some(checkpoint: Checkpoint) -> None:
    for name in islice(checkpoint.tensors, _READ):
        checkpoint.read(name, slice(0, 2))
        checkpoint.read_raw(name)
        if name in checkpoint.exact_formats:
            for _ in checkpoint.read_code_blocks(name, None, 3):
                pass
