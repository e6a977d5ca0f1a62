"""Where a manifest says that weights lie, and what a .pte says of itself: refused in a line, or true of the bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2_export.backends import get_backend
from lfm2_export.config import ModelConfig
from lfm2_export.errors import ArtifactError, Lfm2ExportError
from lfm2_export.families import get_family
from lfm2_export.manifest import Manifest
from lfm2_export.messages import MESSAGE_LIMIT
from tests.fuzz.targets import FOLDER

FILE = "executorch/model_8da4w.pte"
NORM, LINEAR, IN_PROJ = (
    "model.embedding_norm.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.conv.in_proj.weight",
)
EXPERT = "model.layers.1.feed_forward.experts.1.w1.weight"
Places = dict[str, Any]


def config() -> ModelConfig:
    raw = json.loads((FOLDER / "base" / "config.json").read_bytes())
    return get_family(raw["model_type"]).parse_config(raw)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / FILE).parent.mkdir()
    shutil.copyfile(FOLDER / "base" / "model_8da4w.pte", tmp_path / FILE)
    return tmp_path


def opened(folder: Path, change: Callable[[Places], object]) -> Any:
    """The weights of the program, with another manifest."""
    raw = json.loads((FOLDER / "corpus" / "weights" / "exported.json").read_bytes())
    change(raw["programs"][1]["options"])
    program = Manifest.from_json(json.dumps(raw)).programs[1]
    return get_backend("executorch").stored_weights(folder, replace(program, files={}), config())


def part(name: str, index: int = 0, **fields: Any) -> Callable[[Places], object]:
    """Fields of a part of a tensor."""
    return lambda options: options["weights"]["model_8da4w.pte"][name][index].update(fields)


def tensor(name: str, value: Any) -> Callable[[Places], object]:
    return lambda options: options["weights"]["model_8da4w.pte"].update({name: value})


CASES: dict[str, tuple[Callable[[Places], object], str]] = {
    "no weights": (lambda options: options.pop("weights"), "options.weights are None, not an object for each file"),
    "weights that are text": (lambda options: options.update(weights="x"), "options.weights are 'x', not an object"),
    "weights of another file": (lambda options: options.update(weights={"x.pte": {}}), "options.weights are None"),
    "no tensor": (lambda options: options.update(weights={"model_8da4w.pte": {}}), "does not say where .* lies"),
    "no list": (tensor(NORM, {"kind": "float"}), "place of model.embedding_norm.weight is .* not a list of parts"),
    "no part": (tensor(NORM, []), r"is \[\], not a list of parts"),
    "a part that is none": (tensor(NORM, ["float"]), "has the part 'float', not an object"),
    "no kind": (tensor(NORM, [{}]), "has kind=None, not a known one"),
    "an unknown kind": (part(NORM, kind="embedding9"), "has kind='embedding9', not a known one"),
    "a kind that is a list": (part(NORM, kind=[]), r"has kind=\[\], not a known one"),
    "a kind of matrices": (part(NORM, kind="int4"), r"has kind='int4', for matrices, which \[32\] is not"),
    "no digest": (part(NORM, data=None), "has data=None, not a SHA-256"),
    "a digest of another length": (part(NORM, data="0" * 63), "has data='0+…0+', not a SHA-256"),
    "no scale": (part(LINEAR, scale=7), "has scale=7, not a SHA-256"),
    "rows that are no list": (part(IN_PROJ, rows=32), "has rows=32, not two row numbers"),
    "rows that are true": (part(IN_PROJ, rows=[False, True]), r"has rows=\[False, True\], not two row numbers"),
    "rows in reverse": (part(IN_PROJ, rows=[32, 0]), r"has rows=\[32, 0\], not within 96 rows"),
    "rows beyond the tensor": (part(IN_PROJ, 2, rows=[64, 128]), r"not within 96 rows"),
    "rows that leave a gap": (part(IN_PROJ, 1, rows=[33, 64]), "do not meet at row 32"),
    "rows that are missing": (part(IN_PROJ, 2, rows=[64, 95]), "have 95 rows, its config asks for 96"),
    "a group size of none": (part(LINEAR, group_size=0), "has group_size=0, not an integer from 1 to 32"),
    "a group size of text": (part(LINEAR, group_size="32"), "has group_size='32', not an integer"),
    "a group size that does not divide": (part(LINEAR, group_size=30), "has group_size=30, no multiple of 2"),
    "an expert too many": (part(EXPERT, expert=2), "has expert=2, not an integer from 0 to 1"),
    "an expert below none": (part(EXPERT, expert=-1), "has expert=-1, not an integer"),
    "a blob without axes": (part(EXPERT, shape=[]), r"has shape=\[\], not the sizes of 2 axes"),
    "a blob of texts": (part(EXPERT, shape=["2", 1600]), "not the sizes of 2 axes"),
    "a blob beyond 64 bits": (part(EXPERT, shape=[2**62, 1600]), "not the sizes of 2 axes"),
    "a blob of half a row": (part(EXPERT, shape=[2, 1601]), "no number of whole rows"),
    "other columns": (part(EXPERT, columns=64), "has columns=64, not the 32 that its config asks for"),
    "blob rows beyond it": (part(EXPERT, blob_rows=[64, 96]), r"has blob_rows=\[64, 96\], not within 64 rows"),
    "too few blob rows": (part(EXPERT, blob_rows=[0, 16]), r"has blob_rows=\[0, 16\], not 32 rows"),
    "tiles of ours that are none": (part(EXPERT, kind="lfm2"), "not the sizes of 4 axes"),
    "tiles of another size": (
        part(EXPERT, kind="lfm2", shape=[2, 2, 1, 575], first=0, step=2),
        r"\[32, 32\] weights, its config asks for \[32, 32\]",
    ),
    "tiles that do not move on": (
        part(EXPERT, kind="lfm2", shape=[2, 2, 1, 576], first=0, step=0),
        "has step=0, not an integer from 1",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_place_that_cannot_be_is_refused(folder: Path, case: str) -> None:
    change, said = CASES[case]
    with pytest.raises(ArtifactError, match=said) as refused:
        opened(folder, change)
    print(refused.value)
    assert len(str(refused.value)) <= MESSAGE_LIMIT
    assert str(refused.value).endswith("; export again")


def test_bytes_that_are_not_in_the_file_are_missed(folder: Path) -> None:
    weights = opened(folder, part(NORM, data="0" * 64))
    with pytest.raises(ArtifactError, match=r"does not hold model\.embedding_norm\.weight as the manifest describes"):
        weights.read(NORM)


def test_every_weight_comes_back_where_nothing_is_wrong(folder: Path) -> None:
    weights = opened(folder, lambda options: None)
    for name, each in weights.tensors.items():
        values = weights.read(name)
        assert values.shape == each.shape
        assert 0 < np.abs(values).max() < 10
    assert {weights.tensors[name].dtype for name in (NORM, LINEAR, "model.embed_tokens.weight")} == {
        *("float32", "int4", "int8")
    }


def test_a_program_of_any_bytes_is_read_or_refused(folder: Path) -> None:
    """One word at a time of the header and the tables, which are the first bytes: its offset, its count, its index."""
    whole = (folder / FILE).read_bytes()
    tables = int.from_bytes(whole[16:24], "little")
    refused = []
    for at in range(0, tables - 4, 4 * max(1, tables // 4 // 150)):
        for word in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\x01\x01\x00\x00"):
            (folder / FILE).write_bytes(whole[:at] + word + whole[at + 4 :])
            try:
                opened(folder, lambda options: None).read(NORM)
            except Lfm2ExportError as error:
                refused.append(str(error))
    print(f"{len(refused)} refused")
    assert len(refused) > 10
    assert [message for message in refused if not message.isprintable() or "again" not in message] == []
