"""The Rust tokenizer behind ``Tokenizer``, made the same way in this process and in the child that tries it first.

In: the bytes of tokenizer.json and the tokens that tokenizer_config.json adds. Out: a ``tokenizers.Tokenizer``; its
errors, and the panics of its Rust code, as one of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tokenizers

from lfm2_export.errors import Lfm2ExportError
from lfm2_export.messages import shown

# Arguments of tokenizers.AddedToken: "content" and flags.
Token = Mapping[str, Any]


def build(data: bytes, declared: Iterable[Token], special: Iterable[Token]) -> tokenizers.Tokenizer:
    """Opens tokenizer.json and makes further tokens known to it, as transformers does.

    Truncation and padding, which the file may ask for, are off. All tokens are added at once: the library sorts
    everything it knows after each call.

    Args:
        data: the file.
        declared: tokens that are added where the file does not have them.
        special: tokens that become special.

    Raises:
        Exception, and PanicException (a BaseException): whatever the library makes of a damaged file.
    """
    backend = tokenizers.Tokenizer.from_buffer(data)
    backend.no_truncation()
    backend.no_padding()
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([tokenizers.AddedToken(**token) for token in declared if token["content"] not in known])
    backend.add_special_tokens([tokenizers.AddedToken(**token) for token in special])
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
