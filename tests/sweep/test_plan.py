"""A plan's file: what is taken, and which line is blamed for what is not. No Ray, no checkpoint is opened."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lfm2_export.errors import ConfigError
from lfm2_export.sweep.cells import MOST_CELLS, make_cells
from lfm2_export.sweep.plan import read_plan

GOOD = """\
output: out
checkpoints: [tiny-moe, tiny-dense]
backends: [onnx, executorch]
schemes: [q4, q8, 8da4w]
impossible: skip
settings: {max_context: 512}
variants:
  plain: {algorithm: round}
  grouped: {group_size: 64}
gates: {max_kl: 1e-1, min_top1: 0.5, max_bytes: 1.2GB}
cells:
  - {checkpoint: tiny-moe, scheme: q8, skip: true}
  - scheme: q4
    variant: plain
    gates: {max_kl: 0.2}
quality: {max_tokens: 512}
retries: 1
"""


def planned(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text)
    return path


def test_cells_are_the_product_with_its_exceptions(tmp_path: Path) -> None:
    cells = make_cells(read_plan(planned(tmp_path, GOOD)))
    made = {cell.name: cell for cell in cells if not cell.skipped}
    skipped = {cell.name: cell.skipped for cell in cells if cell.skipped}
    print("\n".join(f"{name}: {reason}" for name, reason in skipped.items()))
    assert len(cells) == 2 * 2 * 3 * 2
    assert {name for name in made if "tiny-moe" in name} == {
        "tiny-moe-onnx-q4-plain",
        "tiny-moe-onnx-q4-grouped",
        "tiny-moe-executorch-8da4w-plain",
        "tiny-moe-executorch-8da4w-grouped",
    }
    assert skipped["tiny-moe-onnx-8da4w-plain"] == "backend onnx has no 8da4w, only: fp32, fp16, q8, q4, q4f16"
    assert "the plan says so (line 12)" in skipped["tiny-moe-onnx-q8-plain"]
    q4, pte = made["tiny-dense-onnx-q4-plain"], made["tiny-dense-executorch-8da4w-grouped"]
    assert (q4.settings, q4.gates.max_kl, q4.gates.min_top1) == ({"algorithm": "round"}, 0.2, 0.5)
    assert (pte.settings, pte.gates.max_kl) == ({"group_size": 64, "max_context": 512}, 0.1)
    assert pte.gates.max_bytes == 1_200_000_000
    assert q4.folder == tmp_path / "out" / "cells" / "tiny-dense-onnx-q4-plain"


def test_settings_that_mean_nothing_for_a_scheme_make_no_second_cell(tmp_path: Path) -> None:
    text = "output: o\ncheckpoints: tiny-moe\nschemes: [q4, fp32]\nvariants:\n  a:\n  b: {algorithm: round}\n"
    with pytest.raises(ConfigError, match=r"plan\.yaml:4: tiny-moe-onnx-fp32-b: is the same as tiny-moe-onnx-fp32-a"):
        make_cells(read_plan(planned(tmp_path, text)))
    cells = make_cells(read_plan(planned(tmp_path, f"{text}impossible: skip\n")))
    assert [cell.name for cell in cells if not cell.skipped] == [
        "tiny-moe-onnx-q4-a",
        "tiny-moe-onnx-fp32-a",
        "tiny-moe-onnx-q4-b",
    ]


MINIMAL = "output: out\ncheckpoints: [tiny-moe]\n"
BAD = {
    "unknown key": (f"{MINIMAL}schemas: [q4]\n", r":3: a plan has no key schemas \(did you mean schemes\?\)"),
    "missing key": ("checkpoints: [tiny-moe]\n", ":1: a plan needs output"),
    "unknown scheme": (f"{MINIMAL}schemes:\n  - q4\n  - q4f61\n", r":5: scheme 'q4f61' .*did you mean q4f16"),
    "unknown backend": (f"{MINIMAL}backends: [onxx]\n", r":3: backend 'onxx' is unknown \(did you mean onnx\?\)"),
    "unknown setting": (f"{MINIMAL}settings: {{goup_size: 32}}\n", ":3: settings has no key goup_size .*group_size"),
    "unknown gate": (f"{MINIMAL}gates:\n  max_kld: 1\n", ":4: gates has no key max_kld .did you mean max_kl"),
    "no checkpoint": ("output: o\ncheckpoints:\n  - tiny-moo\n", ":3: checkpoint 'tiny-moo': no such.*tiny-moe"),
    "no folder": ("output: o\ncheckpoints: [./there]\n", ":2: checkpoint './there': no such folder"),
    "wrong type": (f"{MINIMAL}gates: {{max_kl: much}}\n", ":3: max_kl: a number from 0 to .* found 'much'"),
    "a truth for a number": (f"{MINIMAL}threads: yes\n", ":3: threads: an integer from 1 to .* found True"),
    "a number for a name": ("output: 7\ncheckpoints: [tiny-moe]\n", ":1: output: a name expected, found 7; put digits"),
    "not finite": (f"{MINIMAL}gates: {{max_kl: .nan}}\n", ":3: max_kl: a number"),
    "a share above one": (f"{MINIMAL}gates: {{min_top1: 95}}\n", ":3: min_top1: a number from 0 to 1"),
    "no size": (f"{MINIMAL}gates: {{max_bytes: 7 houses}}\n", ":3: max_bytes: bytes, or a size such as 700MB"),
    "a list for a mapping": (f"{MINIMAL}gates: [1]\n", ":3: gates: a mapping .* found a list"),
    "empty list": ("output: o\ncheckpoints: []\n", ":2: checkpoints is empty"),
    "twice the same": ("output: o\ncheckpoints:\n  - tiny-moe\n  - tiny-moe\n", ":4: .*in line 3; give it once"),
    "twice the scheme": (f"{MINIMAL}schemes: [q4, q4]\n", ":3: scheme q4 is there already"),
    "twice the key": (f"{MINIMAL}output: p\n", ":3: output is there already, in line 1"),
    "impossible": (
        f"{MINIMAL}schemes: [8da4w]\n",
        ":3: tiny-moe-onnx-8da4w: backend onnx has no 8da4w.*impossible: skip",
    ),
    "nothing left": (f"{MINIMAL}schemes: [8da4w]\nimpossible: skip\n", "no cell is left"),
    "wrong value": (f"{MINIMAL}settings:\n  group_size: 33\n", ":4: tiny-moe-onnx-q4: .*33"),
    "useless": (f"{MINIMAL}schemes: [fp32]\nsettings: {{group_size: 32}}\n", ":4: group_size: means nothing"),
    "other backend's": (f"{MINIMAL}settings: {{max_context: 512}}\n", ":3: max_context: means nothing"),
    "no such file": (f"{MINIMAL}settings: {{calibrate: defualt}}\n", ":3: calibrate 'defualt'.*did you mean default"),
    "rule without cells": (
        f"{MINIMAL}cells: [{{scheme: q8, skip: true}}]\n",
        ":3: scheme of this plan: 'q8' is unknown",
    ),
    "rule without effect": (f"{MINIMAL}cells: [{{scheme: q4}}]\n", ":3: an entry of cells changes something"),
    "gate without figures": (f"{MINIMAL}quality: false\ngates: {{max_kl: 1}}\n", ":4: gates on max_kl .* need figures"),
    "bad retries": (f"{MINIMAL}retries: 1000\n", ":3: retries: an integer from 0 to 10"),
    "variant's name": (f"{MINIMAL}variants: {{../up: {{}}}}\n", ":3: variant '../up'"),
    "checkpoint's name": ("output: o\ncheckpoints:\n  - {checkpoint: tiny-moe, name: a/b}\n", ":3: name 'a/b'"),
    "no YAML": ("output: [out\ncheckpoints: x: y\n", ":2: is not YAML"),
    "empty": ("", "is empty"),
    "a list": ("- output\n", ":1: a plan: a mapping .* found a list"),
    "tag": (f"{MINIMAL}schemes: !!python/object/apply:os.system [ls]\n", ":3: .* is no kind of value"),
    "alias": ("output: &a o\ncheckpoints: [*a]\n", ":1: anchors and aliases"),
    "deep": (f"{MINIMAL}schemes: {'[' * 100}q4{']' * 100}\n", ":3: .*nested more than 12"),
    "many": (f"{MINIMAL}schemes: [{', '.join(['q4'] * 20_000)}]\n", ":3: the plan has more than 10,000 values"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_typo_is_told_with_its_line(name: str, tmp_path: Path) -> None:
    text, expected = BAD[name]
    with pytest.raises(ConfigError, match=expected) as found:
        make_cells(read_plan(planned(tmp_path, text)))
    print(found.value)
    assert "\n" not in str(found.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.yaml"]


def test_the_smallest_plan_is_one_cell_of_the_default_scheme(tmp_path: Path) -> None:
    (cell,) = make_cells(read_plan(planned(tmp_path, MINIMAL)))
    assert (cell.name, cell.settings, cell.skipped) == ("tiny-moe-onnx-q4", {}, "")


def test_a_billion_laughs_and_a_large_plan_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [lol, lol]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 30)]
    with pytest.raises(ConfigError, match=":1: anchors and aliases"):
        read_plan(planned(tmp_path, "\n".join(lines)))
    names = ", ".join(f"{{checkpoint: tiny-moe, name: a{n}, offline: {n % 2 == 0}}}" for n in range(MOST_CELLS + 1))
    with pytest.raises(ConfigError, match=f"the plan has {MOST_CELLS + 1} cells, more than {MOST_CELLS}"):
        make_cells(read_plan(planned(tmp_path, f"output: o\ncheckpoints: [{names}]\n")))
    with pytest.raises(ConfigError, match=r"more than the .* of text"):
        read_plan(planned(tmp_path, "# " + "a" * 300_000))


def test_an_output_in_a_checkpoint_is_refused_and_paths_count_from_the_plan(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for output, expected in {
        "model": "output lies in checkpoint model",
        "model/deeper": "output lies in checkpoint model",
        "plan.yaml": "is a file",
    }.items():
        with pytest.raises(ConfigError, match=f":1: .*{expected}"):
            read_plan(planned(tmp_path, f"output: {output}\ncheckpoints: [model]\n"))
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(ConfigError, match="output lies in checkpoint model"):
        read_plan(planned(tmp_path, "output: link/out\ncheckpoints: [model]\n"))
    plan = read_plan(planned(tmp_path, "output: out\ncheckpoints: [./model]\n"))
    assert plan.checkpoints[0].request.name == str(tmp_path / "model")


def test_a_plan_that_was_changed_at_random_is_read_or_refused_in_a_line(tmp_path: Path) -> None:
    """Pieces are cut out, doubled, and replaced by what YAML means something by."""
    rng = random.Random(0)
    pieces = [
        "[",
        "]",
        "{",
        "}",
        ":",
        "\n",
        "  ",
        "- ",
        "'",
        "null",
        "-1",
        "1e400",
        "&a",
        "*a",
        "!!x",
        "? ",
        "|\n",
        "\t",
    ]
    refused = []
    for _ in range(300):
        text = GOOD + "# a comment, in which nothing matters\n" * 12
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(text))
            end = start + rng.randint(0, 12)
            text = text[:start] + rng.choice([*pieces, text[start:end] * 2, ""]) + text[end:]
        try:
            make_cells(read_plan(planned(tmp_path, text)))
        except ConfigError as error:
            refused.append(str(error))
    print(f"{len(refused)} of 300 refused")
    assert 100 < len(refused) < 300
    assert all(line.startswith(str(tmp_path / "plan.yaml")) and "\n" not in line for line in refused)
