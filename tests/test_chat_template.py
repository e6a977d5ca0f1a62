"""Templates of strangers: what they may take, and that nothing of this process is lost to those that take more."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import lfm2_export
from lfm2_export import chat_template
from lfm2_export.chat import Chat
from lfm2_export.chat_template import RenderLimits
from lfm2_export.cli import main
from lfm2_export.errors import GenerationError
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.messages import MESSAGE_LIMIT
from lfm2_export.text import Tokenizer
from tests.crafted import with_file
from tests.hash_runner import HashRunner
from tests.template_bombs import BOMBS

BUNDLED = [Path(lfm2_export.__file__).parent / "assets" / name for name in ("tiny-moe", "tiny-dense")]
TOKENIZER = Tokenizer.from_dir(BUNDLED[0])
USER = {"role": "user", "content": "Hello"}
RENDERED = TOKENIZER.render_chat([USER])

# Low, so that the tests end soon; what is tested is that there is a limit.
LOW = RenderLimits(seconds=0.05, memory=128 << 20)


def with_template(folder: Path, template: str, limits: RenderLimits = chat_template.DEFAULT_LIMITS) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(BUNDLED[0] / name, folder)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.from_dir(folder, template_limits=limits)


def refusal(render: Callable[[list], str]) -> str:
    with pytest.raises(GenerationError) as info:
        render([USER])
    message = str(info.value)
    assert message.startswith("chat template")
    assert len(message.splitlines()) == 1
    assert len(message) <= MESSAGE_LIMIT
    return message


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_takes_too_much_ends_in_one_line(name):
    own, started = psutil.Process().memory_info().rss, time.monotonic()
    message = refusal(lambda messages: chat_template.render(BOMBS[name], messages, limits=LOW))
    assert time.monotonic() - started < 10
    assert psutil.Process().memory_info().rss - own < 256 << 20
    print(message)
    assert TOKENIZER.render_chat([USER]) == RENDERED


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 2 s; use a",
        ),
        ("{{ 'x' * 10**10 }}", "needs more than 512 MB of memory; use a simpler template or a shorter conversation"),
        ("{{ 'x' * (3 * 2**20) }}", "gives more than 2097152 characters; use a simpler template or a shorter"),
    ],
)
def test_the_limits_that_hold_where_none_are_given(tmp_path, template, message):
    started = time.monotonic()
    assert message in refusal(with_template(tmp_path, template).render_chat)
    print(f"{time.monotonic() - started:.2f} s")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("limits", [LOW, chat_template.DEFAULT_LIMITS], ids=["low", "default"])
def test_a_limit_is_no_nearer_than_it_says(tmp_path, limits):
    """The control: half of the memory, and as many characters as are allowed, are to be had."""
    amount = limits.memory // 2 - (32 << 20)
    template = f"{{% set n = messages | length * {amount} %}}{{{{ ('x' * n) | length }}}}"
    assert with_template(tmp_path, template, RenderLimits(memory=limits.memory)).render_chat([USER]) == str(amount)
    few = RenderLimits(characters=1000)
    assert with_template(tmp_path, "{{ 'é' * 1000 }}", few).render_chat([USER]) == "é" * 1000
    assert "gives more than 1000 characters" in refusal(with_template(tmp_path, "{{ 'é' * 1001 }}", few).render_chat)


def test_what_one_template_leaves_behind_does_not_count_against_the_next(tmp_path):
    """Each keeps 60 MB in its compiled code."""
    for index in range(12):
        template = f"{{{{ ('{index}' * 60_000_000)[:3] }}}}"
        limits = RenderLimits(memory=512 << 20)
        assert with_template(tmp_path, template, limits).render_chat([USER]) == (str(index) * 3)[:3]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('long ' * 10**5) }}",
        "{{ raise_exception('line\n' * 10**5) }}",
        "{{ raise_exception('\x1b[31m\u202e' * 100) }}",
        "{{ raise_exception('x' * 10**6) }}",
        "{{ raise_exception([['x'] * 10**4] * 9) }}",
        "{{ messages[0]['" + "k" * 10_000 + "'].x }}",
        "{{ dict()[" + "9" * 2000 + "] .x }}",
        "{{ namespace(" + "_" * 5000 + "=1) }}",
        "{{ 'a' | " + "f" * 10_000 + " }}",
        "{% " + "t" * 10_000 + " %}",
        "{{ int(" + "x" * 10_000 + ") }}",
        "{% include '" + "n" * 10_000 + "' %}",
    ],
)
def test_a_template_says_its_error_in_one_short_line(tmp_path, template):
    message = refusal(with_template(tmp_path, template).render_chat)
    assert message.isprintable()
    print(message)


@pytest.mark.parametrize("folder", BUNDLED, ids=lambda folder: folder.name)
def test_a_bundled_template_takes_under_5_ms_a_call(folder):
    tokenizer = Tokenizer.from_dir(folder)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    messages = [USER, {"role": "assistant", "content": "Yes."}] * 10 + [USER]

    def seconds() -> float:
        started = time.perf_counter()
        tokenizer.render_chat(messages, tools=[tool])
        return time.perf_counter() - started

    first, warm = seconds(), sorted(seconds() for _ in range(100))
    print(
        f"first {1e3 * first:.1f} ms, then {1e3 * statistics.median(warm):.2f} ms a call, at most {1e3 * warm[-1]:.2f}"
    )
    assert statistics.median(warm) < 0.005


def test_values_arrive_as_they_are(tmp_path):
    variables = {
        "nan": math.nan,
        "inf": -math.inf,
        "zero": -0.0,
        "big": 10**4000,
        "pair": "\ud83d\ude00",
        "keys": {1: "a", None: "b", 2.5: "c"},
        "nul": "a\x00b\r\n\u2028",
        "deep": json.loads("[" * 200 + "]" * 200),
    }
    template = (
        "{{ nan }} {{ inf }} {{ zero }} {{ big % 7 }} {{ pair }} {{ keys[none] }}{{ keys[2.5] }} {{ nul }} {{ deep }}"
    )
    found = with_template(tmp_path, template).render_chat([USER], variables=variables)
    expected = f"nan -inf -0.0 {10**4000 % 7} \ud83d\ude00 bc a\x00b\r\n\u2028 {'[' * 200}{']' * 200}"
    assert found == expected


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "x" * (65 << 20)}], r"has \d+ bytes, more than the 67108864 that a template"),
        ([{"role": "user", "content": json.loads("[" * 900 + "]" * 900)}], "message 0 is nested too deeply"),
        ([{"role": "user", "content": "x", "n": object()}], "message 0 holds a object; only JSON values"),
        ([["x" * 10**6]], "message 0 is "),
        ([{"content": "x" * 10**6}], "message 0 is "),
    ],
    ids=["large", "deep", "object", "list", "no role"],
)
def test_conversations_that_no_template_is_given(messages, message):
    if "deep" in message:
        node: list = []
        messages = [{"role": "user", "content": node}]
        for _ in range(100_000):
            node.append([])
            node = node[0]
    with pytest.raises(GenerationError, match=message) as info:
        TOKENIZER.render_chat(messages)
    assert len(str(info.value)) <= MESSAGE_LIMIT


def test_a_conversation_is_kept_when_its_template_fails(tmp_path):
    """At the second turn: the first one, the reply and the runner's state are as they were."""
    template = "{% if messages | length > 1 %}{{ 'x' * 10**10 }}{% endif %}{{ messages[0].content }}"
    runner = HashRunner(vocab_size=TOKENIZER.vocab_size)
    chat = Chat(runner, with_template(tmp_path, template), GenerationConfig(max_new_tokens=4))
    reply = "".join(chat.send("Hello"))
    messages, rows = chat.messages, [list(row) for row in runner.rows]
    with pytest.raises(GenerationError, match="needs more than 512 MB of memory"):
        chat.send("again")
    assert chat.messages == messages
    assert runner.rows == rows
    assert "".join(chat.regenerate()) == reply


@pytest.mark.parametrize("name", ["loops: nested ranges", "text: times", "depth: parentheses"])
def test_run_says_it_and_ends_with_2(artifact, tmp_path, capfd, name):
    folder = with_file(artifact("tiny-moe"), tmp_path / "artifact", "chat_template.jinja", BOMBS[name].encode())
    started = time.monotonic()
    assert main(["run", str(folder), "--scheme", "q4", "--prompt", "Hi", "--max-new-tokens", "1"]) == 2
    assert time.monotonic() - started < 10
    out, error = capfd.readouterr()
    (line,) = error.splitlines()
    print(line)
    assert line.startswith("lfm2-export: chat template")
    assert len(line) < 400
    assert out == ""
