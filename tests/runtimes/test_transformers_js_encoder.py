"""Transformers.js' feature-extraction pipeline opens an encoder's artifact as it is and gives our vectors."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lfm2_export
from tests.conftest import Exported
from tests.encoder_checkpoints import COLBERT, EMBEDDING, MASKED_LM
from tests.runtimes.test_transformers_js import MODULES, WHERE, pytestmark
from tests.shows import of, shows

__all__ = ["pytestmark"]

DRIVER = Path(__file__).with_name("extract.mjs")
TEXTS = ["query: What is a dictionary?", "query: x", "document: A list holds items, in order."]
# onnxruntime-node's kernels are of another release; int8 activations are rounded otherwise, too.
TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "q8": 2e-2, "q4": 5e-2, "q4f16": 5e-2}


def run(folder: Path, dtype: str, where: str) -> dict[str, Any]:
    job = json.dumps({"folder": str(folder), "dtype": dtype, "texts": TEXTS})
    result = subprocess.run(["node", DRIVER, MODULES, where], input=job, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, "\n".join(line[:300] for line in result.stderr.splitlines())
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@shows(of("where", WHERE.get), "embeddings", "padding", family="lfm2_bidirectional", scheme=of("scheme"))
@pytest.mark.parametrize(
    ("scheme", "where"),
    [
        ("fp32", "native"),
        ("fp16", "native"),
        ("q8", "native"),
        ("q4", "native"),
        ("q4f16", "native"),
        ("fp32", "wasm"),
        ("q4", "wasm"),
    ],
)
def test_pooled_vectors_of_a_padded_batch(encoder: Callable[..., Exported], scheme: str, where: str) -> None:
    folder = encoder(EMBEDDING, ("fp32", "fp16", "q8", "q4", "q4f16")).artifact
    found = run(folder, scheme, where)
    ours = lfm2_export.load_encoder(folder, scheme=scheme)
    rows = [ours.preparation.cut(text, 512) for text in TEXTS]
    expected = np.stack([one["sentence_embedding"] for one in ours.run(rows)])
    error = np.abs(np.array(found["pooled"]) - expected).max()
    print(f"{scheme} {where}: {error:.1e}")
    assert error < TOLERANCE[scheme]
    assert np.abs(expected - expected[::-1]).max() > 2 * TOLERANCE[scheme], "the comparison can fail"
    own = np.array(found["outputs"]["sentence_embedding"]["data"])
    assert np.abs(own - expected[0]).max() < TOLERANCE[scheme]


@pytest.mark.parametrize(("kind", "name"), [(COLBERT, "token_embeddings"), (MASKED_LM, "logits")])
def test_other_heads(encoder: Callable[..., Exported], kind: str, name: str) -> None:
    folder = encoder(kind, ("fp32", "q4")).artifact
    found = run(folder, "fp32", "native")["outputs"][name]
    ours = lfm2_export.load_encoder(folder, scheme="fp32")
    (expected,) = ours.run([ours.preparation.cut(TEXTS[0], 512)])
    values = np.array(found["data"]).reshape(found["dims"])[0]
    assert np.abs(values - expected[name]).max() < (1e-4 if name == "logits" else 1e-5)
