"""Trains a DSpark drafter for a small target by distilling the target's own greedy text.

    python examples/train_drafter.py --target tiny-dense --output drafter --measure

In: a target that fits into memory as float32, and the beginnings of the texts of `_bundled_corpus`. Out: a checkpoint
as published ones are, for `lfm2-export export drafter --target ARTIFACT`. The target goes on greedily from every
beginning; its text is what the drafter has to say, its residual streams are what the drafter reads. Table and head are
the target's and stay as they are. It takes three to four minutes of one core. `--measure` exports both (q4) and counts
tokens a pass on beginnings that were kept out, beside prompt lookup's: 3.2 and 2.0 for tiny-dense.

Shapes: B texts of T tokens; M blocks a text, of R rows; S layers that are read; D width; V vocabulary.
"""

import argparse
import json
import logging
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import lfm2_export
from lfm2_export.families import find_family
from lfm2_export.families.lfm2_dspark import own_tensors
from lfm2_export.generation import complete
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.models.decoder import DecoderForCausalLM
from lfm2_export.models.lfm2_dspark import MASKED, BlockLayout, Lfm2DSparkDraftModel
from lfm2_export.models.loading import load_model
from lfm2_export.speculation import Drafter, PromptLookup, Report, SpeculativeRunner, StreamDrafter
from lfm2_export.speculation.controller import Always
from lfm2_export.text import Tokenizer

log = logging.getLogger("train_drafter")

SEED = 11
BLOCK, RANK, LAYERS = 8, 64, 2
TEXTS, PROMPT, NEW = 768, 16, 112
STEPS, TEXTS_PER_STEP, BLOCKS_PER_TEXT = 300, 8, 16
PEAK_LR, WARMUP = 2e-3, 20
# A row counts only where all before it are right: later ones weigh less.
ROW_WEIGHT = 0.85
MEASURED = 12


