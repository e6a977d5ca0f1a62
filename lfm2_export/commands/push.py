"""``lfm2-export push``: an artifact to the Hub."""

from __future__ import annotations

import argparse

from lfm2_export import console
from lfm2_export.commands.base import add_json, given
from lfm2_export.messages import as_unicode
from lfm2_export.resources import human_bytes


class PushCommand:
    name = "push"
    help = "push an artifact to the Hub: the files that its manifest lists, the model card among them"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("artifact", metavar="DIR", type=given, help="a folder that `lfm2-export export` wrote")
        parser.add_argument("repository", metavar="REPO_ID", type=given, help="organization/name; made if need be")
        parser.add_argument("--private", action="store_true", help="make a private repository, if one is made")
        parser.add_argument("--revision", type=given, help="a branch, made if need be (default: main)")
        parser.add_argument("--message", metavar="TEXT", type=given, help="of the commit (default: what it is of)")
        parser.add_argument("--dry-run", action="store_true", help="list what would be pushed, and push nothing")
        add_json(parser)

    def run(self, options: argparse.Namespace) -> int:
        from lfm2_export.pushing import push

        made = push(
            options.artifact,
            options.repository,
            private=options.private,
            revision=options.revision,
            message=options.message,
            dry_run=options.dry_run,
        )
        files = {as_unicode(name): size for name, size in made.files.items()}
        if options.json:
            console.print_json({"repository": made.repository, "url": made.url, "files": files})
        elif made.url is None:
            rows = [(name, human_bytes(size)) for name, size in files.items()]
            console.print_table(f"would go to {made.repository}", ("file", "size"), rows)
            print(f"{len(files)} files, {human_bytes(sum(files.values()))}; nothing was pushed")
        else:
            print(f"{len(files)} files, {human_bytes(sum(files.values()))}: {made.url}")
        return 0
