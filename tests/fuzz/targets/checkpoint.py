"""A checkpoint's folder: config.json, index, shards and companion files, as ``inspect`` and ``export`` read them."""

from __future__ import annotations

from itertools import islice

from lfm2_export import companions
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.inspection import inspect
from lfm2_export.manifest import CheckpointRecord
from tests.fuzz.findings import attempt, attempt_command
from tests.fuzz.mutation import bundle_mutator, json_mutator, mutate_bytes
from tests.fuzz.template_mutation import mutate_template
from tests.fuzz.workspace import workspace

_READ = 8  # of a checkpoint's tensors

CONFIG_KEYS = (
    *("model_type", "lfm2", "lfm2_moe", "architectures", "vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "layer_types", "full_attn_idxs"),
    *("conv", "full_attention", "conv_L_cache", "conv_bias", "norm_eps", "rope_theta", "rope_parameters"),
    *("rope_scaling", "rope_type", "max_position_embeddings", "tie_word_embeddings", "tie_embedding", "num_experts"),
    *(
        "num_dense_layers",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "use_expert_bias",
        "norm_topk_prob",
        "routed_scaling_factor",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id", "block_auto_adjust_ff_dim", "block_ff_dim", "block_multiple_of"),
    *("block_ffn_dim_multiplier", "quantization_config", "dtype", "torch_dtype", "auto_map", "text_config"),
    *("Lfm2BidirectionalModel", "Lfm2BidirectionalForMaskedLM"),
)

_MODULE_KEYS = (
    *("type", "path", "sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling", "1_Pooling"),
    *("pylate.models.Dense.Dense", "1_Dense", "pooling_mode", "cls", "mean", "in_features", "out_features", "bias"),
    *("activation_function", "use_residual", "prompts", "default_prompt_name", "max_seq_length", "query_prefix"),
    *("query_length", "document_length", "do_query_expansion", "attend_to_expansion_tokens", "skiplist_words"),
)

mutate = bundle_mutator(
    {
        "modules.json": json_mutator(*_MODULE_KEYS),
        "1_*/config.json": json_mutator(*_MODULE_KEYS),
        "*sentence_*.json": json_mutator(*_MODULE_KEYS),
        "*.index.json": json_mutator("weight_map", "metadata", "model.safetensors", "model-00001-of-00002.safetensors"),
        "config.json": json_mutator(*CONFIG_KEYS),
        "*.json": json_mutator("eos_token_id", "temperature", "chat_template", "added_tokens_decoder"),
        "*.safetensors": json_mutator("dtype", "shape", "data_offsets", "lm_head.weight", "model.embed_tokens.weight"),
        "*.jinja": mutate_template,
        "*": mutate_bytes,
    },
    (
        "modules.json",
        "1_Dense/config.json",
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer_config.json",
        "model.safetensors",
    ),
)


def fuzz_one(data: bytes) -> None:
    folder = workspace().empty() / "checkpoint"
    folder.mkdir()
    workspace().put_bundle(folder, data)
    if attempt(inspect, folder) is None:
        return
    attempt_command("inspect", str(folder))
    checkpoint = attempt(open_checkpoint, folder)
    if checkpoint is not None:
        attempt(companions.check, checkpoint)
        attempt(CheckpointRecord.of, checkpoint)
        attempt(_read_some, checkpoint)


def _read_some(checkpoint: Checkpoint) -> None:
    for name in islice(checkpoint.tensors, _READ):
        checkpoint.read(name, slice(0, 2))
        checkpoint.read_raw(name)
