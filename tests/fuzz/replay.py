"""Runs a target over what is kept of it, and over changes of that, in a process of its own; without atheris.

    python -m tests.fuzz.replay TARGET [FILE ...] --found FOLDER [--mutations N]

Each input is written to FOLDER/at before it is run: where the process dies by a signal or is stopped for its time, that
file is the one. Those that only raised are left in FOLDER too, a line on stdout for each.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random

from tests.fuzz.findings import signature
from tests.fuzz.limits import warmed_up
from tests.fuzz.targets import FOLDER, SECONDS, Target, kept

_ROOT = FOLDER.parent.parent
# Changes of changes reach further; beyond a few the inputs are refused at once.
_MOST_CHANGES = 4


def in_child(target: str, found: Path, *options: str, files: Sequence[Path] = ()) -> tuple[int, list[str]]:
    """Runs a target in another process; files that it left behind are removed with ``found``. An input that takes too
    long is run once more, alone: a machine may be busy.

    Returns:
        How many inputs were run, and a line for each that did harm, with the place where it lies.
    """
    (found / "scratch").mkdir(parents=True)
    harmful: list[str] = []
    start = 0
    while True:
        child = _child(target, found, *options, "--start", str(start), files=files)
        ran, lines = _read(child)
        harmful += lines
        if ran is not None:
            return start + ran, harmful
        again, lines = _read(_again(target, found, *options)) if _is_late(child) else (None, [])
        harmful += lines
        if again is None:
            name = (found / "at.name").read_text() if (found / "at.name").exists() else "its start"
            said = child.stderr.strip()[:2000]
            return 0, [*harmful, f"{name}: ended the process ({child.returncode}): {said} ({found / 'at'})"]
        start = int((found / "at.number").read_text()) + 1


def is_harmful(target: str, file: Path) -> bool:
    """Whether an input does harm when nothing else is run."""
    with tempfile.TemporaryDirectory() as found:
        return bool(in_child(target, Path(found) / "found", files=[file])[1])


def _read(child: subprocess.CompletedProcess[str]) -> tuple[int | None, list[str]]:
    """What a process said: how many inputs it ran, if it came to its end, and those that did harm."""
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    ran = lines.pop()["ran"] if lines and "ran" in lines[-1] else None
    return ran, [f"{line['input']}: {line['signature']}: {line['error']} ({line['path']})" for line in lines]


def _again(target: str, found: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The input at which a process was stopped, in another one."""
    file = found / "late"
    file.write_bytes((found / "at").read_bytes())
    return _child(target, found / "scratch", *options, "--mutations", "0", files=[file])


def _child(target: str, found: Path, *options: str, files: Sequence[Path]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz.replay", target, *map(str, files), "--found", str(found), *options]
    environment = {**os.environ, "TMPDIR": str(found if found.name == "scratch" else found / "scratch")}
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)


def _is_late(child: subprocess.CompletedProcess[str]) -> bool:
    """Whether it was stopped for its time: what faulthandler writes then."""
    return child.returncode == 1 and child.stderr.lstrip().startswith("Timeout (")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("files", nargs="*", type=Path, help="default: all that are kept")
    parser.add_argument("--found", type=Path, required=True)
    parser.add_argument("--mutations", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="inputs to leave out")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that an input may take")
    options = parser.parse_args(arguments)
    target, files = warmed_up(options.target), options.files or kept(options.target)
    ran = 0
    inputs = enumerate(_inputs(target, files, options.mutations))
    for number, (name, data) in islice(inputs, options.start, None):
        (options.found / "at").write_bytes(data)
        (options.found / "at.name").write_text(name)
        (options.found / "at.number").write_text(str(number))
        _run(target, name, data, options)
        ran += 1
    (options.found / "at").unlink(missing_ok=True)
    print(json.dumps({"ran": ran}), flush=True)
    return 0


def _inputs(target: Target, files: Sequence[Path], mutations: int) -> Iterator[tuple[str, bytes]]:
    """The files, then changes of them that are the same each time."""
    seeds = [path.read_bytes() for path in files]
    yield from ((str(path), data) for path, data in zip(files, seeds, strict=True))
    for number in range(mutations):
        rng = Random(number)
        data = rng.choice(seeds)
        for _ in range(rng.randint(1, _MOST_CHANGES)):
            data = target.mutate(data, rng)
        yield f"mutation {number}", data


def _run(target: Target, name: str, data: bytes, options: argparse.Namespace) -> None:
    faulthandler.dump_traceback_later(options.seconds, exit=True)
    try:
        target.fuzz_one(data)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        path = options.found / f"{type(error).__name__}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        line = {"input": name, "path": str(path), "signature": signature(error), "error": f"{error}"[:300]}
        print(json.dumps(line), flush=True)
    finally:
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    sys.exit(main())
