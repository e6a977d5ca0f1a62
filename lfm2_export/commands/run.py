"""``lfm2-export run``: text in, text out, on any artifact."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from lfm2_export import console, interrupts
from lfm2_export.backends.arguments import check_threads
from lfm2_export.backends.base import kernels_of
from lfm2_export.commands.base import add_artifact, add_json, add_machine
from lfm2_export.commands.speculate import add_speculation
from lfm2_export.commands.talk import (
    STDIN_LIMIT,
    Opened,
    add_generation,
    encode_prompt,
    note_speculation,
    open_for_text,
    reading,
    standard_input,
    stream_text,
)
from lfm2_export.errors import GenerationError
from lfm2_export.generation import TokenEvent, generate
from lfm2_export.messages import shown
from lfm2_export.mixups import is_artifact
from lfm2_export.resources import processor_name


class RunCommand:
    name = "run"
    help = "generate text from one prompt"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_artifact(parser)
        parser.add_argument(
            "words",
            metavar="PROMPT",
            nargs="*",
            help="what to say; - or nothing at all reads standard input where that is no terminal",
        )
        parser.add_argument("--prompt", "-p", metavar="TEXT", help="the prompt as an option")
        parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
        add_generation(parser)
        add_speculation(parser)
        add_machine(parser)
        add_json(parser)

    def run(self, options: argparse.Namespace) -> int:
        asked = _asked(options)
        opened = open_for_text(options)
        prompt = _read_prompt() if asked == "-" else asked
        place = "standard input" if asked == "-" else "--prompt" if options.prompt is not None else "the prompt"
        ids = encode_prompt(opened.tokenizer, prompt, raw=options.raw, system=options.system, place=place)
        started = time.perf_counter()
        events = generate(opened.runner, [ids], opened.config)
        timed = _Timed(events, started)
        pieces = stream_text(
            opened.tokenizer,
            timed,
            stop_tokens=opened.config.stop_tokens,
            skip_special_tokens=options.skip_special_tokens,
        )
        if options.json:
            console.print_json(_machine(options) | _collect(opened, ids, timed, "".join(pieces)))
        else:
            for piece in pieces:
                console.stream(piece)
            console.stream("\n")
            console.note(f"{_described(opened, options)}: {timed.summary(len(ids))}")
            note_speculation(opened)
        return 0


def _described(opened: Opened, options: argparse.Namespace) -> str:
    """What ran, and on what: "onnx q4 on lfm2 avx2, threads: 2, <processor>"."""
    kernels = kernels_of(opened.runner)
    program = f"{opened.program} on {kernels}" if kernels else str(opened.program)
    return "{}, threads: {threads}, {processor}".format(program, **_machine(options))


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    return {"threads": check_threads(options.threads), "processor": processor_name()}


def _asked(options: argparse.Namespace) -> str:
    """The prompt as given, "-" for standard input.

    Raises:
        GenerationError: there are two, or none and a terminal where it would be read from.
    """
    words = " ".join(options.words)
    if options.words and is_artifact(words) and not is_artifact(options.artifact):
        raise GenerationError(f"the artifact comes first; say `lfm2-export run {words} {shown(options.artifact)}`")
    if options.prompt is not None and options.words:
        raise GenerationError(f"two prompts: {shown(options.prompt)} by --prompt, and {shown(words)}; leave one out")
    if options.prompt is None and not options.words:
        if standard_input().isatty():
            raise GenerationError(f'a prompt is missing; say `lfm2-export run {options.artifact} "TEXT"`')
        return "-"
    return words if options.prompt is None else options.prompt


def _read_prompt() -> str:
    text = reading(lambda: standard_input().read(STDIN_LIMIT + 1))
    if len(text) > STDIN_LIMIT:
        raise GenerationError(f"standard input: has more than {STDIN_LIMIT:,} characters; give a shorter prompt")
    return text


class _Timed(Iterator[TokenEvent]):
    """Passes events on and remembers them with the time."""

    def __init__(self, events: Iterator[TokenEvent], started: float):
        self._events, self._started = events, started
        self.prefill_s = time.perf_counter() - started
        self.tokens: list[int] = []
        self.finish_reason: str | None = None

    def __next__(self) -> TokenEvent:
        interrupts.check()
        event = next(self._events)
        self.tokens.append(event.token)
        self.finish_reason = event.finish_reason
        self.decode_s = time.perf_counter() - self._started - self.prefill_s
        return event

    def summary(self, prompt_tokens: int) -> str:
        rate = len(self.tokens) / max(self.decode_s, 1e-9)
        return (
            f"{prompt_tokens} prompt tokens in {self.prefill_s:.2f} s, {len(self.tokens)} new ones at {rate:.1f} per s,"
            f" ended by {self.finish_reason}"
        )


def _collect(opened: Opened, ids: list[int], timed: _Timed, text: str) -> dict[str, Any]:
    return {
        "program": str(opened.program),
        "kernels": kernels_of(opened.runner),
        "text": text,
        "tokens": timed.tokens,
        "prompt_tokens": len(ids),
        "finish_reason": timed.finish_reason,
        "prefill_s": timed.prefill_s,
        "decode_s": timed.decode_s,
    } | ({} if opened.speculation is None else {"speculation": opened.speculation.to_json()})
