"""What two servers are compared on: a random model of a published shape, as our artifact and as a .gguf.

In: the name of a shape and a folder that keeps the files. Out: the two, of one vocabulary: the bundled tokenizer's, and
a token of its own for every further id, so that whatever random weights say is text. Prompts are given as token ids.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from benchmarks.gguf_checkpoint import add_tokenizer
from benchmarks.processes import BenchmarkError
from benchmarks.random_gguf import write_random_gguf
from benchmarks.synthetic import REAL_SHAPES, write_random_checkpoint
from lfm2_export.source import ASSETS

# The group size whose bits a weight come nearest to Q4_0's (benchmarks/programs.py).
_GROUP = 64
_TOKENIZER = "tiny-dense"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """``artifact``: a folder; ``rival``: a .gguf; ``vocab_size``: ids that a prompt may have."""

    artifact: Path
    rival: Path
    vocab_size: int


def prepare(folder: Path, shape: str) -> Pair:
    """Makes what is not there.

    Raises:
        BenchmarkError: the export failed.
    """
    raw_config, folder = REAL_SHAPES[shape], folder / shape
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = padded_tokenizer(raw_config["vocab_size"])
    rival, artifact = folder / "server-Q4_0.gguf", folder / f"server-q4-group{_GROUP}"
    if not rival.exists():
        write_random_gguf(rival, raw_config, seed=0, vocabulary=lambda writer: _add(writer, tokenizer, raw_config))
    if not artifact.exists():
        _export(folder / "server-checkpoint", raw_config, tokenizer, artifact)
    return Pair(artifact=artifact, rival=rival, vocab_size=raw_config["vocab_size"])


def padded_tokenizer(vocab_size: int) -> dict[str, Any]:
    """The bundled tokenizer.json with a token ``<uN>`` for every id N that it lacks."""
    tokenizer = json.loads((ASSETS / _TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    known = {*vocabulary.values(), *(added["id"] for added in tokenizer["added_tokens"])}
    vocabulary |= {f"<u{index}>": index for index in range(vocab_size) if index not in known}
    return tokenizer


def _add(writer: gguf.GGUFWriter, tokenizer: Mapping[str, Any], raw_config: Mapping[str, Any]) -> None:
    add_tokenizer(writer, tokenizer)
    writer.add_bos_token_id(raw_config["bos_token_id"])
    writer.add_eos_token_id(raw_config["eos_token_id"])


def _export(checkpoint: Path, raw_config: Mapping[str, Any], tokenizer: Mapping[str, Any], output: Path) -> None:
    """In a process of its own: its memory is gone before anything is timed."""
    if not checkpoint.exists():
        unfinished = checkpoint.with_name(f".{checkpoint.name}")
        write_random_checkpoint(unfinished, raw_config, seed=0, tokenizer_from=_TOKENIZER)
        (unfinished / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        unfinished.rename(checkpoint)
    command = [sys.executable, "-m", "lfm2_export.cli", "export", str(checkpoint), "--algorithm", "round"]
    command += ["--backend", "onnx", "--scheme", "q4", "--group-size", str(_GROUP), "--output", str(output)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise BenchmarkError(f"{output.name}: the export failed with status {done.returncode}, see above")
