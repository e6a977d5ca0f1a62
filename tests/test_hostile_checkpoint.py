"""Checkpoints of strangers: whatever is wrong with one is a line that names the file, soon, and nothing is changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import lfm2_export
from lfm2_export import cli, paths
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import CheckpointError
from tests import hostile
from tests.checkpoints import tiny_config
from tests.hostile import (
    COMPANIONS,
    CONFIG,
    LONG,
    SHARD,
    SPECIAL,
    Damage,
    assert_readable,
    assert_words,
    case,
    link,
    raw,
    refusal,
    refused,
    write_originals,
)

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="links, FIFOs and devices"),
    pytest.mark.timeout(120),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    write_originals(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def single(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "single", tmp_path / "here" / "checkpoint"))


# config.json


def config(**changes: Any) -> Damage:
    def damage(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def moe(**changes: Any) -> Damage:
    return lambda path: path.write_text(json.dumps(tiny_config("lfm2_moe") | changes))


def with_key(text: str) -> Damage:
    """A key of which JSON's text is given, as Python would not write it."""
    return lambda path: path.write_text(path.read_text().rstrip().removesuffix("}") + f", {text}}}")


CONFIGS = [
    case("larger than any config", raw(b"[" + b"{}," * 400_000 + b"{}]"), CONFIG, "has 1200004 bytes, more than"),
    case("a terabyte", hostile.sparse, CONFIG, "has 1099511627776 bytes, more than the 1048576"),
    case("empty", raw(""), CONFIG, "is not JSON"),
    case("null", raw("null"), "holds None, not a JSON object"),
    case("a number", raw("7"), "holds 7, not a JSON object"),
    case("a long text", raw(json.dumps(LONG)), "holds 'xxx", "not a JSON object"),
    case("a long list", raw(json.dumps([0] * 10**5)), "holds [0, 0, ", "not a JSON object"),
    case("zero bytes", raw(bytes(1000)), CONFIG, "is not JSON"),
    case("no text", raw(b"\xff" * 1000), CONFIG, "is not JSON"),
    case("control characters", raw('{"a": "\x1b[2J"}'), "is not JSON (Invalid control character"),
    case("nested endlessly", raw("[" * 500_000), "is not JSON (maximum recursion depth"),
    case("objects in objects", raw('{"a":' * 100_000), "is not JSON (maximum recursion depth"),
    case("nested deeply", with_key('"a": ' + "[" * 300 + "]" * 300), "is nested more than 64 levels deep"),
    case("5,000 digits", with_key('"hidden_size": ' + "9" * 5000), "is not JSON (Exceeds the limit"),
    case("4,000 digits", with_key('"hidden_size": ' + "9" * 4000), "hidden_size=999", "an integer from 1"),
    case("4,000 digits as epsilon", with_key('"norm_eps": ' + "9" * 4000), "norm_eps=999", "a finite number"),
    case("NaN", with_key('"norm_eps": NaN'), "norm_eps=nan is not supported; expected a finite"),
    case("Infinity", with_key('"rope_theta": Infinity'), "rope_theta=inf is not supported"),
    case("-Infinity", with_key('"norm_eps": -Infinity'), "norm_eps=-inf is not supported"),
    case("1e999", with_key('"hidden_size": 1e999'), "hidden_size=inf is not supported"),
    case("NaN as size", with_key('"num_hidden_layers": NaN'), "num_hidden_layers=nan is not supported"),
    case("NaN that another key must equal", with_key('"conv_dim": NaN'), "conv_dim=nan is not supported"),
    case("a text of 900 kB", config(hidden_act=LONG), "hidden_act='xxx", "is not supported"),
    case("a list as size", config(hidden_size=[1] * 10**5), "hidden_size=[1, 1, "),
    case("an object as size", config(vocab_size={str(i): i for i in range(10**4)}), "vocab_size={'0': 0, "),
    case("another family", config(model_type=LONG), "model_type='xxx", "known families: lfm2, lfm2_moe"),
    case("half a character", with_key('"model_type": "\\ud800"'), "model_type='\\ud800' is not supported"),
    case("terminal codes", config(model_type="\x1b]0;owned\x07"), "model_type='\\x1b]0;owned\\x07'"),
    case("text from right to left", config(model_type="lfm2\u202e"), "model_type='lfm2\\u202e'"),
    case("a list as family", config(model_type=["lfm2"] * 1000), "model_type=['lfm2', "),
    case("no family", config(model_type=None), "model_type=None is not supported"),
    case("layers of an unknown kind", config(layer_types=["\n" * 10**5] * 5), "layer_types[0]='\\n"),
    case("layers that are no list", config(layer_types="conv" * 10**5), "layer_types='conv"),
    case("layers of layers", config(layer_types=[["conv"]] * 5), "layer_types[0]=['conv']"),
    case("too many layer types", config(layer_types=["conv"] * 50_000), "has 50000 entries but num_hidden_layers=5"),
    case("a billion layers", config(num_hidden_layers=10**9), "num_hidden_layers=1000000000 is not supp"),
    case("ten thousand layers", config(num_hidden_layers=10**4, layer_types=None), "missing: model.layers."),
    case(
        "attention layers, each a thousand times",
        config(num_hidden_layers=10**4, layer_types=None, full_attn_idxs=list(range(100)) * 1500),
        "missing: model.layers.",
    ),
    case("attention beyond the last layer", config(layer_types=None, full_attn_idxs=[10**30]), "full_attn_idxs="),
    case(
        "65,536 experts in 10,000 layers",
        moe(num_experts=65_536, num_hidden_layers=10**4, layer_types=["conv"] * 10**4),
        "num_experts=65536 in 9999 layers are 1965883392 tensors, more than the 131072",
    ),
    case("65,536 experts in one layer", moe(num_experts=65_536, num_dense_layers=4), "are 196608 tensors"),
    case("40,000 experts in one layer", moe(num_experts=40_000, num_dense_layers=4), "missing: model.layers."),
    case("wider than the weights", config(hidden_size=128), "wrong shape: model.embed_tokens.weight is [2660, 64]"),
    case("a vocabulary of 2^31", config(vocab_size=2**31 - 1), "wrong shape: model.embed_tokens.weight is [2660"),
    case("a rope of 10,000 keys", config(rope_scaling={f"k{i}": {} for i in range(10**4)}), "k0={} is not supported"),
    case("a key of 900 kB", config(rope_scaling={LONG: {}}), CONFIG, "is not supported"),
    case(
        "a quantization of 900 kB",
        config(quantization_config={"a": LONG}),
        "quantization_config says that the weights are quantized already",
    ),
    case("tokens beyond the vocabulary", config(eos_token_id=[-(10**30)] * 10**4), "eos_token_id=-1000"),
    case("tokens of tokens", config(eos_token_id=[[[2]]]), "eos_token_id=[[2]] is not supported"),
]


