"""Trains a bundled checkpoint and writes it as Liquid AI publishes theirs.

    python examples/train_bundled.py tiny-moe --output lfm2_export/assets/tiny-moe
    python examples/train_bundled.py tiny-dense --output lfm2_export/assets/tiny-dense
    python examples/train_bundled.py tiny-lfm3 --output lfm2_export/assets/tiny-lfm3

In: the text of `_bundled_corpus`. Out: a folder with config.json, model.safetensors (bfloat16, experts one by one,
float32 expert bias), tokenizer, chat template and model card. What is trained are transformers' own classes, as what
this project exports is checked against them. Everything is seeded, and the length is given in steps, not in minutes:
900 of them take about ten minutes of one CPU core.

Shapes: B rows of T tokens; V vocabulary; E experts.
"""

import argparse
import copy
import json
import logging
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from _bundled_card import model_card
from _bundled_corpus import Corpus, held_out_sample, load_corpus
from _bundled_tokenizer import BOS, EOT, SPECIAL_TOKENS, chat_document, train_tokenizer, write_tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lfm2_export.families import get_family

log = logging.getLogger("train_bundled")

SEED = 7
VOCAB = 2660  # equals no other width, so that no tool can take another Linear for the head
COMMON = {
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "dtype": "bfloat16",
    "eos_token_id": 7,
    "hidden_size": 256,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "norm_eps": 1e-05,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "use_cache": True,
    "vocab_size": VOCAB,
}
CONFIGS = {
    # The fields of the newer published configs (LFM2-8B-A1B, LFM2.5).
    "tiny-moe": COMMON
    | {
        "architectures": ["Lfm2MoeForCausalLM"],
        "intermediate_size": 384,
        "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention", "conv"],
        "model_type": "lfm2_moe",
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "num_dense_layers": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": True,
        "use_expert_bias": True,
    },
    # The fields of the older ones (LFM2-350M): block_ff_dim 896 becomes 2/3 of it, rounded up to 640.
    "tiny-dense": COMMON
    | {
        "architectures": ["Lfm2ForCausalLM"],
        "block_auto_adjust_ff_dim": True,
        "block_dim": 256,
        "block_ff_dim": 896,
        "block_ffn_dim_multiplier": 1.0,
        "block_mlp_init_scale": 1.0,
        "block_multiple_of": 128,
        "block_norm_eps": 1e-05,
        "block_out_init_scale": 1.0,
        "block_use_swiglu": True,
        "block_use_xavier_init": True,
        "conv_dim": 256,
        "conv_dim_out": 256,
        "conv_use_xavier_init": True,
        "full_attn_idxs": [2, 4],
        "model_type": "lfm2",
        "num_heads": 8,
        "rope_theta": 1000000.0,
        "tie_embedding": True,
        "use_pos_enc": True,
    },
    # The fields of LFM3-1.7B, the label of the half rotation among them (lfm2_export/families/lfm3.py).
    "tiny-lfm3": COMMON
    | {
        "architectures": ["Lfm3ForCausalLM"],
        "conv_L_cache": 7,
        "head_dim": 64,
        "intermediate_size": 160,
        "layer_types": ["conv", "conv", "full_attention", "conv", "sliding_attention", "conv"],
        "model_type": "lfm3",
        "num_attention_heads": 4,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.5, "rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 64,
        "tie_word_embeddings": True,
    },
}
GENERATION = {"bos_token_id": 1, "eos_token_id": [7, 2], "pad_token_id": 0}
STEPS = 900
TOKENS_PER_STEP = 2048
ROW_LENGTHS = (256, 512, 1024)  # in turn, so that long contexts are trained at the cost of short ones
PEAK_LR, FINAL_LR, WARMUP = 4e-3, 1e-4, 80
WEIGHT_DECAY = 0.3
BIAS_UPDATE = 1e-3


class ExpertLoad:
    """Counts the tokens each expert gets, by hooks on the routers, and moves the expert biases against the count.

    The balance without an auxiliary loss of DeepSeek-V3 (arXiv:2408.15664): bias += u * sign(mean load - load).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers = enumerate(model.model.layers)
        self.blocks = {i: layer.feed_forward for i, layer in layers if hasattr(layer.feed_forward, "gate")}
        self.counts = {i: torch.zeros_like(block.expert_bias) for i, block in self.blocks.items()}
        for i, block in self.blocks.items():
            block.gate.register_forward_hook(lambda _gate, _inputs, output, i=i: self._count(i, output[2]))

    def _count(self, layer: int, selected: torch.Tensor) -> None:
        self.counts[layer] += torch.bincount(selected.flatten(), minlength=len(self.counts[layer]))

    def rebalance_(self, update: float) -> None:
        for i, block in self.blocks.items():
            block.expert_bias += update * torch.sign(self.counts[i].mean() - self.counts[i])
            self.counts[i].zero_()

    def shares(self) -> dict[int, list[float]]:
        """Returns by layer each expert's load over its fair share: 1.0 is fair."""
        return {i: (count / count.mean()).tolist() for i, count in self.counts.items()}


