"""Builds the site into ``build/site`` and looks at its links: ``python -m documentation``.

Exit codes: 0 done, 1 something is wrong.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from documentation import links, pages

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def build(work: Path, docs: Path = pages.DOCS) -> list[str]:
    """Builds the site into ``work/site``; what is wrong with it, a line each."""
    work.mkdir(parents=True, exist_ok=True)
    pages.write(work / "pages", docs)
    pages.write_settings(work / "site.yml", docs)
    command = [
        sys.executable,
        "-m",
        "zensical",
        "build",
        "--strict",
        "--clean",
        "--config-file",
        str(work / "site.yml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wrong = pages.misplaced(docs)
    if done.returncode:
        return [*wrong, _COLOURS.sub("", done.stderr.partition("Traceback")[0].strip())]
    return wrong + links.faults(work / "site")


def main() -> int:
    work = pages.ROOT / "build"
    for name in pages.missing():
        print(f"not in the site: docs/{name}, which the navigation names, is not there")
    if wrong := build(work):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    print(f"the site is in {(work / 'site').relative_to(pages.ROOT)}/index.html")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
