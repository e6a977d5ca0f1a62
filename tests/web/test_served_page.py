"""The page of ``lfm2-export serve`` in Chromium: it streams, stops, asks for the key, shows text as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lfm2_export.server.access import Access
from lfm2_export.server.limits import Limits
from tests.server.conftest import Running, Serve, folder, opened, serve
from tests.server.script_runner import scripted
from tests.shows import shows
from tests.web.conftest import ANSWERED, READY, Drive, greedily, python_answer, say

__all__ = ["folder", "serve"]

QUESTION = "How do I sort a list?"
HOSTILE = (
    "<img src=x onerror=document.title='bad'> <script>document.title='bad'</script> **bold** `code` "
    "[link](javascript:alert(1))\n```py\nx = '<b>'\n```\nend"
)
FITS = "document.documentElement.scrollWidth <= innerWidth && document.body.scrollHeight <= innerHeight"
ELEMENTS = "[...document.querySelectorAll('article.assistant *')].map(element => element.tagName).sort()"
GROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def locked(serve: Serve, folder: Path) -> Running:
    return serve(opened(folder, kernels="stock"), access=Access(key="secret"))


@shows("serve", "greedy", family="lfm2", scheme="q4")
def test_it_asks_for_the_key_and_shows_pythons_answer(locked: Running, folder: Path, drive: Drive) -> None:
    unlock = [("wait", "#key:not([hidden])"), ("fill", "#secret", "wrong"), ("click", "#key button")]
    unlock += [
        ("wait", "#fault:text('another API key')"),
        ("fill", "#secret", "secret"),
        ("click", "#key button"),
        READY,
    ]
    asked = [*greedily(), *say(QUESTION), ANSWERED, ("wait", "#memory:not(:empty)")]
    (visit,) = drive(
        {"url": locked.url, "steps": [*unlock, *asked, ("text", "article"), ("text", "#figures, #memory")]}
    )
    texts, (figures, memory) = visit.values[-2:]
    print(texts, figures, memory)
    assert texts == [QUESTION, python_answer(folder, QUESTION).text]
    assert texts[1] != python_answer(folder, "What is a string?").text
    assert re.fullmatch(r"\d+ prompt tokens · 10 new · [\d.]+ tokens/s", figures)
    assert re.fullmatch(r"[\d,]+ MB on the server", memory)
    assert all(request.startswith(locked.url) for request in visit.requests)


def test_text_streams_is_shown_as_text_and_can_be_stopped(serve: Serve, drive: Drive) -> None:
    """On a phone in the dark and on a desk in the light."""
    hostile, endless = serve(scripted(HOSTILE)), serve(scripted("word " * 2000, pause=0.01))
    shown = [("script", script) for script in (ELEMENTS, "document.title", FITS, GROUND)]
    phone: dict[str, Any] = {"width": 390, "height": 844, "dark": True}
    first, second = drive(
        {"url": hostile.url, **phone, "steps": [READY, *say("Hello"), ANSWERED, ("text", "article"), *shown]},
        {
            "url": endless.url,
            "steps": [
                READY,
                *say("Hello"),
                ("wait", "article.running .text:has-text('word word word')"),
                ("click", "#send"),  # Stop
                ("wait", ".note"),
                ("text", ".note"),
                ("text", "#send"),
                *shown,
            ],
        },
    )
    text, elements, title, fits, ground = first.values[-5:]
    assert "<img src=x onerror=document.title='bad'> <script>" in text[1]
    assert "[link](javascript:alert(1))" in text[1]
    assert (elements, title) == (["CODE", "CODE", "DIV", "DIV", "DIV", "PRE", "STRONG"], "lfm2-export chat")
    assert "x = '<b>'" in text[1]
    assert (fits, ground) == (True, "rgb(22, 24, 28)")
    assert second.values[-6:-4] == [["Stopped."], ["Send"]]
    assert second.values[-2:] == [True, "rgb(255, 255, 255)"]
    stopped = endless.count("lfm2_abandoned_requests_total"), endless.count("lfm2_generated_tokens_total")
    print(f"{stopped[1]:g} of 2000 tokens were generated")
    assert stopped[0] == 1
    assert 3 <= stopped[1] < 2000


def test_what_the_server_refuses_is_a_line_and_what_was_typed_stays(serve: Serve, drive: Drive) -> None:
    server = serve(scripted("Hello"), limits=Limits(body=200))
    typed = "long " * 100
    (visit,) = drive(
        {
            "url": server.url,
            "steps": [READY, *say(typed), ("wait", "#fault:not([hidden])"), ("text", "#fault"), ("value", "#text")],
        }
    )
    assert visit.values[-2:] == [["the request has more than 200 bytes; shorten it"], typed]
