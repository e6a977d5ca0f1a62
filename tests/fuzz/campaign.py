"""Fuzzes every target for its share of some minutes: ``make fuzz MINUTES=5 [TARGET=checkpoint]``.

New inputs that reached new code are kept in build/fuzz/<target>/corpus, from where the next run goes on; what did harm
lies in build/fuzz/<target>/found. Ends with 1 where anything did.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.targets import FOLDER, SECONDS, TARGETS

ROOT = FOLDER.parent.parent
_BUILD = ROOT / "build" / "fuzz"
_LARGEST_INPUT = 1 << 17
_MEGABYTES = 2048
# How a fuzzer ends that found something: a signal, a hang, too much memory. And how one that is at fault itself.
_FOUND, BROKEN = (77, 70, 71), 3
_STATUS = re.compile(r"^#(\d+)\s+[A-Z]+ +(?:cov: (\d+))?", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--target", choices=TARGETS, action="append", help="may be given more than once; default: all")
    options = parser.parse_args(arguments)
    targets = options.target or TARGETS
    found = [path for target in targets for path in fuzz(target, 60 * options.minutes / len(targets), _BUILD / target)]
    for path in found:
        print(f"found: {path.relative_to(ROOT)}")
    if found:
        print(
            "To see one again:      python -m tests.fuzz.replay TARGET FILE --found /tmp\n"
            "To make it a test:     copy it to tests/fuzz/crashes/TARGET/, under a name that says what it is, and fix\n"
            "                       what it shows; tests/fuzz/test_corpus.py runs it from then on."
        )
    return 1 if found else 0


def fuzz(target: str, seconds: float, build: Path, *options: str) -> list[Path]:
    """Runs one target; a process that died is started again while there is time.

    Returns:
        Every file in the folder of what was found, from earlier runs too.

    Raises:
        RuntimeError: the fuzzer itself failed.
    """
    corpus, found = build / "corpus", build / "found"
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        command = _command(target, int(left) + 1, corpus, found, options)
        with tempfile.TemporaryDirectory() as scratch, open(build / "log.txt", "w", encoding="utf-8") as log:
            environment = {**os.environ, "TMPDIR": scratch}
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False).returncode
        if code == 0:
            break
        if code not in _FOUND:
            raise RuntimeError(f"{target}: its fuzzer ended with {code}; see {build / 'log.txt'}")
        _drop_late(target, found)
    print(f"{target}: {summary(build / 'log.txt')}", flush=True)
    return sorted(found.iterdir())


def _drop_late(target: str, found: Path) -> None:
    """Removes inputs that took too long and, run once more and alone, do not: a machine may be busy."""
    from tests.fuzz import replay  # it imports the package, which the driver must be the first to do

    for path in [*found.glob("timeout-*"), *found.glob("slow-unit-*")]:
        if not replay.is_harmful(target, path):
            path.unlink()


def _command(target: str, seconds: int, corpus: Path, found: Path, options: Sequence[str]) -> list[str]:
    kept = [str(folder / target) for folder in (FOLDER / "corpus", FOLDER / "crashes") if (folder / target).is_dir()]
    return [
        # A process starts with the greatest memory that its parent ever had as its own, and libFuzzer looks at that.
        # The shell's child starts with the shell's.
        *("sh", "-c", '"$@"; exit "$?"', "sh"),
        *(sys.executable, "-m", "tests.fuzz.driver", target, "--found", str(found)),
        *(f"-max_total_time={seconds}", f"-timeout={SECONDS}", f"-rss_limit_mb={_MEGABYTES}"),
        *(f"-max_len={_LARGEST_INPUT}", f"-artifact_prefix={found}/", "-print_final_stats=1"),
        *options,
        *(str(corpus), *kept),
    ]


class Status(NamedTuple):
    """How many inputs were run, and how many branches of the package they took."""

    inputs: int
    coverage: int


def statuses(log: Path) -> list[Status]:
    """What the last process said of itself as it went on."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return [Status(int(inputs), int(coverage or 0)) for inputs, coverage in _STATUS.findall(text)]


def summary(log: Path) -> str:
    found = statuses(log)
    return f"{found[-1].inputs} inputs, coverage {found[-1].coverage}" if found else f"did not run; see {log}"


if __name__ == "__main__":
    sys.exit(main())
