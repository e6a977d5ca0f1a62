"""Markdown as it streams: what is shown in the end does not depend on the pieces, and nothing of the text is lost."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console

from lfm2_export.terminal import markdown
from lfm2_export.terminal.markdown import MarkdownStream, finished

TEXT = """# Head

Some *emphasis*, `code`,
the next line.

1. one

2. two
   more of it

   a paragraph of it

- other list

```python
def f():

    return "\\n"
```

~~~
``` not the end

~~~

| a | b |
|---|---|
| 1 | 2 |

<|tool_call_start|>[f(a='x')]<|tool_call_end|> <b>html</b> a < b
"""


def shown(pieces: list[str], width: int = 90) -> str:
    """Without the drafts: those are erased."""
    paper = io.StringIO()
    stream = MarkdownStream(Console(file=paper, width=width, highlight=False))
    for piece in pieces:
        stream.push(piece)
    stream.finish()
    return paper.getvalue()


@pytest.fixture
def no_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown.MarkdownStream, "_draw", lambda stream: None)


@pytest.mark.usefixtures("no_drafts")
def test_pieces_of_any_size_are_shown_alike() -> None:
    whole = shown([TEXT])
    print(whole)
    for seed in range(5):
        cuts = sorted(random.Random(seed).sample(range(len(TEXT)), 40))
        assert shown([TEXT[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]) == whole
    assert shown(list(TEXT)) == whole


@pytest.mark.usefixtures("no_drafts")
def test_nothing_of_a_text_is_lost() -> None:
    whole = shown([TEXT])
    words = ("Head", "Some emphasis, code,\nthe next line.", " 1 one", " 2 two", "more of it", "a paragraph", "• other")
    code = ("def f():\n", 'return "\\n"', "``` not the end")
    kept = ("<|tool_call_start|>[f(a='x')]<|tool_call_end|> <b>html</b> a < b",)
    flat = "\n".join(line.strip() for line in whole.splitlines())
    for word in (*words, *code, *kept):
        assert word.strip() in flat or word in whole, word


@pytest.mark.usefixtures("no_drafts")
def test_what_steers_a_terminal_is_shown_as_an_escape() -> None:
    text = shown(["a \x1b[2J b", " \x1b", "]0;title\x07"])
    assert "\x1b" not in text
    assert "a \\x1b[2J b \\x1b]0;title\\x07" in text


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("one", 0),
        ("one\n\n", 0),
        ("one\n\ntwo", 5),
        ("one\n\n    two", 0),
        ("- one\n\n- two", 0),
        ("- one\n\ntwo", 7),
        ("```\na\n\nb", 0),
        ("```\na\n\n```\n\nb", 12),
        ("````\n```\n\nb", 0),
    ],
)
def test_a_block_is_finished_when_nothing_can_change_it(text: str, end: int) -> None:
    assert finished(text) == end


@pytest.mark.parametrize("fence", ["", "```\n"], ids=["text", "code"])
def test_a_draft_that_is_taller_than_the_terminal_shows_its_end(monkeypatch: pytest.MonkeyPatch, fence: str) -> None:
    monkeypatch.setattr(markdown, "_EVERY_S", -1)
    monkeypatch.setattr(markdown, "_REST", -1)
    paper = io.StringIO()
    stream = MarkdownStream(Console(file=paper, width=40, height=8, force_terminal=True))
    stream.push(fence)
    for number in range(30):
        stream.push(f"line {number}\n")
    drafts = paper.getvalue()
    last = drafts[drafts.rindex("line 27") :]
    assert "line 29" in last
    assert "line 2\n" not in last
    stream.finish()
    final = paper.getvalue()[len(drafts) :]
    assert all(f"line {number}" in final for number in range(30))
