"""A checkpoint of packed weights: its very values in an artifact, and one line for what is packed otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lfm2_export
from lfm2_export import cli, takeover
from lfm2_export.backends.onnx import stored_weights
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import CheckpointError, ConfigError, QuantizationError
from lfm2_export.families.tensors import TensorClass
from lfm2_export.quant.formats import IntFormat
from lfm2_export.quant.schemes import get_scheme
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.packed.written import (
    Grid,
    as_compressed_tensors,
    as_gptq,
    compressed_tensors_section,
    gptq_section,
    rewrite,
    write,
)
from tests.shows import shows

LAYER = "model.layers.0.conv.in_proj"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two layers of each family."""
    folder = tmp_path_factory.mktemp("originals")
    two = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    raw = {"lfm2": tiny_config("lfm2", **two), "lfm2_moe": tiny_config("lfm2_moe", **two)}
    return {name: write_random_checkpoint(folder / name, config, seed=0) for name, config in raw.items()}


def check_values(folder: Path, values: dict[str, np.ndarray], output: Path, *schemes: str) -> lfm2_export.Artifact:
    """The values that were drawn are read, and are in the artifact."""
    found = open_checkpoint(folder)
    for name, expected in values.items():
        assert np.array_equal(found.read(name), expected), name
    artifact = lfm2_export.export(folder, scheme=schemes or ("q4",), output=output)
    for program in artifact.programs:
        stored = stored_weights(artifact.path, program, found.config)
        for name, expected in values.items():
            assert np.array_equal(stored.read(name), expected), (program.scheme, name)
    return artifact


@shows("ours", "packed", family="lfm2", scheme=("q4", "fp32"))
def test_an_artifact_holds_compressed_tensors_values(originals: dict[str, Path], tmp_path: Path) -> None:
    """Several widths and groups, an 8-bit table, scales of every dtype, one scale a row."""
    grids = (
        Grid(group=None, dtype=torch.bfloat16, only=("in_proj",)),
        Grid(bits=8, group=16, symmetric=False, dtype=torch.float32, only=("attn",)),
        Grid(symmetric=False, only=("w2",)),
        Grid(bits=8, dtype=torch.bfloat16, only=("embed",)),
        Grid(),
    )
    kinds = (TensorClass.LINEAR, TensorClass.EMBEDDING)
    section = compressed_tensors_section(*grids)
    values = write(tmp_path / "c", originals["lfm2"], section, as_compressed_tensors, *grids, kinds=kinds)
    artifact = check_values(tmp_path / "c", values, tmp_path / "out", "q4", "fp32")
    reasons = {tensor.reason for tensor in artifact.program(scheme="q4").tensors if tensor.dtype == "int4"}
    print(reasons)
    assert "taken over from compressed-tensors int4, one scale a row" in reasons
    assert "quantization_config" not in json.loads((artifact.path / "config.json").read_text())
    formats = open_checkpoint(tmp_path / "c").exact_formats
    assert formats[f"{LAYER}.weight"].scale_dtype == "float16"  # bfloat16 numbers that float16 holds
    assert formats["model.layers.1.self_attn.q_proj.weight"].scale_dtype == "float32"


@shows("ours", "packed", family="lfm2_moe", scheme="q4")
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_artifact_holds_the_experts_of_a_mixture(
    symmetric: bool, originals: dict[str, Path], tmp_path: Path
) -> None:
    """w2's rows are one group; with zero points, which QMoE misreads then, they and their layer's others are cut."""
    grid = Grid(symmetric=symmetric, dtype=torch.bfloat16)
    section = compressed_tensors_section(grid)
    values = write(tmp_path / "c", originals["lfm2_moe"], section, as_compressed_tensors, grid)
    assert any(".experts.3.w2" in name for name in values)
    check_values(tmp_path / "c", values, tmp_path / "out")
    formats = open_checkpoint(tmp_path / "c").exact_formats
    sizes = {form.group_size for name, form in formats.items() if ".experts." in name}
    assert sizes == ({32} if symmetric else {16})
    if not symmetric:
        report = lfm2_export.measure_parity(tmp_path / "out", tmp_path / "c", max_tokens=128)
        assert report.passed, report.failures()


