"""The program that tries a tokenizer before this user's process opens it.

In: a tokenizer.json and the tokens that come with it. Out: nothing, where it opened and then encoded and decoded what
is likely to break it; else what went wrong. A crash, a regular expression that never ends and a text that a normalizer
makes a billion times as long end this process, which is the answer as well.
"""

from __future__ import annotations

import json
import marshal
from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers

from lfm2_export.isolated.serve import serve
from lfm2_export.isolated.wire import Refusal
from lfm2_export.tokenizer_backend import build, is_panic, reason

_RUN = 1000
_WRITTEN = 100_000
# One of each kind of character that tokenizers tell apart.
_KINDS = "aA1 \n\t._-é中😀\u0301\u200d\x00\ufffd"
_RANGES = ((0x20, 0x3000, 1), (0x3000, 0xD800, 32), (0xE000, 0x11000, 32), (0x1F000, 0x1FB00, 4))
_ALONE = 256
# Tokens for each character, at most: a character has up to 4 bytes, and up to 18 characters where it is decomposed.
_MOST = 128


def main() -> None:
    """Each request: (tokenizer.json, tokens to add, tokens that are special) as marshal writes them."""
    serve(_answer)


def _answer(request: bytes) -> bytes:
    data, declared, special = marshal.loads(request)
    try:
        tokenizer = build(data, declared, special)
        for text in _texts(tokenizer):
            _encode(tokenizer, text)
        _decode(tokenizer)
    except (MemoryError, Refusal):
        raise
    except BaseException as error:
        raise Refusal(reason(error)) from None
    return b""


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    """An error is in order, since a vocabulary may lack a token for what it does not know; a panic is not."""
    for add_special_tokens in (True, False):
        try:
            count = len(tokenizer.encode(text, add_special_tokens=add_special_tokens))
        except BaseException as error:
            if is_panic(error) or isinstance(error, MemoryError):
                raise
            continue
        if count > _MOST * (len(text) + 1):
            raise Refusal(f"it makes {count} tokens of {len(text)} characters")


def _decode(tokenizer: tokenizers.Tokenizer) -> None:
    ids = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
    added = sorted(tokenizer.get_added_tokens_decoder())
    for skip_special_tokens in (True, False):
        tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    for token in {*ids[:_ALONE], *ids[-_ALONE:], *added[:_ALONE], 2**32 - 1}:
        tokenizer.decode([token], skip_special_tokens=False)


def _texts(tokenizer: tokenizers.Tokenizer) -> Iterator[str]:
    """Short, of every kind, of all characters, and long runs of what the file's own patterns speak of."""
    yield from ("", *_KINDS, f"Hello, {_KINDS} world!\n")
    yield "".join(chr(code) for first, end, step in _RANGES for code in range(first, end, step))
    written = list(_strings(tokenizer))
    yield from (_run(character) for character in dict.fromkeys(_KINDS + "".join(written)[:_WRITTEN]))
    yield from (_run(text[:_RUN]) for text in dict.fromkeys(written) if len(text) > 1)
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    yield "".join(added)[:_WRITTEN]
    yield " ".join(added)[:_WRITTEN]


def _run(text: str) -> str:
    """Without an end that would let a pattern match at once."""
    return text * (_RUN // len(text)) + "\x01"


def _strings(tokenizer: tokenizers.Tokenizer) -> Iterator[str]:
    """The texts in the parts that work on characters."""
    for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder):
        if part is not None:
            yield from _leaves(json.loads(part.__getstate__()))


def _leaves(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
