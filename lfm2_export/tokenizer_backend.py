"""The Rust tokenizer behind ``Tokenizer``, made the same way in this process and in the child that tries it first.

In: the bytes of tokenizer.json and the tokens that tokenizer_config.json adds. Out: a ``tokenizers.Tokenizer``; its
errors, and the panics of its Rust code, as one of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import tokenizers

from lfm2_export.errors import Lfm2ExportError
from lfm2_export.messages import shown

# Arguments of tokenizers.AddedToken: "content" and flags.
Token = dict[str, Any]


class Additions(TypedDict):
    """What tokenizer_config.json adds to tokenizer.json, as plain data.

    declared: tokens in the order of their ids, which replace those of tokenizer.json; None where it declares none.
    older: then ids, which give an order, and tokens beside those of tokenizer.json.
    special: further ones, taken where the text is not yet known. named: the text of bos_token, eos_token, ..., which
    makes a token special. split: whether special tokens in a text are taken for text.
    """

    declared: list[Token] | None
    older: list[tuple[int, Token]]
    special: list[Token]
    named: list[str]
    split: bool


def build(data: bytes, additions: Additions) -> tokenizers.Tokenizer:
    """Opens tokenizer.json and makes the additions known to it by the rules of transformers 5.23's TokenizersBackend.

    Truncation and padding, which the file may ask for, are off. All tokens are added at once: the library sorts
    everything that it knows after each call.

    Raises:
        Exception, and PanicException (a BaseException): whatever the library makes of a damaged file.
    """
    backend = tokenizers.Tokenizer.from_buffer(data)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = additions["split"]
    there = backend.get_added_tokens_decoder()
    declared = additions["declared"]
    if declared is None:
        by_id = {ident: tokenizers.AddedToken(**token) for ident, token in additions["older"]} | there
        tokens = [by_id[ident] for ident in sorted(by_id)]
    else:
        tokens = [tokenizers.AddedToken(**token) for token in declared]
    known = {token.content for token in (*there.values(), *tokens)}
    tokens += [tokenizers.AddedToken(**token) for token in additions["special"] if token["content"] not in known]
    named = set(additions["named"])
    for token in tokens:
        token.special = token.special or token.content in named
    backend.add_tokens(tokens)
    return backend


@contextmanager
def translated(kind: type[Lfm2ExportError], fault: str, remedy: str) -> Iterator[None]:
    """Errors and panics of the library as ``kind``: the fault, the library's reason, the remedy."""
    try:
        yield
    except (MemoryError, Lfm2ExportError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise kind(f"{fault} ({reason(error)}); {remedy}") from error


def is_panic(error: BaseException) -> bool:
    """Whether Rust code gave up; pyo3 passes that on as a class that no module exports."""
    return type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """What the library says, short."""
    return shown(str(error).removeprefix("Cannot instantiate Tokenizer from buffer: "), 160)[1:-1]
