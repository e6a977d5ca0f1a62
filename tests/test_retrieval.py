"""sentence-transformers' files are a stranger's: read within bounds, inside their folder, refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import lfm2_export
from lfm2_export import retrieval
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.cli import main
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.heads import Pooling
from tests.encoder_checkpoints import COLBERT, EMBEDDING, WIDTH, write_encoder

Change = Callable[[Path], object]
MODULES, SETTINGS, LENGTH = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}


def modules(*more: Any) -> Change:
    return lambda folder: (folder / MODULES).write_text(json.dumps([TRANSFORMER, *more]))


def entry(type_: object, path: object = "1_X") -> dict[str, object]:
    return {"idx": 1, "name": "1", "path": path, "type": type_}


def edit(name: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, **values}))

    return change


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def link_to(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def fifo(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def dense_weights(**tensors: np.ndarray) -> Change:
    return lambda folder: save_file(tensors, folder / "1_Dense/model.safetensors")


DENSE, POOLING = "1_Dense/config.json", "1_Pooling/config.json"
HOSTILE: dict[str, tuple[str, Change, str]] = {
    "modules that are no list": (
        EMBEDDING,
        text(MODULES, "{}"),
        "modules={} is not supported; expected a list of 1 to",
    ),
    "modules that are no JSON": (EMBEDDING, text(MODULES, "["), "modules.json: is not JSON"),
    "a hundred modules": (EMBEDDING, modules(*[entry("x.Normalize")] * 100), "expected a list of 1 to 8 modules"),
    "a module of a number": (EMBEDDING, modules(3), "type=None is not supported; expected the name of a class"),
    "an unknown module": (EMBEDDING, modules(entry("os.system")), "type='system' is not supported"),
    "a folder above": (EMBEDDING, modules(entry("x.Pooling", "../1_Pooling")), "path='../1_Pooling' is not supported"),
    "an absolute folder": (EMBEDDING, modules(entry("x.Pooling", "/etc")), "path='/etc' is not supported"),
    "a folder of a number": (EMBEDDING, modules(entry("x.Pooling", 3)), "path=3 is not supported"),
    "a folder that is not there": (EMBEDDING, modules(entry("x.Pooling", "1_No")), "1_No/config.json: cannot be read"),
    "two kinds of head": (
        EMBEDDING,
        lambda folder: (modules(entry("x.Pooling", "1_Pooling"), entry("x.Dense", "1_Dense"))(folder), _dense(folder)),
        "type='Dense' is not supported; expected no Dense behind a Pooling",
    ),
    "two Denses": (
        COLBERT,
        modules(entry("x.Dense", "1_Dense"), entry("x.Dense", "1_Dense")),
        "type='Dense' is not supported; expected Transformer, then Pooling or one Dense",
    ),
    "another pooling": (
        EMBEDDING,
        edit(POOLING, pooling_mode_cls_token=False, pooling_mode_max_tokens=True),
        "pooling_mode='max' is not supported; expected cls or mean",
    ),
    "two poolings": (
        EMBEDDING,
        edit(POOLING, pooling_mode_max_tokens=True),
        "pooling_mode=['cls', 'max'] is not supported",
    ),
    "a mean without the prompt": (
        EMBEDDING,
        text(POOLING, '{"pooling_mode": "mean", "include_prompt": false}'),
        "include_prompt=False is not supported; expected true with mean pooling",
    ),
    "an activation": (
        COLBERT,
        edit(DENSE, activation_function="torch.nn.modules.activation.Tanh"),
        "activation_function='torch.nn.modules.activation.Tanh' is not supported; expected torch.nn.modules.linear",
    ),
    "a residual": (COLBERT, edit(DENSE, use_residual=True), "use_residual=True is not supported; expected false"),
    "a Dense without a width": (COLBERT, edit(DENSE, out_features=None), "out_features=None is not supported"),
    "a Dense of 2^40 values": (COLBERT, edit(DENSE, out_features=2**40), "out_features=1099511627776 is not supported"),
    "a Dense for another width": (COLBERT, edit(DENSE, in_features=65), "in_features=65, but config.json says"),
    "a Dense of another shape": (COLBERT, edit(DENSE, out_features=33), "dense.linear.weight is [32, 64], config.json"),
    "a Dense with a bias that is not there": (COLBERT, edit(DENSE, bias=True), "1 missing: dense.linear.bias"),
    "a Dense with a bias that it does not name": (
        COLBERT,
        dense_weights(**{"linear.weight": np.ones((WIDTH, 64), "f4"), "linear.bias": np.ones(WIDTH, "f4")}),
        "1 left over: dense.linear.bias",
    ),
    "a Dense of NaN": (
        COLBERT,
        dense_weights(**{"linear.weight": np.full((WIDTH, 64), np.nan, "f4")}),
        "dense.linear.weight: 2048 of 2048 values are not finite",
    ),
    "a pickled Dense": (
        COLBERT,
        lambda folder: (folder / "1_Dense/model.safetensors").rename(folder / "1_Dense/pytorch_model.bin"),
        "model.safetensors: is missing (pickled weights stay closed)",
    ),
    "a Dense that is a link out": (COLBERT, link_to("1_Dense/model.safetensors", "/etc/passwd"), "leaves its folder"),
    "settings that are a link out": (EMBEDDING, link_to(SETTINGS, "/etc/passwd"), "leaves its folder"),
    "a pooling that is a FIFO": (EMBEDDING, fifo(POOLING), "is not a regular file"),
    "settings of 2 MB": (EMBEDDING, edit(SETTINGS, prompts={"query": "x" * (2 << 20)}), "more than the 1048576"),
    "prompts that are a list": (EMBEDDING, edit(SETTINGS, prompts=["a"]), "prompts=['a'] is not supported"),
    "a prompt that is a number": (EMBEDDING, edit(SETTINGS, prompts={"a": 1}), "prompts={'a': 1} is not supported"),
    "a default that is no prompt": (EMBEDDING, edit(SETTINGS, default_prompt_name="x"), "default_prompt_name='x' is"),
    "a length of -1": (EMBEDDING, edit(LENGTH, max_seq_length=-1), "max_seq_length=-1 is not supported"),
    "a query of no tokens": (COLBERT, edit(SETTINGS, query_length=0), "query_length=0 is not supported"),
    "a prefix that is a number": (COLBERT, edit(SETTINGS, query_prefix=3), "query_prefix=3 is not supported"),
    "a skiplist of numbers": (COLBERT, edit(SETTINGS, skiplist_words=[3]), "skiplist_words=[3] is not supported"),
    "expansion of a text": (COLBERT, edit(SETTINGS, do_query_expansion="no"), "do_query_expansion='no' is not"),
}


def _dense(folder: Path) -> None:
    (folder / "1_Dense").mkdir()
    (folder / DENSE).write_text('{"in_features": 64, "out_features": 3, "bias": false}')
    save_file({"linear.weight": np.ones((3, 64), "f4")}, folder / "1_Dense/model.safetensors")


@pytest.mark.parametrize(("kind", "change", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, change: Change, expected: str
) -> None:
    folder = write_encoder(tmp_path / "checkpoint", kind)
    change(folder)
    assert main(["export", str(folder), "--scheme", "fp32", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    print(error)
    assert expected in error
    assert len([line for line in error.splitlines() if line.startswith("lfm2-export:")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_published_forms(tmp_path: Path) -> None:
    """Newer configs say the same in other words."""
    folder = write_encoder(tmp_path, EMBEDDING)
    (folder / POOLING).write_text('{"embedding_dimension": 64, "pooling_mode": "cls", "include_prompt": true}')
    modules(
        entry("sentence_transformers.sentence_transformer.modules.pooling.Pooling", "1_Pooling"),
        entry("sentence_transformers.base.modules.normalize.Normalize", "2_Normalize"),
    )(folder)
    found = retrieval.read(folder)
    assert found is not None
    assert found.pooling is Pooling.FIRST
    assert found.names == (MODULES, POOLING, SETTINGS, LENGTH)
    assert found.text.prompts == {"query": "query: ", "document": "document: "}
    assert open_checkpoint(write_encoder(tmp_path / "b", COLBERT)).retriever.text.query_length == 12  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [EMBEDDING, COLBERT])
def test_the_files_are_carried_over_as_they_are(encoder, kind: str) -> None:
    made = encoder(kind)
    found = retrieval.read(made.checkpoint)
    assert found is not None
    assert len(found.names) == (4 if kind == EMBEDDING else 5)
    for name in found.names:
        assert (made.artifact / name).read_bytes() == (made.checkpoint / name).read_bytes()
    assert set(found.names) <= set(lfm2_export.Artifact.open(made.artifact).manifest.files)


def test_an_artifacts_files_are_read_with_the_same_care(encoder, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(encoder(EMBEDDING).artifact, tmp_path / "a")
    link_to(SETTINGS, "/etc/passwd")(tmp_path / "a")
    with pytest.raises(Lfm2ExportError, match=r"config_sentence_transformers\.json: is a link that leaves its folder"):
        lfm2_export.load_encoder(tmp_path / "a").encode("a")
