"""A shard's header: ``read_shard``, then every tensor that it claims to hold."""

from __future__ import annotations

from random import Random

from lfm2_export.safetensors_file import read_float32, read_row_blocks, read_shard, read_stored
from tests.fuzz.findings import attempt
from tests.fuzz.mutation import json_mutator, mutate_bytes
from tests.fuzz.workspace import workspace

_mutate_header = json_mutator("dtype", "shape", "data_offsets", "BF16", "F16", "F32", "F64", "I8", "__metadata__")


def fuzz_one(data: bytes) -> None:
    workspace().empty()
    path = workspace().put("model.safetensors", data)
    shard = attempt(read_shard, path)
    if shard is None:
        return
    for info in shard.tensors.values():
        attempt(read_stored, shard, info)
        attempt(read_float32, shard, info)
        attempt(lambda info=info: sum(block.size for block in read_row_blocks(shard, info, 2)))


def mutate(data: bytes, rng: Random) -> bytes:
    """The header as JSON, mostly with its length put right."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) or rng.random() < 0.15:
        return mutate_bytes(data, rng)
    header = _mutate_header(data[8 : 8 + length], rng)
    stated = length if rng.random() < 0.1 else len(header)
    return stated.to_bytes(8, "little") + header + data[8 + length :]
