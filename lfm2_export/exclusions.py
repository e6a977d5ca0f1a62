"""Tokens that settings keep from being chosen, whatever their scores are.

In: the settings and the tokens so far. Out: the ids that the next token must not be. The settings are those of
transformers 5.23 and mean what its processors make of them: NoRepeatNGram, NoBadWords, MinLength,
MinNewTokensLength, SuppressTokens, SuppressTokensAtBegin. Nothing here grows with the length of a text but a record of
it, and of its n-grams where they must not repeat.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lfm2_export.generation_config import GenerationConfig


class Exclusions:
    """For one row; ``add`` tells it each token that was chosen.

    Args:
        config: the settings.
        vocab_size: V; ids outside of it, which settings may name, exclude nothing.
        history: the prompt's tokens.
    """

    def __init__(self, config: GenerationConfig, vocab_size: int, history: Iterable[int] = ()):
        self._config, self._vocab_size = config, vocab_size
        self._tokens = list(history)
        self._prompt_length = len(self._tokens)
        self._always = self._ids(config.suppress_tokens)
        self._at_first = self._ids(config.begin_suppress_tokens)
        self._stops = self._ids(config.stop_token_ids)
        # What a word's last token is, by the tokens before it. A stop token alone is never a bad word.
        self._words: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for word in config.bad_words_ids:
            if len(word) > 1 or word[0] not in config.stop_tokens:
                self._words[word[:-1]].append(word[-1])
        self._word_lengths = sorted({len(start) for start in self._words})
        self._ngrams: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for end in range(1, len(self._tokens) + 1):
            self._note_ngram(self._tokens, end)

    def add(self, token: int) -> None:
        self._tokens.append(token)
        self._note_ngram(self._tokens, len(self._tokens))

    def _note_ngram(self, tokens: Sequence[int], end: int) -> None:
        size = self._config.no_repeat_ngram_size
        if size and end >= size:
            self._ngrams[tuple(tokens[end - size : end - 1])].append(tokens[end - 1])

    def ids(self) -> np.ndarray:
        """int64, each at least once."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self._parts()])

    def _parts(self) -> Iterator[np.ndarray]:
        config, length = self._config, len(self._tokens)
        yield self._always
        if length == self._prompt_length:
            yield self._at_first
        if length < config.min_length or length - self._prompt_length < config.min_new_tokens:
            yield self._stops
        for size in self._word_lengths:
            if size <= length:
                yield self._ids(self._words.get(self._last(size), ()))
        if config.no_repeat_ngram_size and length >= config.no_repeat_ngram_size - 1:
            yield self._ids(self._ngrams.get(self._last(config.no_repeat_ngram_size - 1), ()))

    def _last(self, count: int) -> tuple[int, ...]:
        return tuple(self._tokens[len(self._tokens) - count :])

    def _ids(self, tokens: Iterable[int]) -> np.ndarray:
        return np.array(sorted({token for token in tokens if 0 <= token < self._vocab_size}), dtype=np.int64)


def exclude_any(config: GenerationConfig) -> bool:
    """Whether these settings can exclude a token; most do not, and cost nothing then."""
    return bool(
        config.suppress_tokens
        or config.begin_suppress_tokens
        or config.bad_words_ids
        or config.no_repeat_ngram_size
        or (config.stop_token_ids and (config.min_length or config.min_new_tokens))
    )
