"""Every fault at every place: ``make faults``, or ``python -m tests.faults.everything [--every N] [SCENARIO ...]``.

In: nothing; a folder is made and removed. Out: a line for each finding and one for each kind, and 1 where there are
findings. Takes some ten minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults.forks import Forks
from tests.faults.inject import Fault
from tests.faults.scenarios import EXPORTS, FULL, KILLED, UNREADABLE, Bench

READERS = (
    ("inspect",),
    ("bench", "--kernels", "stock", "--prompt-tokens", "2", "--new-tokens", "1", "--rounds", "1"),
)
MEGABYTES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", default=list(EXPORTS), metavar="SCENARIO", help=", ".join(EXPORTS))
    parser.add_argument("--every", type=int, default=1, help="only every so many-th place")
    options = parser.parse_args()
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="lfm2-export-faults-") as name:
        notes = Path(name) / "notes"
        notes.mkdir()
        forks = Forks(notes)
        try:
            bench = Bench(Path(name), forks)
            for scenario in options.scenarios:
                found += exports(bench, scenario, options.every)
            for reader in READERS:
                found += readers(bench, reader, options.every)
        finally:
            forks.close()
    print(f"{len(found)} findings")
    return bool(found)


def exports(bench: Bench, scenario: str, every: int) -> list[str]:
    found: list[str] = []
    for kind in (FULL, UNREADABLE, KILLED):
        chances = bench.chances(scenario, kind)
        places = range(0, chances, every)
        for at in places:
            found += told(bench.disturbed(scenario, Fault(kind=kind, at=at)))
        print(f"{scenario}, {kind}: {len(places)} of {chances} places", flush=True)
    for at in MEGABYTES:
        found += told(bench.disturbed(scenario, Fault(kind="memory", at=at)))
    found += told(bench.disturbed(scenario, Fault(kind="clock")))
    return found


def readers(bench: Bench, arguments: tuple[str, ...], every: int) -> list[str]:
    done, found = bench.unreadable(arguments, None)
    for at in range(0, done.count, every):
        found += told(bench.unreadable(arguments, at)[1])
    print(f"{arguments[0]}, {UNREADABLE}: {-(-done.count // every)} of {done.count} places", flush=True)
    return found


def told(findings: list[str]) -> list[str]:
    for finding in findings:
        print("FOUND", finding, flush=True)
    return findings


if __name__ == "__main__":
    sys.exit(main())
