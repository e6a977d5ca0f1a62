"""Runs an artifact with onnxruntime, numpy and tokenizers alone: what another program has to do, in a hundred lines.

    python examples/onnxruntime_only.py ARTIFACT "The str type is" [--graph onnx/model_q4.onnx] [--max-new-tokens 40]

In: the folder that `lfm2-export export` wrote. Out: the prompt's greedy continuation, printed as it comes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import tokenizers


class Model:
    """A graph with its state: a conv state per short convolution, keys and values per attention layer."""

    def __init__(self, folder: Path, graph: str | None = None):
        decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        self.session = ort.InferenceSession(folder / (graph or decoder["filename"]), providers=["CPUExecutionProvider"])
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.state = {v.name: empty(v) for v in self.session.get_inputs() if v.name.startswith("past_")}
        self.length = 0

    def run(self, ids: list[int]) -> np.ndarray:
        """Appends tokens; returns the logits after the last one, float32 [vocabulary]."""
        self.length += len(ids)
        inputs = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, self.length), np.int64)}
        found = dict(zip(self.outputs, self.session.run(self.outputs, inputs | self.state), strict=True))
        self.state = {name: found[present_name(name)] for name in self.state}
        return found["logits"][0, -1]


def empty(value: ort.NodeArg) -> np.ndarray:
    """The state of one row before its first token: conv states are zeros, keys and values have no positions yet."""
    sizes = {"batch_size": 1, "past_sequence_length": 0}
    dtype = np.float16 if value.type == "tensor(float16)" else np.float32
    return np.zeros([sizes.get(axis, axis) for axis in value.shape], dtype)


def present_name(past: str) -> str:
    """The output that becomes the next call's input."""
    return past.replace("past_conv", "present_conv").replace("past_key_values", "present")


def greedy(model: Model, ids: list[int], limit: int) -> Iterator[tuple[int, np.ndarray]]:
    """The likeliest next token, again and again; each with the logits that it was chosen by."""
    logits = model.run(ids)
    for _ in range(limit):
        token = int(logits.argmax())
        yield token, logits
        logits = model.run([token])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--graph", help="default: the one that genai_config.json names")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args()

    tokenizer = tokenizers.Tokenizer.from_file(str(options.artifact / "tokenizer.json"))
    stop = json.loads((options.artifact / "generation_config.json").read_text())["eos_token_id"]
    stop_ids = set(stop if isinstance(stop, list) else [stop])
    model = Model(options.artifact, options.graph)
    tokens: list[int] = []
    for token, _ in greedy(model, tokenizer.encode(options.prompt).ids, options.max_new_tokens):
        if token in stop_ids:
            break
        tokens.append(token)
    print(tokenizer.decode(tokens))
    print("tokens:", *tokens)


if __name__ == "__main__":
    main()
