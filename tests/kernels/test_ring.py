"""SlidingAttention on a ring: to the last bit what it gives on a cache that keeps everything, and what the ring holds.

The ring holds other numbers wherever no window reaches, so that none of them can matter. What the operator gives on a
whole cache is held against float64 in test_onnx_ops.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lfm2_export.cache import RING_ROOM, ring_positions
from tests.kernels.attention_cases import AttentionCase, in_one_buffer, quantize_rows
from tests.kernels.one_operator import Arrays, operator_library, run_operator

pytestmark = pytest.mark.skipif(operator_library() is None, reason="no compiler for our operators")

WINDOWS = (1, 5, 16, 49, 63, 64, 65, 256)
Caches = list[npt.NDArray[Any]]


def numbered(case: AttentionCase) -> list[tuple[npt.NDArray[np.int64], int]]:
    """Of each row the slots of its attended tokens in order, this call's included, and how many came before it."""
    ends = case.slots()[:, -1] + 1
    slots = [np.flatnonzero(row[:end]) for row, end in zip(case.mask, ends, strict=True)]
    return [(own, int((own < first).sum())) for own, first in zip(slots, case.slots()[:, 0], strict=True)]


def fold(case: AttentionCase, cache: npt.NDArray[Any], size: int, into: npt.NDArray[Any], *, after: bool) -> None:
    """A whole cache [B, G, C, row] as rings [B, G, size, row], as they are before the call or after it."""
    for row, (slots, held) in enumerate(numbered(case)):
        count = len(slots) if after else held
        kept = np.arange(max(0, count - size), count)
        into[row][:, kept % size] = cache[row][:, slots[kept]]


def rings_of(case: AttentionCase, size: int) -> Arrays:
    """The case's inputs with rings in the place of its caches."""
    found = dict(case.inputs)
    for name in ("past_key", "past_value"):
        cache = case.inputs[name]
        assert cache is not None
        others = np.full((case.batch, case.kv_heads, size, case.head_dim), 1e3, np.float32)
        ring = quantize_rows(others) if case.int8 else others
        fold(case, cache, size, ring, after=False)
        found[name] = ring
    return found


def run_on_ring(case: AttentionCase, inputs: Arrays, *, in_place: bool) -> list[npt.NDArray[Any]]:
    attributes = case.attributes | {"ring": 1}
    if not in_place:
        return run_operator(case.op, inputs, case.outputs, attributes, threads=case.threads)
    return in_one_buffer(case, inputs, attributes)


def differing(case: AttentionCase, size: int, *, in_place: bool) -> int:
    """How many tokens of the call differ from those on a whole cache, and rows of the ring from what belongs there."""
    whole, ring = case.run(), run_on_ring(case, rings_of(case, size), in_place=in_place)
    attended = np.stack([row[slots] for row, slots in zip(case.mask, case.slots(), strict=True)]) != 0
    wrong = int((whole[0] != ring[0]).any(-1)[attended].sum())
    assert not ring[0][~attended].any(), "padding sees something"
    for before, cache, found in zip(list(rings_of(case, size).values())[5:7], whole[1:], ring[1:], strict=True):
        assert before is not None
        wanted = before.copy()
        fold(case, cache, size, wanted, after=True)
        wrong += int((wanted != found).any(-1).sum())
    return wrong


