"""An adapter merged while weights stream: the values are W + scale B A, and the program is the merged model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lfm2_export
from lfm2_export import cli
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import ArtifactError, CheckpointError
from lfm2_export.manifest import CheckpointRecord
from lfm2_export.source import ASSETS
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.lora.written import CONFIG, write_adapter
from tests.shows import of, shows

MODULES = (
    "model.layers.0.conv.in_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.out_proj",
    "model.layers.0.feed_forward.w1",
)
EXPERT = "model.layers.1.feed_forward.experts.2.w2"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two layers of each family, the second of the mixture with experts."""
    folder = tmp_path_factory.mktemp("bases")
    two = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    raw = {"lfm2": tiny_config("lfm2", **two), "lfm2_moe": tiny_config("lfm2_moe", **two)}
    return {name: write_random_checkpoint(folder / name, config, seed=0) for name, config in raw.items()}


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, {}),
        ({"lora_alpha": 3.5}, dict.fromkeys(MODULES, 3.5 / 4)),
        ({"use_rslora": True}, dict.fromkeys(MODULES, 8 / 2)),
        ({"alpha_pattern": {"q_proj": 32}}, {MODULES[1]: 32 / 4}),
        ({"rank_pattern": {"layers.0.conv.in_proj": 16}}, {MODULES[0]: 8 / 16}),
    ],
    ids=str,
)
def test_weights_are_those_of_the_base_and_the_scaled_product(
    bases: dict[str, Path], tmp_path: Path, changes: dict[str, Any], scales: dict[str, float]
) -> None:
    ranks = {MODULES[0]: 16} if "rank_pattern" in changes else {}
    products = write_adapter(tmp_path / "adapter", bases["lfm2"], MODULES, ranks=ranks, **changes)
    base, merged = open_checkpoint(bases["lfm2"]), open_checkpoint(bases["lfm2"], lora=tmp_path / "adapter")
    for name in base.tensors:
        module = name.removesuffix(".weight")
        expected = base.read(name).astype(np.float64)
        if module in products:
            expected += scales.get(module, 2.0) * products[module].numpy()
            off = np.abs(merged.read(name) - expected).max()
            print(f"{name}: off by {off:.1e}")
            assert off < 1e-6
            assert np.abs(base.read(name) - expected).max() > 1e-2
            rows = slice(5, 23)
            assert np.array_equal(merged.read(name, rows), merged.read(name)[rows])
            blocks = list(merged.read_raw_blocks(name, rows, 7))
            assert [len(block) for block in blocks] == [7, 7, 4]
            assert np.abs(np.concatenate(blocks) - expected[rows]).max() < 1e-6
        else:
            assert np.array_equal(merged.read(name), base.read(name))


