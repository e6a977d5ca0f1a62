"""What a text may be, token by token: JSON of a schema, or what fits a grammar.

In: a schema or a grammar, the tokenizer. Out: which tokens may come next, from llguidance (the extra ``serve``), which
compiles the schema to a grammar and walks through the vocabulary's bytes. A sampler asks before it chooses
(``sampling.Sampler``).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from lfm2_export.errors import GenerationError
from lfm2_export.messages import shown_reason
from lfm2_export.schema_limits import check_grammar, check_schema
from lfm2_export.text import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    import llguidance


# Between JSON's tokens; without a bound a small model writes white space for ever.
_SPACE = r"(\n {0,16}| ?)"
# Symbols of a compiled grammar, after schemas have been multiplied (``allOf`` over ``anyOf``): llguidance's own 500,000
# take it half a minute, these half a second or less.
_MOST_SYMBOLS = 20_000
# For llguidance, which is recursive: the deepest that ``schema_limits`` lets through takes 8 MB, the stack of a thread
# is 1 MB or less on some systems.
_STACK_BYTES = 32 << 20
_stack_size = threading.Lock()

Result = TypeVar("Result")


class Constraint(Protocol):
    """Of one text; asked and told in turn."""

    def allowed(self) -> np.ndarray | None:
        """bool [V]: the tokens that may come next; None: all of them."""

    def accept(self, token: int) -> None:
        """``token`` was chosen."""


class Grammars:
    """Makes constraints for one vocabulary, which is read when the first is asked for. For any thread.

    Args:
        tokenizer: whose tokens these are.
        vocab_size: V; a program may have more tokens than its tokenizer.
        stop_tokens: what ends a text, at least one.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: Sequence[int]):
        self._tokenizer, self._vocab_size, self._stops = tokenizer, vocab_size, list(stop_tokens)
        self._lock = threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None

    def of_schema(self, schema: Mapping[str, Any]) -> Constraint:
        """JSON that fits a JSON schema, without white space that means nothing at its beginning.

        Raises:
            GenerationError: the schema is none, too large or too deep (``schema_limits``), cannot be met, or has what
                llguidance does not know.
        """
        import llguidance

        check_schema(schema)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_pattern": _SPACE})
        except ValueError as error:
            raise GenerationError(f"schema: {shown_reason(error)}; change it") from error
        return self._matched(grammar)

    def of_grammar(self, lark: str) -> Constraint:
        """What fits a grammar in Lark, with llguidance's additions: ``<[7]>`` is a token, ``%json {...}`` a schema.

        Raises:
            GenerationError: as ``of_schema``.
        """
        import llguidance

        check_grammar(lark)
        return self._matched(llguidance.LLMatcher.grammar_from_lark(lark))

    def _matched(self, grammar: str) -> Constraint:
        vocabulary = self._read()
        return _Matched(_on_large_stack(lambda: _compiled(vocabulary, grammar)), self._vocab_size)

    def _read(self) -> llguidance.LLTokenizer:
        import llguidance

        if not self._stops:
            raise GenerationError("schema: this model has no stop token, so that its JSON would never end")
        with self._lock:
            if self._vocabulary is None:
                source = self._tokenizer.to_json()
                try:
                    self._vocabulary = llguidance.LLTokenizer(source, n_vocab=self._vocab_size, eos_token=self._stops)
                except Exception as error:  # llguidance's own, of no common class
                    reason = shown_reason(error)
                    raise GenerationError(
                        f"schema: this tokenizer cannot be constrained ({reason}); ask for text"
                    ) from error
            return self._vocabulary


def _compiled(vocabulary: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    import llguidance

    limits = llguidance.LLParserLimits(max_grammar_size=_MOST_SYMBOLS)
    is_wrong, faults = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, vocabulary, limits=limits)
    if is_wrong and "grammar size" in faults[0]:
        raise GenerationError(f"schema: compiles to more than {_MOST_SYMBOLS} symbols; give it fewer properties")
    if is_wrong:
        raise GenerationError(f"schema: {shown_reason(ValueError(faults[0]))}; change it")
    return llguidance.LLMatcher(vocabulary, grammar, limits=limits)


def _on_large_stack(work: Callable[[], Result]) -> Result:
    """``work`` in a thread of its own, whose stack does not depend on the system and on who asks."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, name="lfm2-export schema", daemon=True)
    with _stack_size:
        usual = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    return done.result()


class _Matched:
    """llguidance's matcher as a ``Constraint``."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> np.ndarray | None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(bool)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GenerationError(f"schema: {shown_reason(ValueError(self._matcher.get_error()))}; simplify it")


class After:
    """A constraint that begins behind a marker: what comes before is free, such as thinking that a prompt opened."""

    def __init__(self, marker: str, then: Constraint, tokenizer: Tokenizer):
        self._marker, self._then = marker, then
        self._decoder = StreamDecoder(tokenizer)
        self._text = ""
        self._begun = False

    def allowed(self) -> np.ndarray | None:
        return self._then.allowed() if self._begun else None

    def accept(self, token: int) -> None:
        if self._begun:
            self._then.accept(token)
            return
        self._text = (self._text + self._decoder.push(token))[-256:]
        self._begun = self._marker in self._text
