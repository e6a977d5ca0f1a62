"""The text that models are compared on: windows of tokens, spread over it.

In: a checkpoint and perhaps a text file. Out: ``Sample``. The bundled text was kept out of the bundled checkpoints'
training, so perplexity on it means something; a checkpoint without a tokenizer gets pseudo-random tokens, on which
only differences mean something.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lfm2_export import files
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.source import ASSETS, BUNDLED
from lfm2_export.text import Tokenizer

HELD_OUT = ASSETS / "heldout.txt"
WINDOW = 512
# A thousand times what the default looks at; tokenizing it takes seconds and a gigabyte.
TEXT_LIMIT = 16 << 20
# What the cases of hops 1 and 2 need in one window.
LEAST_TOKENS = 96


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """``inputs`` int64 [T]; the token that really follows ``inputs[i]`` is ``targets[i]``."""

    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Windows of one length (the last may be shorter) and what they are, in words."""

    description: str
    windows: tuple[Window, ...]

    @property
    def tokens(self) -> int:
        return sum(len(window.inputs) for window in self.windows)

    def prompt(self, length: int, *, index: int = 0) -> np.ndarray:
        """``length`` tokens from the beginning of a window; other indices give other tokens."""
        inputs = self.windows[index % len(self.windows)].inputs
        start = 16 * (index // len(self.windows)) % max(1, len(inputs) - length)
        return inputs[start : start + length]


def read_sample(
    checkpoint: Checkpoint, text: str | Path | None, *, max_tokens: int, context_length: int, option: str = "--text"
) -> Sample:
    """Up to ``max_tokens`` tokens of ``text``, which ``option`` named, by default of the bundled text, in windows that
    fit the context.

    Raises:
        Lfm2ExportError: the text cannot be read or is too short, or ``max_tokens`` is.
    """
    if max_tokens < LEAST_TOKENS:
        raise Lfm2ExportError(f"max_tokens={max_tokens}: at least {LEAST_TOKENS} are needed")
    if context_length < LEAST_TOKENS:
        raise Lfm2ExportError(f"a context of {context_length} tokens is too short; {LEAST_TOKENS} are needed")
    length = min(WINDOW, context_length, max_tokens)
    if (checkpoint.path / "tokenizer.json").is_file():
        path = HELD_OUT if text is None else Path(text)
        tokenizer = Tokenizer.from_dir(checkpoint.path)
        content = files.read_own_text(path, Lfm2ExportError, limit=TEXT_LIMIT, option=option)
        tokens = np.array(tokenizer.encode(content, add_special_tokens=False), dtype=np.int64)
        prefix = np.array(tokenizer.encode(""), dtype=np.int64)
        description = _describe(checkpoint, text, content)
    elif text is None:
        tokens = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, max_tokens + 1)
        prefix = tokens[:0]
        description = "pseudo-random tokens, since the checkpoint has no tokenizer: only differences mean something"
    else:
        raise Lfm2ExportError(f"{checkpoint.path}: has no tokenizer.json to read {text} with; leave {option} out")
    checkpoint.check_tokens(np.concatenate([prefix, tokens]), Lfm2ExportError)
    if length - len(prefix) < 1:
        raise Lfm2ExportError(
            f"{checkpoint.path}: its tokenizer begins every text with {len(prefix)} tokens, which leave none of a "
            f"window of {length}; bring back the tokenizer that belongs to it"
        )
    if len(tokens) < LEAST_TOKENS:
        raise Lfm2ExportError(f"{text}: has {len(tokens)} tokens; at least {LEAST_TOKENS} are needed")
    return Sample(description=description, windows=_windows(tokens, prefix, length, max_tokens))


def _describe(checkpoint: Checkpoint, text: str | Path | None, content: str) -> str:
    if text is not None:
        return f"{Path(text).name} (sha256 {hashlib.sha256(content.encode()).hexdigest()[:12]})"
    if checkpoint.name in BUNDLED:
        return f"{HELD_OUT.name}, which was kept out of the checkpoint's training"
    return f"{HELD_OUT.name}, English documentation text that comes with lfm2-export"


def _windows(tokens: np.ndarray, prefix: np.ndarray, length: int, max_tokens: int) -> tuple[Window, ...]:
    """Evenly spread over the text, without overlap; each begins with the tokenizer's own prefix (bos)."""
    new = length - len(prefix) + 1  # the last token of a window is a target only
    count = max(1, min(max_tokens // length, len(tokens) // new))
    space = max(0, len(tokens) - count * new)
    starts = [index * new + space * index // max(1, count - 1) for index in range(count)]
    rows = [np.concatenate([prefix, tokens[start : start + new]]) for start in starts]
    return tuple(Window(inputs=row[:-1], targets=row[1:]) for row in rows)
