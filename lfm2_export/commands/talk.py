"""What ``lfm2-export run`` and ``chat`` share: their arguments, what they open, prompts in, text out."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lfm2_export import chat_template, console
from lfm2_export.backends.base import Runner
from lfm2_export.commands.base import runner_options
from lfm2_export.commands.speculate import Speculation
from lfm2_export.errors import GenerationError
from lfm2_export.generation import TokenEvent
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.hub_artifacts import open_artifact
from lfm2_export.manifest import Program
from lfm2_export.runners import open_runner
from lfm2_export.speculation import Report, SpeculativeRunner
from lfm2_export.text import StreamDecoder, Tokenizer, check_text

# What a model's context may hold many times over; a device as standard input has no end.
STDIN_LIMIT = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Opened:
    """All that generating text takes."""

    program: Program
    runner: Runner
    tokenizer: Tokenizer
    config: GenerationConfig

    @property
    def speculation(self) -> Report | None:
        """What it did so far; None where none was asked for."""
        return self.runner.report if isinstance(self.runner, SpeculativeRunner) else None


def add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens", "-n", type=int, metavar="N", help="stop after N tokens (default: the checkpoint's, or 512)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="above 0: draw tokens; 0: always the likeliest one (default: the checkpoint's)",
    )
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest that add up to p")
    parser.add_argument("--min-p", type=float, help="draw without what is below min_p times the likeliest")
    parser.add_argument("--repetition-penalty", type=float, help="above 1: avoid tokens that were there")
    parser.add_argument("--seed", type=int, help="draw the same tokens each time; alone it does not switch drawing on")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--skip-special-tokens",
        action="store_true",
        help="leave the markers of tool calls and the like out of the text",
    )


def open_for_text(options: argparse.Namespace) -> Opened:
    """Loads program, tokenizer and the checkpoint's generation settings, overridden by the options."""
    if not getattr(options, "raw", False):
        chat_template.prepare()  # while the program is loaded
    artifact = open_artifact(options.artifact, backend=options.backend, scheme=options.scheme)
    program = artifact.program(options.backend, options.scheme)
    config = generation_settings(artifact.path).override(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    speculation = Speculation.asked(options)
    with console.busy(f"loading {program}"):
        runner = open_runner(artifact, program, runner_options(options))  # first: says what has no tokenizer, and why
        tokenizer = Tokenizer.from_dir(artifact.path)
        runner = speculation.before(runner, artifact, tokenizer)
    return Opened(program=program, runner=runner, tokenizer=tokenizer, config=config)


def generation_settings(folder: Path) -> GenerationConfig:
    """The settings that came with the checkpoint."""
    return GenerationConfig.from_artifact(folder)


def note_speculation(opened: Opened) -> None:
    if opened.speculation is not None:
        console.note(f"speculation, {opened.speculation.summary()}")


def reading(read: Callable[[], str]) -> str:
    try:
        return read()
    except OSError as error:  # a folder, or a terminal that has gone
        raise GenerationError(
            f"standard input: cannot be read ({error.strerror}); give --prompt a text, or a file on standard input"
        ) from error


def standard_input() -> TextIO:
    """Standard input, whose bytes that are not UTF-8 arrive as they do in arguments: ``check_text`` finds them."""
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "surrogateescape":
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, *, raw: bool, system: str | None = None, place: str = "--prompt"
) -> list[int]:
    """A prompt's tokens: as a user's message where there is a chat template, else the bare text.

    Raises:
        GenerationError: the prompt, which was given at ``place``, is empty, a system message is given where no template
            takes it, or one of them is not UTF-8.
    """
    if not prompt.strip():
        raise GenerationError(f"{place} is empty; give some text to answer or continue")
    check_text(prompt, place)
    check_text(system or "", "--system")
    if raw or not tokenizer.has_chat_template:
        if system is not None:
            raise GenerationError("--system needs a chat template; leave out --raw, or put the text into --prompt")
        return tokenizer.encode(prompt)
    messages = [] if system is None else [{"role": "system", "content": system}]
    return tokenizer.encode_chat([*messages, {"role": "user", "content": prompt}])


def stream_text(
    tokenizer: Tokenizer,
    events: Iterator[TokenEvent],
    *,
    stop_tokens: Collection[int] = (),
    skip_special_tokens: bool = False,
) -> Iterator[str]:
    """The text of a single row as it grows, never half a character."""
    decoder = StreamDecoder(tokenizer, skip_special_tokens=skip_special_tokens or None, stop_tokens=stop_tokens)
    for event in events:
        yield decoder.push(event.token)
    yield decoder.finish()
