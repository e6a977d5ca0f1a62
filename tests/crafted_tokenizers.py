"""Small tokenizer.json files: those that break the library that reads them, and those that only look like it.

By name, each a whole file as text or bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

VOCAB = {"a": 0, "b": 1, "ab": 2, "h": 3, "<unk>": 4, " ": 5}
U64 = 2**64 - 1
ENDLESS = "(a+a+)+$b"


def tokenizer(model: Mapping[str, Any], **parts: Any) -> str:
    empty = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    return json.dumps({"version": "1.0", "added_tokens": [], **dict.fromkeys(empty), "model": model, **parts})


def bpe(**changes: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": VOCAB, "merges": [["a", "b"]], **changes}


def word_piece(**changes: Any) -> dict[str, Any]:
    fixed = {"unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return {"type": "WordPiece", "vocab": VOCAB, **fixed, **changes}


def word_level(**changes: Any) -> dict[str, Any]:
    return {"type": "WordLevel", "vocab": VOCAB, "unk_token": "<unk>", **changes}


def unigram(**changes: Any) -> dict[str, Any]:
    vocab = [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]]
    return {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False, **changes}


def added(content: str = "<x>", **changes: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": 6, "content": content, **flags, "special": True, **changes}


def regex(pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def template(single: list[Any], special: Mapping[str, Any]) -> dict[str, Any]:
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def nested(kind: str, key: str, depth: int) -> str:
    """Sequences in sequences, as the text of a part."""
    return f'{{"type":"{kind}","{key}":[' * depth + "]}" * depth


def spliced(part: str, text: str) -> str:
    return tokenizer(bpe(), **{part: "HERE"}).replace('"HERE"', text)


_CLS = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
_A, _B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
_GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
_STRIP = {"type": "Strip", "content": "a"}

# What is known to panic, to abort or to go on without end, and what the library refuses.
BROKEN: dict[str, str | bytes] = {
    "a prefix longer than a token": tokenizer(bpe(continuing_subword_prefix="##")),
    "a prefix that ends in a character": tokenizer(
        bpe(continuing_subword_prefix="#", vocab={"a": 0, "é": 1, "aé": 2}, merges=[["a", "é"]])
    ),
    "a prefix of four bytes": tokenizer(
        bpe(continuing_subword_prefix="😀", vocab={"é": 0, "b": 1, "éb": 2}, merges=[["é", "b"]])
    ),
    "a merge of unknown tokens": tokenizer(bpe(merges=[["y", "z"]])),
    "a merge into an unknown token": tokenizer(bpe(merges=[["b", "a"]])),
    "a merge of one token": tokenizer(bpe(merges=["ab"])),
    "a merge of three tokens": tokenizer(bpe(merges=[["a", "b", "ab"]])),
    "dropout of everything and more": tokenizer(bpe(dropout=5.0)),
    "negative dropout": tokenizer(bpe(dropout=-1)),
    "dropout beyond float32": tokenizer(bpe(dropout=1e39)),
    "an id of 33 bits": tokenizer(bpe(vocab={"a": 0, "b": 2**32}, merges=[])),
    "a negative id": tokenizer(bpe(vocab={"a": -1}, merges=[])),
    "an id that is no integer": tokenizer(bpe(vocab={"a": 0.5}, merges=[])),
    "a vocabulary that is a list": tokenizer(bpe(vocab=["a", "b"], merges=[])),
    "no merges": tokenizer({"type": "BPE", "vocab": VOCAB}),
    "an unknown model": tokenizer({"type": "Magic"}),
    "a model of no type": tokenizer({}),
    "an unknown id out of range": tokenizer(unigram(unk_id=10**6)),
    "an unknown id in an empty vocabulary": tokenizer(unigram(vocab=[])),
    "an infinite score": tokenizer(unigram()).replace("-1.0", "-1e400"),
    "a score that is text": tokenizer(unigram(vocab=[["a", "b"]])),
    "a negative width of words": tokenizer(word_piece(max_input_chars_per_word=-1)),
    "an added token with a negative id": tokenizer(bpe(), added_tokens=[added(id=-1)]),
    "an added token of 33 bits": tokenizer(bpe(), added_tokens=[added(id=2**32)]),
    "an added token that is a lone surrogate": tokenizer(bpe(), added_tokens=[added("\ud800")]),
    "an added token without text": tokenizer(bpe(), added_tokens=[{"id": 6}]),
    "an added token that nothing is left of": tokenizer(
        bpe(),
        added_tokens=[added("  ", normalized=True)],
        normalizer={"type": "Strip", "strip_left": True, "strip_right": True},
    ),
    "a regex that is none": tokenizer(bpe(), normalizer=regex("(")),
    "a regex without end": tokenizer(bpe(), normalizer=regex(ENDLESS)),
    "a regex without end on another letter": tokenizer(bpe(), normalizer=regex("(q|q|qq)+$b")),
    "a regex without end on a pair": tokenizer(bpe(), normalizer=regex("(zy|zyzy|zyzyzy)+$b")),
    "a regex without end on blanks": tokenizer(bpe(), pre_tokenizer=split("( +| + +)+$b")),
    "a regex that recurs without end": tokenizer(bpe(), normalizer=regex(r"(?<r>(?:\g<r>)*a)")),
    "a regex of deep groups": tokenizer(bpe(), normalizer=regex("(" * 5000 + ")" * 5000)),
    "a regex of deeper groups": tokenizer(bpe(), normalizer=regex("(" * 200_000 + ")" * 200_000)),
    "a regex that splits without end": tokenizer(bpe(), pre_tokenizer=split(ENDLESS)),
    "a text that grows": tokenizer(bpe(), normalizer={"type": "Sequence", "normalizers": [_GROWING] * 9}),
    "a text that grows on another letter": tokenizer(
        bpe(),
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "q"}, "content": "q" * 10}] * 9,
        },
    ),
    "a text that grows at once": tokenizer(bpe(), normalizer={"type": "Prepend", "prepend": "a" * 10_000_000}),
    "no charsmap": tokenizer(bpe(), normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
    "a charsmap of nothing": tokenizer(bpe(), normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a charsmap that is larger than it is": tokenizer(
        bpe(), normalizer={"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}
    ),
    "an unknown normalizer": tokenizer(bpe(), normalizer={"type": "Magic"}),
    "normalizers in normalizers": spliced("normalizer", nested("Sequence", "normalizers", 20_000)),
    "pieces of no length": tokenizer(bpe(), pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a replacement of no character": tokenizer(
        bpe(), pre_tokenizer={"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True}
    ),
    "a delimiter of two characters": tokenizer(bpe(), pre_tokenizer={"type": "CharDelimiterSplit", "delimiter": "ab"}),
    "pre-tokenizers in pre-tokenizers": spliced("pre_tokenizer", nested("Sequence", "pretokenizers", 20_000)),
    "a template with an unknown token": tokenizer(bpe(), post_processor=template([_CLS, _A], {})),
    "a template with a second text": tokenizer(bpe(), post_processor=template([_B], {})),
    "a template of a hundred thousand texts": tokenizer(bpe(), post_processor=template([_A] * 100_000, {})),
    "a template of ids beyond 32 bits": tokenizer(
        bpe(), post_processor=template([_CLS, _A], {"[CLS]": {"id": "[CLS]", "ids": [2**32], "tokens": ["[CLS]"]}})
    ),
    "a decoder that strips too much": tokenizer(bpe(), decoder={**_STRIP, "start": U64, "stop": U64}),
    "a decoder that strips the end": tokenizer(bpe(), decoder={**_STRIP, "start": 0, "stop": 10}),
    "a decoder that strips twice": tokenizer(bpe(), decoder={**_STRIP, "start": 1, "stop": 1}),
    "a decoder that strips a text": tokenizer(bpe(), decoder={**_STRIP, "content": "ab", "start": 1, "stop": 1}),
    "a decoder that grows": tokenizer(
        bpe(),
        decoder={
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 4,
        },
    ),
    "decoders in decoders": spliced("decoder", nested("Sequence", "decoders", 20_000)),
    "nothing": b"",
    "null": b"null",
    "an empty object": b"{}",
    "a list": b"[]",
    "text that is not UTF-8": b'{"version": "\xff"}',
    "another version": tokenizer(bpe(), version="2.0"),
    "a version that is a list": tokenizer(bpe(), version=["x" * 100_000]),
    "deep JSON": b"[" * 100_000,
    "JSON that ends too soon": tokenizer(bpe())[:-9],
    "truncation that is text": tokenizer(bpe(), truncation="a" * 100_000),
    "binary": bytes(range(256)) * 100,
}

# What looks as bad and works: for all texts, or for those whose characters have a token.
WORKING: dict[str, str | bytes] = {
    "bpe": tokenizer(bpe()),
    "bpe, an unknown token that is missing": tokenizer(bpe(unk_token="[UNK]")),
    "bpe, bytes that are missing": tokenizer(bpe(byte_fallback=True)),
    "bpe, an empty vocabulary": tokenizer(bpe(vocab={}, merges=[])),
    "bpe, the largest id": tokenizer(bpe(vocab={"a": 0, "b": 2**32 - 1, "ab": 5})),
    "bpe, one id": tokenizer(bpe(vocab={"a": 0, "b": 0, "ab": 0})),
    "word piece": tokenizer(word_piece()),
    "word piece, an unknown token that is missing": tokenizer(word_piece(unk_token="[UNK]")),
    "word piece, words of no length": tokenizer(word_piece(max_input_chars_per_word=0)),
    "word piece, words of any length": tokenizer(word_piece(max_input_chars_per_word=U64)),
    "word level": tokenizer(word_level(), pre_tokenizer={"type": "Whitespace"}),
    "word level, an unknown token that is missing": tokenizer(word_level(unk_token="[UNK]")),
    "unigram": tokenizer(unigram()),
    "unigram, no unknown token": tokenizer(unigram(unk_id=None)),
    "unigram, an empty piece": tokenizer(unigram(vocab=[["<unk>", 0.0], ["", 0.0]])),
    "unigram, huge scores": tokenizer(unigram(vocab=[["<unk>", -1e308], ["a", 1e308], ["b", 1e308]])),
    "an added token with the largest id": tokenizer(bpe(), added_tokens=[added(id=2**32 - 1)]),
    "an added token with another's id": tokenizer(bpe(), added_tokens=[added(id=0)]),
    "an added token twice": tokenizer(bpe(), added_tokens=[added(), added(id=7)]),
    "an added token of no text": tokenizer(bpe(), added_tokens=[added("")]),
    "an empty pattern": tokenizer(bpe(), normalizer=regex("")),
    "a short nesting": spliced("normalizer", nested("Sequence", "normalizers", 20)),
    "pieces of any length": tokenizer(bpe(), pre_tokenizer={"type": "FixedLength", "length": U64}),
    "padding of any length": tokenizer(
        bpe(),
        padding={
            "strategy": {"Fixed": U64},
            "direction": "Right",
            "pad_to_multiple_of": 0,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        },
    ),
    "truncation to nothing": tokenizer(
        bpe(), truncation={"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9}
    ),
    "a template of no text": tokenizer(bpe(), post_processor=template([], {})),
    "a template with ids that no token has": tokenizer(
        bpe(), post_processor=template([_CLS, _A], {"[CLS]": {"id": "[CLS]", "ids": [2**32 - 1], "tokens": ["[CLS]"]}})
    ),
}

# How published models split text; a run of a thousand characters of one kind must be as fast as any.
PATTERNS = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "Qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "GPT-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "digits in threes": r"\d{1,3}(?=(?:\d{3})*\b)",
    "DeepSeek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
