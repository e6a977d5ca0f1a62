"""The tokenizer and the chat templates in a GGUF file, as the files that every other reader of ours takes.

In: the file's settings. Out: the contents of tokenizer.json and tokenizer_config.json, and templates by name; None
where it holds no byte-level BPE (some are made for programs that bring their own).

A GGUF names the regular expression by which text is cut up first (``tokenizer.ggml.pre``) instead of holding it. For
``lfm2``, ``llama-bpe`` and the like it is Llama 3's, and a piece that is a token is never merged from smaller ones, as
llama.cpp's ``llama-vocab.cpp`` has it.
"""

from __future__ import annotations

from typing import Any

from lfm2_export.errors import CheckpointError
from lfm2_export.gguf.settings import Settings
from lfm2_export.messages import shown

# llama.cpp's names for one and the same way of cutting text.
_LIKE_LLAMA3 = ("lfm2", "llama3", "llama-v3", "llama-bpe")
_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # of gguf's TokenType
_TEMPLATE = "tokenizer.chat_template"


def tokenizer_files(settings: Settings) -> dict[str, dict[str, Any]] | None:
    """tokenizer.json and tokenizer_config.json by their names.

    Raises:
        CheckpointError: lists that do not belong together, a token twice, a merge of what is no token.
    """
    if settings.get("tokenizer.ggml.model", str) != "gpt2":
        return None
    pre = settings.get("tokenizer.ggml.pre", str, "default")
    if pre not in _LIKE_LLAMA3:
        raise CheckpointError(
            f"{settings.place}: tokenizer.ggml.pre={shown(pre)} is not known; known: {', '.join(_LIKE_LLAMA3)}. Pass "
            "--config-from with the Hub id or folder of the original model"
        )
    tokens = _texts(settings, "tokenizer.ggml.tokens")
    kinds = settings.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise CheckpointError(
            f"{settings.place}: tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens; convert "
            "the model again"
        )
    vocabulary = {token: index for index, token in enumerate(tokens) if kinds[index] != _UNUSED}
    if len(vocabulary) != sum(kind != _UNUSED for kind in kinds):
        raise CheckpointError(f"{settings.place}: tokenizer.ggml.tokens has a token twice; convert the model again")
    added = [
        _added(index, tokens[index], kind) for index, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": vocabulary,
        "merges": _merges(settings, vocabulary),
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": _CUTS}, "behavior": "Isolated", "invert": False}
    names = {name: _token(settings, key, tokens) for name, key in _PARTS.items()}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "post_processor": _post_processor(settings, names["bos_token"]),
        "decoder": byte_level | {"use_regex": True},
        "model": model,
    }
    return {"tokenizer.json": whole, "tokenizer_config.json": _config(names, added)}


_PARTS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}


def _config(names: dict[str, tuple[int, str] | None], added: list[dict[str, Any]]) -> dict[str, Any]:
    decoder = {str(one["id"]): {key: value for key, value in one.items() if key != "id"} for one in added}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {name: found[1] for name, found in names.items() if found is not None}
    return {"added_tokens_decoder": decoder, **config}


def _texts(settings: Settings, key: str) -> list[str]:
    found: list[str] = settings.needed(key, list)
    if not found or not isinstance(found[0], str):
        raise CheckpointError(f"{settings.place}: {key} is not a list of texts; convert the model again")
    return found


def _added(index: int, token: str, kind: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": token, **flags, "special": kind == _CONTROL}


def _merges(settings: Settings, vocabulary: dict[str, int]) -> list[list[str]]:
    found = []
    for number, merge in enumerate(_texts(settings, "tokenizer.ggml.merges")):
        pair = merge.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise CheckpointError(
                f"{settings.place}: tokenizer.ggml.merges: number {number}, {shown(merge, 40)}, is not two tokens that "
                "make a third; convert the model again"
            )
        found.append(pair)
    return found


def _token(settings: Settings, key: str, tokens: list[str]) -> tuple[int, str] | None:
    index = settings.token(key)
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise CheckpointError(
            f"{settings.place}: tokenizer.ggml.{key}_token_id={index} is not in the vocabulary of {len(tokens)}; "
            "convert the model again"
        )
    return index, tokens[index]


def _post_processor(settings: Settings, bos: tuple[int, str] | None) -> dict[str, Any] | None:
    """Puts the token that begins a text before it."""
    if bos is None or not settings.get("tokenizer.ggml.add_bos_token", bool, True):
        return None
    index, token = bos
    first = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {token: {"id": token, "ids": [index], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": special}


def chat_templates(settings: Settings) -> dict[str, str]:
    """Templates by their names; that without one is "default"."""
    found = {}
    if (template := settings.get(_TEMPLATE, str)) is not None:
        found["default"] = template
    for name in settings.get("tokenizer.chat_templates", list, []):
        if isinstance(name, str) and (template := settings.get(f"{_TEMPLATE}.{name}", str)) is not None:
            found[name] = template
    return found
