"""Makes an input that does harm smaller while it does the same, by the target's own changes.

    python -m tests.fuzz.minimize TARGET FILE [--seconds 60]

For faults that raise; the file is overwritten. What ends the process is made smaller by libFuzzer: -minimize_crash=1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

from tests.fuzz.findings import signature
from tests.fuzz.limits import warmed_up
from tests.fuzz.targets import Target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args(arguments)
    target, data = warmed_up(options.target), options.file.read_bytes()
    fault = _fault(target, data)
    if fault is None:
        print(f"{options.file}: does no harm")
        return 1
    smaller = minimize(target, data, fault, options.seconds)
    options.file.write_bytes(smaller)
    print(f"{options.file}: {len(data)} to {len(smaller)} bytes, {fault}")
    return 0


def minimize(target: Target, data: bytes, fault: str, seconds: float) -> bytes:
    """The smallest that was found in that time."""
    end, rng = time.monotonic() + seconds, Random(0)
    while time.monotonic() < end:
        changed = target.mutate(data, rng)
        if len(changed) < len(data) and _fault(target, changed) == fault:
            data = changed
    return data


def _fault(target: Target, data: bytes) -> str | None:
    try:
        target.fuzz_one(data)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return signature(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
