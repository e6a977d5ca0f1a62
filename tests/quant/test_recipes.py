"""llama.cpp's Q4_K_M, tensor by tensor: what ``llama-quantize`` was seen to write."""

import pytest

from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.config import ModelConfig
from lfm2_export.families import get_family
from lfm2_export.quant.recipes import BLOCKS, q4_k_m_bytes, q4_k_m_type
from tests.checkpoints import tiny_config


def config_of(model_type: str, **overrides: object) -> ModelConfig:
    return get_family(model_type).parse_config(tiny_config(model_type, **overrides))


def types(config: ModelConfig) -> dict[str, str]:
    tensors = get_family(config.model_type).tensors(config)
    return {name: q4_k_m_type(tensor, config) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("name", "nbytes"), [("tiny-moe", 3894408), ("tiny-dense", 3267720)])
def test_the_bundled_checkpoints_have_the_bytes_of_llama_quantizes_files(name: str, nbytes: int) -> None:
    assert q4_k_m_bytes(open_checkpoint(name).config) == nbytes


def test_some_layers_get_more_bits() -> None:
    found = types(config_of("lfm2", num_hidden_layers=16, layer_types=["full_attention"] * 16, hidden_size=256))
    wide = [layer for layer in range(16) if found[f"model.layers.{layer}.self_attn.v_proj.weight"] == "Q6_K"]
    assert wide == [0, 1, 4, 7, 10, 13, 14, 15]
    assert {found[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in range(16)} == {"Q4_K"}
    assert found["model.embed_tokens.weight"] == "Q6_K"


def test_odd_widths_fall_back() -> None:
    found = types(config_of("lfm2_moe"))
    assert found["model.layers.0.conv.in_proj.weight"] == "Q5_0"
    assert found["model.embed_tokens.weight"] == "Q8_0"
    assert types(config_of("lfm2", hidden_size=80, head_dim=16))["model.layers.0.conv.in_proj.weight"] == "F16"


def test_an_untied_head_is_wide_and_the_table_narrow() -> None:
    found = types(config_of("lfm2", hidden_size=256, tie_word_embeddings=False))
    assert (found["lm_head.weight"], found["model.embed_tokens.weight"]) == ("Q6_K", "Q4_K")


def test_eight_experts_widen_the_attention() -> None:
    found = types(config_of("lfm2_moe", hidden_size=256, num_experts=8))
    prefix = "model.layers.1.self_attn."
    assert [found[f"{prefix}{name}.weight"] for name in ("q_proj", "k_proj", "v_proj", "out_proj")] == [
        "Q4_K",
        "Q8_0",
        "Q8_0",
        "Q5_K",
    ]


def test_bits_of_the_blocks() -> None:
    bits = {name: 8 * size / weights for name, (size, weights) in BLOCKS.items()}
    assert (bits["Q4_K"], bits["Q6_K"], bits["Q5_0"], bits["Q8_0"]) == (4.5, 6.5625, 5.5, 8.5)
