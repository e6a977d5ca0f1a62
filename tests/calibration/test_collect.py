"""Statistics that are collected layer by layer are those of the whole model, whatever happened on the way."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lfm2_export.calibration import collect as collecting
from lfm2_export.calibration.collect import INNER_PRIOR, PRIOR, collect
from lfm2_export.calibration.inputs import inputs
from lfm2_export.calibration.statistics import Statistics
from lfm2_export.calibration.text import Text
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.errors import CalibrationError, ResourceError
from lfm2_export.families.tensors import HEAD
from lfm2_export.manifest import CheckpointRecord
from lfm2_export.models.lfm2_moe import Experts
from lfm2_export.models.loading import load_model
from lfm2_export.progress import Progress
from tests.checkpoints import tiny_config, write_random_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

RAW_CONFIG = tiny_config("lfm2_moe", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
# More rows than a batch has.
ROWS, LENGTH = 9, 512
EXPERT = "model.layers.{}.feed_forward.experts.{}.{}.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("calibration") / "checkpoint"
    return open_checkpoint(write_random_checkpoint(folder, RAW_CONFIG, seed=5))


def random_text(rows: int = ROWS, seed: int = 0) -> Text:
    tokens = np.random.default_rng(seed).integers(0, RAW_CONFIG["vocab_size"], (rows, LENGTH))
    return Text(source="made up", sha256="0" * 64, rows_BT=tokens)


@pytest.fixture(scope="module")
def record(checkpoint: Checkpoint) -> CheckpointRecord:
    return CheckpointRecord.of(checkpoint)


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint, record: CheckpointRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "whole.safetensors"
    collect(checkpoint, random_text(), path, record=record)
    return path


def sums_of_the_whole_model(checkpoint: Checkpoint, text: Text) -> tuple[dict[str, Any], Counter[str]]:
    """By hooks on the eager model, in float64."""
    model = load_model(checkpoint)
    sums: dict[str, Any] = {}
    counts: Counter[str] = Counter()

    def add(name: str, x: Any) -> None:
        x = x.detach().flatten(0, -2).double()
        sums[name] = sums.get(name, 0) + x.T @ x
        counts[name] += len(x)

    def watch(path: str, module: Experts) -> None:
        own = module.inner

        def inner(expert: int, x: Any) -> Any:
            add(f"{path}.{expert}.w1.weight", x)
            y = own(expert, x)
            add(f"{path}.{expert}.w2.weight", y)
            return y

        module.inner = inner

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given, path=path: add(f"{path}.weight", given[0]))
        elif isinstance(module, Experts):
            watch(path, module)
    with torch.inference_mode():
        model(torch.from_numpy(text.rows_BT), use_cache=False)
    return sums, counts


def test_layer_by_layer_gives_what_hooks_on_the_whole_model_give(checkpoint, record, whole) -> None:
    found = Statistics(whole, checkpoint, record)
    sums, counts = sums_of_the_whole_model(checkpoint, random_text())
    worst = 0.0
    for name, one in found.inputs.items():
        assert found.description.seen[name] == counts[name]
        expected = (sums[name] / counts[name]).numpy() if one.expert is None else mixed(sums, counts, one).numpy()
        for weight in one.serves:
            worst = max(worst, float(np.abs(found.hessian(weight) - expected).max() / np.diagonal(expected).mean()))
    print(f"{len(found.inputs)} inputs, off by {worst:.1e} of the diagonal's mean at most")
    assert worst < 1e-5  # measured: 8.1e-7
    assert HEAD in found.inputs


def mixed(sums: dict[str, Any], counts: Counter[str], one: Any) -> Any:
    """An expert's own statistics with those of all experts of its layer."""
    names = [one.name.replace(f"experts.{one.expert}.", f"experts.{e}.") for e in range(RAW_CONFIG["num_experts"])]
    mean = sum(sums[name] for name in names) / sum(counts[name] for name in names)
    prior = (INNER_PRIOR if one.matrix == "w2" else PRIOR) * one.width
    if one.matrix == "w2":
        mean = torch.diag(mean.diagonal())
    return (sums[one.name] + prior * mean) / (counts[one.name] + prior)


def test_experts_see_what_the_router_sends_them(checkpoint, record, whole) -> None:
    seen = Statistics(whole, checkpoint, record).description.seen
    for layer in (1, 2):
        shares = [seen[EXPERT.format(layer, expert, "w1")] for expert in range(RAW_CONFIG["num_experts"])]
        print(f"layer {layer}: {shares} of {ROWS * LENGTH} tokens")
        assert sum(shares) == RAW_CONFIG["num_experts_per_tok"] * ROWS * LENGTH
        assert shares == [seen[EXPERT.format(layer, expert, "w2")] for expert in range(RAW_CONFIG["num_experts"])]