def training_stream(corpus: Corpus, tokenizer: Tokenizer) -> torch.Tensor:
    """Returns all the training text as one row of token ids, documents and chats shuffled together."""
    documents = [f"{BOS}{text}{EOT}" for text in corpus.train]
    documents += [chat_document(corpus.chats, i) for i in range(0, len(corpus.chats), 2)]
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(SEED))
    return _stream([documents[i] for i in order], tokenizer)


def held_out_stream(corpus: Corpus, tokenizer: Tokenizer) -> torch.Tensor:
    return _stream([f"{BOS}{text}{EOT}" for text in corpus.held_out], tokenizer)


def _stream(documents: list[str], tokenizer: Tokenizer) -> torch.Tensor:
    encodings = tokenizer.encode_batch(documents, add_special_tokens=False)
    return torch.tensor([token for encoding in encodings for token in encoding.ids])


def batch(stream: torch.Tensor, length: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Returns B rows of T+1 tokens from random places, B * T = tokens; each begins with BOS, as every prompt does."""
    starts = torch.randint(len(stream) - length, (tokens // length, 1), generator=generator)
    rows = stream[starts + torch.arange(length + 1)]
    rows[:, 0] = SPECIAL_TOKENS.index(BOS)
    return rows


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    warmup = min(WARMUP, steps // 4)
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_LR + (PEAK_LR - FINAL_LR) * (1 + math.cos(math.pi * progress)) / 2


def config_of(name: str) -> PretrainedConfig:
    """Returns a checkpoint's config as transformers has to be given it."""
    raw = copy.deepcopy(CONFIGS[name])
    reference = get_family(raw["model_type"]).reference_config(raw)
    return AutoConfig.for_model(**(raw if reference is None else reference.raw))


def new_model(name: str) -> PreTrainedModel:
    """Returns a model in float32 with random weights, its config read as it will be read from the checkpoint."""
    torch.manual_seed(SEED)
    config = config_of(name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if "moe" in config.model_type:  # the default, "grouped_mm", takes eleven times as long on a CPU
        model.set_experts_implementation("eager")
    return model


def optimizer_for(model: PreTrainedModel) -> torch.optim.Optimizer:
    """Returns AdamW that decays the matrices only, not the norms and the short convs' kernels."""
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith("conv.conv.weight")]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def train_(model: PreTrainedModel, stream: torch.Tensor, *, steps: int, tokens: int) -> None:
    """Trains in place, where the model is."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer, load, began = optimizer_for(model), ExpertLoad(model), time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        length = min(ROW_LENGTHS[step % len(ROW_LENGTHS)], tokens)
        loss = loss_of(model, batch(stream, length, tokens, generator).to(model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        load.rebalance_(BIAS_UPDATE)
        if step % 50 == 0 or step == steps - 1:
            log.info("step %d of %d: loss %.3f, %.0f s", step, steps, loss.item(), time.monotonic() - began)


def loss_of(model: PreTrainedModel, rows_BT1: torch.Tensor) -> torch.Tensor:
    # Without AVX-512 a CPU's products in bfloat16 take many times as long as in float32.
    narrow = model.device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX2"
    with torch.autocast(model.device.type, torch.bfloat16, enabled=narrow):
        logits_BTV = model(input_ids=rows_BT1[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), rows_BT1[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: PreTrainedModel, stream: torch.Tensor, window: int) -> float:
    """Returns exp of the mean loss over windows of `window` tokens that share none and each begin with BOS.

    The special tokens between documents are fed but not counted: the one after EOT is always BOS.
    """
    bos = SPECIAL_TOKENS.index(BOS)
    losses = []
    for start in range(0, len(stream), window - 1):
        row = torch.cat([torch.tensor([bos]), stream[start : start + window - 1]])
        logits_TV = model(input_ids=row[None, :-1], use_cache=False).logits[0]
        loss_T = F.cross_entropy(logits_TV.float(), row[1:], reduction="none")
        losses.append(loss_T[row[1:] >= len(SPECIAL_TOKENS)])
    return torch.cat(losses).mean().exp().item()


def hub_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns the weights under their published names: experts one by one, all bfloat16 but the expert bias."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            _add_experts_(tensors, name.removesuffix("gate_up_proj"), tensor.chunk(2, dim=1), ("w1", "w3"))
        elif name.endswith("experts.down_proj"):
            _add_experts_(tensors, name.removesuffix("down_proj"), (tensor,), ("w2",))
        elif name != "lm_head.weight":  # tied to the embedding
            tensors[name.replace(".self_attn.g_proj.", ".self_attn.gate_proj.")] = tensor
    bfloat16 = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    return bfloat16 | {name: tensor.cpu() for name, tensor in tensors.items() if name.endswith("expert_bias")}


def _add_experts_(tensors: dict, prefix: str, stacks: tuple[torch.Tensor, ...], names: tuple[str, ...]) -> None:
    for stack_Eoi, name in zip(stacks, names, strict=True):
        tensors.update({f"{prefix}{e}.{name}.weight": stack_Eoi[e] for e in range(len(stack_Eoi))})


def write_checkpoint(folder: Path, name: str, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "config.json", CONFIGS[name])
    write_json(folder / "generation_config.json", GENERATION)
    save_file(hub_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves 0600
    write_tokenizer(folder, tokenizer, max_length=COMMON["max_position_embeddings"])


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(dict(sorted(value.items())), indent=2) + "\n")


def measure(folder: Path, name: str, corpus: Corpus, tokenizer: Tokenizer, *, quick: bool) -> dict:
    """Returns what the model card states, measured on the written files as transformers loads them, in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config_of(name), dtype=torch.float32, experts_implementation="eager"
    ).eval()
    stream, load = held_out_stream(corpus, tokenizer), ExpertLoad(model)
    stream = stream[:2000] if quick else stream
    headline = perplexity(model, stream, 512)
    shares = load.shares()
    windows = {window: perplexity(model, stream, window) for window in (256, 1024, 2048)} | {512: headline}
    return {
        "parameters": model.num_parameters(),
        "perplexity_by_window": dict(sorted(windows.items())),
        "bits_per_token": math.log2(headline),
        "held_out_tokens": len(stream),
        "held_out_chars": sum(map(len, corpus.held_out)),
        "expert_shares": shares,
        "expert_bias": {i: block.expert_bias.tolist() for i, block in load.blocks.items()},
        "bytes": (folder / "model.safetensors").stat().st_size,
    }


