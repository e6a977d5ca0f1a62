"""A graph from a stranger: whatever it says of its weights is refused in a line, or is true of their bytes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from lfm2_export.backends.onnx.session import check_program, open_session
from lfm2_export.backends.onnx.stored import StoredWeights
from lfm2_export.config import ModelConfig
from lfm2_export.errors import ArtifactError, RunnerError
from lfm2_export.families import get_family
from lfm2_export.manifest import Manifest
from lfm2_export.messages import MESSAGE_LIMIT
from tests.fuzz.targets import FOLDER

GRAPH = "model_q4.onnx"
EMBEDDING, SCALE, NORM = "model.embed_tokens.qdata", "model.embed_tokens.scale", "model.embedding_norm.weight"
Change = Callable[[onnx.ModelProto], None]


def config() -> ModelConfig:
    raw = json.loads((FOLDER / "base" / "config.json").read_bytes())
    return get_family(raw["model_type"]).parse_config(raw)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copyfile(FOLDER / "corpus" / "onnx_graph" / GRAPH, tmp_path / GRAPH)
    shutil.copyfile(FOLDER / "base" / f"{GRAPH}_data", tmp_path / f"{GRAPH}_data")
    return tmp_path


def tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def sized(name: str, *dims: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        del tensor(model, name).dims[:]
        tensor(model, name).dims.extend(dims)

    return change


def typed(name: str, kind: int) -> Change:
    return lambda model: setattr(tensor(model, name), "data_type", kind)


def placed(key: str, value: str | None, name: str = EMBEDDING) -> Change:
    """An entry of an external tensor; None takes it away."""

    def change(model: onnx.ModelProto) -> None:
        entries = tensor(model, name).external_data
        kept = {entry.key: entry.value for entry in entries} | ({} if value is None else {key: value})
        del entries[:]
        for each, text in kept.items():
            if each != key or value is not None:
                entries.add(key=each, value=text)

    return change


def inline(name: str, nbytes: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        found = tensor(model, name)
        del found.external_data[:]
        found.data_location = onnx.TensorProto.DEFAULT
        found.raw_data = bytes(nbytes)

    return change


def noted(name: str, value: object) -> Change:
    """An attribute of the node that reads the embedding."""

    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if EMBEDDING in node.input)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if value is not None:
            node.attribute.append(onnx.helper.make_attribute(name, value))

    return change


def without_scale(model: onnx.ModelProto) -> None:
    model.graph.initializer.remove(tensor(model, SCALE))


CASES: dict[str, tuple[Change, str]] = {
    "a negative offset": (placed("offset", "-1"), "lies at offset '-1', which is no number of bytes"),
    "an offset of words": (placed("offset", "here"), "lies at offset 'here', which is no"),
    "an offset beyond 64 bits": (placed("offset", "9" * 30), "which is no number of bytes"),
    "an offset beyond the file": (placed("offset", "9" * 18), r"onnx_data: ends inside model\.embed_tokens\.qdata"),
    "another length": (placed("length", "1"), "has 1 bytes, its shape .* needs 2048"),
    "no location": (placed("location", None), "names the data file None, which is not beside it"),
    "a location with a break": (placed("location", "a\nb"), "a.nb: cannot be read"),
    "a data file that is missing": (placed("location", "missing"), "missing: cannot be read"),
    "a data file that is a folder": (placed("location", "folder"), "is a folder where a file is needed"),
    "a data file that leads out": (placed("location", "link"), "is a link that leaves its folder"),
    "no axis": (sized(NORM), "has the shape"),
    "an empty axis": (sized(NORM, 0, 32), "has the shape"),
    "a negative axis": (sized(NORM, -32), "has the shape"),
    "axes beyond 64 bits": (sized(NORM, *[2**31] * 4), "has the shape"),
    "nine axes": (sized(NORM, *[1] * 9), "has the shape"),
    "an unknown type": (typed(NORM, 9999), "has the element type 9999, which is none of our weights'"),
    "text": (typed(NORM, onnx.TensorProto.STRING), "has the element type 8"),
    "codes that are numbers": (typed(EMBEDDING, onnx.TensorProto.FLOAT16), "needs 4096"),
    "numbers that are codes": (inline(NORM, 3), "has 3 bytes"),
    "scales of another size": (sized(SCALE, 64, 2), "needs|speak of"),
    "a scale that is nowhere": (without_scale, "has no initializer model.embed_tokens.scale"),
    "no group size": (noted("block_size", None), "does not say its block_size"),
    "a group size of text": (noted("block_size", "32"), "does not say its block_size"),
    "a group size below zero": (noted("block_size", -32), "in groups of -32, which is not known"),
    "a huge group size": (noted("block_size", 2**62), "its scales speak of 64 rows"),
    "three bits": (noted("bits", 3), "has 3 bits in groups of 32"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_graph_that_says_what_cannot_be_is_refused(folder: Path, case: str) -> None:
    change, said = CASES[case]
    (folder / "folder").mkdir()
    (folder.parent / "outside").write_bytes(b"")
    (folder / "link").symlink_to("../outside")
    model = onnx.load(folder / GRAPH, load_external_data=False)
    change(model)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=said) as refused:
        StoredWeights(folder / GRAPH, config())
    print(refused.value)
    assert len(str(refused.value)) <= MESSAGE_LIMIT
    assert str(refused.value).isprintable()


def test_scales_that_are_not_finite_are_refused(folder: Path) -> None:
    model = onnx.load(folder / GRAPH, load_external_data=False)
    offset = int(next(entry.value for entry in tensor(model, SCALE).external_data if entry.key == "offset"))
    data = bytearray((folder / f"{GRAPH}_data").read_bytes())
    data[offset : offset + 4] = np.float32(np.inf).tobytes()
    (folder / f"{GRAPH}_data").write_bytes(data)
    stored = StoredWeights(folder / GRAPH, config())
    with pytest.raises(ArtifactError, match=r"embed_tokens\.scale has numbers that are not finite; export again"):
        stored.read("model.embed_tokens.weight")
    assert np.isfinite(stored.read(NORM)).all()


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"no graph"])
def test_a_file_that_is_no_graph_is_refused(folder: Path, data: bytes) -> None:
    (folder / GRAPH).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model_q4\.onnx: .*export again"):
        StoredWeights(folder / GRAPH, config())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFO")
def test_a_graph_that_is_a_pipe_is_refused(folder: Path) -> None:
    (folder / GRAPH).unlink()
    os.mkfifo(folder / GRAPH)
    with pytest.raises(ArtifactError, match="is not a regular file"):
        StoredWeights(folder / GRAPH, config())


def test_onnxruntime_prints_nothing_of_a_name_that_it_cannot_say(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(FOLDER / "crashes" / "onnx_graph" / "name_is_not_utf8", folder / GRAPH)
    with pytest.raises(RunnerError, match=r"model_q4\.onnx: onnxruntime .* cannot load it; .*export again"):
        open_session(folder / GRAPH)
    assert capfd.readouterr() == ("", "")


def test_an_input_whose_name_is_no_text_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = (folder / GRAPH).read_bytes()
    assert b"past_conv.0" in data
    (folder / GRAPH).write_bytes(data.replace(b"past_conv.0", b"past\xe5conv.0"))
    manifest = Manifest.from_json((FOLDER / "corpus" / "weights" / "exported.json").read_bytes())
    session = open_session(folder / GRAPH)
    with pytest.raises(RunnerError, match=r"model_q4\.onnx: the graph has a name that is not UTF-8 text; copy it"):
        check_program(session, folder / GRAPH, manifest.programs[0].cache)
    assert capfd.readouterr() == ("", "")