@pytest.mark.parametrize(("damage", "words"), CONFIGS)
def test_a_hostile_config_is_refused(single: Path, damage: Damage, words: tuple[str, ...]) -> None:
    damage(single / CONFIG)
    refused(single, words)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", [CONFIG, SHARD])
def test_what_is_no_file_of_the_folder_is_refused(single: Path, name: str, special: str) -> None:
    damage, words = SPECIAL[special]
    damage(single / name)
    refused(single, (f"{name}: {words}",), CheckpointError)


# Companion files, which an export reads and copies


# A folder of licences is left alone.
@pytest.mark.parametrize(
    ("name", "special"),
    [
        (name, special)
        for name in COMPANIONS
        for special in (*SPECIAL, "a terabyte")
        if name != "LICENSE" or "folder" not in special
    ],
)
def test_a_companion_that_is_no_file_of_the_folder_is_refused(single: Path, name: str, special: str) -> None:
    damage, words = SPECIAL.get(special, (hostile.sparse, "has 1099511627776 bytes, more than the"))
    damage(single / name)
    output = single.parent.parent / "output"
    message = refusal(CheckpointError, single, lambda: lfm2_export.export(single, scheme="fp32", output=output))
    assert_words(message, (f"{single.name}/{name}: {words}",))
    assert not output.exists()


