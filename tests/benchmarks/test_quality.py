"""What the benchmark of quality rests on: the prior's fit, checkpoints as .gguf and back, its table."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.gguf_checkpoint import dequantized, stacks, stored_bits, write_gguf
from benchmarks.quality import Quality, table
from benchmarks.sensitivity import prior
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.families.tensors import TensorClass
from lfm2_export.source import ASSETS
from lfm2_export.text import Tokenizer
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.gguf.written import write as write_quantized

CLASSES, CHECKPOINTS = {"a": 8.0, "b": 0.5, "c": 0.25}, {"x": 1.0, "y": 100.0}


def records() -> list[dict[str, object]]:
    """KL as the product of everything that the fit divides out; checkpoint y has no matrix of class c."""
    return [
        {
            "class": kind,
            "checkpoint": name,
            "bits": bits,
            "group_size": 32,
            "known": (1 if bits == 4 else 7) * 0.006 * share * share,
            "kl": (1 if bits == 4 else 7) * factor * scale * 0.006 * share * share,
        }
        for kind, factor in CLASSES.items()
        for name, scale in CHECKPOINTS.items()
        for share in (1.0, 0.1)
        for bits in (4, 8)
        if (kind, name) != ("c", "y")
    ]


def test_the_prior_is_the_factor_of_the_class_alone() -> None:
    found = prior(records(), "kl", "known")
    print(found)
    assert found == pytest.approx(CLASSES, rel=0.01)


@pytest.fixture(scope="module", params=["lfm2", "lfm2_moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    return open_checkpoint(write_random_checkpoint(folder / "made", tiny_config(request.param), seed=1))


def test_a_gguf_holds_every_tensor_of_the_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "made.gguf", checkpoint)
    sources = stacks(checkpoint)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert found.keys() == sources.keys()
    for name, tensors in sources.items():
        expected = np.concatenate([checkpoint.read(tensor.name).ravel() for tensor in tensors])
        assert np.array_equal(found[name].data.ravel(), expected), name


def test_a_gguf_has_the_vocabulary_that_calibration_texts_are_read_with(tmp_path: Path) -> None:
    original = open_checkpoint("tiny-dense")
    found = open_checkpoint(write_gguf(tmp_path / "made.gguf", original))
    text = (ASSETS / "calibration.txt").read_text(encoding="utf-8")[:4000]
    ours, theirs = (Tokenizer.from_dir(one.path) for one in (original, found))
    assert ours.encode(text) == theirs.encode(text)
    assert found.config.bos_token_id == original.config.bos_token_id


def test_unquantized_tensors_are_not_dequantized(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "made.gguf", checkpoint)
    assert dequantized(path) == {}
    assert stored_bits(path) == (32, 32)


def test_quantized_ones_are_and_their_bits_count(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = write_quantized(tmp_path / "made.gguf", checkpoint)
    found = dequantized(path)
    kinds = {checkpoint.model_tensors[name].kind for name in found}
    assert TensorClass.LINEAR in kinds
    assert not kinds & {TensorClass.ROUTER, TensorClass.SMALL}
    errors = [np.abs(found[name] - checkpoint.read(name)).max() / np.abs(checkpoint.read(name)).max() for name in found]
    print(max(errors))
    assert 0 < max(errors) < 0.2  # Q4_0 rounds to a sixteenth of the range
    file_bits, step_bits = stored_bits(path)
    assert 4.5 < file_bits < 12
    assert (step_bits != file_bits) == (checkpoint.config.num_experts > 0)


def test_the_table_has_a_row_for_each() -> None:
    row = Quality(checkpoint="x", name="q4", kl=0.00123, kl_error=0.00004, file_bits=5.2, step_bits=6.0)
    assert table([row, row]).splitlines()[2:] == ["| x | q4 | 0.00123 ± 0.00004 | 5.20 | 6.00 |"] * 2
