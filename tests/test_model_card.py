"""The model card says what the manifest says, whatever names are in it."""

from __future__ import annotations

import os
import re
from dataclasses import replace

from huggingface_hub import ModelCard

from lfm2_export import model_card
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.manifest import CheckpointRecord
from tests.artifacts import program

NAME = "a/[here](http://x)\n# <script>|`b`*c*\x1b[2J" + os.fsdecode(b"\xff")


def rendered(record: CheckpointRecord, **changes: object) -> str:
    return model_card.render(record, [replace(program(), **changes)], open_checkpoint("tiny-dense"))  # type: ignore[arg-type]


def test_a_hub_checkpoint_is_named_as_the_hub_reads_it() -> None:
    record = replace(CheckpointRecord.of(open_checkpoint("tiny-dense")), name="LiquidAI/LFM2-1.2B", revision="a" * 40)
    card = rendered(record)
    assert "\nbase_model: LiquidAI/LFM2-1.2B\n" in card
    assert f"\n# {record} for on-device runtimes\n" in card
    assert "| onnx | q4 | `onnx/model_q4.onnx` |" in card


def test_a_name_changes_nothing_but_what_it_says() -> None:
    record = replace(CheckpointRecord.of(open_checkpoint("tiny-dense")), name=NAME, revision="main")
    figures = {"lowering": {"kl": "x", "max_abs_error": 1e-5}, "quantization": [1]}
    graphs = {"model": "onnx/`a`|b.onnx"}
    plain = rendered(replace(record, name="a/b"))
    card = rendered(record, graphs=graphs, parity=figures)
    assert card.isascii() or not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", card)
    read = ModelCard(card).data.to_dict()
    assert read == {**ModelCard(plain).data.to_dict(), "base_model": NAME}
    _, _, body = card.removeprefix("---\n").partition("\n---\n")
    (title,) = [line for line in body.splitlines() if line.startswith("# ")]
    assert title.startswith(r"# a/\[here\](http://x) \# \<script\>\|\`b\`\*c\*\\x1b\[2J\\udcff")
    assert "| onnx | q4 | `onnx/'a'/b.onnx` |" in body
    assert "| onnx q4 | 1.0e-05 | - | - | - | - |" in body
