"""Chooses the next token from a row of logits.

In: float32 logits [V] and the tokens so far. Out: a token id. Steps, their order and their edge cases are those of
transformers' LogitsProcessorList (RepetitionPenalty, those of ``exclusions``, Temperature, TopK, TopP, MinP, Typical,
Epsilon, Eta): the same settings give the same
distribution. The random numbers differ: numpy's generator, seeded per row, so that a row of a batch draws what it
would draw alone.

Scores are float32 as in transformers, and float64 where float32 has no room for a setting: no number that a setting
may have makes a score infinite, and the smallest temperature is the likeliest token.

Shape suffixes: V vocabulary, K tokens that are left to choose from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from lfm2_export.constraints import Constraint
from lfm2_export.errors import GenerationError
from lfm2_export.exclusions import Exclusions, exclude_any
from lfm2_export.generation_config import GenerationConfig

_FLOAT32, _FLOAT64 = np.finfo(np.float32), np.finfo(np.float64)
# Probabilities that fall to zero and scores that fall to minus infinity are in order: such a token is not drawn.
_falling = np.errstate(over="ignore", under="ignore")


class Sampler:
    """Chooses tokens for one row; remembers which ones were there (for penalties and exclusions) and its random state.

    Args:
        config: the settings.
        vocab_size: V.
        history: the prompt's tokens, which count as repeated, as they do in transformers.
        row: the row's number in its batch.
        constraint: which tokens may come next; None: all.
    """

    def __init__(
        self,
        config: GenerationConfig,
        vocab_size: int,
        history: Iterable[int] = (),
        row: int = 0,
        constraint: Constraint | None = None,
    ):
        self._config = config
        self._constraint = constraint
        history = list(history)
        self._exclusions = Exclusions(config, vocab_size, history) if exclude_any(config) else None
        self._seen_V = np.zeros(vocab_size, dtype=bool)
        self._seen_V[np.fromiter(history, dtype=np.int64)] = True
        self._random = np.random.default_rng(None if config.seed is None else [config.seed, row])

    def choose(self, logits_V: np.ndarray) -> int:
        """The next token, which is part of the history from then on.

        Raises:
            GenerationError: the logits are not numbers, or the settings exclude every token.
        """
        best = int(np.argmax(logits_V))  # NaN where there is one
        if not np.isfinite(logits_V[best]):
            raise GenerationError(
                f"the program gave {logits_V[best]} as its largest logit; its weights or its state overflow "
                "(fp16 programs: try another scheme)"
            )
        scores_V = penalize(logits_V, self._seen_V, self._config.repetition_penalty)
        if self._exclusions is not None:
            scores_V = exclude(scores_V, self._exclusions.ids())
        if self._constraint is not None and (allowed_V := self._constraint.allowed()) is not None:
            scores_V = exclude(scores_V, np.flatnonzero(~allowed_V))
        if not self._config.greedy:
            token = draw(*candidates(scores_V, self._config), self._random)
        else:
            token = best if scores_V is logits_V else int(np.argmax(scores_V))
        self._seen_V[token] = True
        if self._exclusions is not None:
            self._exclusions.add(token)
        if self._constraint is not None:
            self._constraint.accept(token)
        return token


def exclude(scores_V: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The scores with minus infinity for ``ids``.

    Raises:
        GenerationError: nothing is left.
    """
    if not len(ids):
        return scores_V
    scores_V = scores_V.copy()
    scores_V[ids] = -np.inf
    if scores_V.max() == -np.inf:
        raise GenerationError(
            "the settings exclude every token (suppress_tokens, bad_words_ids, no_repeat_ngram_size, min_new_tokens, "
            "a schema); relax one of them"
        )
    return scores_V


@_falling
def penalize(logits_V: np.ndarray, seen_V: np.ndarray, penalty: float) -> np.ndarray:
    """Divides the positive and multiplies the negative logits of ``seen_V`` by ``penalty`` (CTRL, arXiv:1909.05858);
    float64 where float32 cannot hold the result."""
    if penalty == 1:
        return logits_V
    seen = np.flatnonzero(seen_V)
    scores = logits_V[seen]
    if _has_room(logits_V, penalty) and np.abs(scores).max(initial=0) <= _FLOAT32.max * min(penalty, 1 / penalty):
        scores_V, factor = logits_V.copy(), np.float32(penalty)
        scores_V[seen] = np.where(scores < 0, scores * factor, scores / factor)
        return scores_V
    scores_V = logits_V.astype(np.float64)
    scores = scores_V[seen]
    changed = np.where(scores < 0, scores * penalty, scores / penalty)
    # A logit of minus infinity is a token that the program excludes; no other becomes one.
    scores_V[seen] = np.where(np.isfinite(scores), np.clip(changed, _FLOAT64.min, _FLOAT64.max), scores)
    return scores_V


