"""The manifest's JSON: it comes back as it was, and what is wrong in it is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import ArtifactError
from lfm2_export.manifest import CheckpointRecord, FileEntry, Manifest
from tests.artifacts import program, record
from tests.checkpoints import tiny_config, write_random_checkpoint

ENTRY = FileEntry(bytes=3, sha256="0" * 64)


def manifest() -> Manifest:
    files = {"onnx/model_q4.onnx": ENTRY}
    whole = replace(program(), files=files, parity={"kl": 1e-4, "top1": 0.99, "per_prompt": [0.1, None]})
    return Manifest(checkpoint=record(), programs=(whole,), files={"config.json": ENTRY})


def test_json_comes_back_as_it_was() -> None:
    before = manifest()
    after = Manifest.from_json(before.to_json())
    assert after.to_json() == before.to_json()
    assert after.programs[0].cache == before.programs[0].cache
    assert after.programs[0].tensors == before.programs[0].tensors
    assert after.checkpoint == before.checkpoint
    assert after.programs[0].inputs[0].shape == ("batch_size", "sequence_length")
    print(f"{len(before.to_json())} bytes of JSON")


def test_recorded_figures_come_back_with_what_stands_beside_them() -> None:
    figures = {"kl": 0.1, "perplexity": None, "weight_error": {"int4": 0.07}, "text": "2 windows", "passed": True}
    whole = replace(manifest().programs[0], parity={"lowering": figures, "quantization": figures})
    assert Manifest.from_json(replace(manifest(), programs=(whole,)).to_json()).programs[0].parity == whole.parity


def test_text_that_no_file_can_hold_is_written_as_an_escape() -> None:
    """A pattern of ``--exclude`` as a terminal gives bytes that are not UTF-8."""
    whole = replace(manifest().programs[0], options={"exclude": ["caf\udce9"]})
    text = replace(manifest(), programs=(whole,)).to_json()
    assert Manifest.from_json(text.encode("utf-8")).programs[0].options == {"exclude": ["caf\\udce9"]}


def test_figures_that_are_not_finite_become_null() -> None:
    whole = replace(manifest().programs[0], parity={"perplexity": float("inf"), "kl": float("nan")})
    text = replace(manifest(), programs=(whole,)).to_json()
    assert Manifest.from_json(text).programs[0].parity == {"perplexity": None, "kl": None}


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    raw = json.loads(manifest().to_json())
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda m: m.update(schema_version=2),
            "schema_version=2 is unknown, this version of lfm2-export reads 1; install",
        ),
        (lambda m: m.update(schema_version=True), "schema_version=True is unknown"),
        (lambda m: m.pop("schema_version"), "schema_version=None is unknown"),
        (lambda m: m.pop("checkpoint"), "m.json: checkpoint is missing; export again"),
        (lambda m: m.update(extra=1), "m.json: extra is an unknown field"),
        (lambda m: m.update(programs={}), "programs={} is not a list"),
        (lambda m: m["checkpoint"].update(name=7), "checkpoint.name=7 is not a string"),
        (lambda m: m["checkpoint"].update(shards=[]), "checkpoint.shards=[] is not an object"),
        (lambda m: m["files"]["config.json"].update(bytes=3.5), "files.config.json.bytes=3.5 is not an integer"),
        (lambda m: m["files"]["config.json"].update(bytes=True), "files.config.json.bytes=True is not an integer"),
        (lambda m: m["files"]["config.json"].update(bytes=-1), "config.json has no valid size and sha256"),
        (lambda m: m["files"]["config.json"].update(sha256="xy"), "config.json has no valid size and sha256"),
        (lambda m: m["programs"][0]["tensors"][1].update(shape="x"), "programs[0].tensors[1].shape='x' is not a list"),
        (
            lambda m: m["programs"][0]["tensors"][0].update(error="x"),
            "programs[0].tensors[0].error='x' is not a number",
        ),
        (
            lambda m: m["programs"][0]["inputs"][0].update(shape=[1.5]),
            "programs[0].inputs[0].shape[0]=1.5 is not an int",
        ),
        (
            lambda m: m["programs"][0].update(own_cache=[]),
            "has an own_cache of other layers than its cache",
        ),
        (lambda m: m["programs"][0]["cache"][0].pop("kind"), "programs[0].cache: cache: a state tensor needs exactly"),
        (lambda m: m["programs"][0].update(context_length=0), "onnx q4 has context_length=0, which is not from 1"),
        (lambda m: m["programs"][0].update(graphs={}), "onnx q4 has no graph 'model'"),
        (lambda m: m["programs"][0]["graphs"].update(cpu="x.onnx"), "does not list 'x.onnx', its graph 'cpu', among"),
        (lambda m: m["programs"].append(m["programs"][0]), "the program onnx q4 is listed twice"),
        (
            lambda m: m["programs"][0]["options"].update(bits_per_weight={"file": "x"}),
            "options.bits_per_weight={'file': 'x'}, which is not a number for each kind",
        ),
        (lambda m: m["programs"][0]["options"].update(bits_per_weight={"file": -1}), "which is not a number for each"),
        (
            lambda m: m["programs"][0]["options"].update(widths=[{"part": "x", "format": "y", "tensors": 1}]),
            "options.widths=[{",
        ),
        (lambda m: m["programs"][0]["options"].update(widths=7), "options.widths=7, which is not a list of parts and"),
    ],
)
def test_names_what_is_wrong(change: Callable[[dict[str, Any]], object], text: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(edited(change), "m.json")
    print(caught.value)
    assert str(caught.value).startswith("m.json: ")
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\x", "C:x", "", "a//x", "./x", "a\0"])
def test_refuses_names_that_leave_the_folder(name: str) -> None:
    with pytest.raises(ArtifactError, match=r"m\.json: the file name .* leaves the artifact's folder; export again"):
        Manifest.from_json(edited(lambda m: m["files"].update({name: m["files"]["config.json"]})), "m.json")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff\xfe"])
def test_refuses_what_is_not_json(text: str | bytes) -> None:
    with pytest.raises(ArtifactError, match=r"m\.json: is not JSON \(.*; export again"):
        Manifest.from_json(text, "m.json")


def test_a_list_is_no_manifest() -> None:
    with pytest.raises(ArtifactError, match="schema_version=None is unknown"):
        Manifest.from_json("[]", "m.json")


def test_a_record_names_no_path_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_random_checkpoint(tmp_path / "mine", tiny_config("lfm2"), seed=1)
    monkeypatch.chdir(tmp_path / "mine")
    here = CheckpointRecord.of(open_checkpoint("."))
    assert (here.name, here.revision, here.model_type) == ("mine", None, "lfm2")
    assert list(here.shards) == ["model.safetensors"]
    write_random_checkpoint(tmp_path / "copy", tiny_config("lfm2"), seed=1)
    write_random_checkpoint(tmp_path / "other", tiny_config("lfm2"), seed=2)
    assert here.is_same_as(CheckpointRecord.of(open_checkpoint(tmp_path / "copy")))
    assert not here.is_same_as(CheckpointRecord.of(open_checkpoint(tmp_path / "other")))
