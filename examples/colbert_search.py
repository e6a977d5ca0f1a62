"""Searches a few documents with ColBERT, as PyLate does: a vector a token, and the sum of the best matches (MaxSim).

    lfm2-export export LiquidAI/LFM2.5-ColBERT-350M --scheme q8 --output colbert
    python examples/colbert_search.py colbert --query "which animal is it?" FILE.txt

In: an artifact of a ColBERT model; a query; a file with a document a line. Out: the documents, the best one first, each
with its score. Documents are encoded once: their vectors are what an index would keep.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lfm2_export


def search(artifact: Path, query: str, documents: list[str], scheme: str | None = None) -> list[tuple[float, str]]:
    """Every document with its score, the best one first."""
    encoder = lfm2_export.load_encoder(artifact, scheme=scheme)
    index = encoder.encode(documents)  # a [tokens, width] for each, without its punctuation
    (asked,) = encoder.encode([query], query=True)  # filled up to the model's length of queries
    scores = [lfm2_export.max_sim(asked, document) for document in index]
    return sorted(zip(scores, documents, strict=True), reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("documents", type=Path, help="a document a line")
    parser.add_argument("--query", required=True)
    parser.add_argument("--scheme", help="default: the preferred one in the folder")
    parser.add_argument("--best", type=int, default=5, help="how many to show")
    options = parser.parse_args()

    documents = [line for line in options.documents.read_text().splitlines() if line.strip()]
    for score, document in search(options.artifact, options.query, documents, options.scheme)[: options.best]:
        print(f"{score:7.3f}  {document}")


if __name__ == "__main__":
    main()