def cases(window: int, int8: bool) -> list[AttentionCase]:
    shape: dict[str, Any] = {"window": window, "int8": int8, "head_dim": 16, "heads": 4, "kv_heads": 2}
    edge = ring_positions(window) - window + 1  # the most tokens that the ring has room for
    held = (window - 1, window, window + 1, 63, 64, 65, 700)
    steps = [AttentionCase(held=(n,), tokens=t, **shape) for n in held if n > 0 for t in (1, RING_ROOM, edge, edge + 1)]
    return [
        *steps,
        *(AttentionCase(tokens=n, **shape) for n in (1, 17, window, window + 1, 400)),
        AttentionCase(tokens=300, lengths=(300, 3, 1, window), **shape),  # padded on the right
        AttentionCase(held=(window, 4, 1, 700), **shape),  # rows of different length
        AttentionCase(held=(90,), tokens=500, **shape),
        AttentionCase(held=(1500,), tokens=600, threads=2, **shape),  # two pieces
        AttentionCase(held=(3000,), tokens=2, threads=2, **shape),
    ]


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_ring_gives_the_bits_of_a_whole_cache(window: int, int8: bool) -> None:
    found = {}
    for index, case in enumerate(cases(window, int8)):
        least = -(-window // 64) * 64
        for size in {ring_positions(window), least}:
            found[f"{case.label}, ring of {size}"] = differing(case, size, in_place=index % 2 == 0)
    print(f"{len(found)} calls, rings of {ring_positions(window)} and less")
    assert not any(found.values()), {label: count for label, count in found.items() if count}


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("window", [5, 16, 70])
def test_padding_takes_no_place_in_a_ring(window: int, int8: bool) -> None:
    """A row with padding among its slots is, to the last bit, the row without."""
    shape: dict[str, Any] = {"window": window, "int8": int8, "head_dim": 16}
    size, wrong = ring_positions(window), 0
    for hidden, case in (
        ((0, 30), AttentionCase(tokens=130, hidden=(0, 30), **shape)),  # on the left of a first prompt
        ((0, 30), AttentionCase(held=(120,), tokens=3, hidden=(0, 30), **shape)),
        ((40, 90), AttentionCase(held=(150,), hidden=(40, 90), **shape)),  # behind a prompt padded on the right
        ((100, 110), AttentionCase(held=(90,), tokens=150, hidden=(100, 110), **shape)),
    ):
        inputs = rings_of(case, size)
        first = int(case.slots()[0, 0])
        own = np.flatnonzero(case.mask[0, first:])
        alone = dict(inputs)
        for name in ("q", "k", "v", "position_ids"):
            array = inputs[name]
            assert array is not None
            alone[name] = np.ascontiguousarray(array[:, own])
        count = case.total - (hidden[1] - hidden[0])
        alone["attention_mask"] = np.ones((1, count), np.int64)
        alone["seqlens_k"] = np.array([count - 1], np.int32)
        got = run_on_ring(case, inputs, in_place=True)
        want = run_on_ring(replace(case, tokens=len(own)), alone, in_place=True)
        wrong += int((got[0][:, own] != want[0]).any(-1).sum())
        wrong += sum(int((a != b).any(-1).sum()) for a, b in zip(got[1:], want[1:], strict=True))
    assert wrong == 0


def test_a_window_that_is_off_by_one_is_noticed() -> None:
    """The control."""
    case = AttentionCase(held=(700,), tokens=9, window=16)
    inputs, whole = rings_of(case, 64), case.run()[0]
    same = [
        (run_on_ring(replace(case, window=window), inputs, in_place=False)[0] == whole).all() for window in (15, 16, 17)
    ]
    assert same == [False, True, False]


def test_tokens_that_were_written_can_be_taken_back() -> None:
    """Up to RING_ROOM of them leave everything that the same call without them sees."""
    for window in (5, 16, 49, 256):
        case = AttentionCase(held=(500,), tokens=RING_ROOM, window=window, head_dim=16)
        inputs = rings_of(case, ring_positions(window))
        _, key, value = run_on_ring(case, inputs, in_place=True)
        after = inputs | {"past_key": key, "past_value": value}
        for got, want in zip(
            run_on_ring(case, after, in_place=True), run_on_ring(case, inputs, in_place=True), strict=True
        ):
            np.testing.assert_array_equal(got, want)
        longer = AttentionCase(held=(500,), tokens=ring_positions(window) - window + 2, window=window, head_dim=16)
        held = {name: inputs[name] for name in ("past_key", "past_value")}
        _, key, value = run_on_ring(longer, longer.inputs | held, in_place=True)
        spoilt = run_on_ring(case, inputs | {"past_key": key, "past_value": value}, in_place=True)[0]
        assert (spoilt != run_on_ring(case, inputs, in_place=True)[0]).any()  # the control


@pytest.mark.parametrize(
    ("size", "attributes", "words"),
    [
        (72, {}, "a ring of 72 positions is no multiple of 64"),
        (64, {"window": 65}, "below the window of 65"),
        (0, {}, "below the window of 5"),
        (64, {"ring": 2}, "ring is 2: 0 and 1 are known"),
    ],
)
def test_a_ring_that_does_not_fit_is_refused(size: int, attributes: dict[str, int], words: str) -> None:
    case = AttentionCase(held=(9,), window=5)
    inputs = case.inputs | {
        name: np.zeros((1, case.kv_heads, size, case.head_dim), np.float32) for name in ("past_key", "past_value")
    }
    with pytest.raises(Exception, match=re.escape(words)):
        run_operator(case.op, inputs, case.outputs, case.attributes | {"ring": 1} | attributes)
