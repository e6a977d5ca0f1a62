"""No part of a stop string is ever shown, and what is shown does not depend on how the text was cut."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_export.replies import StopStrings

few = st.text(alphabet="ab", max_size=30)


def shown(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    watched = StopStrings(stops)
    return "".join(map(watched.push, pieces)) + watched.finish(), watched.found


@settings(max_examples=400, deadline=None)
@given(text=few, stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3), size=st.integers(1, 5))
def test_the_first_complete_stop_string_ends_the_text(text: str, stops: list[str], size: int) -> None:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    result, found = shown(pieces, stops)
    assert (result, found) == shown(list(text), stops)
    if found is None:
        assert result == text
        assert not any(stop in text for stop in stops)
    else:
        assert (result + found) == text[: len(result + found)]
        assert not any(stop in (result + found)[:-1] for stop in stops), "another was complete before"


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    watched = StopStrings(["END."])
    assert [watched.push(piece) for piece in ("say EN", "D", "!", " END")] == ["say ", "", "END!", " "]
    assert watched.finish() == "END"
