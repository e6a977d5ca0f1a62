"""Chooses the next token from a row of logits.

In: float32 logits [V] and the tokens so far. Out: a token id. Steps, their order and their edge cases are those of
transformers' LogitsProcessorList (RepetitionPenalty, Temperature, TopK, TopP, MinP): the same settings give the same
distribution. The random numbers differ: numpy's generator, seeded per row, so that a row of a batch draws what it
would draw alone.

Shape suffixes: V vocabulary, K tokens that are left to choose from.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lfm2_export.errors import GenerationError
from lfm2_export.generation_config import GenerationConfig


class Sampler:
    """Chooses tokens for one row; remembers which ones were there (for the repetition penalty) and its random state.

    Args:
        config: the settings.
        vocab_size: V.
        history: the prompt's tokens, which count as repeated, as they do in transformers.
        row: the row's number in its batch.
    """

    def __init__(self, config: GenerationConfig, vocab_size: int, history: Iterable[int] = (), row: int = 0):
        self._config = config
        self._seen_V = np.zeros(vocab_size, dtype=bool)
        self._seen_V[np.fromiter(history, dtype=np.int64)] = True
        self._random = np.random.default_rng(None if config.seed is None else [config.seed, row])

    def choose(self, logits_V: np.ndarray) -> int:
        """The next token, which is part of the history from then on.

        Raises:
            GenerationError: the logits are not numbers.
        """
        scores_V = penalize(logits_V, self._seen_V, self._config.repetition_penalty)
        best = int(np.argmax(scores_V))
        if not np.isfinite(scores_V[best]):
            raise GenerationError(
                f"the program gave {scores_V[best]} as its largest logit; its weights or its state overflow "
                "(fp16 programs: try another scheme)"
            )
        token = best if self._config.greedy else draw(*candidates(scores_V, self._config), self._random)
        self._seen_V[token] = True
        return token


def penalize(logits_V: np.ndarray, seen_V: np.ndarray, penalty: float) -> np.ndarray:
    """Divides the positive and multiplies the negative logits of ``seen_V`` by ``penalty`` (CTRL, arXiv:1909.05858)."""
    if penalty == 1:
        return logits_V
    scores_V, seen, factor = logits_V.copy(), np.flatnonzero(seen_V), np.float32(penalty)
    scores = scores_V[seen]
    scores_V[seen] = np.where(scores < 0, scores * factor, scores / factor)
    return scores_V


def candidates(scores_V: np.ndarray, config: GenerationConfig) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn, int64 [K] in rising order, and their scores, float32 [K].

    Each step looks only at what the one before has left: with top_k on (the default) that is a handful of tokens.
    """
    scores_V = scores_V / np.float32(config.temperature)
    tokens = np.flatnonzero(keep_top_k(scores_V, config.top_k) & (scores_V > -np.inf))
    scores = scores_V[tokens]
    for keep, setting in ((keep_top_p, config.top_p), (keep_min_p, config.min_p)):
        kept = keep(scores, setting)
        tokens, scores = tokens[kept], scores[kept]
    return tokens, scores


def keep_top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """bool: what scores at least as much as the k-th best; 0 keeps everything."""
    if k == 0 or k >= len(scores):
        return np.ones(len(scores), dtype=bool)
    return scores >= np.partition(scores, -k)[-k]


def keep_top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """bool: all but the unlikeliest tokens that together have at most 1 - p (nucleus sampling); the best stays."""
    if p == 1:
        return np.ones(len(scores), dtype=bool)
    probabilities, rest = softmax(scores), 1 - p
    # Tokens below rest / n are never kept, since all of them together cannot exceed the rest: no need to sort them.
    rare = probabilities < rest / len(scores)
    others = np.flatnonzero(~rare)
    ascending = others[np.argsort(scores[others], kind="stable")]
    # Summed in float64 and rounded once, as torch's cumsum does on the CPU.
    sums = probabilities[rare].sum(dtype=np.float64) + np.cumsum(probabilities[ascending], dtype=np.float64)
    kept = np.zeros(len(scores), dtype=bool)
    kept[ascending[sums.astype(np.float32) > np.float32(rest)]] = True
    kept[ascending[-1]] = True
    return kept


def keep_min_p(scores: np.ndarray, p: float) -> np.ndarray:
    """bool: what is at least ``p`` times as likely as the best token (arXiv:2407.01082); 0 keeps everything."""
    probabilities = softmax(scores)
    return probabilities >= np.float32(p) * probabilities.max()


def draw(tokens: np.ndarray, scores: np.ndarray, random: np.random.Generator) -> int:
    """One of ``tokens`` with the probability that softmax gives it."""
    cumulative = np.cumsum(softmax(scores.astype(np.float64)))
    chosen = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
    return int(tokens[min(chosen, len(tokens) - 1)])


def softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max())
    return shifted / shifted.sum()
