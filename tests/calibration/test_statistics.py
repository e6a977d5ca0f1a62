"""A file of statistics belongs to one checkpoint, and is data from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from lfm2_export.calibration import statistics as module
from lfm2_export.calibration.inputs import inputs
from lfm2_export.calibration.statistics import (
    METADATA,
    Description,
    Statistics,
    StatisticsLayout,
    checkpoint_hash,
    packed,
    packed_size,
    unpacked,
)
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.errors import CalibrationError, QuantizationError
from lfm2_export.families.tensors import EMBEDDING, HEAD
from lfm2_export.manifest import CheckpointRecord
from lfm2_export.quant.hessian import input_statistics
from tests.checkpoints import tiny_config, write_random_checkpoint

RAW_CONFIG = tiny_config("lfm2", num_hidden_layers=1, layer_types=["full_attention"])
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_random_checkpoint(tmp_path_factory.mktemp("one") / "checkpoint", RAW_CONFIG, seed=0))


@pytest.fixture(scope="module")
def record(checkpoint: Checkpoint) -> CheckpointRecord:
    return CheckpointRecord.of(checkpoint)


def matrix(width: int) -> np.ndarray:
    made = np.random.default_rng(width).standard_normal((2 * width, width)).astype(np.float32)
    return made.T @ made / len(made)


@pytest.fixture
def written(checkpoint: Checkpoint, record: CheckpointRecord, tmp_path: Path) -> Path:
    """A file of random statistics."""
    layout = StatisticsLayout(inputs=inputs(checkpoint.config, checkpoint.model_tensors), source="made up")
    description = Description(
        checkpoint=checkpoint_hash(record),
        source="made up",
        sha256="0" * 64,
        tokens=5000,
        seen=dict.fromkeys(layout.inputs, 5000),
    )
    path = tmp_path / "statistics"
    data = b"".join(packed(matrix(one.width)).tobytes() for one in layout.inputs.values())
    path.write_bytes(layout.header(description) + data)
    assert path.stat().st_size == layout.nbytes
    return path


def test_a_triangle_is_all_of_a_symmetric_matrix() -> None:
    for width in (1, 2, 7):
        whole = matrix(width)
        whole = (whole + whole.T) / 2
        assert packed(whole).shape == (packed_size(width),)
        assert np.array_equal(unpacked(packed(whole), width), whole)


def test_every_weight_that_is_multiplied_has_its_inputs_statistics(checkpoint, record, written) -> None:
    found = Statistics(written, checkpoint, record)
    assert np.array_equal(found.hessian(Q), matrix(64))
    k = Q.replace("q_proj", "k_proj")
    assert found.of(Q) is found.of(k), "made once, and kept for the next weight"
    assert found.of(HEAD) is not None
    assert not found.has(EMBEDDING)
    assert found.of(EMBEDDING) is None
    assert np.array_equal(found.of(Q).order_N, input_statistics(matrix(64)).order_N)
    assert found.record() == {
        "text": {"source": "made up", "sha256": "0" * 64, "tokens": 5000},
        "averaged": 0,
        "diagonal": 0,
    }


def test_threads_that_ask_for_one_input_make_its_factor_once(checkpoint, record, written, monkeypatch) -> None:
    made: list[str] = []
    real = module.input_statistics
    monkeypatch.setattr(module, "input_statistics", lambda h, name: made.append(name) or real(h, name=name))
    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    found = Statistics(written, checkpoint, record)
    threads = [Thread(target=found.of, args=(Q,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    for name in (HEAD, "model.layers.0.feed_forward.w1.weight", Q):
        found.of(name)
    assert len(made) == 4, "only as many are kept as there are threads at work"


def test_statistics_of_another_checkpoint_are_refused(checkpoint, written, tmp_path) -> None:
    other = open_checkpoint(write_random_checkpoint(tmp_path / "other", RAW_CONFIG, seed=1))
    with pytest.raises(CalibrationError, match=r"holds statistics of another checkpoint than other \(the sha256 diff"):
        Statistics(written, other, CheckpointRecord.of(other))


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """The file with another header: ``change`` is given its entries and what it says of itself."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    told = json.loads(header["__metadata__"][METADATA])
    change(header, told)
    if METADATA in header.get("__metadata__", {}):
        header["__metadata__"][METADATA] = json.dumps(told)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, told: header.pop("__metadata__"), "is no file of statistics"),
        (lambda header, told: header["__metadata__"].clear(), "is no file of statistics"),
        (lambda header, told: told.update(version=2), "it is of version 2"),
        (lambda header, told: told.update(tokens="many"), "tokens='many' is not an integer"),
        (lambda header, told: told.pop("seen"), "seen is missing"),
        (lambda header, told: told["seen"].update({Q: -1}), "-1 is no number of tokens"),
        (lambda header, told: told["seen"].pop(Q), f"{Q} is missing"),
        (lambda header, told: told.update(averaged=["nobody"]), "nobody is unknown"),
        (lambda header, told: header.update({"odd": header.pop(Q)}), f"{Q} is missing"),
        (lambda header, told: header[Q].update(shape=[65, 32]), "is F32 [65, 32], not F32 [2080]"),
        (lambda header, told: header[Q].update(dtype="BF16", shape=[2080, 2]), "is BF16 [2080, 2], not F32 [2080]"),
        (lambda header, told: header[Q].update(shape=[10**9]), "data_offsets"),
    ],
)
def test_a_header_that_lies_is_refused(checkpoint, record, written, change, message) -> None:
    with pytest.raises(CalibrationError) as error:
        Statistics(rewritten(written, change), checkpoint, record)
    print(error.value)
    assert message in str(error.value)
    assert "calibrate again, or give the file that belongs to this checkpoint" in str(error.value)
    assert "download" not in str(error.value)


def test_a_truncated_file_and_one_that_is_not_there_are_refused(checkpoint, record, written, tmp_path) -> None:
    written.write_bytes(written.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match=r"cannot be used as statistics \(is truncated"):
        Statistics(written, checkpoint, record)
    with pytest.raises(CalibrationError, match="no such file; make it with --calibrate default --statistics"):
        Statistics(tmp_path / "nothing", checkpoint, record)
    with pytest.raises(CalibrationError, match="is a folder where a file is needed"):
        Statistics(tmp_path, checkpoint, record)


def test_values_that_are_no_statistics_are_refused_by_the_inputs_name(checkpoint, record, written) -> None:
    data = bytearray(written.read_bytes())
    found = Statistics(written, checkpoint, record)
    place = found._shard.tensors[Q].offset
    data[place : place + 4] = np.float32(np.nan).tobytes()
    written.write_bytes(data)
    with pytest.raises(QuantizationError, match=rf"statistics: {Q}: the statistics are damaged \(not finite"):
        Statistics(written, checkpoint, record).of(Q)
    with pytest.raises(CalibrationError, match="was changed while it was being read"):
        found.of(HEAD)


def test_exports_follow_from_what_the_file_says_and_when_it_was_written(checkpoint, record, written) -> None:
    first = Statistics(written, checkpoint, record)
    assert first.key == Statistics(written, checkpoint, record).key
    rewritten(written, lambda header, told: told.update(tokens=6000))
    assert first.key != Statistics(written, checkpoint, record).key
    assert replace(first.description, tokens=6000) == Statistics(written, checkpoint, record).description
