"""Random drafters for small targets, and the drafter's forward pass spelled out a second time.

The second writing is in float64, from the published tensors, one position and one head at a time; RoPE is a product of
complex numbers. Nothing of the package's nets is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import lfm2_export
from examples import train_drafter
from lfm2_export.artifact import Artifact
from lfm2_export.backends import get_backend
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.families import find_family
from lfm2_export.generation import complete
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.models.decoder import DecoderForCausalLM
from lfm2_export.models.loading import load_model
from lfm2_export.text import Tokenizer
from tests.checkpoints import tiny_config, write_random_checkpoint

# What the taught drafter was trained to say.
PROMPTS, NEW = ("The list of files", "Once upon a time there", "def add(a, b):", "Return the value of"), 96
LAYERS, MASK = (0, 2, 3), 3
TARGET = tiny_config("lfm2", hidden_size=64, intermediate_size=96)


def drafter_config(target: Mapping[str, Any] = TARGET, **overrides: Any) -> dict[str, Any]:
    """The raw config.json of a small drafter for ``target``, as published ones look; None removes a key."""
    config: dict[str, Any] = {
        "architectures": ["Lfm2DSparkDraftModel"],
        "model_type": "qwen3",
        "vocab_size": target["vocab_size"],
        "hidden_size": target["hidden_size"],
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000_000.0,
        "rope_is_neox_style": False,
        "max_position_embeddings": 512,
        "block_size": 5,
        "markov_rank": 32,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "dflash_config": {
            "mask_token_id": MASK,
            "target_layer_ids": list(LAYERS),
            "num_target_layers": target["num_hidden_layers"],
        },
    }
    config |= overrides
    return {key: value for key, value in config.items() if value is not None}


def write_drafter(folder: Path, raw_config: Mapping[str, Any] | None = None, *, seed: int = 1) -> Path:
    return write_random_checkpoint(folder, raw_config or drafter_config(), seed=seed, dtype="F32")


def teach_drafter(folder: Path) -> None:
    """Writes a drafter for tiny-dense that was trained for some seconds on the very texts of ``PROMPTS``."""
    checkpoint = open_checkpoint("tiny-dense")
    tokenizer = Tokenizer.from_dir(checkpoint.path)
    target = load_model(checkpoint).requires_grad_(False)
    prompts = torch.tensor([tokenizer.encode(prompt)[:4] for prompt in PROMPTS])
    with one_thread():
        _teach(target, folder, train_drafter.greedy_texts(target, prompts, NEW))


def teach_for(target: Path, folder: Path, prompts: Sequence[Sequence[int]]) -> None:
    """The same for the model of an artifact, as its program has it: the texts are its own answers to ``prompts``."""
    artifact = Artifact.open(target)
    raw = json.loads((target / "config.json").read_text())
    config = find_family(raw, "config.json").parse_config(raw)
    source = get_backend("onnx").stored_weights(target, artifact.program("onnx", None), config)
    runner, settings = lfm2_export.load_runner(artifact, threads=1), GenerationConfig(max_new_tokens=NEW)
    texts = [[*prompt, *complete(runner, [prompt], settings)[0].tokens] for prompt in prompts]
    with one_thread():
        _teach(load_model(source).requires_grad_(False), folder, torch.tensor(texts))


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _teach(target: DecoderForCausalLM, folder: Path, texts: Tensor) -> None:
    raw = train_drafter.drafter_config(target, num_hidden_layers=1, block_size=5, markov_rank=32, intermediate_size=128)
    net = train_drafter.new_drafter(raw, target)
    train_drafter.train_(net, target, texts, steps=80, per_step=4, prompt=1, peak_lr=1e-2)
    train_drafter.write_checkpoint(folder, raw, net)


@dataclass(frozen=True)
class Reference:
    """A drafter's published tensors with its target's table and head, in float64."""

    raw: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    table: Tensor
    head: Tensor

    @classmethod
    def read(cls, folder: Path, table: Tensor, head: Tensor) -> Reference:
        raw = json.loads((folder / "config.json").read_text())
        tensors = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
        return cls(raw, tensors, table.double(), head.double())

    def propose(self, streams_CE: Tensor, anchor: int) -> tuple[list[int], list[float]]:
        """Tokens and confidences of a block behind the context whose concatenated streams are given."""
        hidden = self.hidden(streams_CE, anchor)
        previous, tokens, scores = anchor, [], []
        for row in hidden:
            markov = self.tensors["markov_head.markov_w1.weight"][previous]
            logits = self.head @ row + self.tensors["markov_head.markov_w2.weight"] @ markov
            tokens.append(int(logits.argmax()))
            if "confidence_head.proj.weight" in self.tensors:
                score = self.tensors["confidence_head.proj.weight"][0] @ torch.cat((row, markov))
                scores.append(float(torch.sigmoid(score + self.tensors["confidence_head.proj.bias"][0])))
            previous = tokens[-1]
        return tokens, scores

    def hidden(self, streams_CE: Tensor, anchor: int) -> list[Tensor]:
        """The block's rows behind the last norm."""
        context = [self._norm(self._times("fc", e), "hidden_norm") for e in streams_CE.double()]
        masks = [self.raw["dflash_config"]["mask_token_id"]] * (self.raw["block_size"] - 1)
        rows = [self.table[token] for token in (anchor, *masks)]
        for layer in range(self.raw["num_hidden_layers"]):
            rows = self._layer(f"layers.{layer}.", rows, context)
        return [self._norm(row, "norm") for row in rows]

    def _layer(self, at: str, rows: Sequence[Tensor], context: Sequence[Tensor]) -> list[Tensor]:
        normed = [self._norm(row, f"{at}input_layernorm") for row in rows]
        seen = [*context, *normed]
        keys = [self._heads(x, at, "k", place) for place, x in enumerate(seen)]
        values = [self._times(f"{at}self_attn.v_proj", x).view(-1, self.raw["head_dim"]) for x in seen]
        out = []
        for index, x in enumerate(normed):
            queries = self._heads(x, at, "q", len(context) + index)
            share = self.raw["num_attention_heads"] // self.raw["num_key_value_heads"]
            mixed = []
            for number, query in enumerate(queries):
                scores = torch.stack([query @ key[number // share] for key in keys]) / self.raw["head_dim"] ** 0.5
                weights = torch.softmax(scores, dim=0)
                mixed.append(sum(w * value[number // share] for w, value in zip(weights, values, strict=True)))
            row = rows[index] + self._times(f"{at}self_attn.o_proj", torch.cat(mixed))
            inner = self._norm(row, f"{at}post_attention_layernorm")
            gate, up = self._times(f"{at}mlp.gate_proj", inner), self._times(f"{at}mlp.up_proj", inner)
            out.append(row + self._times(f"{at}mlp.down_proj", gate * torch.sigmoid(gate) * up))
        return out

    def _heads(self, x: Tensor, at: str, kind: str, place: int) -> list[Tensor]:
        """Normed and turned heads: neighbours are one complex number each, unless the config speaks of halves."""
        heads = self._times(f"{at}self_attn.{kind}_proj", x).view(-1, self.raw["head_dim"])
        half = self.raw["head_dim"] // 2
        turns = torch.polar(
            torch.ones(half, dtype=torch.float64),
            place * self.raw["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half),
        )
        found = []
        for one in heads:
            one = self._norm(one, f"{at}self_attn.{kind}_norm")
            if self.raw.get("rope_is_neox_style", True):
                whole = torch.complex(one[:half], one[half:]) * turns
                found.append(torch.cat((whole.real, whole.imag)))
            else:
                found.append(torch.view_as_real(torch.view_as_complex(one.view(half, 2)) * turns).flatten())
        return found

    def _times(self, name: str, x: Tensor) -> Tensor:
        return self.tensors[f"{name}.weight"] @ x

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + self.raw["rms_norm_eps"]).sqrt() * self.tensors[f"{name}.weight"]
