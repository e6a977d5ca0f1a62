"""What a terminal's keys leave in a text: nothing."""

from __future__ import annotations

import pytest

from lfm2_export.terminal.typed import cleaned


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("abc\x1b[D\x1b[Dx", "abcx"),
        ("\x1b[1;5Cword\x1b[3~", "word"),
        ("\x1bOAup\x1bOB", "up"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("\x1b[200~pasted\x1b[201~", "pasted"),
        ("a\x08b\x7f\x00c\x9b", "abc"),
        ("\x1b", ""),
        ("tab\there\r\nand\rthere\n", "tab\there\nand\nthere\n"),
        ("größer 👍🏽 [31m ~", "größer 👍🏽 [31m ~"),
    ],
)
def test_keys_are_no_text(typed: str, said: str) -> None:
    assert cleaned(typed) == said
