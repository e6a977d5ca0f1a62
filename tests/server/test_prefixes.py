"""States that are kept: the longest beginning is found, the bound holds, what was not used for longest goes first."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_export.backends.base import Snapshot
from lfm2_export.server.prefixes import PrefixCache

LOGITS = np.zeros((1, 4), dtype=np.float32)


def snapshot(nbytes: int) -> Snapshot:
    return Snapshot(program_id="x", lengths=np.array([1]), tensors={"a": np.zeros(nbytes, dtype=np.uint8)})


def test_the_longest_beginning_after_which_logits_are_known_or_come() -> None:
    kept = PrefixCache(10_000)
    kept.put([1], snapshot(1))
    kept.put([1, 2, 3], snapshot(1))
    assert kept.longest([2, 1]) is None
    assert [p.length for tokens in ([1, 9], [1, 2, 3, 4], [1, 2, 3]) if (p := kept.longest(tokens))] == [1, 3, 1]
    kept.put([1, 2, 3], snapshot(1), LOGITS)
    assert (found := kept.longest([1, 2, 3])) is not None
    assert found.length == 3
    assert [kept.shared(tokens) for tokens in ([1, 2, 9], [9], [1, 2, 3, 4])] == [2, 0, 3]


def test_a_token_is_not_taken_for_a_part_of_another() -> None:
    kept = PrefixCache(10_000)
    kept.put([256], snapshot(1))
    assert kept.longest([0, 1]) is None
    assert kept.longest([65_536 + 256, 3]) is None


def test_what_was_not_used_for_longest_goes_first() -> None:
    kept = PrefixCache(350)
    for token in (1, 2, 3):
        kept.put([token], snapshot(100))
    assert kept.longest([1, 5]) is not None
    kept.put([4], snapshot(100))
    assert [token for token in (1, 2, 3, 4) if kept.longest([token, 5])] == [1, 3, 4]
    kept.put([5], snapshot(400))
    assert len(kept) == 3, "larger than all there is room for: nothing goes"


@settings(max_examples=100, deadline=None)
@given(puts=st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(0, 300)), max_size=30))
def test_the_bound_holds(puts: list[tuple[list[int], int]]) -> None:
    kept = PrefixCache(500)
    for tokens, nbytes in puts:
        kept.put(tokens, snapshot(nbytes))
        assert kept.nbytes <= 500
    assert kept.nbytes == sum(p.nbytes for p in kept._prefixes.values())
