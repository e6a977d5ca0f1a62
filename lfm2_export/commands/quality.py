"""``lfm2-export quality``: what quantized models lose and what they weigh, side by side."""

from __future__ import annotations

import argparse

from lfm2_export import console
from lfm2_export.commands.base import add_json, add_source, add_threads, given, source_options
from lfm2_export.commands.check import add_max_kl, check_max_kl, check_writable


class QualityCommand:
    name = "quality"
    help = "compare artifacts and GGUF files with their checkpoint: KL divergence, perplexity, bits a weight"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        models = "artifacts' folders and .gguf files, also on the Hub"
        parser.add_argument("models", metavar="MODEL", type=given, nargs="+", help=models)
        parser.add_argument(
            "--checkpoint", metavar="CHECKPOINT", type=given, required=True, help="what they were made of"
        )
        parser.add_argument("--text", metavar="FILE", type=given, help="text that neither training nor calibration saw")
        parser.add_argument(
            "--base",
            metavar="FILE.kld",
            type=given,
            help="tokens and probabilities of llama-perplexity --kl-divergence-base, instead of a text",
        )
        parser.add_argument("--write-base", metavar="FILE.kld", type=given, help="write such a file")
        parser.add_argument("--max-tokens", type=int, metavar="N", default=8192, help="of the text (default: 8192)")
        add_max_kl(parser)
        parser.add_argument("--report", metavar="FILE.html", type=given, help="also write a page with plots")
        add_threads(parser)
        add_source(parser)
        add_json(parser)

    def run(self, options: argparse.Namespace) -> int:
        from lfm2_export.quality import measure_quality, page

        check_max_kl(options.max_kl)
        for path in (options.report, options.write_base):
            if path:
                check_writable(path)
        with console.busy("comparing with the checkpoint") as doing:
            report = measure_quality(
                options.models,
                options.checkpoint,
                text=options.text,
                base=options.base,
                write_base=options.write_base,
                max_tokens=options.max_tokens,
                threads=options.threads,
                progress=doing,
                **source_options(options),
            )
        try:
            if options.json:
                console.print_json(report.to_json())
            else:
                console.print_table(f"{report.checkpoint}: {report.text}", report.columns, report.rows())
                console.print_line(f"the checkpoint in fp32 has a perplexity of {report.perplexity:.3f}")
        finally:
            if options.report:
                page.write(report, options.report)
        if options.max_kl is None:
            return 0
        worse = report.above(options.max_kl)
        for model in worse:
            console.note(f"{model.name}: KL {model.kl:.2e} is above {options.max_kl:g}")
        return 1 if worse else 0
