"""``lfm2-export serve`` as a process: its first line, its end by signals, what it refuses, the extra that it needs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest

from lfm2_export.backends.onnx.variants import own_library

needs_library = pytest.mark.skipif(own_library() is None, reason="no compiler for our operators")
COMMAND = [sys.executable, "-m", "lfm2_export.cli", "serve"]


@pytest.fixture(scope="module")
def folder(artifact: Callable[[str], Path]) -> Path:
    return artifact("tiny-dense")


@contextmanager
def running(
    *arguments: str, said: list[str] | None = None, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL, once it answers; ``said`` gets the lines before."""
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--port", "0"], stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )
    try:
        assert process.stderr is not None
        lines, url = iter(process.stderr.readline, ""), None
        for line in lines:
            if found := re.search(r"http://\S+/v1", line):
                url = found[0]
                break
            if said is not None:
                said.append(line)
        assert url is not None
        yield process, url
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_lets_an_answer_end_and_then_ends_the_server(folder: Path, number: signal.Signals, code: int) -> None:
    with running(str(folder), "--threads", "1", LFM2_EXPORT_API_KEY="secret") as (process, url):
        assert httpx.get(f"{url}/models").status_code == 401
        body = {"prompt": "def f(", "max_tokens": 300, "stream": True}
        headers = {"Authorization": "Bearer secret"}
        with httpx.stream("POST", f"{url}/completions", json=body, headers=headers, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(number)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        _, err = process.communicate(timeout=30)
        assert process.returncode == code
        assert err == f"lfm2-export: stopped by {number.name}\n"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--port", "99999"), "--port 99999: is no port"),
        (("--host", "203.0.113.1"), "cannot be listened on"),
        (("--max-tokens", "0"), "limit tokens=0 is not usable"),
        (("--parallel", "0"), "limit parallel=0 is not usable"),
        (("--scheme", "q5"), "has no q5 program"),
    ],
)
def test_what_it_cannot_do_is_one_line(folder: Path, arguments: tuple[str, ...], fault: str) -> None:
    done = subprocess.run(
        [*COMMAND, str(folder), "--port", "0", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert fault in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told", "limit"),
    [
        (("--kernels", "stock"), "one request at a time (these kernels give other bits", 1),
        (("--parallel", "1"), "tiny-dense: one request at a time\n", 1),
        pytest.param(("--parallel", "3"), "up to 3 requests at once; the state of one takes", 3, marks=needs_library),
    ],
)
def test_it_says_how_many_requests_it_answers_at_once(
    folder: Path, arguments: tuple[str, ...], told: str, limit: int
) -> None:
    said: list[str] = []
    with running(str(folder), "--scheme", "q4", "--threads", "1", *arguments, said=said) as (_, url):
        metrics = httpx.get(f"{url.removesuffix('/v1')}/metrics").text
    assert told in "".join(said)
    assert f'lfm2_requests_parallel_limit{{model="tiny-dense"}} {limit}\n' in metrics


def test_a_port_that_is_taken_is_named_before_anything_is_loaded(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run([*COMMAND, str(folder), "--port", port], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"lfm2-export: --host 127.0.0.1 --port {port}: cannot be listened on")
    assert done.stderr.count("\n") == 1


def test_two_folders_of_one_name_are_refused(folder: Path) -> None:
    done = subprocess.run([*COMMAND, str(folder), str(folder), "--port", "0"], capture_output=True, text=True)
    assert (done.returncode, "each needs a name of its own" in done.stderr) == (2, True)


def test_without_its_extra_the_remedy_is_told_and_the_other_commands_do_without() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("starlette", "uvicorn", "anyio"):
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
sys.meta_path.insert(0, Refuse())
from lfm2_export.cli import main
assert main(["support", "--json"]) == 0
assert main(["serve", "nowhere"]) == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("which is not installed; pip install 'lfm2-export[serve]'\n")
