"""ONNX folders in the layout that others publish, built from ours: they run, or are refused in a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import lfm2_export
from lfm2_export.cli import main
from lfm2_export.config import CONV
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.hub_artifacts import open_artifact
from tests.fake_hub import closed_port, files_of, own_cache, serving, use_endpoint
from tests.foreign_folders import write_foreign
from tests.shows import shows

PROMPT = [1, 30, 40, 7, 22, 19]
# Graphs that differ in layout compute the same in another order; 6.7e-6 measured.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def made(artifact: Callable[[str], Path]) -> Path:
    return artifact("tiny-dense")


@pytest.fixture(scope="module")
def published(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_foreign(made, tmp_path_factory.mktemp("foreign") / "published")


@pytest.fixture
def own(published: Path, tmp_path: Path) -> Path:
    shutil.copytree(published, tmp_path / "own")
    return tmp_path / "own"


def logits_of(path: str | Path, scheme: str = "q4") -> np.ndarray:
    """Of a prompt, of single steps, and of several tokens after it; by the name of its file a stand-in is a q4."""
    runner = lfm2_export.load_runner(path, scheme=scheme, kernels="stock")
    found = [runner.prefill([PROMPT]), runner.decode([5]), runner.decode([9]), runner.prefill([[4, 11, 17]])]
    return np.concatenate(found)


LAYOUTS: dict[str, dict] = {
    "positions": {},
    "no positions": {"positions": False},
    "logits to keep": {"keep": "num_logits_to_keep"},
    "logits to keep, newer": {"keep": "logits_to_keep", "positions": False},
}


@shows("ours", "foreign", "logits", family="lfm2", scheme="fp32")
@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_a_published_layout_computes_what_the_model_does(made: Path, tmp_path: Path, options: dict) -> None:
    expected = logits_of(made, "fp32")
    error = np.abs(logits_of(write_foreign(made, tmp_path / "published", **options)) - expected).max()
    print(f"max abs error {error:.1e}")
    assert error < TOLERANCE
    assert np.abs(np.roll(expected, 1, axis=0) - expected).max() > 100 * TOLERANCE


@shows("ours", "foreign", "states", family="lfm2", scheme="fp32")
def test_marks_snapshots_and_scores_are_those_of_the_protocol(made: Path, published: Path) -> None:
    runner = lfm2_export.load_runner(published)
    ours = lfm2_export.load_runner(made, scheme="fp32")
    assert np.abs(runner.score([PROMPT]) - ours.score([PROMPT])).max() < TOLERANCE
    runner.prefill([PROMPT])
    mark, snapshot = runner.mark(), runner.snapshot()
    step = runner.decode([5])
    runner.rewind(mark)
    assert np.array_equal(runner.decode([5]), step)
    runner.reset()
    runner.restore(snapshot)
    assert np.array_equal(runner.decode([5]), step)
    assert list(runner.lengths) == [len(PROMPT) + 1]


def test_run_and_bench_take_such_a_folder(made: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "What is a list?", "--max-new-tokens", "8", "--temperature", "0", "--json"]
    assert main(["run", str(made), "--scheme", "fp32", *words]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert main(["run", str(published), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["program"] == "onnx q4"
    assert found["tokens"] == expected["tokens"]
    size = ["--prompt-tokens", "8", "--new-tokens", "2", "--rounds", "1", "--json"]
    assert main(["bench", str(published), *size]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == "onnxruntime"


def test_from_the_hub_only_one_program_is_fetched_and_opens_offline(
    made: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache(tmp_path, monkeypatch)
    more = {"onnx/model.onnx": b"x", "onnx/model.onnx_data": b"x", "model.safetensors": b"x", "README.md": b"x"}
    with serving(files_of(published) | more, monkeypatch) as hub:
        tokenizer, hub.files["tokenizer.json"] = hub.files["tokenizer.json"], b" " * (65 << 20)
        with pytest.raises(Lfm2ExportError, match="such a file may have"):
            open_artifact("org/model")
        assert hub.asked == []
        hub.files["tokenizer.json"] = tokenizer
        assert np.abs(logits_of("org/model") - logits_of(made, "fp32")).max() < TOLERANCE
        assert not {"onnx/model.onnx", "onnx/model.onnx_data", "model.safetensors"} & set(hub.asked)
        with pytest.raises(Lfm2ExportError, match="has no q8 program, only: "):
            open_artifact("org/model", scheme="q8")
    use_endpoint(monkeypatch, f"http://127.0.0.1:{closed_port()}")
    assert open_artifact("org/model").program().scheme == "q4"


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_graph(folder: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    path = folder / "onnx/model_q4.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    onnx.save(model, path)


def add_input(name: str) -> Callable[[Path], None]:
    value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch_size", 4])
    return lambda folder: edit_graph(folder, lambda graph: graph.input.append(value))


def lead_data_elsewhere(folder: Path) -> None:
    shutil.move(folder / "onnx/model_q4.onnx_data", folder.parent / "secret")

    def change(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../../secret"

    edit_graph(folder, change)


def link_data_elsewhere(folder: Path) -> None:
    data = folder / "onnx/model_q4.onnx_data"
    shutil.move(data, folder.parent / "secret")
    data.symlink_to(folder.parent / "secret")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "an image's input": (add_input("image_features"), "left over: image_features"),
    "other heads": (
        lambda folder: edit_config(folder, num_key_value_heads=1),
        "where its config.json means [batch, 1,",
    ),
    "a larger vocabulary": (
        lambda folder: edit_config(folder, vocab_size=99),
        "where its config.json means [batch, tokens, 99]",
    ),
    "more layers": (
        lambda folder: edit_config(folder, num_hidden_layers=20, layer_types=[CONV] * 20),
        "the graph's inputs are not those of a text decoder of its config.json (missing: ",
    ),
    "a vision model": (
        lambda folder: edit_config(folder, model_type="lfm2_vl", architectures=["X"]),
        "is a model of images and text",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
    "data elsewhere by its graph": (lead_data_elsewhere, "cannot load it"),
    "data elsewhere by a link": (link_data_elsewhere, "is a link that leaves its folder"),
    "no graph": (lambda folder: (folder / "onnx/model_q4.onnx").write_bytes(b"\x08"), "cannot load it"),
    "no data": (lambda folder: (folder / "onnx/model_q4.onnx_data").unlink(), "cannot load it"),
}


@pytest.mark.parametrize(("edit", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_another_thing_is_refused_in_a_line(
    own: Path, edit: Callable[[Path], None], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(own)
    assert main(["run", str(own), "--prompt", "a", "--max-new-tokens", "1"]) == 2
    error = capsys.readouterr().err
    print(error)
    assert text in error
    assert error.count("\n") == 1


def test_our_kernels_and_an_int8_cache_are_refused(published: Path) -> None:
    for options in ({"kernels": "lfm2"}, {"kv_cache": "int8"}):
        with pytest.raises(Lfm2ExportError, match="others exported it, without graphs for our kernels"):
            lfm2_export.load_runner(published, **options)
