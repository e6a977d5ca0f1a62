"""Residual streams of a program's passes, against the eager model's, and what a tap leaves alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.backends import get_backend
from lfm2_export.backends.base import Runner, TapsStreams
from lfm2_export.backends.onnx import variants
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import RunnerError
from lfm2_export.models.decoder import DecoderForCausalLM
from lfm2_export.models.loading import load_model
from tests.conftest import Exported
from tests.drafters import TARGET

needs_own = pytest.mark.skipif(variants.own_library() is None, reason="no compiler for our operators")
LAYERS = (0, 1, 4)
IDS = np.random.default_rng(5).integers(0, 131, 40).tolist()


class Heard:
    """What a tap was told, by position."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []

    def __call__(self, before: int, streams: np.ndarray) -> None:
        assert before <= len(self.rows)
        self.rows = [*self.rows[:before], *streams]


@pytest.fixture(scope="module")
def made(random_artifact: Callable[..., Exported]) -> Exported:
    return random_artifact(TARGET, ("fp32", "q4", "q8"))


@pytest.fixture(scope="module")
def wanted(made: Exported) -> np.ndarray:
    """The streams behind ``LAYERS`` side by side, float32 [T, 3 * D]; behind the last one before the final norm."""
    net = load_model(open_checkpoint(made.checkpoint))
    found = streams_of(net, IDS)
    return np.concatenate([found[layer] for layer in LAYERS], axis=-1)


def streams_of(net: DecoderForCausalLM, ids: list[int]) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}
    norms = [*(layer.operator_norm for layer in net.model.layers[1:]), net.model.embedding_norm]
    for index, norm in enumerate(norms):
        norm.register_forward_hook(lambda _, __, out, index=index: found.__setitem__(index, out[1][0].numpy()))
    with torch.no_grad():
        net(torch.tensor([ids]))
    return found


def passes(runner: Runner) -> None:
    """A prompt in chunks, single steps, a verified block of which a part stays, and what follows it."""
    runner.prefill([IDS[:20]], chunk_size=8)
    runner.decode([IDS[20]])
    runner.verify([*IDS[21:24], 0, 0])
    runner.accept(3)
    runner.prefill_scored([IDS[24:36]], chunk_size=5)
    for token in IDS[36:]:
        runner.decode([token])


# Measured: 8e-6, and 0.5 where activations are rounded to int8 in every layer; streams reach 12.
@pytest.mark.parametrize(
    ("scheme", "kernels", "close"),
    [
        ("fp32", "stock", 2e-5),
        pytest.param("q8", "lfm2", 1.5, marks=needs_own),
        ("q8", "stock", 1.5),
    ],
)
def test_streams_are_the_eager_models(made: Exported, wanted: np.ndarray, scheme: str, kernels: str, close: float):
    runner = lfm2_export.load_runner(made.artifact, scheme=scheme, kernels=kernels, threads=1)
    assert isinstance(runner, TapsStreams)
    heard = Heard()
    assert runner.tap(LAYERS, heard) == 3 * 64
    passes(runner)
    runner.score([IDS[:3]])
    found = np.stack(heard.rows)
    error, control = np.abs(found - wanted).max(), np.abs(found[1:] - wanted[:-1]).max()
    print(f"{scheme}, {kernels}: {error:.1e}; shifted by a token {control:.1e}")
    assert error < close
    assert control > 5.0


@needs_own
def test_a_tap_changes_no_bit(made: Exported):
    runners = [lfm2_export.load_runner(made.artifact, scheme="q4", kernels="lfm2", threads=1) for _ in range(2)]
    heard = Heard()
    runners[0].tap(LAYERS, heard)
    for runner in runners:
        passes(runner)
    np.testing.assert_array_equal(*(runner.decode([7]) for runner in runners))
    count = len(heard.rows)
    runners[0].tap((), None)
    np.testing.assert_array_equal(*(runner.decode([8]) for runner in runners))
    assert len(heard.rows) == count == len(IDS) + 1


def test_a_layer_that_there_is_not_is_named(made: Exported):
    runner = lfm2_export.load_runner(made.artifact, scheme="fp32", threads=1)
    with pytest.raises(RunnerError, match="does not give the residual stream behind layer 5, which the drafter reads"):
        runner.tap((0, 5), Heard())


def test_what_other_runtimes_open_is_as_it_was(made: Exported):
    """Their graphs have no further output; those that score have one for each layer, on the same data files."""
    for program in Artifact.open(made.artifact).programs:
        for role, name in program.graphs.items():
            graph = onnx.load(made.artifact / name, load_external_data=False).graph
            count = sum(output.name.startswith("residual.") for output in graph.output)
            assert count == (5 if role.endswith("scoring") else 0), role


def test_an_artifact_from_before_has_none_and_says_so(made: Exported, tmp_path: Path):
    folder = Path(shutil.copytree(made.artifact, tmp_path / "old"))
    graph = folder / "onnx/model_scoring.onnx"
    model = onnx.load(graph, load_external_data=False)
    kept = [output for output in model.graph.output if not output.name.startswith("residual.")]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    graph.write_bytes(model.SerializeToString())
    program = Artifact.open(folder, verify=False).program("onnx", "fp32")
    runner = get_backend("onnx").load_runner(folder, program)
    with pytest.raises(RunnerError, match="export the model again"):
        runner.tap((0,), Heard())
