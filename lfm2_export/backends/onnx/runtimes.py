"""The two files that let other runtimes open the artifact's folder as it is.

In: the model's config, the checkpoint's generation settings and the ONNX programs that the folder holds. Out:
``genai_config.json`` for onnxruntime-genai, and ``config.json`` with a ``transformers.js_config`` section for
Transformers.js. Both name the preferred program.

Sources: onnxruntime-genai 0.18's config reader and its builder's ``make_genai_config``; Transformers.js 4.3's
``configs.js`` and ``utils/model-loader.js``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lfm2_export import files, paths, template_files
from lfm2_export.artifact_writer import ArtifactWriter
from lfm2_export.backends.onnx.variants import CPU
from lfm2_export.cache import CONV_STATE, KEY_STATE, VALUE_STATE, StateTensor
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.config import CONV, FULL_ATTENTION, ModelConfig
from lfm2_export.errors import CheckpointError
from lfm2_export.manifest import MODEL, Program

# A cache of 128k tokens is 3 GB of fp32 on the 8B, and genai allocates max_length at once.
GENAI_MAX_LENGTH = 32768
# What genai 0.18 knows of models with conv states. It handles their state and nothing else, so that the first serves
# any other family as well; and it finds a layer's state by these two kinds, whatever its graph makes of a window.
GENAI_TYPES = ("lfm2", "lfm2_moe")
# WebGPU's QMoE takes neither the zero points nor the separate routing weights of the other schemes.
WEBGPU_SCHEME = "q4f16"


def write(checkpoint: Checkpoint, writer: ArtifactWriter) -> None:
    """Writes both files for the ONNX programs that the artifact will hold, the preferred one first; of an encoder,
    which onnxruntime-genai does not run, config.json alone; of a drafter, which nothing else runs, as it is."""
    programs = [program for program in writer.programs if program.backend == "onnx"]
    config = checkpoint.config
    if config.drafter is not None:
        writer.write_json("config.json", checkpoint.raw_config)
        return
    if config.encoder is not None:
        writer.write_json("config.json", transformers_js_config(checkpoint.raw_config, config, programs))
        return
    generation = _read_object(checkpoint.path, "generation_config.json") or {}
    writer.write_json("genai_config.json", genai_config(config, generation, checkpoint.stop_token_ids, programs[0]))
    writer.write_json("config.json", transformers_js_config(checkpoint.raw_config, config, programs))
    _write_chat_templates(checkpoint.path, writer)


def _write_chat_templates(folder: Path, writer: ArtifactWriter) -> None:
    """Transformers.js and onnxruntime-genai look into tokenizer_config.json alone, where genai takes one text and opens
    no tokenizer with a list: the default lies there. Several have files, too, which transformers and we read first.
    """
    settings = _read_object(folder, "tokenizer_config.json")
    found = {} if settings is None else template_files.read(folder, settings, CheckpointError)
    if settings is None or not found:
        return
    rest = {key: value for key, value in settings.items() if key != "chat_template"}
    default = found.get(template_files.DEFAULT)
    writer.write_json("tokenizer_config.json", rest if default is None else {**rest, "chat_template": default})
    if found.keys() != {template_files.DEFAULT} and not template_files.read_files(folder, CheckpointError):
        for name, text in found.items():
            writer.path(template_files.file_name(name)).write_bytes(text.encode())


def _read_object(folder: Path, name: str) -> dict[str, Any] | None:
    if not paths.exists(folder / name, CheckpointError):
        return None
    return files.read_json_object(folder / name, folder, CheckpointError)


def genai_config(
    config: ModelConfig, generation: Mapping[str, Any], stop_token_ids: Sequence[int], program: Program
) -> dict[str, Any]:
    """``genai_config.json``: the graph with the fast CPU kernels, in-place KV buffers, the model's sampling
    defaults."""
    eos = list(stop_token_ids)
    return {
        "model": {
            "type": config.model_type if config.model_type in GENAI_TYPES else GENAI_TYPES[0],
            "bos_token_id": config.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": config.pad_token_id if config.pad_token_id is not None else (eos or [0])[0],
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": program.graphs.get(CPU, program.graphs[MODEL]),
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": config.num_key_value_heads,
                "layer_types": [kind if kind == CONV else FULL_ATTENTION for kind in config.layer_types],
                "conv_cache_size": config.conv_L_cache - 1,
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **_names("past")},
                "outputs": {"logits": "logits", **_names("present")},
            },
        },
        "search": _search(config, generation),
    }


def _names(side: str) -> dict[str, str]:
    """Templates of the state's names, from the one place that makes them."""
    kinds = {"key": KEY_STATE, "value": VALUE_STATE, "conv": CONV_STATE}
    templates = {key: StateTensor.names("%d", kind) for key, kind in kinds.items()}
    index = 0 if side == "past" else 1
    return {f"{side}_{key}_names": names[index] for key, names in templates.items()}


def _search(config: ModelConfig, generation: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    chosen = {key: value if generation.get(key) is None else generation[key] for key, value in defaults.items()}
    # transformers takes all of the vocabulary where top_k is beyond it; genai fails at the first token.
    chosen["top_k"] = min(chosen["top_k"], config.vocab_size)
    return {
        "max_length": min(config.max_position_embeddings, GENAI_MAX_LENGTH),
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        **chosen,
    }


def transformers_js_config(
    raw_config: Mapping[str, Any], config: ModelConfig, programs: Sequence[Program]
) -> dict[str, Any]:
    """``config.json`` as the checkpoint has it, plus what Transformers.js needs: layer kinds, dtypes, data files.
    Without ``auto_map``, which names a checkpoint's Python files: none is carried over."""
    section: dict[str, Any] = {
        "dtype": programs[0].scheme,
        "use_external_data_format": {_name(p.graphs[MODEL]): _data_files(p) for p in programs},
    }
    if WEBGPU_SCHEME in (program.scheme for program in programs):
        section["device_config"] = {"webgpu": {"dtype": WEBGPU_SCHEME}}
    stated = {key: value for key, value in raw_config.items() if key != "auto_map"}
    return {**stated, "layer_types": list(config.layer_types), "transformers.js_config": section}


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _data_files(program: Program) -> int:
    return sum("_data" in _name(path) for path in program.files)