def replace_folder(new: Path, old: Path) -> None:
    """Puts the complete new folder in the old one's place: nobody reads a half-written one. LICENSE stays."""
    if (old / "LICENSE").exists():
        shutil.copy(old / "LICENSE", new)
    if old.exists():
        shutil.rmtree(old)
    new.rename(old)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(1)  # where other work runs, two threads wait for each other; and one adds in one order
    corpus, began = load_corpus(), time.monotonic()
    tokenizer = train_tokenizer(corpus, VOCAB)
    stream, model = training_stream(corpus, tokenizer), new_model(options.checkpoint).to(options.device)
    log.info("%s: %d parameters, %d tokens", options.checkpoint, model.num_parameters(), len(stream))
    train_(model, stream, steps=options.steps, tokens=512 if options.quick else TOKENS_PER_STEP)

    staging = options.output.with_name(options.output.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    write_checkpoint(staging, options.checkpoint, model, tokenizer)
    facts = measure(staging, options.checkpoint, corpus, tokenizer, quick=options.quick)
    facts |= {"steps": options.steps, "train_tokens": len(stream), "seconds": time.monotonic() - began}
    (staging / "README.md").write_text(model_card(options.checkpoint, CONFIGS[options.checkpoint], facts))
    replace_folder(staging, options.output)
    log.info(json.dumps(facts, indent=1))
    if options.held_out:
        options.held_out.write_text(held_out_sample(corpus.held_out, 80_000))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", choices=sorted(CONFIGS))
    parser.add_argument("--output", type=Path, required=True, help="folder to write; replaced if it exists")
    parser.add_argument("--held-out", type=Path, help="also write a part of the held-out text to this file")
    parser.add_argument("--steps", type=int, help=f"training steps (default {STEPS}, or 4 with --quick)")
    parser.add_argument("--device", default="cpu", help="cpu (default), or cuda, which gives other weights")
    parser.add_argument("--quick", action="store_true", help="small steps and little measuring: a smoke run of seconds")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (4 if options.quick else STEPS)
    return options


if __name__ == "__main__":
    main()
