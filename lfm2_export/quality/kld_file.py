"""The base files of llama.cpp's perplexity tool: a model's log probabilities over a text, with the text's tokens.

In: a path. Out: ``Base``, whose chunks are read one at a time; or the file, for ``llama-perplexity --kl-divergence``.
The vocabulary's log probabilities of a position are 16 bits each, down to 16 nats below the likeliest one.

Format (llama.cpp, ``tools/perplexity/perplexity.cpp``), little-endian: "_logits_", int32 context, int32 vocabulary,
int32 chunks, int32 tokens [chunks, context]; then for each chunk and each position from context / 2 to context - 2:
float32 step, float32 least, uint16 [vocabulary, made even] with log probability = least + step * value. A program that
computes it puts bos in the place of each chunk's first token, where the tokenizer has one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from lfm2_export import files, paths
from lfm2_export.errors import Lfm2ExportError, ResourceError
from lfm2_export.resources import is_disk_full

MAGIC = b"_logits_"
_LOWEST = 16.0  # nats below the likeliest token
_GREATEST = 65535
_MOST_CONTEXT, _MOST_VOCABULARY, _MOST_TOKENS = 1 << 20, 1 << 20, 1 << 28


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """``tokens`` int64 [chunks, context]; the positions that count are those from ``first`` on, but for the last."""

    path: Path
    vocab_size: int
    tokens: np.ndarray

    @property
    def first(self) -> int:
        return int(self.tokens.shape[1]) // 2

    def log_probabilities(self) -> Iterator[np.ndarray]:
        """Of each chunk float32 [positions, vocabulary].

        Raises:
            Lfm2ExportError: the file changed.
        """
        real = paths.real(self.path, Lfm2ExportError)
        row, rows = _row_dtype(self.vocab_size), self.tokens.shape[1] - 1 - self.first
        with files.open_regular(self.path, real.parent, Lfm2ExportError, real=real) as file:
            file.seek(_start(self.tokens.size))
            for _ in range(len(self.tokens)):
                stored = np.frombuffer(_take(self.path, file, rows * row.itemsize), row)
                yield stored["least"][:, None] + stored["step"][:, None] * stored["values"][:, : self.vocab_size]


def read_base(path: Path, vocab_size: int) -> Base:
    """Opens a file; everything that it states is checked against its size.

    Raises:
        Lfm2ExportError: it is none, is truncated, or is of another vocabulary.
    """
    real = paths.real(path, Lfm2ExportError)
    with files.open_regular(path, real.parent, Lfm2ExportError, real=real) as file:
        size = os.fstat(file.fileno()).st_size
        if _take(path, file, len(MAGIC)) != MAGIC:
            raise Lfm2ExportError(f"{paths.shown(path)}: is no file of llama-perplexity --kl-divergence-base")
        context, stated, chunks = (int(number) for number in np.frombuffer(_take(path, file, 12), "<i4"))
        if stated != vocab_size:
            raise Lfm2ExportError(
                f"{paths.shown(path)}: is of a vocabulary of {stated} tokens, and the checkpoint has {vocab_size}; "
                "give the file that was made with this model"
            )
        in_bounds = 4 <= context <= _MOST_CONTEXT and chunks >= 1 and context * chunks <= _MOST_TOKENS
        if not in_bounds or not 1 <= stated <= _MOST_VOCABULARY:
            raise Lfm2ExportError(f"{paths.shown(path)}: states {chunks} chunks of {context} tokens; make it again")
        tokens = np.frombuffer(_take(path, file, 4 * context * chunks), "<i4").astype(np.int64)
    needed = _start(tokens.size) + chunks * (context - 1 - context // 2) * _row_dtype(vocab_size).itemsize
    if size < needed:
        raise Lfm2ExportError(f"{paths.shown(path)}: is truncated ({size} bytes of {needed}); make it again")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise Lfm2ExportError(f"{paths.shown(path)}: has tokens that are not in the vocabulary; make it again")
    return Base(path=path, vocab_size=vocab_size, tokens=tokens.reshape(chunks, context))


def write_base(path: Path, tokens: np.ndarray, logits: Iterator[np.ndarray]) -> None:
    """Writes tokens [chunks, context] and, of each chunk, logits float32 [context - 1, vocabulary] from the first
    position on; only the second half is stored.

    Raises:
        ResourceError: the disk is full.
        Lfm2ExportError: the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    first = tokens.shape[1] // 2
    try:
        with open(unfinished, "xb") as file:
            for index, chunk in enumerate(logits):
                if index == 0:
                    numbers = np.array([tokens.shape[1], chunk.shape[1], len(tokens)], "<i4")
                    file.write(MAGIC + numbers.tobytes() + tokens.astype("<i4").tobytes())
                file.write(_stored(chunk[first : tokens.shape[1] - 1]).tobytes())
        unfinished.rename(path)
    except OSError as error:
        kind = ResourceError if is_disk_full(error) else Lfm2ExportError
        raise kind(f"{paths.shown(path)}: cannot be written ({error.strerror}); give another file") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _stored(logits: np.ndarray) -> np.ndarray:
    """Rows as they lie in the file."""
    values = logits.astype(np.float64)
    greatest = values.max(axis=1, keepdims=True)
    lowest = np.maximum(values.min(axis=1, keepdims=True), greatest - _LOWEST)
    step = (greatest - lowest) / _GREATEST
    rows = np.zeros(len(values), _row_dtype(values.shape[1]))
    rows["step"] = step[:, 0]
    rows["least"] = (lowest - greatest - np.log(np.exp(values - greatest).sum(axis=1, keepdims=True)))[:, 0]
    scaled = np.divide(values - lowest, step, out=np.zeros_like(values), where=step > 0)
    rows["values"][:, : values.shape[1]] = np.clip(np.rint(scaled), 0, _GREATEST)
    return rows


def _row_dtype(vocab_size: int) -> np.dtype[np.void]:
    return np.dtype([("step", "<f4"), ("least", "<f4"), ("values", "<u2", (vocab_size + vocab_size % 2,))])


def _start(tokens: int) -> int:
    return len(MAGIC) + 12 + 4 * tokens


def _take(path: Path, file: FileIO, count: int) -> bytes:
    pieces = []
    while count and (piece := file.read(count)):
        pieces.append(piece)
        count -= len(piece)
    if count:
        raise Lfm2ExportError(f"{paths.shown(path)}: is truncated; make it again")
    return b"".join(pieces)
