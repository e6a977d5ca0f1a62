"""JSON of strangers: bounded where it is read, plain where it is written."""

import json

import pytest

from lfm2_export.json_values import DEEPEST, MOST_VALUES, JsonError, dump, not_plain, parse, plain


def test_values_come_back_as_json_reads_them():
    text = '{"a": [1, 2.5, true, null, "é"], "b": {"c": -1e3}, "d": []}'
    assert parse(text) == parse(text.encode()) == json.loads(text)


def test_what_transformers_takes_for_numbers_is_taken():
    assert str(parse('[NaN, Infinity, -Infinity, 1e999, "\\ud800"]')) == r"[nan, inf, -inf, inf, '\ud800']"


@pytest.mark.parametrize("levels", [DEEPEST - 1, DEEPEST])
def test_depth_is_bounded(levels):
    nested = "[" * levels + "]" * levels
    assert str(parse(nested)).count("[") == levels
    with pytest.raises(JsonError, match=f"is nested more than {DEEPEST} levels deep"):
        parse("[" + '{"a":' * (DEEPEST - 1) + "[1]" + "}" * (DEEPEST - 1) + "]")


def test_values_are_bounded_before_they_are_made():
    assert len(parse(b"[" + b"0," * (MOST_VALUES // 10) + b"0]")) == MOST_VALUES // 10 + 1
    with pytest.raises(JsonError, match=f"holds more than {MOST_VALUES} values"):
        parse(b"[" + b"0," * MOST_VALUES)


@pytest.mark.parametrize("text", ["", "{", "nul", b"\xff", "[" * 10**5, "9" * 5000])
def test_what_is_no_json_is_said_shortly(text):
    with pytest.raises(JsonError, match=r"^is not JSON \(.{5,120}\)$"):
        parse(text)


def test_what_is_written_every_parser_reads():
    value = {"a": float("nan"), "b": [1, (float("inf"), 2.5)], "\ud800": "x\udcff", "c": {"d": -float("inf")}, "e": "é"}
    expected = {"a": None, "b": [1, [None, 2.5]], "\ufffd": "x\ufffd", "c": {"d": None}, "e": "é"}
    assert plain(value) == expected
    assert json.loads(dump(value).encode("utf-8"), parse_constant=pytest.fail) == expected
    assert not_plain(value) == ["a", "b", "\ud800", "c"]
    assert not_plain(expected) == []
