"""Small random encoders under their published names, with sentence-transformers' files beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lfm2_export.families.lfm2 import parse_config
from lfm2_export.source import ASSETS
from tests.checkpoints import tiny_config

EMBEDDING, COLBERT, MASKED_LM = "embedding", "colbert", "masked_lm"
KINDS = (EMBEDDING, COLBERT, MASKED_LM)
WIDTH = 32  # of ColBERT's vectors
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
QUERY, DOCUMENT = "[Q] ", "[D] "
_MODULES = "sentence_transformers.models"


def encoder_config(kind: str = EMBEDDING, **overrides: Any) -> dict[str, Any]:
    """The raw config.json; three layers, so that one of either sort reads what the other wrote."""
    name = "Lfm2BidirectionalForMaskedLM" if kind == MASKED_LM else "Lfm2BidirectionalModel"
    raw = tiny_config("lfm2", vocab_size=_tokens() + 2, max_position_embeddings=1024, num_hidden_layers=3)
    raw |= {
        "architectures": [name],
        "auto_map": {"AutoModel": f"modeling_lfm2_bidirectional.{name}"},
        "layer_types": ["conv", "full_attention", "conv"],
        "use_cache": False,
    }
    return {key: value for key, value in (raw | overrides).items() if value is not None}


def _tokens() -> int:
    return len(json.loads((ASSETS / "tiny-dense/tokenizer.json").read_text())["model"]["vocab"])


def write_encoder(folder: Path, kind: str = EMBEDDING, *, seed: int = 0, **overrides: Any) -> Path:
    """A checkpoint as it is downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = encoder_config(kind, **overrides)
    _write_json(folder / "config.json", raw)
    prefix = "lfm2." if kind == MASKED_LM else ""
    rng = np.random.default_rng(seed)
    tensors = {f"{prefix}{name}": value for name, value in _body(raw, rng).items()}
    if kind == MASKED_LM and not raw["tie_word_embeddings"]:
        head = rng.standard_normal((raw["vocab_size"], raw["hidden_size"]))
        tensors["lm_head.weight"] = head.astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)
    if kind == EMBEDDING:
        _write_embedding_files(folder, raw)
    elif kind == COLBERT:
        _write_colbert_files(folder, raw, rng)
    return folder


def _body(raw: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    config = parse_config({**raw, "tie_word_embeddings": True})
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def near_one(size: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    found = {"embed_tokens.weight": rng.standard_normal((config.vocab_size, width)).astype(np.float32)}
    found["embedding_norm.weight"] = near_one(width)
    for layer, kind in enumerate(config.layer_types):
        p = f"layers.{layer}."
        found |= {f"{p}operator_norm.weight": near_one(width), f"{p}ffn_norm.weight": near_one(width)}
        found |= {f"{p}feed_forward.w{i}.weight": matrix(inner, width) for i in (1, 3)}
        found[f"{p}feed_forward.w2.weight"] = matrix(width, inner)
        if kind == "conv":
            found[f"{p}conv.in_proj.weight"] = matrix(3 * width, width)
            kernel = rng.standard_normal((width, 1, config.conv_L_cache)) / np.sqrt(config.conv_L_cache)
            found[f"{p}conv.conv.weight"] = kernel.astype(np.float32)
            found[f"{p}conv.out_proj.weight"] = matrix(width, width)
            if config.conv_bias:
                for name, size in (("in_proj", 3 * width), ("conv", width), ("out_proj", width)):
                    found[f"{p}conv.{name}.bias"] = near_one(size) - 1
            continue
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            found[f"{p}self_attn.{name}.weight"] = matrix(size, width)
        found[f"{p}self_attn.out_proj.weight"] = matrix(width, queries)
        found |= {f"{p}self_attn.{name}_layernorm.weight": near_one(head) for name in "qk"}
    return found


def _write_tokenizer(folder: Path) -> None:
    """The bundled one, with ColBERT's two prefixes as tokens of their own."""
    for name in TOKENIZER:
        shutil.copy(ASSETS / "tiny-dense" / name, folder / name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pattern = {**tokenizer["added_tokens"][-1], "special": False, "normalized": False}
    added = [{**pattern, "id": _tokens() + i, "content": text} for i, text in enumerate((QUERY, DOCUMENT))]
    tokenizer["added_tokens"] += added
    _write_json(folder / "tokenizer.json", tokenizer)


def _write_embedding_files(folder: Path, raw: Mapping[str, Any]) -> None:
    _write_json(
        folder / "modules.json", _modules((f"{_MODULES}.Transformer", ""), (f"{_MODULES}.Pooling", "1_Pooling"))
    )
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    prompts = {"query": "query: ", "document": "document: "}
    _write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": raw["hidden_size"], "pooling_mode_cls_token": True}
    pooling |= {f"pooling_mode_{name}": False for name in ("mean_tokens", "max_tokens", "lasttoken")}
    _write_json(folder / "1_Pooling/config.json", pooling)


def _write_colbert_files(folder: Path, raw: Mapping[str, Any], rng: np.random.Generator) -> None:
    _write_json(
        folder / "modules.json", _modules((f"{_MODULES}.Transformer", ""), ("pylate.models.Dense.Dense", "1_Dense"))
    )
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": 511, "do_lower_case": False})
    settings = {"query_prefix": QUERY, "document_prefix": DOCUMENT, "query_length": 12, "document_length": 64}
    settings |= {"attend_to_expansion_tokens": False, "skiplist_words": [".", ",", "!"], "similarity_fn_name": "MaxSim"}
    _write_json(folder / "config_sentence_transformers.json", settings)
    (folder / "1_Dense").mkdir(exist_ok=True)
    dense = {"in_features": raw["hidden_size"], "out_features": WIDTH, "bias": False, "use_residual": False}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    _write_json(folder / "1_Dense/config.json", dense)
    weight = rng.standard_normal((WIDTH, raw["hidden_size"])).astype(np.float32)
    save_file({"linear.weight": weight}, folder / "1_Dense/model.safetensors")


def _modules(*classes: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"idx": i, "name": str(i), "path": path, "type": name} for i, (name, path) in enumerate(classes)]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))
