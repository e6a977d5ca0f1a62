"""What may be asked of a runner: each argument checked where it comes in, before anything is changed.

In: whatever a caller passes, of any type. Out: arrays and integers to be relied on, or a RunnerError in one line.

Shape suffixes: B rows of a batch, T new tokens.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from lfm2_export import memory
from lfm2_export.cache import CacheSpec
from lfm2_export.errors import ContextLimitError, Lfm2ExportError, ResourceError, RunnerError
from lfm2_export.messages import shown
from lfm2_export.resources import check_memory, usable_cores

if TYPE_CHECKING:
    from lfm2_export.backends.base import TokenRows

# Of a row beside its numbers: the objects that hold them.
_ROW_OVERHEAD = 256
# Beyond what any context holds: a range of a billion would take all memory before anything could be said of it.
_LONGEST = 1 << 24
# Beyond what any context holds, and within what every library takes for a size.
_LARGEST_CHUNK = 1 << 30
# What to do where the memory is too small.
LESS = "pass fewer rows or shorter ones, or use a larger machine"


def check_rows(input_ids: TokenRows, batch_size: int | None, vocab_size: int) -> list[np.ndarray]:
    """The rows as int64 arrays; ``batch_size`` None: any number of them.

    Raises:
        RunnerError: no rows of token ids, another number of them than the state has, an empty one, or an id that is
            not in the vocabulary.
    """
    rows = _as_rows(input_ids)
    if batch_size is not None and len(rows) != batch_size:
        remedy = f" or reset({len(rows)}) first" if rows else ""
        raise RunnerError(f"{len(rows)} rows of tokens for a state of {batch_size}; pass one per row{remedy}")
    return [_check_row(row, index, vocab_size) for index, row in enumerate(rows)]


def _as_rows(input_ids: object) -> list[Any]:
    sized = hasattr(input_ids, "__len__") and hasattr(input_ids, "__iter__")
    if not sized or isinstance(input_ids, str | bytes | bytearray | Mapping | Set):
        raise RunnerError(
            f"input_ids: {shown(input_ids, 40)} is not a list of rows; pass one list of token ids for each row"
        )
    with short_of_memory("input_ids"), _refusing("input_ids"):
        if len(input_ids) > _LONGEST:  # type: ignore[arg-type]
            raise ValueError(f"it has {len(input_ids)} rows")  # type: ignore[arg-type]
        rows = list(input_ids)  # type: ignore[call-overload]
    if rows and all(isinstance(row, int | float | np.number) for row in rows):
        raise RunnerError(
            f"input_ids: {shown(rows, 40)} is one flat list; pass a list of token ids for each row, [[...]] for one row"
        )
    return rows


def _check_row(row: object, index: int, vocab_size: int) -> np.ndarray:
    tokens = as_array(row, f"row {index}")
    if tokens.size == 0:
        raise RunnerError(
            f"row {index} is empty; a prompt needs at least one token (the tokenizer's bos, for instance)"
        )
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise RunnerError(
            f"row {index}: expected a list of token ids, found {tokens.dtype} values of shape {list(tokens.shape)}"
        )
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise RunnerError(
            f"row {index}: token id {outside[0]} is not in the vocabulary of {vocab_size}; "
            "use the tokenizer that came with this artifact"
        )
    return tokens.astype(np.int64)


def as_array(value: object, what: str) -> np.ndarray:
    with short_of_memory(what), _refusing(what):
        if not hasattr(value, "__array__"):
            _check_flat(value)
        return np.asarray(value)


def _check_flat(value: object) -> None:
    """Raises a ValueError where numpy would unfold more than a row can hold before it finds that it is none."""
    if hasattr(value, "__len__") and len(value) > _LONGEST:
        raise ValueError(f"it has {len(value)} entries")
    if isinstance(value, list | tuple) and any(issubclass(kind, Sequence) for kind in set(map(type, value))):
        raise ValueError("it is a list of lists, or of texts")


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Ragged lists, tensors of another device, objects that refuse to be read: each raises an error of its own."""
    try:
        yield
    except Exception as error:
        if memory.ran_out(error):
            raise
        raise RunnerError(
            f"{what}: cannot be read as numbers ({shown(str(error), 120)}); pass a list of integers"
        ) from error


@contextmanager
def short_of_memory(what: str) -> Iterator[None]:
    """Says it in an error of ours where memory runs out in spite of all estimates.

    Raises:
        ResourceError: the allocation failed, in whatever words.
    """
    try:
        yield
    except Lfm2ExportError:
        raise
    except Exception as error:
        if not memory.ran_out(error):
            raise
        raise ResourceError(f"{what}: the memory ran out; {LESS}") from error


