"""A random GGUF reads back with the names, shapes and types that llama.cpp wants, and sane values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.synthetic import REAL_SHAPES
from lfm2_export.families import get_family
from tests.checkpoints import tiny_config

gguf = pytest.importorskip("gguf")
random_gguf = pytest.importorskip("benchmarks.random_gguf")


def read(folder: Path, config: dict[str, Any]) -> Any:
    return gguf.GGUFReader(random_gguf.write_random_gguf(folder / "model.gguf", config, seed=0))


def setting(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


@pytest.mark.parametrize("model_type", ["lfm2", "lfm2_moe"])
def test_reads_back_with_the_shapes_of_the_checkpoint(tmp_path: Path, model_type: str) -> None:
    config = tiny_config(model_type)
    found = {tensor.name: tensor for tensor in read(tmp_path, config).tensors}
    family = get_family(model_type)
    parsed = family.parse_config(config)
    weights = sum(int(np.prod(tensor.shape)) for tensor in family.tensors(parsed).values())
    assert sum(int(tensor.n_elements) for tensor in found.values()) == weights
    # gguf lists the innermost size first.
    assert found["token_embd.weight"].shape.tolist() == [64, 131]
    assert found["blk.0.shortconv.in_proj.weight"].shape.tolist() == [64, 192]
    assert found["blk.0.shortconv.conv.weight"].shape.tolist() == [3, 64]
    assert found["blk.1.attn_k.weight"].shape.tolist() == [64, 32]
    assert found["blk.0.ffn_down.weight"].shape.tolist() == [96, 64]
    if model_type == "lfm2_moe":
        assert found["blk.2.ffn_gate_exps.weight"].shape.tolist() == [64, 32, 4]
        assert found["blk.2.ffn_down_exps.weight"].shape.tolist() == [32, 64, 4]
        assert found["blk.2.ffn_gate_inp.weight"].shape.tolist() == [64, 4]
        assert found["blk.2.exp_probs_b.bias"].shape.tolist() == [4]
    print(f"{model_type}: {len(found)} tensors, {weights} weights")


@pytest.mark.parametrize("model_type", ["lfm2", "lfm2_moe"])
def test_only_linear_layers_are_four_bits(tmp_path: Path, model_type: str) -> None:
    types = {tensor.name: tensor.tensor_type.name for tensor in read(tmp_path, tiny_config(model_type)).tensors}
    assert types["blk.0.ffn_up.weight"] == types["blk.1.attn_output.weight"] == "Q4_0"
    assert types["token_embd.weight"] == "Q8_0"  # 64 columns do not make a block of Q6_K
    floats = {name for name, kind in types.items() if kind == "F32"}
    assert all("norm" in name or "conv.conv" in name or "gate_inp" in name or "probs_b" in name for name in floats)


def test_every_tensor_is_one_that_the_architecture_has(tmp_path: Path) -> None:
    for model_type, name in (("lfm2", "LFM2"), ("lfm2_moe", "LFM2MOE")):
        arch = gguf.MODEL_ARCH[name]
        known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[arch]}
        for tensor in random_gguf.tensors(tiny_config(model_type)):
            stem = tensor.name.removesuffix(".weight").removesuffix(".bias")
            parts = ["{bid}" if part.isdigit() else part for part in stem.split(".")]
            assert ".".join(parts) in known


def test_settings_are_those_of_the_config(tmp_path: Path) -> None:
    reader = read(tmp_path, tiny_config("lfm2_moe"))
    assert setting(reader, "general.architecture") == "lfm2moe"
    assert setting(reader, "lfm2moe.block_count") == 5
    assert setting(reader, "lfm2moe.attention.head_count_kv") == [0, 2, 0, 2, 0]
    assert setting(reader, "lfm2moe.shortconv.l_cache") == 3
    assert setting(reader, "lfm2moe.expert_used_count") == 2
    assert setting(reader, "lfm2moe.leading_dense_block_count") == 1
    assert setting(reader, "lfm2moe.expert_gating_func") == int(gguf.ExpertGatingFuncType.SIGMOID)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "Q8_0"])
def test_blocks_are_numbers_of_the_size_of_a_linear_layer(kind: str) -> None:
    shape = (64, 512)
    tensor = random_gguf.GgufTensor(name="blk.0.ffn_up.weight", shape=shape, type=gguf.GGMLQuantizationType[kind])
    stored = random_gguf.random_data(tensor, np.random.default_rng(0))
    values = gguf.dequantize(stored, tensor.type)
    assert stored.nbytes == tensor.nbytes
    assert values.shape == shape
    assert np.isfinite(values).all()
    deviation = float(values.std() * np.sqrt(shape[-1]))
    assert 0.8 < deviation < 1.25
    print(f"{kind}: {deviation:.2f} of 1/sqrt(in_features)")


def test_a_seed_gives_the_same_file_again(tmp_path: Path) -> None:
    first = random_gguf.write_random_gguf(tmp_path / "a.gguf", tiny_config(), seed=3).read_bytes()
    assert first == random_gguf.write_random_gguf(tmp_path / "b.gguf", tiny_config(), seed=3).read_bytes()
    assert first != random_gguf.write_random_gguf(tmp_path / "c.gguf", tiny_config(), seed=4).read_bytes()


def test_the_8b_takes_four_and_a_half_bits_a_weight() -> None:
    tensors = random_gguf.tensors(REAL_SHAPES["8b-a1b"])
    nbytes, count = sum(t.nbytes for t in tensors), sum(t.count for t in tensors)
    assert 4.5 < 8 * nbytes / count < 4.6
    assert {t.type.name for t in tensors if t.name.startswith("token_embd.")} == {"Q6_K"}
    print(f"{count / 1e9:.2f} billion weights in {nbytes / 1e9:.2f} GB, {8 * nbytes / count:.2f} bits a weight")


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(random_gguf, "random_data", fail)
    with pytest.raises(OSError, match="no space left"):
        random_gguf.write_random_gguf(tmp_path / "model.gguf", tiny_config(), seed=0)
    assert list(tmp_path.iterdir()) == []
