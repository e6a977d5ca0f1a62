"""``lfm2-export demo``: a bundled checkpoint through everything, in a minute."""

from __future__ import annotations

import argparse
from pathlib import Path

from lfm2_export import __version__, console
from lfm2_export.artifact import Artifact
from lfm2_export.choices import SchemeName
from lfm2_export.commands.base import given
from lfm2_export.commands.check import print_parity
from lfm2_export.commands.export import print_programs
from lfm2_export.commands.talk import encode_prompt, generation_settings, stream_text
from lfm2_export.errors import ArtifactError
from lfm2_export.generation import generate
from lfm2_export.manifest import CheckpointRecord
from lfm2_export.runners import load_runner
from lfm2_export.text import Tokenizer

SCHEMES: tuple[SchemeName, ...] = ("fp32", "q4")
PROMPT = "What is a dictionary?"
MAX_NEW_TOKENS = 64
PARITY_TOKENS = 1024  # a quarter of what `lfm2-export parity` takes: a demo is waited for


class DemoCommand:
    name = "demo"
    help = "export a bundled checkpoint, prove it, and generate text from it"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--checkpoint", default="tiny-moe", type=given, help="tiny-moe (default), tiny-dense or tiny-lfm3"
        )
        parser.add_argument("--output", default="demo_output", metavar="DIR", type=given, help="default: demo_output")
        parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"default: {PROMPT}")

    def run(self, options: argparse.Namespace) -> int:
        from lfm2_export.parity import measure_parity

        folder = Path(options.output) / options.checkpoint
        artifact = _existing(folder, options.checkpoint) or _export(folder, options.checkpoint)
        print_programs(artifact)
        with console.busy("comparing with the eager model") as doing:
            report = measure_parity(
                artifact.path, options.checkpoint, scheme=SCHEMES, max_tokens=PARITY_TOKENS, progress=doing
            )
        print_parity(report)
        for scheme in SCHEMES:
            _generate(artifact, scheme, options.prompt)
        return 0 if report.passed else 1


def _existing(folder: Path, checkpoint: str) -> Artifact | None:
    """What an earlier run left, if this version made it of this checkpoint."""
    from lfm2_export.checkpoint import open_checkpoint

    try:
        artifact = Artifact.open(folder)
        programs = [artifact.program("onnx", scheme) for scheme in SCHEMES]
    except ArtifactError:
        return None
    same = artifact.manifest.checkpoint.is_same_as(CheckpointRecord.of(open_checkpoint(checkpoint)))
    return artifact if same and all(p.versions.get("lfm2-export") == __version__ for p in programs) else None


def _export(folder: Path, checkpoint: str) -> Artifact:
    from lfm2_export.pipeline import export

    with console.export_progress() as progress:
        return export(checkpoint, scheme=SCHEMES, output=folder, progress=progress)


def _generate(artifact: Artifact, scheme: SchemeName, prompt: str) -> None:
    tokenizer = Tokenizer.from_dir(artifact.path)
    config = generation_settings(artifact.path).override(max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    runner = load_runner(artifact, scheme=scheme)
    events = generate(runner, [encode_prompt(tokenizer, prompt, raw=False)], config)
    console.stream(f"\n{scheme}> {prompt}\n")
    for piece in stream_text(tokenizer, events, stop_tokens=config.stop_tokens):
        console.stream(piece)
    console.stream("\n")