@pytest.mark.parametrize("name", [CONFIG, SHARD, *COMPANIONS])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_file_that_the_system_does_not_give_is_a_line(
    single: Path, name: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, *options: Any, **named: Any) -> int:
        if str(path) == str(single / name):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *options, **named)

    monkeypatch.setattr(os, "open", refuse)
    output = single.parent.parent / "output"
    message = refusal(CheckpointError, single, lambda: lfm2_export.export(single, scheme="fp32", output=output))
    assert_words(message, (f"{single / name}: cannot be read ({os.strerror(code)}); check the file and its rights",))


# The folder


def test_a_folder_of_a_million_names_is_not_listed(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "MOST_NAMES", 50)
    for number in range(60):
        (single / f"{number}.txt").touch()
    message = refusal(CheckpointError, single, lambda: open_checkpoint(single).files())
    assert_words(message, ("holds more than 50 files; give the folder of one model alone",))


def test_of_many_licences_the_first_few_are_taken(single: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(100):
        (single / f"LICENSE-{number:02}.txt").touch()
    for name in ("LICENSE\nmine", "LICENSE`code`", "LICENSE:x", "LICENSE" + "x" * 200, os.fsdecode(b"LICENSE\xff")):
        (single / name).touch()
    checkpoint = open_checkpoint(single)
    for _ in range(2):
        names = [path.name for path in checkpoint.files() if path.name not in COMPANIONS[:-1]]
        assert names == ["LICENSE", *(f"LICENSE-{number:02}.txt" for number in range(15))]
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "checkpoint: is without these licence files from here on: LICENSE" in warning
    assert warning.endswith(" and 82 more")


def test_the_licences_of_people_are_taken(single: Path, caplog: pytest.LogCaptureFixture) -> None:
    (single / "LICENSES").mkdir()
    (single / "LICENSES" / "MIT.txt").touch()
    names = ["LICENSE", "LICENSE (1).txt", "LICENSE-MODEL", "LICENSE.md", "LICENSE_für_alle.txt"]
    for name in names:
        (single / name).touch()
    assert [path.name for path in open_checkpoint(single).files()][-5:] == names
    assert not caplog.records


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", b"[bold]", b"[", b"a\nb", b"\x1b[2J"])
def test_a_folder_of_any_name_opens(single: Path, name: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.fsdecode(os.fsencode(single.parent) + b"/" + name))
    single.rename(folder)
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.encode("utf-8"))
    assert found["kind"] == "checkpoint"
    (folder / CONFIG).unlink()
    assert_readable(refusal(CheckpointError, folder, lambda: open_checkpoint(folder)))


def test_a_refusal_of_the_command_line_is_one_line_without_the_names(
    single: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config(hidden_size=128)(single / CONFIG)
    assert cli.main(["inspect", str(single)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert len(err) < 400
    assert err.startswith(f"lfm2-export: {single}: the weights do not fit config.json; 48 wrong shape: ")


# What is right stays so


def test_links_within_the_folder_and_to_the_folder_are_followed(single: Path) -> None:
    (single / SHARD).rename(single / "weights")
    link("weights")(single / SHARD)
    link("checkpoint")(single.parent / "other")
    assert open_checkpoint(single.parent / "other").total_bytes == open_checkpoint(single).total_bytes


def test_a_snapshot_of_the_hubs_cache_opens(single: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(single.iterdir())):
        path.rename(blobs / f"{number}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"{number}"))
    checkpoint = open_checkpoint(snapshot)
    assert {path.name for path in checkpoint.files()} == set(COMPANIONS)
    assert list(checkpoint.shard_hashes()) == [SHARD]
