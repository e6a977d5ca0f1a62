"""The requests that are decoded together: a row of one runner's state for each, or one request alone.

On our operators each row gets the bits that it gets alone, whatever other rows there are (``JoinsRows`` in
backends/base.py): there a request that joins, leaves or is given up changes no other answer, and weights are read once
for all rows of a step. Prompts are prefilled on a runner of their own beside, on the same weights; then their state is
copied behind the rows that are there. Other runners would give other answers to requests that are computed together, or
have one state only: they take one request at a time.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lfm2_export.backends.base import JoinsRows, Runner, Snapshot
from lfm2_export.server.prefilling import Prefill


class Rows(Protocol):
    """Rows are numbered from 0; where one leaves, the last one takes its number."""

    @property
    def limit(self) -> int:
        """How many there may be."""

    @property
    def desk(self) -> Runner:
        """Where prompts are prefilled. Nothing but ``join`` may follow a prefill, unless there is no row."""

    def join(self, prefill: Prefill) -> None:
        """What was prefilled becomes the last row. Raises: ResourceError: there is no memory for it, now."""

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """Appends a token to each row; float32 [B, V]. What it raises leaves all rows as they were."""

    def copy(self, row: int) -> Snapshot:
        """A copy of a row's state."""

    def leave(self, row: int) -> None:
        """A row goes."""


def rows_of(runner: Runner, parallel: int) -> Rows:
    """As many as are asked for, where they can be answered together."""
    if parallel > 1 and isinstance(runner, JoinsRows) and runner.rows_are_independent:
        return JoinedRows(runner, parallel)
    return OneRow(runner)


def why_alone(runner: Runner) -> str | None:
    """Why a runner's requests are answered one at a time; None where they need not be."""
    if not isinstance(runner, JoinsRows):
        return "this runner has the state of one"
    if not runner.rows_are_independent:
        return "these kernels give other bits to rows that are computed together"
    return None


class OneRow:
    """A ``Rows`` of one at a time, on the runner that prefilled it."""

    limit = 1

    def __init__(self, runner: Runner):
        self.desk = runner

    def join(self, prefill: Prefill) -> None:
        """It is there."""

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        return self.desk.decode(tokens)

    def copy(self, row: int) -> Snapshot:
        return self.desk.snapshot()

    def leave(self, row: int) -> None:
        """The next prefill resets it."""


class JoinedRows:
    """A ``Rows`` of several. Where there is none, their memory is given back."""

    def __init__(self, runner: JoinsRows, limit: int):
        self._runner, self.limit = runner, limit
        self._batch: JoinsRows | None = None

    @property
    def desk(self) -> Runner:
        return self._runner

    def join(self, prefill: Prefill) -> None:
        if self._batch is not None:
            self._batch.join(prefill.state())
            return
        batch = self._runner.beside()
        batch.restore(prefill.state())
        self._batch = batch

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        assert self._batch is not None
        return self._batch.decode(tokens)

    def copy(self, row: int) -> Snapshot:
        assert self._batch is not None
        return self._batch.copy_row(row)

    def leave(self, row: int) -> None:
        assert self._batch is not None
        if self._batch.batch_size > 1:
            self._batch.leave(row)
        else:
            self._batch = None
