"""The stream, filling the files of a .pte: they need no runtime, and show what the loop does for any backend."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lfm2_export.backends.executorch.plan import MoeOp, make_plan
from lfm2_export.backends.executorch.stream import PteStream
from lfm2_export.backends.weights import pieces, stream
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.errors import CheckpointError, QuantizationError
from lfm2_export.families.tensors import EMBEDDING, HEAD
from lfm2_export.manifest import StoredTensor
from lfm2_export.quant.algorithms import get_algorithm
from lfm2_export.quant.hessian import InputStatistics, input_statistics
from lfm2_export.quant.schemes import get_scheme
from tests.checkpoints import tiny_config, write_random_checkpoint

RAW_CONFIG = tiny_config("lfm2_moe", num_hidden_layers=2, layer_types=["conv", "full_attention"])
A_FEW_ROWS = 200  # values in a piece


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_random_checkpoint(tmp_path / "checkpoint", RAW_CONFIG, seed=3, dtype="F32"))


def put(checkpoint: Checkpoint, name: str, row: int, column: int, value: float) -> None:
    info = checkpoint.tensors[name]
    with open(info.file, "r+b") as file:
        file.seek(info.offset + 4 * (row * info.shape[1] + column))
        file.write(np.float32(value).tobytes())


def streamed(
    checkpoint: Checkpoint, root: Path, scheme: str = "8da4w", op: MoeOp | None = None
) -> tuple[list[bytes], tuple[StoredTensor, ...], int]:
    """The files, the records and how many pieces they were made of."""
    root.mkdir()
    plan = make_plan(checkpoint.config, get_scheme(scheme), moe_op=op)
    made = PteStream(plan, "round", name="model.pte", root=root, ledger=None)
    records = made.write(checkpoint, lambda nbytes: None)
    return [path.read_bytes() for path in made.paths], records, len(made.pieces)


@pytest.mark.parametrize(("scheme", "op"), [("fp32", None), ("8da4w", MoeOp.STOCK), ("8da4w", MoeOp.LFM2)])
def test_files_do_not_depend_on_how_the_work_is_cut_up(checkpoint, tmp_path, monkeypatch, scheme, op) -> None:
    whole, records, count = streamed(checkpoint, tmp_path / "whole", scheme, op)
    monkeypatch.setattr(pieces, "CHUNK_VALUES", A_FEW_ROWS)
    monkeypatch.setattr(stream, "usable_cores", lambda: 3)
    cut, other_records, more = streamed(checkpoint, tmp_path / "cut", scheme, op)
    print(f"{count} pieces, {more} small ones, {sum(map(len, whole))} bytes")
    assert more > 2 * count
    assert cut == whole
    for one, other in zip(records, other_records, strict=True):
        assert other.error == pytest.approx(one.error, rel=1e-5)
        assert replace(other, error=one.error) == one


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("scheme", ["fp32", "8da4w"])
def test_what_is_not_finite_is_named_by_its_place_in_the_tensor(checkpoint, tmp_path, monkeypatch, scheme, value):
    """Not in the piece that it was read with."""
    monkeypatch.setattr(pieces, "CHUNK_VALUES", A_FEW_ROWS)
    put(checkpoint, EMBEDDING, 77, 5, value)
    put(checkpoint, EMBEDDING, 90, 0, value)
    with pytest.raises(CheckpointError) as caught:
        streamed(open_checkpoint(checkpoint.path), tmp_path / "out", scheme)
    rows, columns = checkpoint.tensors[EMBEDDING].shape
    assert str(caught.value).startswith(
        f"{EMBEDDING}: 2 of {rows * columns} values are not finite, first {value} at [77, 5]; "
    )


def test_a_scale_that_does_not_fit_is_named_by_its_row_of_the_tensor(checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK_VALUES", A_FEW_ROWS)
    name = "model.layers.1.feed_forward.experts.2.w3.weight"
    put(checkpoint, name, 30, 5, 1e9)
    with pytest.raises(QuantizationError, match=rf"^{name}: row 30 needs a scale of "):
        streamed(open_checkpoint(checkpoint.path), tmp_path / "out")


def test_a_full_disk_is_an_error_of_the_file_and_not_a_signal(checkpoint, tmp_path, monkeypatch) -> None:
    def pwrite(file: int, view: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream.os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        streamed(checkpoint, tmp_path / "out")


class MadeUpStatistics:
    """Those of one input for every weight but the token table."""

    key = "made up"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def has(self, weight: str) -> bool:
        return weight != EMBEDDING

    def of(self, weight: str) -> InputStatistics | None:
        self.asked.append(weight)
        width = 96 if weight.endswith("feed_forward.w2.weight") else 32 if weight.endswith("w2.weight") else 64
        inputs = np.random.default_rng(width).standard_normal((100, width)).astype(np.float32)
        return input_statistics(inputs.T @ inputs / 100) if self.has(weight) else None


@pytest.mark.parametrize("few_values", [False, True])
def test_an_algorithm_that_needs_statistics_gets_those_of_each_source(checkpoint, tmp_path, monkeypatch, few_values):
    if few_values:
        monkeypatch.setattr(pieces, "CHUNK_VALUES", A_FEW_ROWS)
    plan, statistics = make_plan(checkpoint.config, get_scheme("8da4w"), moe_op=MoeOp.LFM2), MadeUpStatistics()
    made = PteStream(plan, "gptq", name="model.pte", root=tmp_path, ledger=None, statistics=statistics)  # type: ignore[arg-type]
    records = {record.name: record for record in made.write(checkpoint, lambda nbytes: None)}
    name = "model.layers.0.feed_forward.w2.weight"
    there = made.places.tensors[f"{name}.qdata"]
    stored = np.fromfile(made.paths[there.file], np.int8, there.nbytes, offset=there.offset).reshape(there.shape)
    quantize = get_algorithm("gptq").fitted(statistics.of(name))
    expected = quantize(checkpoint.read(name), plan[name].format, threads=1).qdata.astype(np.int16) - 8
    differing = float((stored != expected).mean())
    print(f"{differing:.4f} of the codes differ")  # of a few rows a product is summed in another order
    assert differing < (0.01 if few_values else 1e-9)
    assert HEAD in statistics.asked, "a head of its own has its own input"
    assert records[EMBEDDING].reason == f"scheme 8da4w: embedding; {stream.UNMEASURED}"
    assert stream.UNMEASURED not in str([record.reason for record in records.values() if record.name != EMBEDDING])


def test_files_that_other_statistics_filled_are_not_gone_on_with(checkpoint, tmp_path) -> None:
    plan = make_plan(checkpoint.config, get_scheme("8da4w"), moe_op=None)
    ledger = tmp_path / "model.ledger"
    options = {"name": "model.pte", "root": tmp_path, "ledger": ledger}
    one, other = MadeUpStatistics(), MadeUpStatistics()
    other.key = "others"
    PteStream(plan, "gptq", **options, statistics=one).write(checkpoint, lambda nbytes: None)  # type: ignore[arg-type]
    for _ in range(200):
        if PteStream(plan, "gptq", **options, statistics=one).done:  # type: ignore[arg-type]
            break
        time.sleep(0.05)
    assert PteStream(plan, "gptq", **options, statistics=one).done  # type: ignore[arg-type]
    assert not PteStream(plan, "gptq", **options, statistics=other).done  # type: ignore[arg-type]
    assert not PteStream(plan, "refit", **options).done  # type: ignore[arg-type]
