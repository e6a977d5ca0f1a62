"""Artifacts of strangers: a manifest's values and the files that it names, refused in a line before they are used."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lfm2_export import cli
from lfm2_export.artifact import Artifact
from lfm2_export.errors import ArtifactError
from lfm2_export.manifest import MANIFEST
from lfm2_export.runners import load_runner
from tests import hostile
from tests.artifacts import write_artifact
from tests.hostile import LONG, SPECIAL, assert_words, case, link, raw, refusal

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="links, FIFOs and devices"),
    pytest.mark.timeout(120),
]

DATA, GRAPH = "onnx/model_q4.onnx_data", "onnx/model_q4.onnx"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "artifact"
    write_artifact(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "here" / "artifact"))


def refused(folder: Path, words: tuple[str, ...]) -> None:
    assert_words(refusal(ArtifactError, folder, lambda: Artifact.open(folder)), words)


# The manifest's bytes


BYTES = [
    case("empty", raw(""), "is not JSON"),
    case("a list", raw("[]"), "schema_version=None is unknown"),
    case("a number", raw("7"), "schema_version=None is unknown"),
    case("no text", raw(b"\xff\xfe\xfd"), "is not JSON"),
    case("nested endlessly", raw("[" * 10**6), "is not JSON (maximum recursion depth"),
    case("nested deeply", raw('{"a":' * 300 + "1" + "}" * 300), "is nested more than 64 levels"),
    case("5,000 digits", raw('{"schema_version": ' + "9" * 5000 + "}"), "is not JSON (Exceeds the limit"),
    case("4,000 digits", raw('{"schema_version": ' + "9" * 4000 + "}"), "schema_version=999"),
    case("a version of 900 kB", raw(json.dumps({"schema_version": LONG})), "schema_version='xxx"),
    case("a terabyte", hostile.sparse, "has 1099511627776 bytes, more than the 33554432"),
    case("many values", raw(b"[" + b"0," * 2_100_000 + b"0]"), "holds more than 2000000 values"),
]


@pytest.mark.parametrize(("damage", "words"), BYTES)
def test_a_manifest_that_is_none_is_refused(artifact: Path, damage: Any, words: tuple[str, ...]) -> None:
    damage(artifact / MANIFEST)
    refused(artifact, (f"{artifact / MANIFEST}: ", *words))


# Its values


def top(**changes: Any) -> Change:
    return lambda manifest: manifest.update(changes)


def record(**changes: Any) -> Change:
    return lambda manifest: manifest["checkpoint"].update(changes)


def program(**changes: Any) -> Change:
    return lambda manifest: manifest["programs"][0].update(changes)


def state(**changes: Any) -> Change:
    return lambda manifest: manifest["programs"][0]["cache"][0].update(changes)


def cache(*entries: dict[str, Any]) -> Change:
    return program(cache=list(entries))


def tensor(**changes: Any) -> Change:
    return lambda manifest: manifest["programs"][0]["tensors"][0].update(changes)


def data_file(**changes: Any) -> Change:
    return lambda manifest: manifest["programs"][0]["files"][DATA].update(changes)


def renamed(name: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        files = manifest["programs"][0]["files"]
        files[name] = files.pop(DATA)

    return change


def programs(count: int) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        manifest["programs"] *= count

    return change


def conv(number: int, **changes: Any) -> dict[str, Any]:
    names = {"past_name": f"past_conv.{number}", "present_name": f"present_conv.{number}"}
    shape = ["batch_size", 2, 64]
    return {"layer": number, "kind": "conv", **names, "shape": shape, "dtype": "float32", **changes}


def key(layer: int, kind: str = "key", size: int = 16) -> dict[str, Any]:
    names = {"past_name": f"past_key_values.{layer}.{kind}", "present_name": f"present.{layer}.{kind}"}
    shape = ["batch_size", 2, "past_sequence_length", size]
    return {"layer": layer, "kind": kind, **names, "shape": shape, "dtype": "float32"}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


CONV_SHAPE = "[batch_size, size, size] expected"
VALUES = [
    case("an unknown field", top(other=1), "other is an unknown field"),
    case("a field of 900 kB", top(**{LONG: 1}), "is an unknown field"),
    case("a field of terminal codes", top(**{"\x1b[2J": 1}), "\\x1b[2J is an unknown field"),
    case("programs that are no list", top(programs={"a": 1}), "programs={'a': 1} is not a list"),
    case("3,000 equal programs", programs(3_000), "the program onnx q4 is listed twice"),
    case("a name of half a character", record(name="\ud800"), "checkpoint.name='\\ud800' is not Unicode text"),
    case("a name of 900 kB", record(name=LONG), "checkpoint.name='xxx", "has 900000 characters, more than 4096"),
    case("a family of terminal codes", record(model_type="\x1b[2J"), "checkpoint.model_type='\\x1b[2J' is not a name"),
    case("shards of numbers", record(shards={"a": 1}), "checkpoint.shards.a=1 is not a string"),
    case("a backend in brackets", program(backend="[/x]"), "backend='[/x]' is not a name of letters"),
    case("a scheme of lines", program(scheme="q4\nq8"), "scheme='q4\\nq8' is not a name of letters"),
    case("a scheme of 100 letters", program(scheme="q" * 100), "is not a name of letters, digits and _.+- (at most"),
    case("no scheme", program(scheme=""), "scheme='' is not a name"),
    case("a context of 2^70", program(context_length=2**70), "context_length=1180591620717411303424 has more than 64"),
    case("a context of 2^40", program(context_length=2**40), "context_length=1099511627776, which is not from 1 to"),
    case("a negative context", program(context_length=-1), "context_length=-1, which is not from 1 to 2147483647"),
    case("a context of true", program(context_length=True), "context_length=True is not an integer"),
    case("a fraction as context", program(context_length=512.0), "context_length=512.0 is not an integer"),
    case("graphs that are a list", program(graphs=["model"]), "graphs=['model'] is not an object"),
    case("a graph that is no file of it", program(graphs={"model": "a"}), "does not list 'a', its graph 'model'"),
    case("a graph of 900 kB", program(graphs={"model": LONG}), "graphs.model='xxx", "more than 4096"),
    case("versions of lists", program(versions={"numpy": [2]}), "versions.numpy=[2] is not a string"),
    case("versions that are a text", program(versions="1"), "versions='1' is not an object"),
    case("operators of text", program(operators={"QMoE": "4"}), "operators.QMoE='4' is not an integer"),
    case("operators of 10^30", program(operators={"QMoE": 10**30}), "has more than 64 bits"),
    case("options that are a list", program(options=[1]), "options=[1] is not an object"),
    case("options of a type that the runner takes apart", program(options={"moe_op": ["a"]}), "options.moe_op=['a']"),
    case("options nested deeply", program(options={"a": deep(30)}), "options.a is nested more than 16 levels deep"),
    case("options of NaN", program(options={"a": float("nan")}), "options.a=nan is not a finite number"),
    case("options of 10^30", program(options={"a": [10**30]}), "options.a=1000", "has more than 64 bits"),
    case("options of half a character", program(options={"\udcff": 1}), "is not Unicode text"),
    case("figures that are a list", program(parity=[1]), "parity=[1] is not an object"),
    case("figures of text", program(parity={"lowering": {"kl": "0"}}), "parity.lowering.kl='0', which is not a number"),
    case("figures of a number", program(parity={"quantization": 3}), "parity.quantization=3, which is not an object"),
    case("infinite figures", program(parity={"lowering": {"kl": float("inf")}}), "lowering.kl=inf is not a finite"),
    case("inputs of 40 axes", program(inputs=[{"name": "a", "dtype": "b", "shape": [1] * 40}]), "a has the shape [1,"),
    case("inputs of 2^70", program(inputs=[{"name": "a", "dtype": "b", "shape": [2**70]}]), "has more than 64 bits"),
    case("inputs without a size", program(outputs=[{"name": "a", "dtype": "b", "shape": [0]}]), "a has the shape [0]"),
    case("a tensor of 40 axes", tensor(shape=[1] * 40), "a.weight has the shape [1, 1"),
    case("a tensor of no rows", tensor(shape=[0, 8]), "a.weight has the shape [0, 8]"),
    case("a tensor of negative rows", tensor(shape=[-8, 8]), "a.weight has the shape [-8, 8]"),
    case("a tensor of 2^93 values", tensor(shape=[2**31 - 1] * 3), "a.weight has the shape [2147483647, "),
    case("a tensor of 2^40 rows", tensor(shape=[2**40]), "a.weight has the shape [1099511627776]"),
    case("an infinite error", tensor(error=float("inf")), "tensors[0].error=inf is not a finite number"),
    case("an error of 10^400", tensor(error=10**400), "tensors[0].error=1000", "has more than 64 bits"),
    case("a tensor named by 900 kB", tensor(name=LONG), "tensors[0].name='xxx", "has 900000 characters"),
    case("a size of 10^30", data_file(bytes=10**30), f"{DATA}.bytes=1000000000000000000000000000000 has more than 64"),
    case("a negative size", data_file(bytes=-1), f"{DATA} has no valid size and sha256"),
    case("a hash of zeros", data_file(sha256="0" * 63), f"{DATA} has no valid size and sha256"),
    case("a hash of other digits", data_file(sha256="٣" * 64), f"{DATA} has no valid size and sha256"),
    case("a hash of capitals", data_file(sha256="A" * 64), f"{DATA} has no valid size and sha256"),
    case(
        "a file above", renamed("../outside/secret"), "the file name '../outside/secret' leaves the artifact's folder"
    ),
    case("an absolute file", renamed("/etc/passwd"), "the file name '/etc/passwd' leaves the artifact's folder"),
    case("a file of half a character", renamed("\ud800"), "'\\ud800' is not Unicode text"),
    case("a file of a null byte", renamed("a\0b"), "the file name 'a\\x00b' leaves the artifact's folder"),
    case("a file of 300 characters", renamed("x" * 300), "cannot be looked at (File name too long)"),
    case("a file of 900 kB", renamed(LONG), "has 900000 characters, more than 4096"),
    case("no state", program(cache=[]), "has 0 state tensors, which no decoder has"),
    case("state that is a text", program(cache=LONG), "cache: expected a list of state tensors, found 'xxx"),
    case("state of numbers", program(cache=[1]), "needs exactly the fields layer, kind, "),
    case("state of an unknown field", state(other=1), "needs exactly the fields layer, kind, "),
    case("state of no axis", state(shape=[]), f"past_conv.0 has the shape []; {CONV_SHAPE}"),
    case("state of 40 axes", state(shape=["batch_size"] + [1] * 39), CONV_SHAPE),
    case("state of 2^93 values", state(shape=["batch_size", 2**31 - 1, 2**31 - 1]), CONV_SHAPE),
    case("state of 2^31 columns", state(shape=["batch_size", 2, 2**31]), CONV_SHAPE),
    case("state too large for memory", state(shape=["batch_size", 2, 2**30]), CONV_SHAPE),
    case("state of no rows", state(shape=["batch_size", 0, 64]), CONV_SHAPE),
    case("state of negative rows", state(shape=["batch_size", -2, 64]), CONV_SHAPE),
    case("state of true", state(shape=["batch_size", True, 64]), CONV_SHAPE),
    case("state without a batch", state(shape=[1, 2, 64]), CONV_SHAPE),
    case("conv state that grows", state(shape=["batch_size", "past_sequence_length", 64]), CONV_SHAPE),
    case("state of an unknown axis", state(shape=["batch_size", "rows", 64]), CONV_SHAPE),
    case("state of an unknown kind", state(kind="ring"), "kind='ring' and layer=0; one of conv, key, value"),
    case("a negative layer", cache(conv(-1)), "layer=-1; one of conv, key, value, and a layer from 0 expected"),
    case("a layer of true", state(layer=True), "cache: layer=True is not a int"),
    case("a layer of 2^70", cache(conv(2**70)), "layer=1180591620717411303424; one of conv, key"),
    case(
        "another name", state(past_name="x"), "layer 0's conv state is named 'x' and 'present_conv.0'; expected past_"
    ),
    case("a name of another layer", cache(conv(1, layer=0)), "is named 'past_conv.1' and 'present_conv.1'; expected"),
    case("a name of a megabyte", state(past_name=LONG), "layer 0's conv state is named 'xxx"),
    case("whole numbers", state(dtype="int64"), "past_conv.0 has the dtype 'int64'; float32 or float16 expected"),
    case("a layer twice", cache(conv(0), conv(1), conv(0)), "its layers are [0, 1, 0]; each once and in order"),
    case("layers backwards", cache(conv(1), conv(0)), "its layers are [1, 0]; each once and in order"),
    case(
        "the same state twice", cache(conv(0), conv(0)), "layer 0 has conv, conv; conv, or key and value of one shape"
    ),
    case("keys alone", cache(key(0)), "layer 0 has key; conv, or key and value of one shape expected"),
    case("values first", cache(key(0, "value"), key(0)), "layer 0 has value, key; conv, or key and value"),
    case("keys and values of two shapes", cache(key(0), key(0, "value", 32)), "of one shape expected"),
]


@pytest.mark.parametrize(("change", "words"), VALUES)
def test_a_value_that_no_export_writes_is_refused(artifact: Path, change: Change, words: tuple[str, ...]) -> None:
    path = artifact / MANIFEST
    manifest = json.loads(path.read_text())
    before = copy.deepcopy(manifest)
    change(manifest)
    assert str(manifest) != str(before)
    path.write_text(json.dumps(manifest))
    refused(artifact, (f"{path}: "[:200], *words) if "File name too long" not in words[0] else words)


def test_the_state_of_both_kinds_of_layers_is_read(artifact: Path) -> None:
    path = artifact / MANIFEST
    manifest = json.loads(path.read_text())
    cache(conv(0), key(1), key(1, "value"), conv(2))(manifest)
    path.write_text(json.dumps(manifest))
    spec = Artifact.open(artifact).program().cache
    assert (spec.bytes_per_token(), spec.fixed_bytes()) == (2 * 2 * 16 * 4, 2 * 2 * 64 * 4)


# The files that it names


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", [MANIFEST, "config.json", GRAPH, DATA])
@pytest.mark.parametrize("reader", [Artifact.open, load_runner], ids=["open", "load_runner"])
def test_what_is_no_file_of_the_folder_is_refused(
    artifact: Path, name: str, special: str, reader: Callable[[Path], object]
) -> None:
    damage, words = SPECIAL[special]
    if special == "climbing link":
        damage = link("../" * (1 + name.count("/")) + "outside/secret")
    damage(artifact / name)
    message = refusal(ArtifactError, artifact, lambda: reader(artifact))
    assert_words(message, (f"{artifact / name}: {words}",))


def test_a_link_with_the_right_bytes_elsewhere_is_refused(artifact: Path) -> None:
    (artifact.parent / DATA).parent.mkdir()
    (artifact / DATA).rename(artifact.parent / DATA)
    (artifact / DATA).symlink_to(artifact.parent / DATA)
    refused(artifact, (f"{artifact / DATA}: is a link that leaves its folder (to ",))


def test_a_folder_in_the_folder_that_is_a_link_to_elsewhere_is_refused(artifact: Path) -> None:
    (artifact / "onnx").rename(artifact.parent / "onnx")
    (artifact / "onnx").symlink_to(artifact.parent / "onnx")
    refused(artifact, (f"{artifact / GRAPH}: is a link that leaves its folder",))


def test_a_file_of_a_terabyte_is_not_hashed(artifact: Path) -> None:
    hostile.sparse(artifact / DATA)
    refused(artifact, (f"{artifact / DATA}: has 1099511627776 bytes where the export wrote ",))


@pytest.mark.parametrize("command", ["inspect", "run", "bench"])
def test_the_commands_refuse_in_a_line(artifact: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    hostile.fifo(artifact / DATA)
    options = {"run": ["--prompt", "x"], "bench": ["--prompt-tokens", "8", "--new-tokens", "4"]}
    assert cli.main([command, str(artifact), *options.get(command, [])]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{DATA}: is not a regular file; put the file itself there" in err


def test_an_artifact_in_the_hubs_cache_opens(artifact: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in artifact.rglob("*") if path.is_file())):
        place = snapshot / path.relative_to(artifact)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / f"{number}")
        place.symlink_to(os.path.relpath(blobs / f"{number}", place.parent))
    assert Artifact.open(snapshot).program().scheme == "q4"