def drafter_config(target: DecoderForCausalLM, **changes: Any) -> dict[str, Any]:
    """config.json of a small drafter, under the published names."""
    config = target.config
    layers = config.num_hidden_layers
    return {
        "architectures": ["Lfm2DSparkDraftModel"],
        "attention_bias": False,
        "block_size": BLOCK,
        "dflash_config": {
            "mask_token_id": config.pad_token_id or 0,
            "num_target_layers": layers,
            "target_layer_ids": sorted({layers // 3, 2 * layers // 3, layers - 1}),
        },
        "enable_confidence_head": True,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": 2 * config.hidden_size,
        "markov_head_type": "vanilla",
        "markov_rank": RANK,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "qwen3",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": 1e-5,
        "rope_is_neox_style": False,
        "rope_theta": 10_000_000.0,
        "vocab_size": config.vocab_size,
        **changes,
    }


def new_drafter(raw: dict[str, Any], target: DecoderForCausalLM) -> Lfm2DSparkDraftModel:
    """A drafter with random weights and its target's table and head, which are not trained."""
    torch.manual_seed(SEED)
    net = Lfm2DSparkDraftModel(find_family(raw, "config.json").parse_config(raw))
    for name, parameter in net.named_parameters():
        if name.endswith("markov_w2.weight"):
            torch.nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02 if "markov" in name else parameter.shape[-1] ** -0.5)
    net.model.embed_tokens.weight = target.model.embed_tokens.weight
    net.lm_head.weight = target.lm_head.weight
    return net.requires_grad_(True)


@torch.no_grad()
def greedy_texts(target: DecoderForCausalLM, prompts: Tensor, new: int) -> Tensor:
    """The prompts int64 [B, P] with `new` tokens that the target goes on with: [B, P + new]."""
    tokens, cache, ids = [prompts], None, prompts
    for _ in range(new):
        out = target(ids, cache=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.cache, out.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(ids)
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def streams_of(target: DecoderForCausalLM, ids: Tensor, layers: Sequence[int]) -> Tensor:
    """The residual streams behind `layers`, side by side: [B, T, S * D]."""
    norms = [*(layer.operator_norm for layer in target.model.layers[1:]), target.model.embedding_norm]
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda _norm, _inputs, out: found.__setitem__(layer, out[1])

    hooks = [norms[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        target(ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([found[layer] for layer in layers], dim=-1)


def blocks_layout(net: Lfm2DSparkDraftModel, length: int, anchors: Tensor) -> BlockLayout:
    """Rows of a block see the streams before its anchor, and the block; `anchors` int64 [B, M] are positions."""
    rows = net.draft.block_size
    batch, blocks = anchors.shape
    offsets = torch.arange(rows)
    places = (anchors[..., None] + offsets).flatten(1)
    context = torch.arange(length).expand(batch, -1)
    cos, sin = net.angles(torch.cat((context, places), dim=1))
    own = torch.arange(blocks).repeat_interleave(rows)
    before = context[:, None, :] < anchors.repeat_interleave(rows, dim=1)[..., None]
    inside = (own[:, None] == own[None, :]).expand(batch, -1, -1)
    seen = torch.cat((before, inside), dim=-1)
    return BlockLayout(cos=cos, sin=sin, bias=((~seen) * MASKED)[:, None])


def loss_of(net: Lfm2DSparkDraftModel, texts: Tensor, streams: Tensor, anchors: Tensor) -> Tensor:
    """Cross entropy of every row against the target's text, and of the confidence against what is right.

    The Markov head is given the true token before each row, the confidence says whether the row is right after it.
    """
    config, rows = net.config, net.draft.block_size
    batch, blocks = anchors.shape
    empty = torch.zeros(batch, config.num_key_value_heads, 0, config.head_dim)
    stream = net.embedded(texts.gather(1, anchors).flatten()).view(batch, blocks * rows, -1)
    past = dict.fromkeys(range(config.num_hidden_layers), (empty, empty))
    hidden, _ = net.block(net.context(streams), stream, past, blocks_layout(net, texts.shape[1], anchors))
    places = (anchors[..., None] + torch.arange(rows)).flatten(1)
    previous, wanted = texts.gather(1, places), texts.gather(1, places + 1)
    markov = net.markov_head.markov_w1(previous)
    logits = net.lm_head(hidden) + net.markov_head.markov_w2(markov)
    weights = (ROW_WEIGHT ** torch.arange(rows)).repeat(blocks)
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
    right = (logits.argmax(-1) == wanted).float()
    doubt = F.binary_cross_entropy_with_logits(net.confidence_head(hidden.detach(), markov.detach()), right)
    return (losses * weights).sum() / (weights.sum() * batch) + 0.1 * doubt


def train_(
    net: Lfm2DSparkDraftModel,
    target: DecoderForCausalLM,
    texts: Tensor,
    *,
    steps: int,
    per_step: int,
    prompt: int,
    peak_lr: float = PEAK_LR,
) -> None:
    """Trains in place; blocks begin behind the prompts, where the text is the target's own."""
    generator, began = torch.Generator().manual_seed(SEED), time.monotonic()
    learned = [p for name, p in net.named_parameters() if not name.startswith(("model.", "lm_head."))]
    net.model.embed_tokens.weight.requires_grad_(False)
    net.lm_head.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(learned, lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    last = texts.shape[1] - net.draft.block_size - 1
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * max(0.02, rate)
        rows = texts[torch.randint(len(texts), (per_step,), generator=generator)]
        anchors = torch.randint(prompt, last + 1, (per_step, BLOCKS_PER_TEXT), generator=generator)
        loss = loss_of(net, rows, streams_of(target, rows, net.draft.target_layers), anchors)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            log.info("step %d of %d: loss %.3f, %.0f s", step, steps, loss.item(), time.monotonic() - began)


def write_checkpoint(folder: Path, raw: dict[str, Any], net: Lfm2DSparkDraftModel) -> None:
    """config.json and model.safetensors in bfloat16, without what is the target's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(sorted(raw.items())), indent=2) + "\n")
    state = net.state_dict()
    tensors = {name: state[name].to(torch.bfloat16).contiguous() for name in own_tensors(net.config)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def beginnings(tokenizer: Tokenizer, documents: Sequence[str], count: int, length: int) -> Tensor:
    """The first tokens of `count` documents, and of places within them: int64 [count, length]."""
    chosen, random_ = [], random.Random(SEED)
    while len(chosen) < count:
        document = random_.choice(documents)
        start = random_.choice((0, document.find("\n\n", len(document) // 2) + 2))
        ids = tokenizer.encode(document[start : start + 8 * length])[:length]
        if len(ids) == length:
            chosen.append(ids)
    return torch.tensor(chosen)


def measure(target: Path, drafter: Path, prompts: Sequence[Sequence[int]], new: int = 128) -> dict[str, Report]:
    """What lookup and the drafter bring on the exported programs, verifying as much as they propose; every text is
    compared with plain decoding's."""
    runner = lfm2_export.load_runner(target, scheme="q4")
    made: dict[str, Callable[[], Drafter]] = {
        "lookup": PromptLookup,
        "drafter": lambda: StreamDrafter(lfm2_export.load_drafter(drafter)),
    }
    config = GenerationConfig(max_new_tokens=new)
    plain = [complete(runner, [list(prompt)], config)[0] for prompt in prompts]
    reports = {}
    for name, make in made.items():
        reports[name] = Report(drafter=name)
        for prompt, wanted in zip(prompts, plain, strict=True):
            ours = SpeculativeRunner(
                runner, make(), inexact=not runner.verifies_exactly, controller=Always(most=8, report=reports[name])
            )
            (found,) = complete(ours, [list(prompt)], config)
            assert found.tokens == wanted.tokens or not runner.verifies_exactly
            ours.release()
    return reports


def measured(checkpoint: str, drafter: Path, prompts: Tensor) -> dict[str, Report]:
    """Exports both as q4 and measures."""
    with tempfile.TemporaryDirectory() as folder:
        target, made = Path(folder) / "target", Path(folder) / "drafter"
        lfm2_export.export(checkpoint, scheme="q4", output=target)
        lfm2_export.export(drafter, scheme="q4", output=made, target=target)
        return measure(target, made, prompts.tolist())


def main(arguments: list[str] | None = None) -> None:
    from _bundled_corpus import load_corpus  # a script beside this one; tests need none of it

    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(1)  # where other work runs, two threads wait for each other
    checkpoint = lfm2_export.open_checkpoint(options.target)
    target, tokenizer = load_model(checkpoint).requires_grad_(False), Tokenizer.from_dir(checkpoint.path)
    corpus = load_corpus()
    prompts = beginnings(tokenizer, corpus.train, options.texts, PROMPT)
    texts = torch.cat([greedy_texts(target, part, NEW) for part in prompts.split(64)])
    log.info("%d texts of %d tokens from the target", *texts.shape)
    raw = drafter_config(target)
    net = new_drafter(raw, target)
    train_(net, target, texts, steps=options.steps, per_step=TEXTS_PER_STEP, prompt=PROMPT)
    write_checkpoint(options.output, raw, net)
    if options.measure:
        held_out = beginnings(tokenizer, corpus.held_out, MEASURED, PROMPT)
        for report in measured(options.target, options.output, held_out).values():
            log.info("%s", report.summary())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", default="tiny-dense", help="the checkpoint of the model to draft for")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"texts to learn (default {TEXTS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--measure", action="store_true", help="export both and count tokens a pass")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
