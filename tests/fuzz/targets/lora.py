"""An adapter's folder beside a checkpoint: adapter_config.json and the header of adapter_model.safetensors."""

from __future__ import annotations

from functools import partial
from itertools import islice

from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.lora import MergedTensor
from lfm2_export.manifest import CheckpointRecord
from tests.fuzz.findings import attempt, attempt_command
from tests.fuzz.mutation import bundle_mutator, json_mutator, mutate_bytes
from tests.fuzz.workspace import workspace

_BASE = "dense"  # of the checkpoints' seeds
_READ = 4

_SETTINGS = (
    *("peft_type", "LORA", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "none", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "q_proj", "(a+)+$", "fan_in_fan_out", "init_lora_weights", "pissa"),
    *("target_modules", "target_parameters", "layer_replication", "base_model_name_or_path"),
)
_WEIGHTS = (
    *("dtype", "shape", "data_offsets", "base_model.model.model.layers.0.conv.in_proj.lora_A.weight"),
    *("base_model.model.lm_head.lora_B.weight", "base_model.model.model.embed_tokens.lora_embedding_A", "I64", "F64"),
)

mutate = bundle_mutator(
    {"adapter_config.json": json_mutator(*_SETTINGS), "*.safetensors": json_mutator(*_WEIGHTS), "*": mutate_bytes},
    ("adapter_config.json", "adapter_model.safetensors"),
)


def fuzz_one(data: bytes) -> None:
    from tests.fuzz.targets import FOLDER

    root = workspace().empty()
    base, adapter = root / "base", root / "adapter"
    for folder, bundle in ((base, (FOLDER / "corpus" / "checkpoint" / _BASE).read_bytes()), (adapter, data)):
        folder.mkdir()
        workspace().put_bundle(folder, bundle)
    checkpoint = attempt(partial(open_checkpoint, base, lora=adapter))
    if checkpoint is None:
        return
    attempt_command("inspect", str(base), "--lora", str(adapter))
    attempt(CheckpointRecord.of, checkpoint)
    attempt(_read_some, checkpoint)


def _read_some(checkpoint: Checkpoint) -> None:
    merged = (name for name, info in checkpoint.tensors.items() if isinstance(info, MergedTensor))
    for name in islice(merged, _READ):
        checkpoint.read(name, slice(1, 3))
        checkpoint.read_raw(name)