@shows("ours", "packed", family="lfm2", scheme="q4")
def test_an_artifact_holds_gptq_values(originals: dict[str, Path], tmp_path: Path) -> None:
    grid = Grid(bits=8, group=None, symmetric=False)
    values = write(tmp_path / "c", originals["lfm2"], gptq_section(grid), as_gptq, grid, least_zero=1)
    check_values(tmp_path / "c", values, tmp_path / "out")


def test_scales_that_float16_does_not_hold_stay_float32_for_a_whole_layer_of_experts(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    grids = (Grid(dtype=torch.float32, only=("experts.1.w1",)), Grid())
    section = compressed_tensors_section(*grids)
    values = write(tmp_path / "c", originals["lfm2_moe"], section, as_compressed_tensors, *grids)
    formats = open_checkpoint(tmp_path / "c").exact_formats
    assert set(values) == set(formats)
    assert {form.scale_dtype for name, form in formats.items() if ".experts." in name} == {"float32"}
    assert formats["model.layers.0.feed_forward.w1.weight"].scale_dtype == "float16"


@pytest.mark.parametrize(("scheme", "kept"), [("8da4w", 0.0), ("q4", 1.0), ("q4f16", 0.5)])
def test_what_a_scheme_has_no_grid_for_is_quantized_again_and_said(
    scheme: str, kept: float, originals: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """XNNPACK takes no negative scales, WebGPU's experts no zero points, and q4f16 no float32 scales."""
    grids = (Grid(symmetric=False, only=(".experts.",)), Grid(dtype=torch.float32, only=(".w1",)), Grid())
    section = compressed_tensors_section(*grids)
    write(tmp_path / "c", originals["lfm2_moe"], section, as_compressed_tensors, *grids)
    found = open_checkpoint(tmp_path / "c")
    chosen = takeover.taken_over(found, get_scheme(scheme), requantize_table=False).choices
    again = {name for name in found.exact_formats if name not in chosen}
    assert bool(again) == (kept < 1)
    assert bool(chosen) == (kept > 0)
    assert (f"{len(again)} of its quantized tensors are quantized again" in caplog.text) == bool(again)
    print(scheme, len(chosen), len(again))


def test_a_router_that_was_quantized_is_stored_as_the_numbers_it_stands_for(
    originals: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = Grid()
    kinds = (TensorClass.LINEAR, TensorClass.EXPERTS, TensorClass.ROUTER)
    section = compressed_tensors_section(grid)
    values = write(tmp_path / "c", originals["lfm2_moe"], section, as_compressed_tensors, grid, kinds=kinds)
    assert "model.layers.1.feed_forward.gate.weight" in values
    check_values(tmp_path / "c", values, tmp_path / "out")
    assert "quantized again" not in caplog.text


def test_widths_that_are_there_are_not_chosen_again(originals: dict[str, Path], tmp_path: Path) -> None:
    grid = Grid()
    write(tmp_path / "c", originals["lfm2"], gptq_section(grid), as_gptq, grid)
    with pytest.raises(QuantizationError, match="is quantized already, and its widths are taken over"):
        lfm2_export.export(tmp_path / "c", target_bits=5.0, output=tmp_path / "out")


CT, GPTQ = compressed_tensors_section(Grid()), gptq_section(Grid())
WEIGHTS = CT["config_groups"]["group_0"]["weights"]


def group(**changed: Any) -> dict[str, Any]:
    return {**CT, "config_groups": {"group_0": {**CT["config_groups"]["group_0"], **changed}}}


REFUSED = [
    ({"quant_method": "awq", "bits": 4}, "quant_method='awq' is none of those"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes'"),
    ({"quant_method": "fp8"}, "quant_method='fp8'"),
    ({"quant_method": "mxfp4"}, "quant_method='mxfp4'"),
    ([4], "quant_method=None"),
    ({**CT, "format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized' is none that can be taken over"),
    ({**CT, "format": "int-quantized"}, "format='int-quantized'"),
    ({**CT, "format": None}, "format=None"),
    ({**CT, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme quantizes the cache"),
    ({**CT, "transform_config": {"config_groups": {"u": {}}}}, "transform_config turns what"),
    ({**CT, "config_groups": {}}, "config_groups={} names no scheme"),
    ({**CT, "config_groups": {"W4A16": ["Linear"]}}, "says nothing of weights"),
    (group(input_activations={"num_bits": 8}), "input_activations are quantized"),
    (group(weights={**WEIGHTS, "type": "float"}), "type='float' of weights is not taken over, only int"),
    (group(weights={**WEIGHTS, "num_bits": 3}), "num_bits=3 of weights is not taken over, only 4 or 8"),
    (group(weights={**WEIGHTS, "strategy": "block"}), "strategy='block' of weights is not taken over, only group or"),
    ({**GPTQ, "bits": 3}, "bits=3 is not taken over, only 4 or 8"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format='marlin' is none that can be taken over"),
    ({**GPTQ, "checkpoint_format": ["gptq"]}, "checkpoint_format=['gptq']"),
    ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype='int16' is not taken over"),
    ({**GPTQ, "sym": "yes"}, "sym is neither true nor false"),
]


@pytest.mark.parametrize(("section", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_packed_otherwise_is_refused_by_name(
    section: object, words: str, originals: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads((originals["lfm2"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": section}))
    assert cli.main(["export", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert "quantization_config says that the weights are quantized already; export the checkpoint that they" in line
    assert len(line) < 500
    assert not (tmp_path / "out").exists()


def _drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda state: state.pop(f"{LAYER}.{part}")  # type: ignore[return-value]


def _put(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def changed(state: dict[str, torch.Tensor]) -> None:
        state[f"{LAYER}.{part}"] = change(state[f"{LAYER}.{part}"]).contiguous()

    return changed


DAMAGES = [
    ("ct", _drop("weight_scale"), r"weight_packed is there without .*weight_scale"),
    ("ct", _put("weight_shape", lambda t: t * 0), r"holds no int4 or int8 codes of the shape \[0, 0\]"),
    ("ct", _put("weight_shape", lambda t: t * 2), r"holds no int4 or int8 codes of the shape \[384, 128\]"),
    ("ct", _put("weight_shape", lambda t: torch.tensor([192, 32])), r"none of config.json's config_groups is"),
    ("ct", _put("weight_shape", lambda t: t.to(torch.int32)), r"weight_shape is I32 \[2\], expected I64"),
    ("ct", _put("weight_packed", lambda t: t.to(torch.int64)), r"weight_packed is I64"),
    ("ct", _put("weight_packed", lambda t: t[:, :4]), r"holds no int4 or int8 codes"),
    ("ct", _put("weight_scale", lambda t: t[:-1]), r"weight_scale is F16 \[191, 2\], expected F16 or BF16 or F32"),
    ("ct", _put("weight_scale", lambda t: t.repeat(1, 3)), r"does not divide rows of 64 into groups"),
    ("ct", _put("weight_scale", lambda t: t.repeat(1, 2)), r"int4 in groups of 16, symmetric, which none"),
    ("ct", _put("weight_scale", lambda t: t.to(torch.float64)), r"weight_scale is F64"),
    ("gptq", _drop("qzeros"), r"qweight is there without .*qzeros"),
    ("gptq", _put("g_idx", lambda t: t.flip(0)), r"puts columns into groups by their importance \(desc_act"),
    ("gptq", _put("g_idx", lambda t: t[:50]), r"codes of 5 bits"),
    ("gptq", _put("qzeros", lambda t: t + 1), r"has the zero point 9, expected 8 everywhere, as sym=true says"),
    ("gptq", _put("qzeros", lambda t: t[:, :-1]), r"qzeros is I32 \[2, 23\], expected I32 \[2, 24\]"),
    ("gptq", _put("scales", lambda t: t[:0]), r"does not divide 192 rows of 64 into groups"),
    ("gptq", _put("qweight", lambda t: t.reshape(-1)), r"which is no matrix"),
    ("gptq", _put("scales", lambda t: t * torch.inf), r"scales: .*values are not finite"),
]


@pytest.mark.parametrize(("kind", "damage", "words"), DAMAGES, ids=[words for _, _, words in DAMAGES])
def test_damaged_parts_are_refused(
    kind: str, damage: Callable[[dict[str, torch.Tensor]], None], words: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    grid = Grid(only=("in_proj",))
    section, arrange = (CT, as_compressed_tensors) if kind == "ct" else (GPTQ, as_gptq)
    write(tmp_path / "c", originals["lfm2"], section, arrange, grid)  # type: ignore[arg-type]
    rewrite(tmp_path / "c", damage)
    with pytest.raises(CheckpointError, match=words) as caught:
        lfm2_export.export(tmp_path / "c", output=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_zero_point_that_readers_disagree_about_is_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    grid = Grid(symmetric=False, only=("in_proj",))
    write(tmp_path / "c", originals["lfm2"], gptq_section(grid), as_gptq, grid, least_zero=1)
    rewrite(tmp_path / "c", _put("qzeros", lambda t: t * 0 - 1))
    with pytest.raises(CheckpointError, match="has the zero point 16, expected at most 15"):
        lfm2_export.export(tmp_path / "c", output=tmp_path / "out")


def test_desc_act_with_neighbours_in_a_group_is_taken(originals: dict[str, Path], tmp_path: Path) -> None:
    grid = Grid()
    section = {**gptq_section(grid), "desc_act": True}
    values = write(tmp_path / "c", originals["lfm2"], section, as_gptq, grid)
    assert set(values) == set(open_checkpoint(tmp_path / "c").exact_formats)
    rewrite(tmp_path / "c", _drop("g_idx"))
    with pytest.raises(CheckpointError, match=r"qweight is there without .*g_idx"):
        open_checkpoint(tmp_path / "c")


def test_groups_that_are_none_of_ours(tmp_path: Path) -> None:
    """Of 24: quantized again; of 192: each is three of 64."""
    raw = tiny_config("lfm2", num_hidden_layers=1, layer_types=["full_attention"], hidden_size=192)
    original = write_random_checkpoint(tmp_path / "original", raw, seed=0)
    grid = Grid(group=192, only=("attn",))
    write(tmp_path / "c", original, compressed_tensors_section(grid), as_compressed_tensors, grid)
    assert set(open_checkpoint(tmp_path / "c").exact_formats.values()) == {
        IntFormat(bits=4, group_size=64, symmetric=True, signed_scale=True, scale_dtype="float16")
    }
    grid = Grid(group=24, only=("attn",))
    write(tmp_path / "odd", original, compressed_tensors_section(grid), as_compressed_tensors, grid)
    assert open_checkpoint(tmp_path / "odd").exact_formats == {}


def test_config_json_must_be_that_of_the_weights(originals: dict[str, Path], tmp_path: Path) -> None:
    grid = Grid()
    write(tmp_path / "c", originals["lfm2"], GPTQ, as_compressed_tensors, grid)
    with pytest.raises(CheckpointError, match="the weights do not fit config"):
        open_checkpoint(tmp_path / "c")
    raw = json.loads((tmp_path / "c" / "config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "c" / "config.json").write_text(json.dumps(raw))
    with pytest.raises((CheckpointError, ConfigError), match="weight_packed"):
        open_checkpoint(tmp_path / "c")
