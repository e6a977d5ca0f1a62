"""A runner that decodes several tokens in one pass, behind the calls of one that decodes them one by one.

In: another runner, which belongs to it, and a drafter. A ``decode`` runs the program on its token and on proposals of
what follows. As long as the next calls bring just those tokens, their logits are there already; with the first other
one, what was not chosen is taken back. Whoever calls sees one token after the other: settings that depend on what was
chosen, stop tokens, limits and marks work as they are.

Shape suffixes: T tokens of a pass, V vocabulary.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lfm2_export.backends.base import (
    Mark,
    Runner,
    Snapshot,
    TapsStreams,
    TokenRows,
    check_rows,
    check_tokens,
    kernels_of,
)
from lfm2_export.backends.guard import guard_of, guarded
from lfm2_export.cache import CacheSpec
from lfm2_export.errors import RunnerError
from lfm2_export.speculation.controller import Controller, Report
from lfm2_export.speculation.drafters import Draft, Drafter, ReadsStreams

logger = logging.getLogger(__name__)

DEFAULT_DRAFT_TOKENS = 8
_MOST_DRAFT_TOKENS = 64


@dataclass(kw_only=True)
class _Block:
    """One verified pass: its tokens are the one that was decoded and the proposals; ``served`` of them count so far."""

    draft: Draft
    logits_TV: np.ndarray
    seconds: float
    before: int  # tokens that the row held
    served: int = 1

    def expects(self, token: int) -> bool:
        return self.served <= len(self.draft.tokens) and self.draft.tokens[self.served - 1] == token


@guarded
class SpeculativeRunner:
    """The Runner protocol (backends/base.py), decoding with proposals where there is one row.

    Args:
        runner: runs the program; nobody else uses it from here on.
        drafter: proposes tokens.
        draft_tokens: proposals of a pass at most.
        inexact: also on a program whose passes give other bits than its steps: tokens may differ from plain decoding's.
        controller: decides how many proposals are verified; default: by what is measured.
        clock: seconds.

    Raises:
        RunnerError: the program cannot score several positions, or not exactly and that was not allowed; a number of
            proposals below 1 or above 64.
    """

    def __init__(
        self,
        runner: Runner,
        drafter: Drafter,
        *,
        draft_tokens: int = DEFAULT_DRAFT_TOKENS,
        inexact: bool = False,
        controller: Controller | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        check_draft_tokens(draft_tokens)
        if not runner.can_score:
            raise RunnerError("speculation needs a graph with the logits of every position; export the scheme again")
        if not runner.verifies_exactly and not inexact:
            raise RunnerError(
                "speculation may change tokens here: only q4 and q8 on our operators score several tokens to the same "
                "bits as one; pass --speculate-inexact (inexact=True) to take that"
            )
        runner.score([[0, 0, 0]])  # what is loaded for it is loaded now, not within a measured pass
        self._runner, self._drafter, self._clock = runner, drafter, clock
        self._controller = controller or Controller(most=draft_tokens, report=Report(drafter=drafter.name))
        self._block: _Block | None = None
        is_empty = runner.batch_size == 1 and not runner.lengths.any()
        self._tokens: list[int] | None = [] if is_empty else None  # of the only row; None: unknown, or several rows
        if isinstance(drafter, ReadsStreams):
            self._listen(drafter)
        self._marked: weakref.WeakKeyDictionary[Mark, list[int] | None] = weakref.WeakKeyDictionary()
        self._copied: weakref.WeakKeyDictionary[Snapshot, list[int] | None] = weakref.WeakKeyDictionary()

    def _listen(self, drafter: ReadsStreams) -> None:
        if not isinstance(self._runner, TapsStreams):
            raise RunnerError(
                "this program gives no residual streams, which the drafter reads; take the model's on onnx"
            )
        width = self._runner.tap(drafter.layers, drafter.hear)
        if width != drafter.width:
            self._runner.tap((), None)
            raise RunnerError(
                f"this program gives residual streams of {width} numbers, the drafter reads {drafter.width}; export "
                "the drafter again with --target and this artifact"
            )

    def release(self) -> Runner:
        """The runner behind this one, as if it had never been here; this one must not be used any more."""
        with guard_of(self).lock:
            self.settle()
            if isinstance(self._drafter, ReadsStreams) and isinstance(self._runner, TapsStreams):
                self._runner.tap((), None)
            return self._runner

    def _forget(self) -> None:
        if isinstance(self._drafter, ReadsStreams):
            self._drafter.forget()

    @property
    def report(self) -> Report:
        """What speculation did so far."""
        with guard_of(self).lock:
            self.settle()
        return self._controller.report

    @property
    def report_so_far(self) -> Report:
        """The same without what is under way, for any thread: nothing waits for it and nothing is taken back."""
        return replace(self._controller.report)

    @property
    def kernels(self) -> str:
        return kernels_of(self._runner)

    @property
    def program_id(self) -> str:
        return self._runner.program_id

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    @property
    def cache(self) -> CacheSpec:
        return self._runner.cache

    @property
    def context_length(self) -> int:
        return self._runner.context_length

    @property
    def max_batch_size(self) -> int | None:
        return self._runner.max_batch_size

    @property
    def batch_size(self) -> int:
        return self._runner.batch_size

    @property
    def lengths(self) -> np.ndarray:
        block = self._block
        return self._runner.lengths if block is None else np.array([block.before + block.served], dtype=np.int64)

    @property
    def can_score(self) -> bool:
        return self._runner.can_score

    @property
    def verifies_exactly(self) -> bool:
        return self._runner.verifies_exactly

    def reset(self, batch_size: int = 1) -> None:
        self.settle()
        self._runner.reset(batch_size)
        self._forget()
        self._tokens = [] if batch_size == 1 else None
        if batch_size != 1:
            logger.warning("speculation is for one row; %d are decoded plainly", batch_size)

    def prefill(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> np.ndarray:
        rows = check_rows(input_ids, self.batch_size, self.vocab_size)
        if len(rows) == 1 and len(rows[0]) == 1 and self.lengths.any():
            return self.decode(rows[0])
        self.settle()
        logits_BV = self._runner.prefill(input_ids, chunk_size=chunk_size)
        self._append(input_ids)
        return logits_BV

    def prefill_scored(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> list[np.ndarray]:
        self.settle()
        logits = self._runner.prefill_scored(input_ids, chunk_size=chunk_size)
        self._append(input_ids)
        return logits

    def decode(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        rows, block = check_rows(check_tokens(tokens), self.batch_size, self.vocab_size), self._block
        if self._tokens is None:
            return self._runner.decode(tokens)
        token = int(rows[0][0])
        if block is not None and block.expects(token):
            block.served += 1
            self._tokens.append(token)
            return block.logits_TV[block.served - 1][None].copy()
        self.settle(rejected=block is not None and block.served <= len(block.draft.tokens))
        logits_BV = self._step(token)
        self._tokens.append(token)
        return logits_BV

    def _step(self, token: int) -> np.ndarray:
        """One pass: a plain one, or the token and proposals."""
        before = int(self._runner.lengths[0])
        draft = self._draft(token, before)
        started = self._clock()
        if not draft.tokens:
            logits_BV = self._runner.decode([token])
            self._controller.took_plain_step(self._clock() - started)
            return logits_BV
        logits_TV = self._runner.verify([token, *draft.tokens])
        seconds = self._clock() - started
        self._block = _Block(draft=draft, logits_TV=logits_TV, seconds=seconds, before=before)
        return logits_TV[:1].copy()

    def _draft(self, token: int, before: int) -> Draft:
        """Proposals of what follows ``token``, as many as are worth a pass and fit the context."""
        assert self._tokens is not None
        drafter, controller = self._drafter, self._controller
        most = min(
            self.context_length - before - 1, controller.width(drafter.name) if drafter.costs else controller.most
        )
        if most < 1:
            return Draft()
        started = self._clock()
        draft = drafter.propose([*self._tokens, token], most)
        if drafter.costs:
            controller.took_drafting(len(draft.tokens), self._clock() - started, at_once=drafter.at_once)
        elif draft.tokens:
            draft = Draft(tokens=draft.tokens[: controller.width(draft.kind)], kind=draft.kind)
        return self._known(draft)

    def _known(self, draft: Draft) -> Draft:
        """Without what follows the first that is no token of the program's: a drafter may be anybody's."""
        end = next((i for i, token in enumerate(draft.tokens) if not 0 <= token < self.vocab_size), None)
        return draft if end is None else Draft(tokens=draft.tokens[:end], kind=draft.kind)

    def settle(self, rejected: bool = False) -> None:
        """Takes back what was proposed and not chosen: the runner behind this one then holds what ``lengths`` says."""
        block, self._block = self._block, None
        if block is None:
            return
        started = self._clock()
        self._runner.accept(block.served)
        self._controller.took_pass(
            block.draft.kind,
            drafted=len(block.draft.tokens),
            accepted=block.served - 1,
            rejected=rejected,
            seconds=block.seconds + self._clock() - started,
        )

    def _append(self, rows: TokenRows) -> None:
        if self._tokens is not None:
            self._tokens.extend(int(token) for token in rows[0])

    def verify(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        self.settle()
        logits_TV = self._runner.verify(tokens)
        if self._tokens is not None:
            self._tokens.extend(int(token) for token in tokens)
        return logits_TV

    def accept(self, count: int) -> None:
        self.settle()
        self._runner.accept(count)
        if self._tokens is not None:
            del self._tokens[int(self._runner.lengths[0]) :]

    def score(self, input_ids: TokenRows, *, chunk_size: int | None = None) -> np.ndarray:
        self.settle()
        return self._runner.score(input_ids, chunk_size=chunk_size)

    def snapshot(self) -> Snapshot:
        self.settle()
        snapshot = self._runner.snapshot()
        self._copied[snapshot] = None if self._tokens is None else list(self._tokens)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        self.settle()
        self._runner.restore(snapshot)
        tokens, known = self._copied.get(snapshot), self._tokens
        if tokens is None or known is None or known[: len(tokens)] != tokens:
            self._forget()  # else this is a place in the text that the drafter knows
        self._tokens = None if tokens is None else list(tokens)

    def restore_with(self, snapshot: Snapshot, tokens: Sequence[int]) -> None:
        """``restore`` of a snapshot of one row that this runner did not make, such as a file's, with the tokens that it
        is of: without them nothing could be proposed from then on."""
        self._copied[snapshot] = list(tokens)
        self.restore(snapshot)

    def mark(self) -> Mark:
        self.settle()
        mark = self._runner.mark()
        self._marked[mark] = None if self._tokens is None else list(self._tokens)
        return mark

    def rewind(self, mark: Mark) -> None:
        self.settle()
        self._runner.rewind(mark)
        tokens = self._marked.get(mark)
        self._tokens = None if tokens is None else list(tokens)

    def is_valid(self, mark: Mark) -> bool:
        return self._runner.is_valid(mark)

    def reorder(self, indices: Sequence[int] | np.ndarray) -> None:
        self.settle()
        self._runner.reorder(indices)
        self._forget()
        if self.batch_size != 1:
            self._tokens = None


def check_draft_tokens(count: int) -> int:
    """A RunnerError where a pass cannot have so many proposals."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_DRAFT_TOKENS:
        raise RunnerError(f"draft tokens {count!r}: give a number from 1 to {_MOST_DRAFT_TOKENS}")
    return count
