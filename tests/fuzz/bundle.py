"""Several files as one input: what a folder from a stranger holds, in a form that can be read, edited and mutated.

    === config.json
    {"model_type": "lfm2"}
    === chat_template.jinja -> ../outside
    === LICENSE (fifo)

Inputs are made at random, so that putting them on the disk must be as safe as reading them is meant to be: nothing is
written through a link or over a file, and a link leads to no place but this folder's surroundings and ``SAFE_DEVICES``.

A file ends before the line break of the next header. Of a .safetensors file that begins with "{" only the header is
written here: its length is put in front, and as many zeros behind as its entries speak of.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_HEADER = re.compile(rb"^=== ([^\n]*)\n?", re.MULTILINE)
_MOST_FILES = 64
# Sparse, so they cost no disk. More than any part of a small model; reading them takes no second.
_MOST_ZEROS = 64 << 20
# Reading them never ends, and writing to them changes nothing.
SAFE_DEVICES = ("/dev/zero",)


@dataclass(frozen=True)
class Part:
    """``title`` is the name, with " -> target" for a link and " (fifo)" for a pipe."""

    title: bytes
    content: bytes

    @property
    def name(self) -> bytes:
        return self.title.partition(b" -> ")[0].removesuffix(b" (fifo)")


def split(data: bytes) -> list[Part]:
    """The parts; what stands before the first header belongs to none."""
    found = list(_HEADER.finditer(data))
    ends = [header.start() - 1 for header in found[1:]] + [len(data)]
    # Of a part without a line the next header's start lies before its own end.
    return [Part(header[1], data[header.end() : max(end, header.end())]) for header, end in zip(found, ends)]  # noqa: B905


def join(parts: Iterable[Part]) -> bytes:
    return b"\n".join(b"=== " + part.title + b"\n" + part.content for part in parts)


def write(folder: Path, data: bytes, *, root: Path) -> None:
    """Puts the parts into ``folder``, whose links may lead to anything in ``root``. Left out are parts whose name is no
    relative path, cannot be made or is taken, and links that would lead elsewhere."""
    for part in split(data)[:_MOST_FILES]:
        name = os.fsdecode(part.name)
        if name and not set(name.split("/")) & {"", ".", ".."}:
            try:
                _write(folder / name, part, folder.resolve(), root.resolve())
            except (OSError, ValueError):  # too long, a NUL, a file where a folder would have to be
                continue


def _write(path: Path, part: Part, folder: Path, root: Path) -> None:
    if not _real(path.parent).is_relative_to(folder):  # a link stands where a folder would have to be
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if part.title.endswith(b" (fifo)"):
        os.mkfifo(path)
    elif b" -> " in part.title:
        _link(path, os.fsdecode(part.title.partition(b" -> ")[2]), root)
    else:
        _new_file(path, part.content)


def _link(path: Path, target: str, root: Path) -> None:
    if target in SAFE_DEVICES or _real(path.parent / target).is_relative_to(root):
        os.symlink(target, path)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _new_file(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:  # "x" follows no link and takes no name that is there
        if path.suffix == ".safetensors" and content.startswith(b"{"):
            file.write(len(content).to_bytes(8, "little") + content)
            file.truncate(file.tell() + _zeros(content))
        else:
            file.write(content)


def _zeros(header: bytes) -> int:
    """Bytes of data that the entries of a safetensors header speak of."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        return max(0, min(int(max(ends, default=0)), _MOST_ZEROS))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
        return 0
