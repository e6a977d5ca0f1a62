"""Residual streams of a program's passes, against the eager model's, and what a tap leaves alone."""

from __future__ import annotations

import json
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
from lfm2_export.backends.onnx import runner as onnx_runner
from lfm2_export.backends.onnx import tap, variants
from lfm2_export.cache import FIRST_SCORED
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import RunnerError
from lfm2_export.hashing import sha256_file
from lfm2_export.manifest import MANIFEST
from lfm2_export.models.decoder import DecoderForCausalLM
from lfm2_export.models.loading import load_model
from tests.checkpoints import tiny_config
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


@pytest.mark.parametrize("family", ["lfm2_moe", "lfm3"])
def test_streams_of_other_families_are_the_eager_models(random_artifact: Callable[..., Exported], family: str):
    """Of mixtures, and where a norm stands behind each half of a layer. Measured: 6e-6 and 1.2e-5."""
    made = random_artifact(tiny_config(family), ("fp32",))
    found = streams_of(load_model(open_checkpoint(made.checkpoint)), IDS)
    wanted = np.concatenate([found[layer] for layer in LAYERS], axis=-1)
    runner, heard = lfm2_export.load_runner(made.artifact, scheme="fp32", kernels="stock", threads=1), Heard()
    assert runner.tap(LAYERS, heard) == 3 * 64
    passes(runner)
    error, control = (float(np.abs(a - b).max()) for a, b in ((heard.rows, wanted), (heard.rows[1:], wanted[:-1])))
    print(f"{family}: {error:.1e}; shifted by a token {control:.1e}")
    assert error < 5e-5
    assert control > 5.0


def prompted(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[tuple[int, int]], np.ndarray]:
    """The logits of a prompt with a tap; of each pass how many tokens it had and of how many it gave logits; the
    streams."""
    passes: list[tuple[int, int]] = []
    real = onnx_runner.run

    def run(session, state, ids_BT, counts, logits, *others, **options):
        passes.append((ids_BT.shape[1], logits.shape[1]))
        real(session, state, ids_BT, counts, logits, *others, **options)

    heard = Heard()
    runner.reset()
    runner.tap(LAYERS, heard)
    with monkeypatch.context() as patched:
        patched.setattr(onnx_runner, "run", run)
        logits = runner.prefill([IDS])
    runner.tap((), None)
    return logits, passes, np.stack(heard.rows)


@needs_own
def test_a_prompt_gives_the_logits_of_its_last_token_alone(
    made: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In pieces of bounded memory; graphs from before give all of them, the same bits. What is scored has all."""
    runner = lfm2_export.load_runner(made.artifact, scheme="q4", kernels="lfm2", threads=1)
    plain = runner.prefill([IDS])
    whole, passes, streams = prompted(runner, monkeypatch)
    assert passes == [(len(IDS), 1)]
    assert len(runner.prefill_scored([IDS[:5]])[0]) == 5
    monkeypatch.setattr(tap, "_MOST_BYTES", 16 * 4 * 64 * (5 + 2 * 3))  # five layers, three of them twice more
    pieces, passes, again = prompted(runner, monkeypatch)
    assert passes == [(16, 1), (16, 1), (8, 1)]
    old = lfm2_export.load_runner(from_before(made.artifact, tmp_path / "old"), scheme="q4", kernels="lfm2", threads=1)
    before, passes, others = prompted(old, monkeypatch)
    assert [size for size, _ in passes] == [size for _, size in passes]
    assert passes[0][0] < 16  # with logits in the memory that there is
    for found in (whole, pieces, before):
        np.testing.assert_array_equal(found, plain)
    for found in (again, others):
        np.testing.assert_array_equal(found, streams)


def from_before(artifact: Path, folder: Path) -> Path:
    """The artifact as older versions exported it: its graphs take no first position."""
    shutil.copytree(artifact, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    for graph in (folder / "onnx").glob("*_scoring.onnx"):
        model = onnx.load(graph, load_external_data=False)
        kept = [value for value in model.graph.input if value.name != FIRST_SCORED]
        assert len(kept) == len(model.graph.input) - 1
        del model.graph.input[:]
        model.graph.input.extend(kept)
        graph.write_bytes(model.SerializeToString())
        for program in manifest["programs"]:
            if (name := f"onnx/{graph.name}") in program["files"]:
                program["files"][name] = {"bytes": graph.stat().st_size, "sha256": sha256_file(graph)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


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
