"""What other tools packed comes out as they take it out: compressed-tensors itself, another reader of GPTQ."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm2_export import packed
from lfm2_export.packed import PackedTensor, PackedWeights
from lfm2_export.quant.formats import Codes
from lfm2_export.safetensors_file import read_shard
from tests.packed.write_reference import LAYERS, PATH
from tests.packed.written import Grid, as_compressed_tensors, as_gptq, compressed_tensors_section, draw, gptq_section

SHAPE = (40, 96)


def opened(path: Path, section: dict[str, object]) -> tuple[dict[str, PackedTensor], PackedWeights]:
    quantization = packed.read_quantization({packed.KEY: section}, "config.json")
    assert quantization is not None
    found, weights = quantization.open({path: read_shard(path)})
    return {name: info for name, info in found.items() if isinstance(info, PackedTensor)}, weights


def in_blocks(weights: PackedWeights, info: PackedTensor, rows: int) -> Codes:
    blocks = list(weights.code_blocks(info, rows))
    zero_points = [block.zero_point for block in blocks if block.zero_point is not None]
    return Codes(
        np.concatenate([block.qdata for block in blocks]),
        np.concatenate([block.scale for block in blocks]),
        np.concatenate(zero_points) if zero_points else None,
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_values_are_those_of_compressed_tensors_itself(layer: str) -> None:
    """Its own decompression rounds to the scales' dtype; rounded so, ours are the same as well."""
    found, weights = opened(PATH, compressed_tensors_section(*LAYERS.values()))
    theirs, info = load_file(PATH), found[f"{layer}.weight"]
    ours = weights.float32(info)
    assert np.array_equal(ours, theirs[f"{layer}.float32"].numpy())
    rounded = theirs[f"{layer}.rounded"]
    assert torch.equal(torch.from_numpy(ours).to(rounded.dtype), rounded)
    assert np.array_equal(weights.float32(info.rows(slice(5, 19))), ours[5:19])
    blocks = [block.copy() for block in weights.row_blocks(info, 7)]
    assert np.array_equal(np.concatenate(blocks), ours)


def test_the_writer_of_these_tests_packs_as_compressed_tensors_does() -> None:
    found, weights = opened(PATH, compressed_tensors_section(*LAYERS.values()))
    stored = load_file(PATH)
    for layer, grid in LAYERS.items():
        codes = in_blocks(weights, found[f"{layer}.weight"], 8)
        zero_points = np.zeros_like(codes.scale, int) if codes.zero_point is None else codes.zero_point
        drawn = SimpleNamespace(codes=codes.qdata, zero_points=zero_points, scales=stored[f"{layer}.weight_scale"])
        for name, tensor in as_compressed_tensors(layer, drawn, grid).items():  # type: ignore[arg-type]
            assert torch.equal(tensor, stored[name]), name


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    "grid", [Grid(), Grid(symmetric=False), Grid(bits=8, symmetric=False), Grid(group=None)], ids=str
)
def test_gptq_comes_out_as_onnxruntime_genai_takes_it_out(grid: Grid, checkpoint_format: str, tmp_path: Path) -> None:
    from onnxruntime_genai.models.loaders.gptq import GPTQModel

    drawn = draw(np.random.default_rng(1), SHAPE, grid, least_zero=1)
    tensors = as_gptq("layer", drawn, grid, less=1 if checkpoint_format == "gptq" else 0)
    save_file(tensors, tmp_path / "model.safetensors")
    found, weights = opened(tmp_path / "model.safetensors", gptq_section(grid, checkpoint_format=checkpoint_format))
    info = found["layer.weight"]
    assert info.shape == SHAPE
    ours = in_blocks(weights, info, 7)

    reader = object.__new__(GPTQModel)
    module = SimpleNamespace(
        **{name.removeprefix("layer."): tensor for name, tensor in tensors.items()},
        in_features=SHAPE[1],
        out_features=SHAPE[0],
        bits=grid.bits,
        group_size=grid.group or SHAPE[1],
    )
    if checkpoint_format == "gptq":
        reader.handle_qzeros(module)
    reader.unpack_qzeros(module)
    reader.unpack_qweight(module)
    assert np.array_equal(ours.qdata, module.qweight.T.numpy())
    zero_points = np.full_like(ours.scale, 1 << (grid.bits - 1)) if ours.zero_point is None else ours.zero_point
    assert np.array_equal(zero_points, module.qzeros.T.numpy())
    assert np.array_equal(weights.float32(info), drawn.values())
    assert np.array_equal(weights.float32(info.rows(slice(3, 30))), drawn.values()[3:30])


def test_groups_may_be_cut_but_not_joined() -> None:
    codes = Codes(np.zeros((2, 64), np.uint8), np.array([[1.0, 2.0]] * 2, np.float32), np.array([[3, 4]] * 2, np.uint8))
    cut = codes.in_groups_of(16)
    assert cut.scale.tolist() == [[1.0, 1.0, 2.0, 2.0]] * 2
    assert cut.zero_point is not None
    assert cut.zero_point.tolist() == [[3, 3, 4, 4]] * 2
    assert codes.in_groups_of(32) is codes
