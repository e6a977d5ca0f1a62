"""``lfm2-export export``: a checkpoint in, an artifact out."""

from __future__ import annotations

import argparse
from typing import Any

from lfm2_export import console
from lfm2_export.artifact import Artifact
from lfm2_export.backends import BACKENDS, option_flag
from lfm2_export.commands.base import add_json, add_source, given, source_options
from lfm2_export.manifest import Program


class ExportCommand:
    name = "export"
    help = "export a checkpoint to an artifact"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_checkpoint(parser)
        parser.add_argument(
            "--output", "-o", metavar="DIR", type=given, required=True, help="a new folder, or an artifact to add to"
        )
        add_export_options(parser)

    def run(self, options: argparse.Namespace) -> int:
        from lfm2_export.pipeline import export

        with console.export_progress() as progress:
            artifact = export(
                options.checkpoint,
                backend=_listed(options.backend),
                scheme=None if options.scheme is None else _listed(options.scheme),
                output=options.output,
                group_size=options.group_size,
                exclude=options.exclude,
                algorithm=options.algorithm,
                calibrate=options.calibrate,
                statistics=options.statistics,
                target_bits=options.target_bits,
                target_size=options.target_size,
                budget=options.budget,
                measure=options.measure,
                requantize_table=options.requantize_table,
                target=options.target,
                **source_options(options),
                progress=progress,
                **{name: getattr(options, name) for backend in BACKENDS.values() for name in backend.OPTIONS},
            )
        if options.json:
            programs = [{"backend": p.backend, "scheme": p.scheme, "bytes": _bytes(p)} for p in artifact.programs]
            console.print_json({"artifact": str(artifact.path), "programs": programs})
        else:
            print_programs(artifact)
        return 0


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=given,
        help="a directory, a GGUF file, a Hub id, or a bundled name (tiny-moe, tiny-dense, tiny-lfm3)",
    )


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """All but the checkpoint and where the artifact goes: other command lines have these, too."""
    parser.add_argument("--backend", default="onnx", help="onnx (default) or executorch, or both with a comma between")
    parser.add_argument(
        "--scheme",
        "-s",
        help="one or several, with commas: q4, q8, fp16, fp32, ...; of several backends each makes those that it "
        f"has (default: {', '.join(f'{one.DEFAULT_SCHEME} for {name}' for name, one in BACKENDS.items())})",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="weights that share a scale, in every tensor that is quantized (default: the scheme's sizes; "
        "q4 and q4f16 mix them, see --target-bits)",
    )
    add_budget(parser)
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave tensors of this name unquantized (* and ? as in a shell); may be repeated",
    )
    parser.add_argument(
        "--algorithm",
        help="gptq (default where calibrated), refit (default: least squared error) or round (plain, faster)",
    )
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        type=given,
        help="fit weights, and mixed widths, to what layers are given on a text: default (comes with this), self (the "
        "model's own) or a file",
    )
    parser.add_argument(
        "--statistics",
        metavar="FILE",
        type=given,
        help="keep what --calibrate measures in this file; without --calibrate: use it",
    )
    for backend in BACKENDS.values():
        for name, option in backend.OPTIONS.items():
            parser.add_argument(
                option_flag(name),
                type=option.kind,
                metavar=option.metavar,
                choices=option.choices,
                help=option.help,
            )
    parser.add_argument(
        "--target",
        metavar="ARTIFACT",
        type=given,
        help="of a drafter: the artifact of the model that it drafts for, whose token table and head it borrows",
    )
    parser.add_argument(
        "--requantize-table",
        action="store_true",
        help="of a quantized checkpoint: quantize its token table again, as the scheme does, not taking it over",
    )
    add_source(parser)
    add_json(parser)


def _listed(names: str) -> list[Any]:
    """For the library to check."""
    return [name.strip() for name in names.split(",") if name.strip()]


def add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target-bits",
        type=float,
        metavar="N",
        help="mix 4 and 8 bits within N bits a weight, scales and table included (q4, q4f16, 8da4w; q4's default: "
        "the bytes of llama.cpp's Q4_K_M)",
    )
    parser.add_argument(
        "--target-size", metavar="SIZE", help="the same within so many bytes of weights and tables (700MB, 1.2GB)"
    )
    parser.add_argument(
        "--budget",
        metavar="file|step",
        help="what these count: the file (default), or what a decode step reads",
    )
    parser.add_argument(
        "--measure",
        metavar="FILE",
        type=given,
        help="a text on which is measured what each tensor's width costs (default: estimated by the statistics of "
        "--calibrate, else without data)",
    )


def print_programs(artifact: Artifact) -> None:
    """The programs of an artifact as a table."""
    console.print_table(str(artifact.path), artifact.COLUMNS, artifact.rows())


def _bytes(program: Program) -> int:
    return sum(entry.bytes for entry in program.files.values())