@_falling
def candidates(scores_V: np.ndarray, config: GenerationConfig) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn, int64 [K] in rising order, and their scores, float32 or float64 [K].

    Each step looks only at what the one before has left: with top_k on (the default) that is a handful of tokens.
    """
    scores_V = temper(scores_V, config.temperature)
    tokens = np.flatnonzero(keep_top_k(scores_V, config.top_k) & (scores_V > -np.inf))
    scores = scores_V[tokens]
    steps = (
        (keep_top_p, config.top_p),
        (keep_min_p, config.min_p),
        (keep_typical, config.typical_p),
        (keep_epsilon, config.epsilon_cutoff),
        (keep_eta, config.eta_cutoff),
    )
    for keep, setting in steps:
        kept = keep(scores, setting)
        tokens, scores = tokens[kept], scores[kept]
    return tokens, scores


@_falling
def temper(scores_V: np.ndarray, temperature: float) -> np.ndarray:
    """The scores divided by ``temperature``; where float32 has no room for that, their distances to the best one."""
    best = float(scores_V.max())
    if _has_room(scores_V, temperature) and abs(best) <= _FLOAT32.max * min(temperature, 1):
        return scores_V / np.float32(temperature)
    return (scores_V.astype(np.float64) - best) / temperature


def _has_room(scores: np.ndarray, setting: float) -> bool:
    """Whether these are float32 and a setting keeps its digits in it."""
    return scores.dtype == np.float32 and bool(_FLOAT32.tiny <= setting <= _FLOAT32.max)


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
    rare[np.argmax(scores)] = False  # whatever rounding makes of n equal ones
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


def keep_typical(scores: np.ndarray, mass: float) -> np.ndarray:
    """bool: the tokens whose surprise is nearest to the entropy, until they have ``mass`` together (arXiv:2202.00666);
    1 and more keeps everything."""
    if mass >= 1:
        return np.ones(len(scores), dtype=bool)
    probabilities = softmax(scores)
    distances = np.abs(-_log(probabilities, scores) - _entropy(probabilities, scores))
    ascending = np.argsort(distances, kind="stable")
    sums = np.cumsum(probabilities[ascending], dtype=np.float64).astype(probabilities.dtype)
    last = min(int((sums < mass).sum()), len(scores) - 1)
    kept = distances <= distances[ascending[last]]
    kept[ascending[0]] = True
    return kept


def keep_epsilon(scores: np.ndarray, epsilon: float) -> np.ndarray:
    """bool: what has at least the probability ``epsilon``, and the best (arXiv:2210.15191); 0 and 1 keep everything."""
    if not 0 < epsilon < 1:
        return np.ones(len(scores), dtype=bool)
    return (softmax(scores) >= epsilon) | (scores == scores.max())


def keep_eta(scores: np.ndarray, epsilon: float) -> np.ndarray:
    """bool: as ``keep_epsilon``, with a threshold that falls where the entropy is high (the same paper)."""
    if not 0 < epsilon < 1:
        return np.ones(len(scores), dtype=bool)
    probabilities = softmax(scores)
    eta = min(epsilon, math.sqrt(epsilon) * math.exp(-_entropy(probabilities, scores)))
    return (probabilities >= eta) | (scores == scores.max())


def _log(probabilities: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Of probabilities, from the scores: those that are too small for a float have one, too."""
    return scores - scores.max() + np.log(probabilities.max())


def _entropy(probabilities: np.ndarray, scores: np.ndarray) -> float:
    return float(-(probabilities * _log(probabilities, scores)).sum())


def draw(tokens: np.ndarray, scores: np.ndarray, random: np.random.Generator) -> int:
    """One of ``tokens`` with the probability that softmax gives it."""
    cumulative = np.cumsum(softmax(scores.astype(np.float64)))
    chosen = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
    return int(tokens[min(chosen, len(tokens) - 1)])


@_falling
def softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max())
    return shifted / shifted.sum()