def their_logits(base: Path, products: dict[str, torch.Tensor], ids: list[int]) -> np.ndarray:
    """transformers' model with the merged weights, made by plain torch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for module, product in products.items():
            place = f"{module}.weight"
            if place in weights:
                weights[place] += 2.0 * product.float()
            else:  # transformers 5 has a layer's experts as one tensor
                experts, expert = module.split(".experts.")
                weights[f"{experts}.experts.down_proj"][int(expert[0])] += 2.0 * product.float()
        return model(torch.tensor([ids])).logits[0, -1].numpy()


@shows("ours", "lora", "logits", family=of("family"), scheme="fp32")
@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe"])
def test_the_program_is_the_merged_model(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    modules = MODULES if family == "lfm2" else (*MODULES, EXPERT)
    products = write_adapter(tmp_path / "adapter", bases[family], modules)
    command = [
        "export",
        str(bases[family]),
        "--lora",
        str(tmp_path / "adapter"),
        "-s",
        "fp32",
        "-o",
        str(tmp_path / "out"),
    ]
    assert cli.main(command) == 0
    ids = [5, 6, 7, 8, 9]
    ours = lfm2_export.load_runner(tmp_path / "out").prefill([ids])[0]
    off = np.abs(ours - their_logits(bases[family], products, ids)).max()
    without = np.abs(ours - their_logits(bases[family], {}, ids)).max()
    print(f"{family}: logits off by {off:.1e}, from the base's by {without:.1e}")
    assert off < 1e-5
    assert without > 1e-2


def test_an_adapter_is_part_of_what_an_artifact_was_made_of(bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapter = bases["lfm2"], tmp_path / "adapter"
    write_adapter(adapter, base, MODULES)
    records = [CheckpointRecord.of(open_checkpoint(base)), CheckpointRecord.of(open_checkpoint(base, lora=adapter))]
    (adapter / "adapter_config.json").write_text(json.dumps({**CONFIG, "lora_alpha": 9}))
    records.append(CheckpointRecord.of(open_checkpoint(base, lora=adapter)))
    assert not [one for one in records for other in records if one is not other and one.is_same_as(other)]
    assert {"adapter_model.safetensors", "adapter_config.json"} <= records[1].shards.keys()


def test_parity_takes_the_same_adapter(tmp_path: Path) -> None:
    """Its model is transformers' with the merged weights; without the adapter it is another checkpoint."""
    base, out = ASSETS / "tiny-dense", tmp_path / "out"
    write_adapter(tmp_path / "adapter", base, ("model.layers.0.conv.in_proj", "model.layers.1.feed_forward.w1"))
    lfm2_export.export(base, lora=tmp_path / "adapter", scheme="fp32", output=out)
    report = lfm2_export.measure_parity(out, base, lora=tmp_path / "adapter", max_tokens=128)
    assert report.passed, report.failures()
    with pytest.raises(ArtifactError, match="has other weights"):
        lfm2_export.measure_parity(out, base, max_tokens=128)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora=True is not followed here; merge the adapter with peft (merge_and_unload)"),
        ({"bias": "all"}, "bias='all' is not followed"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] is not followed"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not followed"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices=[3] is not followed"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters=['experts.gate_up_proj'] is not followed"),
        ({"something_new": 3}, "something_new=3 is not followed"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base's weights"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is no LoRA"),
        ({"r": 0}, "r=0: a rank from 1"),
        ({"lora_alpha": "many"}, "lora_alpha='many': a number expected"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern has '(a+)+$', which is more than a module's name"),
        ({"r": 5}, "lora_A and lora_B of model.layers."),
    ],
    ids=str,
)
def test_what_is_not_followed_is_refused_by_name(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    write_adapter(tmp_path / "adapter", bases["lfm2"], MODULES)
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    command = ["export", str(bases["lfm2"]), "--lora", str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def _renamed(before: str, after: str) -> Change:
    return lambda tensors: {name.replace(before, after): one for name, one in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            _renamed("0.conv.in_proj.lora_A", "0.conv.in_proj.lora_magnitude_vector"),
            "is no lora_A or lora_B of a",
        ),
        (_renamed("lora_A", "lora_embedding_A"), "is no lora_A or lora_B of a linear layer"),
        (_renamed("layers.0.conv.in_proj", "layers.7.conv.in_proj"), "model.layers.7.conv.in_proj, which is no linear"),
        (_renamed("model.layers.0.conv.in_proj", "lm_head"), "lm_head, which is tied to the token table"),
        (_renamed("model.layers.0.conv.in_proj", "model.embed_tokens"), "model.embed_tokens, which is no linear layer"),
        (
            lambda tensors: {n: t for n, t in tensors.items() if "q_proj.lora_B" not in n},
            "one of lora_A and lora_B",
        ),
        (lambda tensors: {}, "holds no weights"),
    ],
)
def test_factors_of_nothing_are_refused_by_name(
    bases: dict[str, Path],
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    words: str,
) -> None:
    write_adapter(tmp_path / "adapter", bases["lfm2"], MODULES)
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(bases["lfm2"], lora=tmp_path / "adapter")
    assert words in str(error.value)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_an_adapter_of_no_numbers_is_blamed_itself(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: str
) -> None:
    write_adapter(tmp_path / "adapter", bases["lfm2"], MODULES)
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if f"0.conv.in_proj.lora_{factor}" in name)
    tensors[name].view(-1)[3] = float("nan" if factor == "A" else "inf")
    save_file(tensors, path)
    command = ["export", str(bases["lfm2"]), "--lora", str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    print(line)
    assert f"adapter_model.safetensors: {name} holds NaN or infinity; the adapter is damaged" in line
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    def said(**asked: Any) -> str:
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(**asked)
        return str(error.value)

    base = bases["lfm2"]
    assert "no such directory" in said(name=base, lora=tmp_path / "nothing")
    assert "is a file; give the folder" in said(name=base, lora=base / "config.json")
    assert "is no LoRA adapter (it has no adapter_config.json)" in said(name=base, lora=base)
    write_adapter(tmp_path / "adapter", base, MODULES)
    assert "give that as the checkpoint and this by --lora" in said(name=tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapter_model.bin")
    assert "only pickled weights (adapter_model.bin), which can run code and stay closed" in said(
        name=base, lora=tmp_path / "adapter"
    )