def test_matrices_that_share_an_input_share_its_statistics(checkpoint) -> None:
    found = inputs(checkpoint.config, checkpoint.model_tensors)
    prefix = "model.layers.1.self_attn."
    assert found[f"{prefix}q_proj.weight"].serves == tuple(f"{prefix}{matrix}_proj.weight" for matrix in "qkv")
    assert found[EXPERT.format(1, 0, "w1")].serves == tuple(EXPERT.format(1, 0, matrix) for matrix in ("w1", "w3"))
    served = [weight for one in found.values() for weight in one.serves]
    assert len(served) == len(set(served))


def test_a_collection_that_was_stopped_goes_on_and_gives_the_same_file(
    checkpoint, record, whole, tmp_path, monkeypatch
) -> None:
    """Twice, in the middle of a layer, when the next one's input is half written over."""
    path, done, stop = tmp_path / "statistics", [], [1]
    real = collecting._Collection._layer

    def layer(self: Any, number: int) -> Any:
        if [number] == stop:
            self.activations.write(number + 1, slice(0, 2), np.full((2, LENGTH, 64), np.nan))
            raise ResourceError("the memory is short")
        done.append(number)
        return real(self, number)

    monkeypatch.setattr(collecting._Collection, "_layer", layer)
    for stop[0] in (1, 2):
        with pytest.raises(ResourceError, match="memory is short"):
            collect(checkpoint, random_text(), path, record=record)
        assert not path.exists()
    stop.clear()
    steps: list[int] = []
    collect(checkpoint, random_text(), path, record=record, progress=Progress(advance=steps.append))
    assert done == [0, 1, 2], "no layer was done twice"
    assert steps == [3, 1, 1]
    assert path.read_bytes() == whole.read_bytes()
    assert [one.name for one in tmp_path.iterdir()] == ["statistics"], "nothing is left beside it"


def test_another_text_does_not_go_on_with_what_is_there(checkpoint, record, tmp_path, monkeypatch) -> None:
    path = tmp_path / "statistics"
    other = random_text(2, seed=1)
    with monkeypatch.context() as patched:
        patched.setattr(collecting._Collection, "_head", lambda self: (_ for _ in ()).throw(ResourceError("short")))
        with pytest.raises(ResourceError):
            collect(checkpoint, random_text(2), path, record=record)
    collect(checkpoint, other, path, record=record)
    collect(checkpoint, other, tmp_path / "anew", record=record)
    assert path.read_bytes() == (tmp_path / "anew").read_bytes()


def test_an_error_leaves_nothing(checkpoint, record, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(collecting._Collection, "_head", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        collect(checkpoint, random_text(1), tmp_path / "statistics", record=record)
    assert list(tmp_path.iterdir()) == []


def test_something_else_in_the_workspaces_place_is_left_alone(checkpoint, record, tmp_path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    (tmp_path / ".statistics.lfm2-export.partial").symlink_to(elsewhere)
    with pytest.raises(CalibrationError, match="is no folder of yours where statistics are collected; delete it"):
        collect(checkpoint, random_text(1), tmp_path / "statistics", record=record)
    assert [one.name for one in elsewhere.iterdir()] == ["mine"]


def test_experts_with_few_tokens_are_named_and_have_their_layers_mean(checkpoint, record, tmp_path, caplog) -> None:
    tokens = np.random.default_rng(0).integers(0, RAW_CONFIG["vocab_size"], (1, 24))
    path = tmp_path / "statistics"
    collect(checkpoint, Text(source="short", sha256="0" * 64, rows_BT=tokens), path, record=record)
    found = Statistics(path, checkpoint, record)
    few = found.description.averaged
    assert few
    assert all(found.description.seen[name] < found.inputs[name].width for name in few)
    assert f"{len(few)} experts' inputs saw fewer tokens than they are wide" in caplog.text
    assert few[0].removesuffix(".weight") in caplog.text
    for name in few:
        assert found.of(name) is not None, "even of none there is a factor"


def test_where_memory_is_short_mean_squares_are_kept(checkpoint, record, whole, tmp_path) -> None:
    names = frozenset({EXPERT.format(1, 2, "w1"), "model.layers.0.conv.in_proj.weight"})
    path = tmp_path / "statistics"
    collect(checkpoint, random_text(), path, record=record, diagonal=names)
    found, expected = Statistics(path, checkpoint, record), Statistics(whole, checkpoint, record)
    assert found.record()["diagonal"] == 2
    plain = "model.layers.0.conv.in_proj.weight"
    assert found.hessian(plain) == pytest.approx(np.diagonal(expected.hessian(plain)), rel=1e-5)
    assert found.hessian(EXPERT.format(1, 2, "w1")).shape == (64,)
    assert found.hessian(EXPERT.format(1, 1, "w1")).shape == (64, 64)
    assert path.stat().st_size < whole.stat().st_size
    assert json.dumps(found.record())
