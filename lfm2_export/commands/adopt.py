"""``lfm2-export adopt``: an artifact's text files are its owner's."""

from __future__ import annotations

import argparse

from lfm2_export import console
from lfm2_export.artifact import Artifact
from lfm2_export.commands.base import add_json, given
from lfm2_export.messages import as_unicode


class AdoptCommand:
    name = "adopt"
    help = "record text files that you edited (settings, chat template, card), so that further exports keep them"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("artifact", metavar="DIR", type=given, help="a folder that `lfm2-export export` wrote")
        add_json(parser)

    def run(self, options: argparse.Namespace) -> int:
        artifact, names = Artifact.open(options.artifact, verify=False).adopt()
        new, all_ = (list(map(as_unicode, found)) for found in (names, artifact.manifest.adopted_files))
        if options.json:
            console.print_json({"adopted": new, "adopted_files": all_})
            return 0
        print(f"adopted: {', '.join(new)}" if new else "nothing was edited since the export, or since the last adopt")
        return 0
