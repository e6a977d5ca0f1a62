"""``lfm2-export parity`` and ``bench``: is the program the model, and how fast is it here."""

from __future__ import annotations

import argparse
import math
import os
from typing import TYPE_CHECKING, Any

from lfm2_export import console
from lfm2_export.artifact import Artifact
from lfm2_export.commands.base import (
    add_artifact,
    add_json,
    add_machine,
    add_source,
    given,
    runner_options,
    source_options,
)
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.hub_artifacts import described, is_on_hub
from lfm2_export.manifest import ENCODER
from lfm2_export.mixups import check_order
from lfm2_export.resources import human_bytes

if TYPE_CHECKING:
    from lfm2_export.backends.profile import Profile
    from lfm2_export.parity import ParityReport


class ParityCommand:
    name = "parity"
    help = "compare an artifact with the eager model it was made of; exit code 1 below tolerance"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_artifact(parser)
        parser.add_argument("checkpoint", metavar="CHECKPOINT", type=given, help="what the artifact was made of")
        parser.add_argument("--text", metavar="FILE", type=given, help="text that the checkpoint was not trained on")
        parser.add_argument("--report", metavar="FILE.html", type=given, help="also write a page with all figures")
        parser.add_argument(
            "--record",
            action="store_true",
            help="write the figures, and on which text, into the artifact's manifest and model card",
        )
        add_max_kl(parser)
        add_source(parser)
        add_json(parser)

    def run(self, options: argparse.Namespace) -> int:
        from lfm2_export.parity import measure_parity

        check_order("parity", options.artifact, options.checkpoint)
        check_max_kl(options.max_kl)
        source = source_options(options)
        if options.record and is_on_hub(options.artifact):
            raise Lfm2ExportError(
                f"--record: {options.artifact} is on the Hub; download it into a folder, record there, and push that"
            )
        if options.max_kl is not None:
            refuse_encoder(options.artifact, "--max-kl", offline=source["offline"])
        if options.report:
            check_writable(options.report)
        with console.busy("comparing with the eager model") as doing:
            report = measure_parity(
                options.artifact,
                options.checkpoint,
                backend=options.backend,
                scheme=options.scheme,
                text=options.text,
                progress=doing,
                **source,
            )
        # The figures took minutes: that they cannot be shown is no reason not to keep them, nor the other way round.
        try:
            if options.json:
                console.print_json(report.to_json())
            else:
                print_parity(report)
        finally:
            _keep(options, report, source)
        beyond = [] if options.max_kl is None else report.above(options.max_kl)
        for line in beyond:
            console.note(line)
        return 0 if report.passed and not beyond else 1


def add_max_kl(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-kl", type=float, metavar="X", help="exit code 1 where quantization costs a KL divergence above X"
    )


def check_max_kl(value: float | None) -> None:
    if value is not None and not 0 <= value < math.inf:
        raise Lfm2ExportError(f"--max-kl {value}: a divergence is a number from 0 on")


def refuse_encoder(artifact: str, option: str, *, offline: bool) -> None:
    """Refuses an option that is for logits, before minutes are spent.

    Raises:
        Lfm2ExportError: the artifact is an encoder's, or none.
    """
    found = described(artifact, offline=offline) or Artifact.open(artifact, verify=False)
    if any(program.kind == ENCODER for program in found.programs):
        raise Lfm2ExportError(f"{option}: {artifact} is an encoder, whose vectors are judged by cosines; leave it out")


def _keep(options: argparse.Namespace, report: ParityReport, source: dict[str, Any]) -> None:
    """Writes the page and the record that were asked for; the one also where the other fails."""
    from lfm2_export.parity import page, record_parity

    try:
        if options.report:
            page.write(report, options.report)
    finally:
        if options.record:
            record_parity(options.artifact, options.checkpoint, report, **source)


def check_writable(path: str) -> None:
    """Refuses a file that could not be written; what is there stays as it is, and nothing is left behind.

    Raises:
        Lfm2ExportError: its folder is missing, or it may not be written.
    """
    # A link to nothing stays one.
    place = os.path.realpath(path) if os.path.islink(path) else path
    there = os.path.lexists(place)
    try:
        # Without O_NONBLOCK a pipe that nobody reads would be waited for.
        os.close(os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666))
        if not there:
            os.unlink(place)
    except OSError as error:
        raise Lfm2ExportError(f"{path}: the report cannot be written ({error.strerror}); give another file") from error


def print_parity(report: ParityReport) -> None:
    """One table: what was compared, the figure, its tolerance, the verdict; and what to make of it."""
    console.print_table("parity", report.COLUMNS, report.rows())
    for remark in report.remarks():
        console.note(remark)
    console.print_line(report.verdict())


class BenchCommand:
    name = "bench"
    help = "time loading, prefill and decode, and measure peak memory"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_artifact(parser)
        parser.add_argument("--prompt-tokens", "-p", type=int, default=512, metavar="N", help="default: 512")
        parser.add_argument("--new-tokens", "-n", type=int, default=128, metavar="N", help="default: 128")
        parser.add_argument("--rounds", type=int, default=3, metavar="N", help="medians over N rounds (default: 3)")
        parser.add_argument("--profile", action="store_true", help="also show where a step's time goes, by operator")
        add_machine(parser)
        add_json(parser)

    def run(self, options: argparse.Namespace) -> int:
        from lfm2_export.bench import Workload, measure

        workload = Workload(
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            rounds=options.rounds,
            profile=options.profile,
        )
        with console.busy("measuring"):
            result = measure(
                options.artifact,
                workload,
                runner_options(options),
                backend=options.backend,
                scheme=options.scheme,
            )
        if options.json:
            console.print_json(result.to_json())
            return 0
        rows = [
            *([("kernels", result.kernels)] if result.kernels else []),
            ("threads", str(result.threads)),
            ("processor", result.processor),
            ("load", f"{result.load_s:.2f} s"),
            ("to the first token", f"{result.first_token_s:.2f} s"),
            (f"prefill of {result.prompt_tokens} tokens", f"{result.prefill_tps:.1f} tokens/s"),
            (f"decode of {result.new_tokens} tokens", f"{result.decode_tps:.1f} tokens/s"),
            ("peak memory", human_bytes(result.peak_memory_bytes)),
            ("state", human_bytes(result.state_bytes)),
            ("program on disk", human_bytes(result.artifact_bytes)),
        ]
        console.print_table(f"{result.program}, medians of {result.rounds}", ("what", "measured"), rows)
        if result.profile:
            print_profile(result.profile)
        return 0


def print_profile(profile: Profile) -> None:
    """One table: operators, what a prefill and a decode step spend in them."""
    title = f"a prefill of {profile.prefill.tokens} tokens and a decode step after it, by operator"
    console.print_table(title, profile.COLUMNS, profile.rows())
    console.note("tracing costs time of its own: compare shares, and take rates from the table above")
