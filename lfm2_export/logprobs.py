"""How likely tokens were: the program's own distribution, before temperature, penalties and what cuts it.

In: a chosen token and the logits that it was chosen from. Out: its logarithm and the likeliest tokens of its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lfm2_export.text import Tokenizer

_REPLACEMENT = "\ufffd"
# What OpenAI gives for a token that cannot be.
_IMPOSSIBLE = -9999.0


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """``text`` has U+FFFD where a token ends inside a character."""

    text: str
    logprob: float

    @property
    def utf8(self) -> list[int] | None:
        """Its bytes, None where the text does not tell them."""
        return None if _REPLACEMENT in self.text else list(self.text.encode())


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A chosen token and the likeliest ones of its place, in falling order."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


def choice_of(token: int, logits_V: np.ndarray, top: int, tokenizer: Tokenizer) -> Choice:
    logprobs = log_softmax(logits_V)
    best = np.argsort(-logprobs, kind="stable")[:top] if top else np.empty(0, dtype=np.int64)
    return Choice(
        chosen=_of(token, logprobs, tokenizer), top=tuple(_of(one, logprobs, tokenizer) for one in best.tolist())
    )


def _of(token: int, logprobs: np.ndarray, tokenizer: Tokenizer) -> TokenLogprob:
    value = float(logprobs[token])
    return TokenLogprob(text=tokenizer.decode([token]), logprob=value if np.isfinite(value) else _IMPOSSIBLE)


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted = logits_V.astype(np.float64) - logits_V.max()
    with np.errstate(under="ignore"):
        return shifted - np.log(np.exp(shifted).sum())
