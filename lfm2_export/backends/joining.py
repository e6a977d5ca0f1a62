"""What every runner does alike whose rows come and go: arguments checked, marks forgotten.

In: rows as snapshots, and numbers of rows. Out: what ``JoinsRows`` (backends/base.py) says. A backend's runner brings
the steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import numpy as np

from lfm2_export.backends.arguments import check_batch_size, check_row_number, short_of_memory
from lfm2_export.backends.base import Snapshot
from lfm2_export.backends.guard import guarded
from lfm2_export.backends.runner_base import RunnerBase
from lfm2_export.errors import RunnerError


@guarded
class JoiningRunner(RunnerBase):
    """A ``RunnerBase`` that is one of ``JoinsRows``."""

    @property
    @abstractmethod
    def rows_are_independent(self) -> bool:
        """Whether each row gets the bits that it gets alone."""

    @short_of_memory("copy_row")
    def copy_row(self, row: int) -> Snapshot:
        row = check_row_number(row, self.batch_size)
        return Snapshot(program_id=self.program_id, lengths=self.lengths[row : row + 1], tensors=self._copy_row(row))

    @short_of_memory("join")
    def join(self, snapshot: Snapshot) -> None:
        lengths = self._lengths_of(snapshot)
        check_batch_size(self.batch_size + len(lengths), self.max_batch_size)
        self._join(snapshot.tensors, lengths)
        self._marks.clear()

    @short_of_memory("leave")
    def leave(self, row: int) -> None:
        row = check_row_number(row, self.batch_size)
        if self.batch_size == 1:
            raise RunnerError("leave: a state needs at least one row; reset() instead")
        self._leave(row)
        self._marks.clear()

    @abstractmethod
    def _copy_row(self, row: int) -> Mapping[str, np.ndarray]:
        """As ``Snapshot.tensors``, of one row."""

    @abstractmethod
    def _join(self, tensors: Mapping[str, np.ndarray], lengths: np.ndarray) -> None:
        """Copies of the rows of ``tensors`` behind the present ones; as it was where it raises."""

    @abstractmethod
    def _leave(self, row: int) -> None:
        """The last row takes the place of row ``row``; there is another one."""
