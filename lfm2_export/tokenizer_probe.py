"""Whether a tokenizer can be opened in this process without harm; found out once, in another process.

In: a tokenizer.json from anywhere. Out: nothing, or what is wrong with it. The library that reads it is written in
Rust, and on crafted files it panics, aborts the process, or works without end. The verdict that a tokenizer opens is
remembered in this user's cache folder by the hash of all that was tried, so that it costs its time once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import marshal
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from lfm2_export.errors import ResourceError
from lfm2_export.hashing import cache_folder
from lfm2_export.isolated.process import Child, Limits, Stopped
from lfm2_export.isolated.wire import Refusal
from lfm2_export.tokenizer_backend import Token

logger = logging.getLogger(__name__)

# A vocabulary of 128,000 takes 0.9 s and 250 MB.
DEFAULT_LIMITS = Limits(seconds=4.0, memory=1 << 30, reply=1 << 16)

# To be raised when more is tried than before.
_PROBE = "1"
_OPENS = b"opens\n"


def fault(data: bytes, declared: Sequence[Token], special: Sequence[Token], limits: Limits) -> str | None:
    """What is wrong with a tokenizer; None where it opened, encoded and decoded.

    Args:
        data: tokenizer.json.
        declared, special: the tokens that come with it (``tokenizer_backend.build``).
        limits: of the process that tries it.

    Raises:
        ResourceError: this system starts no such process.
    """
    tokens = (list(declared), list(special))
    record = _record(data, tokens)
    if _is_known(record):
        return None
    child = Child("lfm2_export.isolated.tokenizer", ("tokenizers",))
    try:
        child.ask(marshal.dumps((data, *tokens)), limits)
    except Refusal as error:
        return str(error)
    except Stopped as error:
        return f"opening it {error}"
    finally:
        child.stop()
    _remember(record)
    return None


def _record(data: bytes, tokens: object) -> Path | None:
    """The file that stands for the verdict; None where this user has no place for it."""
    key = hashlib.sha256(json.dumps([_PROBE, tokenizers.__version__, tokens], sort_keys=True).encode())
    key.update(data)
    try:
        return cache_folder() / "tokenizers" / key.hexdigest()
    except ResourceError as error:
        logger.debug("tokenizers are tried each time: %s", error)
        return None


def _is_known(record: Path | None) -> bool:
    try:
        return record is not None and record.read_bytes() == _OPENS
    except OSError:
        return False


def _remember(record: Path | None) -> None:
    """Best effort: a cache folder that cannot be written costs time, not correctness."""
    if record is None:
        return
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=record.parent)
        with open(descriptor, "wb") as file:
            file.write(_OPENS)
        os.replace(name, record)
    except OSError as error:
        logger.debug("verdict not remembered in %s: %s", record, error)
