"""``lfm2-export`` for a page's shell commands, in a process of its own, at the price of a fork: most of what a short
command takes are imports, which a server has done.

``start(folder)`` writes the command into a folder. It hands its arguments, working directory, environment and standard
streams to the server, so that pipes and redirections are the shell's, and ends with the exit code that it is told.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# What the commands of the pages import; nothing is computed before a fork, whose threads would be missing in it.
_WARM = (
    "lfm2_export.cli",
    "lfm2_export.pipeline",
    "lfm2_export.chat",
    "lfm2_export.parity",
    "lfm2_export.quality",
    "lfm2_export.backends.onnx.export",
    "lfm2_export.backends.onnx.runner",
    "lfm2_export.models.lfm2",
    "onnxruntime",
    "onnxscript",
    "transformers",
    "torch.export",
)
_CLIENT = """#!{python} -ISE
import json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({path!r})
call = json.dumps(dict(arguments=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))).encode()
socket.send_fds(link, [len(call).to_bytes(4, "little")], [0, 1, 2])
link.sendall(call)
sys.exit(int(link.recv(8)))
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Starts a server and writes ``lfm2-export`` into ``folder``."""
    path = str(folder / "socket")
    command = folder / "lfm2-export"
    command.write_text(_CLIENT.format(python=sys.executable, path=path))
    command.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.documentation.forking", path], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    return server


def serve(path: str) -> None:
    """Until it is ended."""
    for name in _WARM:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        print("ready", flush=True)
        while True:
            link, _ = door.accept()
            if os.fork() == 0:
                door.close()
                _answer(link)
            link.close()


def _answer(link: socket.socket) -> None:
    """In the fork: does what is asked, tells the exit code, and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    header, streams, _, _ = socket.recv_fds(link, 4, 3)
    text, size = b"", int.from_bytes(header, "little")
    while len(text) < size:
        text += link.recv(size - len(text))
    code = 70
    try:
        code = _run(json.loads(text), streams)
    finally:
        link.sendall(str(code).encode())
        os._exit(code)


def _run(call: dict[str, Any], streams: list[int]) -> int:
    from lfm2_export import cli

    for number, given in enumerate(streams):
        os.dup2(given, number)
        os.close(given)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.argv = ["lfm2-export", *call["arguments"]]
    try:
        return int(cli.main(call["arguments"]) or 0)
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
