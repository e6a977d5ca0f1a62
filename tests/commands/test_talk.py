"""``run`` and ``chat`` on a runner without a model: what is typed, and what a mistake or Ctrl-C does."""

from __future__ import annotations

import io
import json
from itertools import cycle

import numpy as np
import pytest

from lfm2_export import cli
from lfm2_export.chat import Chat
from lfm2_export.commands import chat as chat_command
from lfm2_export.commands import run as run_command
from lfm2_export.commands import talk
from lfm2_export.generation_config import GenerationConfig
from tests.artifacts import program
from tests.hash_runner import TOKENIZER, HashRunner

SHORT = GenerationConfig(max_new_tokens=6)


class InterruptedRunner(HashRunner):
    """Ctrl-C arrives while this prefill, counted from 0, is under way."""

    def __init__(self, at: int):
        super().__init__(vocab_size=TOKENIZER.vocab_size)
        self.at = at

    def prefill(self, input_ids, *, chunk_size=None):
        if len(self.prefilled) == self.at:
            self.prefilled.append([])
            self.rows[0].append(1)
            raise KeyboardInterrupt
        return super().prefill(input_ids, chunk_size=chunk_size)


@pytest.fixture
def say(monkeypatch, capsys):
    """``say(bytes, *arguments)`` runs a command with that standard input; exit code, stdout, stderr."""

    def run(
        stdin: bytes,
        *arguments: str,
        runner: HashRunner | None = None,
        config: GenerationConfig = SHORT,
    ) -> tuple[int, str, str]:
        opened = talk.Opened(
            program=program(),
            runner=runner or HashRunner(vocab_size=TOKENIZER.vocab_size),
            tokenizer=TOKENIZER,
            config=config,
        )
        for command in (chat_command, run_command):
            monkeypatch.setattr(command, "open_for_text", lambda options: opened)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = cli.main([*arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("stdin", "arguments", "place"),
    [
        (b"", ("--prompt", "a\udcff"), "--prompt: character 1"),
        (b"ab\xff\n", ("--prompt", "-"), "standard input: character 2"),
        (b"ab\xff\n", (), "standard input: character 2"),
        (b"", ("a\udcff",), "the prompt: character 1"),
        (b"", ("--raw", "--prompt", "a\udcff"), "--prompt: character 1"),
        (b"", ("--prompt", "a", "--system", "\udcff"), "--system: character 0"),
    ],
)
def test_run_refuses_text_that_is_not_utf8(say, stdin, arguments, place):
    code, out, err = say(stdin, "run", "DIR", *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        f"lfm2-export: {place} ('\\udcff') is not Unicode text; give the text as valid UTF-8",
    ]


def test_run_reads_standard_input(say):
    code, out, _ = say("größer\n".encode(), "run", "DIR", "--prompt", "-")
    assert code == 0
    assert out.strip()


def test_a_message_that_is_not_utf8_does_not_end_the_conversation(say):
    code, out, err = say(b"Hello\nan\xffd\nAgain\n", "chat", "DIR")
    assert code == 2  # a script has no other way to know
    assert "lfm2-export: your message: character 2 ('\\udcff') is not Unicode text" in err
    alone, shown = HashRunner(vocab_size=TOKENIZER.vocab_size), io.StringIO()
    chat = Chat(alone, TOKENIZER, GenerationConfig(max_new_tokens=6))
    for line in ("Hello", "Again"):
        print("".join(chat.send(line)), file=shown)
    assert out == shown.getvalue()


def test_a_system_message_that_is_not_utf8_ends_chat_at_once(say):
    code, out, err = say(b"Hello\n", "chat", "DIR", "--system", "\udcff")
    assert (code, out) == (2, "")
    assert err.startswith("lfm2-export: --system: character 0 ('\\udcff') is not Unicode text")


@pytest.mark.parametrize("at", [0, 1])
def test_ctrl_c_before_a_reply_begins_stops_only_the_reply(say, at):
    """What was typed before and after is answered as if the interrupted line had never been."""
    lines = [b"One\n", b"Two\n"]
    lines.insert(at, b"Interrupted\n")
    code, out, _ = say(b"".join(lines), "chat", "DIR", runner=InterruptedRunner(at))
    assert code == 0
    replies = out.splitlines(keepends=True)
    _, expected, _ = say(b"One\nTwo\n", "chat", "DIR")
    print(replies)
    assert "\n" in replies
    replies.remove("\n")
    assert "".join(replies) == expected


CALL = "<|tool_call_start|>[look_up(name='x')]<|tool_call_end|>"


class CallingRunner(HashRunner):
    """Its likeliest tokens are those of a tool call and of the end of a turn."""

    def __init__(self) -> None:
        super().__init__(vocab_size=TOKENIZER.vocab_size)
        self.script = cycle(TOKENIZER.encode(f"{CALL}<|im_end|>", add_special_tokens=False))

    def logits_of(self, row):
        return np.eye(self.vocab_size, dtype=np.float32)[next(self.script)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((), CALL), (("--skip-special-tokens",), "[look_up(name='x')]")],
    ids=["shown", "skipped"],
)
def test_a_tool_call_is_written_with_its_markers_unless_told_otherwise(say, arguments, expected):
    config = GenerationConfig(max_new_tokens=40, stop_token_ids=(TOKENIZER.token_id("<|im_end|>"),))
    for command in (("run", "DIR", "--prompt", "a"), ("chat", "DIR")):
        code, out, _ = say(b"a\n", *command, *arguments, runner=CallingRunner(), config=config)
        assert (code, out) == (0, f"{expected}\n")
    _, out, _ = say(b"", "run", "DIR", "--prompt", "a", "--json", *arguments, runner=CallingRunner(), config=config)
    answer = json.loads(out)
    assert answer["text"] == expected
    assert TOKENIZER.decode(answer["tokens"]) == f"{CALL}<|im_end|>"
