"""A checkpoint whose weights other tools packed: ``quantization_config``, and the parts that it speaks of.

Three files in a bundle, so that the header is changed as what it means: config.json, and the shard's header and data.
"""

from __future__ import annotations

from itertools import islice

from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.inspection import inspect
from tests.fuzz import bundle
from tests.fuzz.findings import attempt
from tests.fuzz.mutation import bundle_mutator, json_mutator, mutate_words
from tests.fuzz.workspace import workspace

HEADER, DATA = "header.json", "data"
_READ = 8  # of a checkpoint's tensors

_CONFIG_WORDS = (
    *("quantization_config", "quant_method", "compressed-tensors", "gptq", "gptq_v2", "checkpoint_format", "bits"),
    *("config_groups", "weights", "num_bits", "group_size", "strategy", "group", "channel", "symmetric", "sym"),
    *("format", "pack-quantized", "mixed-precision", "input_activations", "kv_cache_scheme", "desc_act", "pack_dtype"),
)
_HEADER_WORDS = ("dtype", "shape", "data_offsets", "I32", "I64", "F16", "BF16", "F32", "F64")

mutate = bundle_mutator(
    {"config.json": json_mutator(*_CONFIG_WORDS), HEADER: json_mutator(*_HEADER_WORDS), "*": mutate_words}
)


def fuzz_one(data: bytes) -> None:
    folder = workspace().empty() / "checkpoint"
    folder.mkdir()
    parts = {part.title: part.content for part in bundle.split(data)}
    header = parts.get(HEADER.encode(), b"")
    shard = len(header).to_bytes(8, "little") + header + parts.get(DATA.encode(), b"")
    (folder / "model.safetensors").write_bytes(shard)
    (folder / "config.json").write_bytes(parts.get(b"config.json", b""))
    if attempt(inspect, folder) is None:
        return
    checkpoint = attempt(open_checkpoint, folder)
    if checkpoint is not None:
        attempt(_read_some, checkpoint)


def _read_some(checkpoint: Checkpoint) -> None:
    formats = checkpoint.exact_formats
    for name in [*islice(formats, _READ), *islice(checkpoint.tensors, _READ)]:
        checkpoint.read(name, slice(0, 2))
        checkpoint.read_raw(name)
        if name in formats:
            for _ in checkpoint.read_code_blocks(name, None, 3):
                pass
