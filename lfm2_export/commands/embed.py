"""``lfm2-export embed``: texts in, vectors out, on an artifact of an encoder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from lfm2_export import console
from lfm2_export.commands.base import add_artifact, add_json, add_threads
from lfm2_export.encoders import DEFAULT_BATCH_SIZE, load_encoder
from lfm2_export.errors import RunnerError
from lfm2_export.text import check_text

# Of standard input; a device has no end.
_STDIN_LIMIT = 64 << 20


class EmbedCommand:
    name = "embed"
    help = "turn texts into vectors with an encoder"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_artifact(parser)
        parser.add_argument(
            "--text",
            action="append",
            metavar="TEXT",
            help="a text, and another one with each further --text (default: the lines of standard input)",
        )
        parser.add_argument(
            "--query",
            action="store_true",
            help="the texts are queries (default: documents): the two have other prompts",
        )
        parser.add_argument(
            "--batch-size", type=int, default=DEFAULT_BATCH_SIZE, metavar="N", help="texts at once (default: 32)"
        )
        add_threads(parser)
        add_json(parser)

    def run(self, options: argparse.Namespace) -> int:
        texts = options.text if options.text is not None else _lines()
        for index, text in enumerate(texts):
            check_text(text, f"text {index}")
        with console.busy("loading"):
            encoder = load_encoder(
                options.artifact, backend=options.backend, scheme=options.scheme, threads=options.threads
            )
        vectors = encoder.encode(texts, query=options.query, batch_size=options.batch_size)
        if options.json:
            found = [{"text": text, "embedding": one.tolist()} for text, one in zip(texts, vectors, strict=True)]
            console.print_json({"query": options.query, "embeddings": found})
        else:
            for one in vectors:
                console.stream("".join(f"{line}\n" for line in _rows(one)))
        return 0


def _lines() -> Sequence[str]:
    """Standard input's lines, for a vector each. They end as files' lines do: U+2028 or a form feed is of the text.

    Raises:
        RunnerError: it is too long, there is none, or a line before the last one is blank.
    """
    data = sys.stdin.buffer.read(_STDIN_LIMIT + 1)
    if len(data) > _STDIN_LIMIT:
        raise RunnerError(f"standard input: has more than {_STDIN_LIMIT >> 20} MiB; give it in parts")
    lines = [line.removesuffix("\r") for line in data.decode(errors="surrogateescape").split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise RunnerError("standard input: holds no text; pass --text, or lines on standard input")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise RunnerError(f"standard input: line {number} is blank, which has no vector; take it out")
    return lines


def _rows(vectors: np.ndarray) -> Iterator[str]:
    """A vector a line; those of a text's tokens as one line each, and an empty one behind them."""
    for row in np.atleast_2d(vectors):
        yield " ".join(f"{value:.7g}" for value in row)
    if vectors.ndim == 2:
        yield ""
