"""Messages are one printable line of bounded length, whatever they quote."""

import pickle
import time

import pytest

from lfm2_export.errors import ArtifactError, CheckpointError
from lfm2_export.messages import MESSAGE_LIMIT, as_unicode, listed, one_line, shown


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, [0] * 10**6, {str(i): i for i in range(10**5)}, 10**5000, -(10**20_000), "\x1b[31m\ud800\n" * 99],
    ids=["text", "list", "object", "digits", "more digits", "control characters"],
)
def test_a_value_of_any_size_is_shown_short_and_printable(value):
    started = time.perf_counter()
    text = shown(value)
    assert len(text) <= 80
    assert text.isprintable()
    assert time.perf_counter() - started < 1


def test_small_values_are_shown_as_python_writes_them():
    for value in (1, 1.5, "conv", None, ["a", 2], {"a": [1]}, "é"):
        assert shown(value) == repr(value)


def test_long_lists_show_the_first_eight_and_how_many_more():
    names = [f"model.layers.{i}.weight" for i in range(100)]
    text = listed(names[::-1])
    assert text == ", ".join(names[:8]) + " and 92 more"
    assert listed(names[:3]) == ", ".join(names[:3])


def test_of_long_names_as_many_are_shown_as_there_is_room_for():
    names = [f"model.layers.{i}.feed_forward.experts.0.w1.weight" for i in range(20)]
    assert listed(names, room=100) == f"{names[0]}, {names[1]} and 18 more"
    assert listed(names, room=1) == f"{names[0]} and 19 more"
    assert len(listed(["x" * 10**6, "y" * 10**6])) < 200


def test_text_that_no_utf_8_can_hold_stands_as_escapes():
    assert as_unicode("é\udce9\ud800x") == "é\\udce9\\ud800x"


def test_names_with_superscripts_and_endless_digits_can_be_sorted():
    names = ["²", "a" + "9" * 10**5, "a10", "a9", "a²"]
    assert listed(names).startswith("a9, a10, a99999")


def test_a_message_is_one_line_that_keeps_its_beginning_and_its_remedy():
    error = CheckpointError("weights: " + "x" * 10**6 + "\n; download them\n again", details=["a", "b"])
    text = str(error)
    assert text.startswith("weights: xxx")
    assert text.endswith("; download them again")
    assert len(text) == MESSAGE_LIMIT
    assert error.details == ("a", "b")


def test_errors_survive_being_sent_to_another_process():
    error = pickle.loads(pickle.dumps(ArtifactError("here: is wrong; correct it", details=["more"])))
    assert str(error) == "here: is wrong; correct it"
    assert error.details == ("more",)


def test_a_message_cannot_steer_a_terminal():
    assert one_line("a\x1b[2J\x07b\u202ec\ud800") == "a\\x1b[2J\\x07b\\u202ec\\ud800"
