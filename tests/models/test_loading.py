"""Checkpoints on disk, in every layout, become the same eager model that transformers makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.config import ModelConfig
from lfm2_export.errors import CheckpointError
from lfm2_export.families import Family
from lfm2_export.models import NETS, loading
from lfm2_export.models.decoder import DecoderForCausalLM
from lfm2_export.models.lfm2 import Lfm2ForCausalLM
from lfm2_export.models.lfm2_moe import Lfm2MoeForCausalLM
from lfm2_export.models.loading import load_model
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.models.reference import TOLERANCE, largest, perturbed, published, their_model, token_ids
from tests.models.test_against_transformers import report

FAMILIES = ["lfm2", "lfm2_moe", "lfm3"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    wanted = {published(name): tensor for name, tensor in tensors_of(theirs).items() if "inv_freq" not in name}
    found = tensors_of(ours)
    assert found.keys() == wanted.keys()
    assert list(found) == list(tensors_of(type(ours)(ours.config)))
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("published", [True, False], ids=["experts_one_by_one", "experts_fused"])
@pytest.mark.parametrize("shard_size", ["10GB", "40KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saved_loads_as_it_was(
    tmp_path: Path, model_type: str, published: bool, shard_size: str, tied: bool
) -> None:
    theirs = their_model(tiny_config(model_type, conv_bias=True, tie_word_embeddings=tied))
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size, save_original_format=published)
    assert (shard_size == "10GB") == (tmp_path / "model.safetensors").exists()
    ours = load_model(open_checkpoint(tmp_path))
    assert_same_weights(ours, theirs)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert not ours.training


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_converted_as_transformers_does(
    tmp_path: Path, model_type: str, stored: str, dtype: torch.dtype
) -> None:
    write_random_checkpoint(tmp_path, tiny_config(model_type), seed=3, dtype=stored, shards=2)
    ours = NETS[model_type].from_pretrained(tmp_path, dtype=dtype)
    theirs = type(their_model(tiny_config(model_type))).from_pretrained(tmp_path, dtype=dtype)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_loaded_model_computes_what_theirs_computes(tmp_path: Path, model_type: str, fused: bool) -> None:
    write_random_checkpoint(tmp_path, tiny_config(model_type), seed=4, fused=fused)
    ours = load_model(open_checkpoint(tmp_path))
    made = their_model(tiny_config(model_type))  # whose config says what LFM3's half rotation is
    theirs = type(made).from_pretrained(tmp_path, config=made.config, dtype=torch.float32).eval()
    ids = token_ids(2, 9)
    expected = theirs(ids, use_cache=False).logits
    report(model_type, {"logits": largest(ours(ids).logits, expected)})
    wrong = perturbed(ours, "model.layers.3.self_attn.v_proj.weight")
    assert largest(wrong(ids).logits, expected) > 10 * TOLERANCE


def test_the_base_class_loads_either_family_and_a_family_only_its_own(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, tiny_config("lfm2_moe"), seed=5)
    assert isinstance(DecoderForCausalLM.from_pretrained(tmp_path), Lfm2MoeForCausalLM)
    with pytest.raises(
        CheckpointError, match="model_type=lfm2_moe is loaded by Lfm2MoeForCausalLM, not by Lfm2ForCausalLM"
    ):
        Lfm2ForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        Lfm2MoeForCausalLM.from_pretrained(tmp_path / "nowhere", offline=True)


def test_a_dtype_that_no_model_has_is_refused(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, tiny_config("lfm2"), seed=5)
    with pytest.raises(ValueError, match=r"dtype=torch.int8 is not supported; expected one of torch.float32"):
        Lfm2ForCausalLM.from_pretrained(tmp_path, dtype=torch.int8)


@dataclass
class Source:
    """Weights that are in no file; every read is recorded. ``changed`` replaces tensors, None drops one."""

    checkpoint: Any
    changed: dict[str, np.ndarray | None] = field(default_factory=dict)
    reads: list[tuple[str, int]] = field(default_factory=list)

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def family(self) -> Family:
        return self.checkpoint.family

    @property
    def tensors(self) -> Mapping[str, Any]:
        both = {**self.checkpoint.tensors, **self.changed}
        return {name: tensor for name, tensor in both.items() if tensor is not None}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        given = self.changed.get(name)
        values = self.checkpoint.read(name, rows) if given is None else given[rows or slice(None)]
        self.reads.append((name, values.size))
        return values


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(open_checkpoint(write_random_checkpoint(tmp_path / "moe", tiny_config("lfm2_moe"), seed=6)))


def test_every_value_is_read_once_and_in_small_pieces(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_model(source.checkpoint)
    monkeypatch.setattr(loading, "PIECE", 1000)
    found = load_model(source)
    assert_same_weights(found, expected)
    total = dict.fromkeys(source.tensors, 0)
    for name, size in source.reads:
        total[name] += size
        assert size <= 1000
    assert total == {name: int(np.prod(tensor.shape)) for name, tensor in source.tensors.items()}


def test_weights_of_any_source_can_be_loaded(source: Source) -> None:
    name = "model.layers.2.feed_forward.experts.3.w3.weight"
    source.changed[name] = np.full((32, 64), 0.25, dtype=np.float32)
    experts = load_model(source).model.layers[2].feed_forward.experts
    assert (experts.gate_up_proj[3, 32:] == 0.25).all()
    assert not (experts.gate_up_proj[3, :32] == 0.25).any()


def test_missing_and_left_over_weights_are_all_named(source: Source) -> None:
    extra = np.zeros(3, dtype=np.float32)
    source.changed |= {"model.layers.0.conv.out_proj.weight": None, "model.spare.weight": extra, "a.b": extra}
    source.changed["model.layers.4.feed_forward.experts.1.w2.weight"] = None
    with pytest.raises(CheckpointError) as caught:
        load_model(source)
    print(caught.value)
    assert "the weights do not fit the lfm2_moe model; missing: model.layers.0.conv.out_proj.weight, " in str(
        caught.value
    )
    assert "model.layers.4.feed_forward.experts.1.w2.weight; left over: a.b, model.spare.weight" in str(caught.value)


def test_weights_of_another_shape_are_named(source: Source) -> None:
    source.changed["model.embedding_norm.weight"] = np.zeros(63, dtype=np.float32)
    with pytest.raises(
        CheckpointError, match=r"embedding_norm.weight: has the shape \[63\]; the model asks for \[64\]"
    ):
        load_model(source)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(source: Source, value: float) -> None:
    bad = np.zeros((64, 64), dtype=np.float32)
    bad[40, 7] = value
    source.changed["model.layers.0.conv.out_proj.weight"] = bad
    with pytest.raises(CheckpointError, match=r"model.layers.0.conv.out_proj.weight: 1 of 4096 values are not finite"):
        load_model(source)


def test_weights_too_large_for_float16_are_named(source: Source) -> None:
    source.changed["model.embedding_norm.weight"] = np.full(64, 7e4, dtype=np.float32)
    with pytest.raises(CheckpointError, match=r"embedding_norm.weight: values up to 70000 do not fit float16"):
        load_model(source, dtype=torch.float16)
    assert load_model(source, dtype=torch.bfloat16).model.embedding_norm.weight[0] > 6e4
