"""``optimum-cli export lfm2``: a checkpoint in, an artifact out, by lfm2-export.

In: the arguments of ``lfm2-export export``, with the folder to write as the second. Out: what that command gives, its
exit code too.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from lfm2_export import cli
from lfm2_export.commands.export import ExportCommand, add_checkpoint, add_export_options


class Lfm2ExportCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(
        name="lfm2",
        help="Export LiquidAI's LFM2, LFM2-MoE or LFM3 to quantized ONNX and ExecuTorch programs (lfm2-export).",
        formatter_class=argparse.HelpFormatter,
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        add_checkpoint(parser)
        parser.add_argument("output", metavar="OUTPUT", help="a new folder, or an artifact to add to")
        add_export_options(parser)
        parser.add_argument("--verbose", action="store_true", help="also tell what is being done")
        parser.set_defaults(verb="optimum-cli export lfm2", run=ExportCommand().run)

    def run(self) -> None:
        sys.exit(cli.call(self.args))
