"""Fuzzes one target with atheris, guided by the coverage of the package: what ``make fuzz`` starts for each.

    python -m tests.fuzz.driver TARGET --found FOLDER [libFuzzer's options] CORPUS...

A finding that only raises is kept in FOLDER, once for each place that it came from, and fuzzing goes on. A signal, a
hang or too much memory end this process; libFuzzer then leaves the input under its own ``-artifact_prefix``.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random

import atheris

from tests.fuzz import campaign

# Instrumented as they are imported, so nothing that imports the package is imported above.
_INSTRUMENTED = ["lfm2_export"]
# How many of a hundred mutations are libFuzzer's own.
_BLIND = 30


def main(arguments: list[str]) -> None:
    name, _, found, *options = arguments
    with atheris.instrument_imports(include=_INSTRUMENTED):  # to the end: readers import some modules late
        from tests.fuzz.findings import signature
        from tests.fuzz.limits import warmed_up

        target = warmed_up(name)
        fuzz_one = _keeping(target.fuzz_one, Path(found), signature)
        atheris.Setup([sys.argv[0], *options], fuzz_one, custom_mutator=_mixed(target.mutate))
        atheris.Fuzz()


def _mixed(own: Callable[[bytes, Random], bytes]) -> Callable[[bytes, int, int], bytes]:
    """The target's own mutator, and now and then libFuzzer's."""

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = Random(seed)
        if rng.randrange(100) < _BLIND:
            return atheris.Mutate(data, max_size)
        try:
            mutated = own(data, rng)
        except BaseException:  # atheris would go on without an end
            traceback.print_exc()
            os._exit(campaign.BROKEN)
        return mutated if len(mutated) <= max_size else data

    return mutate


def _keeping(
    fuzz_one: Callable[[bytes], None], found: Path, signature: Callable[[BaseException], str]
) -> Callable[[bytes], None]:
    """``fuzz_one`` that keeps what raises, and says where it is."""

    def run(data: bytes) -> None:
        try:
            fuzz_one(data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            seen = signature(error)
            path = found / re.sub(r"[^A-Za-z0-9]+", "_", seen)
            if not path.exists():
                path.write_bytes(data)
                print(json.dumps({"path": str(path), "signature": seen, "error": f"{error}"[:300]}), flush=True)

    return run


if __name__ == "__main__":
    main(sys.argv[1:])
