"""What strangers may put where a file is expected, and what must be true of every refusal."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.messages import MESSAGE_LIMIT
from tests.checkpoints import tiny_config, write_random_checkpoint

# Of work: a process that waits is what the tests' timeout is for.
SECONDS = 5.0

Damage = Callable[[Path], object]

CONFIG, SHARD, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE")
LONG = "x" * 900_000


def case(name: str, damage: Any, *words: str) -> Any:
    """A parameter set: the damage and the words that its refusal must have."""
    return pytest.param(damage, words, id=name)


def write_originals(folder: Path) -> None:
    """Good checkpoints to damage: one file of weights, and two."""
    small = tiny_config("lfm2", vocab_size=2660, intermediate_size=16)
    write_random_checkpoint(folder / "single", small, seed=1, tokenizer_from="tiny-moe")
    write_random_checkpoint(folder / "sharded", small, seed=1, shards=2)
    (folder / "single" / "LICENSE").write_text("a licence")


def raw(text: str | bytes) -> Damage:
    """A file of these bytes."""
    return lambda path: path.write_bytes(text.encode() if isinstance(text, str) else text)


def link(target: str) -> Damage:
    """A file that is a link; ``{outside}`` is a file beside the folder."""

    def damage(path: Path) -> None:
        remove(path)
        path.symlink_to(target.format(outside=outside_of(path)))

    return damage


def outside_of(path: Path) -> Path:
    """A readable file that is none of the folder's; tests keep their folder in one that is called ``here``."""
    here = next(parent for parent in path.parents if parent.name == "here")
    secret = here / "outside" / "secret"
    secret.parent.mkdir(exist_ok=True)
    secret.write_text('{"secret": "of this user"}')
    return secret


def fifo(path: Path) -> None:
    remove(path)
    os.mkfifo(path)


def listener(path: Path) -> None:
    """A socket's file. Its path may have 108 bytes, so that it is made elsewhere under a short name."""
    remove(path)
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


def directory(path: Path) -> None:
    remove(path)
    path.mkdir()


def sparse(path: Path) -> None:
    """A terabyte of nothing."""
    remove(path)
    with open(path, "wb") as file:
        file.truncate(1 << 40)


# In the place of any file; the words that say so.
SPECIAL: dict[str, tuple[Damage, str]] = {
    "fifo": (fifo, "is not a regular file"),
    "socket": (listener, "is not a regular file"),
    "folder": (directory, "is a folder where a file is needed"),
    "endless device": (link("/dev/zero"), "is a link that leaves its folder (to /dev/zero)"),
    "terminal": (link("/dev/tty"), "is a link that leaves its folder (to /dev/tty)"),
    "process": (link("/proc/self/environ"), "is a link that leaves its folder"),
    "kernel": (link("/proc/kmsg"), "is a link that leaves its folder (to /proc/kmsg)"),
    "file of this user": (link("{outside}"), "is a link that leaves its folder"),
    "climbing link": (link("../outside/secret"), "is a link that leaves its folder"),
    "folder of this user": (link("/etc"), "is a link that leaves its folder (to /etc)"),
}


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What a read must not change: every name with its mode, size and time."""
    return {
        os.fsencode(path.relative_to(folder)).hex(): (status.st_mode, status.st_size, status.st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        for status in [path.lstat()]
    }


def refusal(kind: type[Lfm2ExportError], folder: Path, call: Callable[[], object]) -> str:
    """The line that ``call`` raises, with all that is asked of it; ``folder`` stays as it is."""
    outside_of(folder / "file")
    before = listing(folder.parent)
    started = time.process_time()
    with pytest.raises(kind) as caught:
        call()
    seconds = time.process_time() - started
    message = str(caught.value)
    print(f"{seconds:.2f} s, {len(message)} characters: {message}")
    assert_readable(message)
    assert caught.value.exit_code == 2
    assert seconds < SECONDS
    assert listing(folder.parent) == before
    return message


def refused(folder: Path, words: tuple[str, ...], kind: type[Lfm2ExportError] = Lfm2ExportError) -> None:
    """Opening the checkpoint raises a line with these words."""
    assert_words(refusal(kind, folder, lambda: open_checkpoint(folder)), words)


def assert_readable(message: str) -> None:
    assert len(message) <= MESSAGE_LIMIT
    assert message.isprintable()
    assert "of this user" not in message.replace("/outside/secret", "")


def assert_words(message: str, words: tuple[str, ...]) -> None:
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
