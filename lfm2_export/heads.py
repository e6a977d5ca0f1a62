"""What an encoder gives: its hidden states and, by its head, a vector a text, a vector a token, or logits.

In: what a checkpoint's files say. Out: ``EncoderHead``, and the names by which every program's outputs go.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# Outputs, float32 in every scheme: [B, T, hidden_size]; [B, hidden_size]; [B, T, projection]; [B, T, vocabulary].
HIDDEN = "last_hidden_state"
SENTENCE = "sentence_embedding"
TOKENS = "token_embeddings"
LOGITS = "logits"

# What an attention mask says of a position. An expansion is a token that the convolutions and its own query see, and
# no other token attends to: ColBERT's queries are filled up with such (``retrieval.TextSettings``).
PADDING, ATTENDED, EXPANSION = 0, 1, 2


class Pooling(StrEnum):
    """How the hidden states of a text become its one vector; the names are sentence-transformers'."""

    FIRST = "cls"
    MEAN = "mean"


@dataclass(frozen=True, kw_only=True)
class EncoderHead:
    """At most one of a vector a text (``pooling``), a vector a token (``projection``: its width) and the vocabulary's
    logits (``masked_lm``); vectors are of length 1."""

    pooling: Pooling | None = None
    projection: int | None = None
    projection_bias: bool = False
    masked_lm: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what a program returns, in its order."""
        further = {SENTENCE: self.pooling, TOKENS: self.projection, LOGITS: self.masked_lm or None}
        return (HIDDEN, *(name for name, part in further.items() if part is not None))

    def describe(self, hidden_size: int) -> str:
        """In words, for reports."""
        if self.pooling is not None:
            return f"a vector of {hidden_size} for a text ({self.pooling} pooling)"
        if self.projection is not None:
            return f"a vector of {self.projection} for each token"
        return "logits of masked tokens" if self.masked_lm else "hidden states"
