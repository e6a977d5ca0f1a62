"""Writes golden_outputs/<checkpoint>/<prompt>.json: what the eager fp32 model of each bundled checkpoint says.

    python examples/write_golden_outputs.py [tiny-moe] [tiny-dense]

In: the bundled checkpoints. Out: per prompt its token ids, 64 greedy tokens, and the largest logits of every step.
Nothing but this command writes these files. Tests compare the eager model and exported programs with them, so that a
change of behaviour cannot pass unseen; after the checkpoints themselves were replaced, run it again and read the
difference.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lfm2_export.backends.base import Runner
from lfm2_export.backends.eager import EagerRunner
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.manifest import CheckpointRecord
from lfm2_export.models.loading import load_model
from lfm2_export.packages import recorded_versions
from lfm2_export.source import BUNDLED
from lfm2_export.text import Tokenizer

ROOT = Path(__file__).resolve().parents[1] / "golden_outputs"
COMMAND = "python examples/write_golden_outputs.py"
TOKENS, TOP = 64, 8
DECIMALS = 4

# Text to continue, or a conversation to answer.
PROMPTS: dict[str, str | list[dict[str, str]]] = {
    "start": "",
    "sentence": "The return value is",
    "code": "def __init__(self, name):\n    ",
    "non_ascii": "Größe in µm, naïve café, 数字 π ≈ 3.14159 🙂:",
    "chat": [{"role": "user", "content": "What is a dictionary?"}],
    "conversation": [
        {"role": "system", "content": "You answer questions about Python."},
        {"role": "user", "content": "How do I open a file?"},
        {"role": "assistant", "content": "Call open() with its name."},
        {"role": "user", "content": "And close it?"},
    ],
}


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The logits that chose each token, float32 [TOKENS, V], and the tokens."""

    tokens: list[int]
    logits: np.ndarray


def encode(tokenizer: Tokenizer, prompt: str | list[dict[str, str]]) -> list[int]:
    return tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)


def follow(runner: Runner, prompt_ids: list[int], tokens: list[int] | None = None) -> Steps:
    """Greedy tokens, or the logits along ``tokens``; a stop token does not stop it."""
    runner.reset()
    logits = [runner.prefill([prompt_ids])[0]]
    chosen: list[int] = []
    while True:
        chosen.append(int(logits[-1].argmax()) if tokens is None else tokens[len(chosen)])
        if len(chosen) == TOKENS:
            return Steps(tokens=chosen, logits=np.stack(logits))
        logits.append(runner.decode(chosen[-1:])[0])


def golden_output(checkpoint: Checkpoint, runner: Runner, prompt: str | list[dict[str, str]]) -> dict[str, Any]:
    tokenizer = Tokenizer.from_dir(checkpoint.path)
    prompt_ids = encode(tokenizer, prompt)
    steps = follow(runner, prompt_ids)
    return {
        "checkpoint": checkpoint_hashes(checkpoint),
        "versions": {name: recorded_versions()[name] for name in ("python", "torch", "numpy")},
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "tokens": steps.tokens,
        "text": tokenizer.decode(steps.tokens),
        "top_logits": [top_logits(row) for row in steps.logits],
    }


def top_logits(row: np.ndarray) -> list[list[float]]:
    """[token, logit] of the largest ones, the largest first."""
    best = np.argsort(-row, kind="stable")[:TOP]
    return [[int(token), round(float(row[token]), DECIMALS)] for token in best]


def checkpoint_hashes(checkpoint: Checkpoint) -> dict[str, Any]:
    record = CheckpointRecord.of(checkpoint)
    return {"name": record.name, "config_sha256": record.config_sha256, "shards": dict(record.shards)}


def to_json(record: dict[str, Any]) -> str:
    """One line for each key and each step, so that differences can be read."""
    steps = ",\n".join(f"  {json.dumps(step)}" for step in record["top_logits"])
    lines = [
        f"{json.dumps(key)}: {json.dumps(record[key], ensure_ascii=False)}" for key in record if key != "top_logits"
    ]
    return "{\n" + ",\n".join(lines) + f',\n"top_logits": [\n{steps}\n]\n}}\n'


def write(name: str) -> list[Path]:
    """Writes all files of one checkpoint and removes those of prompts that are no more."""
    torch.set_num_threads(1)  # decoding a small model gains nothing from more
    checkpoint = open_checkpoint(name)
    runner = EagerRunner(load_model(checkpoint))
    folder = ROOT / name
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{prompt}.json" for prompt in PROMPTS]
    for path, prompt in zip(paths, PROMPTS.values(), strict=True):
        path.write_text(to_json(golden_output(checkpoint, runner, prompt)), encoding="utf-8")
    for left_over in set(folder.glob("*.json")) - set(paths):
        left_over.unlink()
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the golden outputs of bundled checkpoints.")
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help=f"default: {' '.join(BUNDLED)}")
    names = parser.parse_args().checkpoints or BUNDLED
    if unknown := sorted(set(names) - set(BUNDLED)):
        parser.error(f"{' '.join(unknown)}: not bundled; there are {' '.join(BUNDLED)}")
    for name in names:
        for path in write(name):
            print(path.relative_to(ROOT.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
