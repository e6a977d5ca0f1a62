"""``lfm2-export serve``: programs behind an OpenAI-compatible HTTP server, and a page to chat with them."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from lfm2_export import chat_template, console
from lfm2_export.artifact import Artifact
from lfm2_export.commands.base import add_machine, add_program_choice, given, runner_options
from lfm2_export.commands.talk import generation_settings
from lfm2_export.encoders import Encoder, load_encoder
from lfm2_export.errors import ConfigError
from lfm2_export.hub_artifacts import name_of, open_artifact
from lfm2_export.manifest import ENCODER
from lfm2_export.runners import open_runner
from lfm2_export.server.embeddings import EncoderQueue
from lfm2_export.server.limits import Limits
from lfm2_export.server.rows import why_alone
from lfm2_export.server.served import Model, Models, Served
from lfm2_export.text import Tokenizer

KEY_VARIABLE = "LFM2_EXPORT_API_KEY"
_MB = 1 << 20
_DEFAULTS = Limits()


class ServeCommand:
    name = "serve"
    help = "a chat page at /, and OpenAI's API: /v1/chat/completions, /v1/completions, /v1/embeddings, /metrics"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "artifacts",
            metavar="DIR...",
            nargs="+",
            type=given,
            help="folders that `lfm2-export export` wrote, or Hub ids; a folder's name is its model's",
        )
        add_program_choice(parser)
        parser.add_argument(
            "--host", type=given, default="127.0.0.1", help="address (default: 127.0.0.1, this machine)"
        )
        parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any that is free (default: 8000)")
        parser.add_argument(
            "--api-key", type=given, metavar="KEY", help=f"what clients must send (default: {KEY_VARIABLE}, or none)"
        )
        parser.add_argument(
            "--allow-origin",
            action="append",
            default=[],
            type=given,
            metavar="ORIGIN",
            help="a web page's origin that may ask, such as http://localhost:3000, or * (default: none)",
        )
        add_limits(parser)
        add_machine(parser)

    def run(self, options: argparse.Namespace) -> int:
        from lfm2_export.server.access import Access
        from lfm2_export.server.listening import bind, is_loopback, serve, url_of

        limits = _limits(options)
        key = options.api_key or os.environ.get(KEY_VARIABLE) or None
        bound = bind(options.host, options.port)
        chat_template.prepare()
        opened = [_open(folder, options) for folder in options.artifacts]
        models = Models(
            [one for one in opened if isinstance(one, Model)],
            limits,
            [EncoderQueue(*one, queue_limit=limits.queue) for one in opened if not isinstance(one, Model)],
        )
        for served in models.all():
            console.note(_at_once(served))
        access = Access(key=key, origins=tuple(options.allow_origin), local=is_loopback(bound))
        if not access.local and key is None:
            console.note(f"{options.host}: anyone who reaches this machine can ask; --api-key KEY lets only some")
        url = url_of(bound)
        serve(
            bound, models, limits, access, ready=lambda: console.note(f"{url} to chat, {url}/v1 the API; Ctrl-C: end")
        )
        return 0


def add_limits(parser: argparse.ArgumentParser) -> None:
    for name, metavar, default, what in (
        ("--max-body", "MB", _DEFAULTS.body // _MB, "the largest request"),
        ("--max-tokens", "N", _DEFAULTS.tokens, "the longest answer"),
        ("--parallel", "N", _DEFAULTS.parallel, "requests that a program answers at once, where it can do so exactly"),
        ("--max-queue", "N", _DEFAULTS.queue, "requests that may wait for a program"),
        ("--cache-memory", "MB", _DEFAULTS.cache_bytes // _MB, "kept states of prompts, for each program; 0: none"),
    ):
        parser.add_argument(name, type=int, default=default, metavar=metavar, help=f"{what} (default: {default})")


def _limits(options: argparse.Namespace) -> Limits:
    return Limits(
        body=options.max_body * _MB,
        tokens=options.max_tokens,
        parallel=options.parallel,
        queue=options.max_queue,
        cache_bytes=options.cache_memory * _MB,
    )


def _at_once(served: Served) -> str:
    """How many requests a model answers at once, and the memory that their states may take."""
    runner, count = served.model.runner, served.engine.parallel
    megabytes = math.ceil(runner.cache.state_bytes(runner.context_length) / 1e6)
    if count == 1:
        reason = why_alone(runner)
        return f"{served.model.name}: one request at a time{f' ({reason})' if reason else ''}"
    return (
        f"{served.model.name}: up to {count} requests at once; the state of one takes {megabytes} MB at the full "
        f"context of {runner.context_length} tokens"
    )


def _open(path: str, options: argparse.Namespace) -> Model | tuple[str, Encoder]:
    """A model that generates text, or an encoder with its name."""
    artifact = open_artifact(path, backend=options.backend, scheme=options.scheme)
    name = _name(path, artifact.path)
    program = artifact.program(options.backend, options.scheme)
    with console.busy(f"loading {program}"):
        if program.kind == ENCODER:
            opened: Model | tuple[str, Encoder] = (name, _encoder(artifact, options))
        else:
            opened = Model(
                name=name,
                runner=open_runner(artifact, program, runner_options(options)),
                tokenizer=Tokenizer.from_dir(artifact.path),
                settings=generation_settings(artifact.path),
            )
    console.note(f"{name}: {program}")
    return opened


def _encoder(artifact: Artifact, options: argparse.Namespace) -> Encoder:
    return load_encoder(artifact, backend=options.backend, scheme=options.scheme, threads=options.threads)


def _name(path: str, folder: Path) -> str:
    name = name_of(path, folder)
    if not name:
        raise ConfigError(f"{folder}: has no name to serve it by; give a folder with one")
    return name
