"""tokenizer.json, which a Rust library parses and runs."""

from __future__ import annotations

from lfm2_export.text import StreamDecoder, Tokenizer
from tests.fuzz.findings import attempt
from tests.fuzz.mutation import json_mutator
from tests.fuzz.workspace import workspace

_TEXTS = (
    "",
    "Hello, world! 12345",
    "  two  spaces\n\tand a tab",
    "Zürich 天气 😀 é",
    "<|im_start|>user<|im_end|>[UNK]",
)

mutate = json_mutator(
    *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"),
    *("model", "type", "vocab", "merges", "unk_token", "unk_id", "byte_fallback", "content"),
    *("dropout", "BPE", "WordPiece", "WordLevel", "Unigram", "ByteLevel", "Sequence", "Metaspace", "Split", "Replace"),
    *("pattern", "Regex", "String", "(a+)+$", "[", "NFKC", "Strip", "Prepend", "TemplateProcessing", "id"),
    *(
        "continuing_subword_prefix",
        "Precompiled",
        "special",
        "single_word",
        "lstrip",
        "rstrip",
        "normalized",
        "max_input_chars_per_word",
        "end_of_word_suffix",
    ),
)


def fuzz_one(data: bytes) -> None:
    folder = workspace().empty()
    workspace().put("tokenizer.json", data)
    tokenizer = attempt(Tokenizer.from_dir, folder)
    if tokenizer is not None:
        use(tokenizer)


def use(tokenizer: Tokenizer) -> None:
    """What `run` and `chat` do with it."""
    attempt(lambda: (tokenizer.vocab_size, tokenizer.token_id("a"), dict(tokenizer.special_tokens)))
    for text in _TEXTS:
        ids = attempt(tokenizer.encode, text)
        if ids is not None:
            attempt(tokenizer.decode, ids)
            attempt(tokenizer.decode, ids, skip_special_tokens=True)
            attempt(StreamDecoder(tokenizer).push_all, ids)
    attempt(tokenizer.decode, [0, 1, 2**31, 2**32 - 1])
    attempt(tokenizer.encode_chat, [{"role": "user", "content": "Hello"}])
