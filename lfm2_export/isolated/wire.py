"""What a child process and its parent say to each other: frames on two pipes.

In and out: raw file objects. A request is a header with its limits and its bytes, an answer one with its kind.
"""

from __future__ import annotations

import struct
from typing import IO

GREETING = b"+"
REQUEST = struct.Struct("<dQQ")  # seconds of processor time, bytes of address space, bytes of the request
REPLY = struct.Struct("<c?Q")  # kind, whether the child goes now, bytes of the answer
ANSWER, REFUSAL, OUT_OF_MEMORY = b"=", b"!", b"m"

_PIECE = 1 << 20


class Refusal(Exception):
    """The program's own answer that a request is wrong; the message says what is."""


def write(sink: IO[bytes], *pieces: bytes) -> None:
    """All of the pieces; an unbuffered pipe takes part of one at a time."""
    for piece in pieces:
        view = memoryview(piece)
        while view:
            view = view[sink.write(view) :]


def read(source: IO[bytes], size: int) -> bytes:
    """Exactly ``size`` bytes.

    Raises:
        EOFError: the other side has gone.
    """
    pieces, left = list[bytes](), size
    while left:
        piece = source.read(min(left, _PIECE))
        if not piece:
            raise EOFError("the pipe was closed")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