def check_tokens(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """What ``decode`` takes, as [B, 1]; ``check_rows`` looks at the ids."""
    tokens_B = as_array(tokens, "decode takes one token per row; its argument")
    if tokens_B.ndim != 1:
        raise RunnerError(f"decode takes one token per row, found shape {list(tokens_B.shape)}")
    return tokens_B[:, None]


def check_equal_rows(input_ids: TokenRows, vocab_size: int, context_length: int) -> list[np.ndarray]:
    """What ``score`` takes: rows of one length that fit the context."""
    rows = check_rows(input_ids, None, vocab_size)
    if len({len(row) for row in rows}) != 1:
        raise RunnerError("score takes rows of one length; score rows of different length one by one")
    check_fits(np.zeros(len(rows), dtype=np.int64), [len(row) for row in rows], context_length)
    return rows


def check_fits(lengths: np.ndarray, new_tokens: Sequence[int], context_length: int) -> None:
    """Raises ContextLimitError where a row would hold more than ``context_length`` tokens."""
    for row, (held, new) in enumerate(zip(lengths.tolist(), new_tokens, strict=True)):
        if held + new > context_length:
            after = f" after {held} held" if held else ""
            raise ContextLimitError(
                f"row {row}: {new} tokens{after} do not fit the context limit of {context_length}; "
                "shorten the prompt or start a new conversation"
            )


def check_batch_size(batch_size: int, max_batch_size: int | None) -> int:
    """The number of rows; a RunnerError where it is none, or more than the program takes at once."""
    rows = as_integer(batch_size)
    if rows is None:
        raise RunnerError(f"batch_size={shown(batch_size, 40)}: rows are counted by an integer from 1 up")
    if rows < 1:
        raise RunnerError(f"batch_size={shown(rows, 40)}: a state needs at least one row")
    if max_batch_size is not None and rows > max_batch_size:
        raise RunnerError(
            f"batch_size={shown(rows, 40)}: this program takes at most {max_batch_size} rows at once; pass fewer"
        )
    return rows


def as_integer(value: object) -> int | None:
    """An integer of any kind, but not a truth value; None for anything else."""
    try:
        return None if isinstance(value, bool | np.bool_) else operator.index(value)  # type: ignore[arg-type]
    except Exception:
        return None


def check_state_fits(cache: CacheSpec, batch_size: int, positions: int) -> None:
    """Refuses a state that the memory has no room for: rows of conv states, twice, and of ``positions`` keys and
    values.

    Raises:
        ResourceError: states what is needed and what is available.
    """
    row = 2 * cache.fixed_bytes() + cache.bytes_per_token() * positions + _ROW_OVERHEAD * (1 + len(cache.tensors))
    check_memory(
        batch_size * row,
        purpose=f"a state of {shown(batch_size, 40)} rows of {positions} tokens",
        remedy=LESS,
    )


def check_logits_fit(rows: Sequence[np.ndarray], vocab_size: int) -> None:
    """Refuses logits of every position, float32, that the memory has no room for.

    Raises:
        ResourceError: states what is needed and what is available.
    """
    tokens = sum(len(row) for row in rows)
    check_memory(4 * tokens * vocab_size, purpose=f"keeping the logits of {tokens} tokens", remedy=LESS)


def check_one_row(batch_size: int) -> None:
    """A RunnerError where there are several."""
    if batch_size != 1:
        raise RunnerError(f"verify takes one row, this state has {batch_size}; reset(1), or decode them")


def check_count(count: int, most: int) -> int:
    """How many tokens stay; a RunnerError where there are not so many."""
    found = as_integer(count)
    if found is None or not 0 <= found <= most:
        raise RunnerError(f"accept: {shown(count, 40)} of {most} tokens; give a number from 0 to {most}")
    return found


def check_indices(indices: Sequence[int] | np.ndarray, batch_size: int) -> np.ndarray:
    """Row numbers as int64 [new B]; a RunnerError where one does not exist."""
    rows = as_array(indices, "reorder")
    if rows.ndim != 1 or rows.size == 0 or rows.dtype.kind not in "iu":
        raise RunnerError(f"reorder needs a list of row numbers, found {shown(indices)}")
    if rows.min() < 0 or rows.max() >= batch_size:
        raise RunnerError(f"reorder: rows {shown(rows.tolist())} of a state that has {batch_size}; count from 0")
    return rows.astype(np.int64)


def check_row_number(row: int, batch_size: int) -> int:
    """The number of a row; a RunnerError where there is none of that number."""
    found = as_integer(row)
    if found is None or not 0 <= found < batch_size:
        raise RunnerError(f"row {shown(row, 40)} of a state that has {batch_size}; count from 0")
    return found


def check_chunk_size(chunk_size: int | None, default: int) -> int:
    """The tokens that a prefill takes at a time; a RunnerError where they are none."""
    if chunk_size is None:
        return default
    size = as_integer(chunk_size)
    if size is None or size < 1:
        raise RunnerError(f"chunk_size={shown(chunk_size, 40)}: a prefill takes at least one token at a time")
    return min(size, _LARGEST_CHUNK)


def check_context_length(context_length: int) -> int:
    """The tokens that a runner may hold; a RunnerError where they are none."""
    length = as_integer(context_length)
    if length is None or length < 1:
        raise RunnerError(f"context_length={shown(context_length, 40)}: a runner holds at least one token")
    return length


def check_threads(threads: int | None) -> int:
    """How many threads a runner takes: as many as there are usable cores, where it is not said.

    Raises:
        RunnerError: not positive, or more than the machine has cores.
    """
    if threads is None:
        return usable_cores()
    count = as_integer(threads)
    if count is None or count < 1:
        raise RunnerError(f"threads={shown(threads, 40)}: a runner needs at least one thread")
    if count > (cores := os.cpu_count() or count):
        raise RunnerError(
            f"threads={shown(count, 40)}: this machine has {cores} cores, and more threads only wait for each other"
        )
    return count
