"""The bundled checkpoints' model card. In: the config and what was measured. Out: README.md's text."""

import platform

CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# {name}

A trained language model of {parameters:,} parameters in the architecture of Liquid AI's {family}, in the format in
which they publish theirs. It is small enough to travel with a package, and it is for testing exports: its weights are
not random, so quantization has something to spoil. It is not Liquid AI's, and it has read nothing but a part of
Python's documentation.

Made by `python examples/train_bundled.py {name} --output {name}`: {steps:,} steps, {minutes:.0f} minutes on one
thread.

| | |
|---|---|
{shapes}
| model.safetensors | {bytes:,} bytes, bfloat16 |

**Text**: English that every CPython carries ({python} here): `pydoc_data.topics`, the docstrings and the comments
of the standard library; {train_tokens:,} tokens, with questions and answers made from them. That text is copyright
Python Software Foundation, under the PSF License Version 2. One document in ten, by the hash of its text, was kept out.

**Held-out perplexity**: {held_out_tokens:,} tokens of {chars_per_token:.2f} characters, cut into windows, each read on
its own; measured on these files, loaded in float32 by transformers.

| Tokens in a window | {windows} |
|---|{window_rule}
| Perplexity | {perplexities} |

At 512 tokens that is {bits_per_char:.2f} bits per character.
"""

EXPERTS = """
**Experts**: the held-out tokens that each gets, over its fair share (1.00 is fair):

| Layer | {experts} |
|---|{rule}
{rows}
"""


def model_card(name: str, config: dict, facts: dict) -> str:
    windows, chars_per_token = facts["perplexity_by_window"], facts["held_out_chars"] / facts["held_out_tokens"]
    card = CARD.format(
        name=name,
        family={"lfm2_moe": "LFM2-MoE", "lfm2": "LFM2", "lfm3": "LFM3"}[config["model_type"]],
        shapes="\n".join(f"| {key} | {value} |" for key, value in _shapes(config)),
        python=platform.python_version(),
        minutes=facts["seconds"] / 60,
        windows=" | ".join(map(str, windows)),
        window_rule="---|" * len(windows),
        perplexities=" | ".join(f"{value:.2f}" for value in windows.values()),
        chars_per_token=chars_per_token,
        bits_per_char=facts["bits_per_token"] / chars_per_token,
        **{key: facts[key] for key in ("parameters", "steps", "bytes", "train_tokens", "held_out_tokens")},
    )
    return card + _expert_table(facts["expert_shares"])


def _shapes(config: dict) -> list[tuple[str, object]]:
    keys = ("hidden_size", "num_hidden_layers", "layer_types", "full_attn_idxs", "num_attention_heads")
    keys += ("num_key_value_heads", "intermediate_size", "block_ff_dim", "num_dense_layers", "num_experts")
    keys += ("num_experts_per_tok", "moe_intermediate_size", "conv_L_cache", "vocab_size", "max_position_embeddings")
    keys += ("head_dim", "sliding_window")
    return [(key, config[key]) for key in keys if key in config]


def _expert_table(shares: dict[int, list[float]]) -> str:
    if not shares:
        return ""
    rows = [f"| {layer} | " + " | ".join(f"{share:.2f}" for share in row) + " |" for layer, row in shares.items()]
    experts = range(len(next(iter(shares.values()))))
    return EXPERTS.format(experts=" | ".join(map(str, experts)), rule="---|" * len(experts), rows="\n".join(rows))
