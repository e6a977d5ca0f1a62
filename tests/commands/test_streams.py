"""Commands whose standard streams are closed, full, unread or of another encoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lfm2_export.messages import as_unicode
from tests.artifacts import write_artifact

CLI = (sys.executable, "-m", "lfm2_export.cli")
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
NOTHING = ("inspect", "no-such-thing")
SAID = "lfm2-export: standard output: cannot be written (No space left on device); free space, or send the output"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``inspect`` describes."""
    return write_artifact(tmp_path_factory.mktemp("streams") / "größe").path


def closing(*descriptors: int) -> Callable[[], None]:
    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    return close


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run([*CLI, *arguments], text=True, timeout=60, **{**streams, **options})  # type: ignore[call-overload]


@needs_full
@pytest.mark.parametrize(
    "arguments",
    [("inspect", "."), ("inspect", ".", "--json"), ("support",), ("--help",), ("run", "-h"), ("--version",)],
)
def test_a_full_disk_below_standard_output_is_a_line_and_code_3(folder: Path, arguments: Sequence[str]) -> None:
    with open(FULL, "w") as full:
        done = run(*arguments, stdout=full, cwd=folder)
    assert done.returncode == 3
    assert done.stderr.startswith(SAID)
    assert len(done.stderr.splitlines()) == 1


@needs_full
def test_a_full_disk_below_standard_error_changes_no_code(folder: Path) -> None:
    with open(FULL, "w") as full:
        assert run(*NOTHING, stderr=full).returncode == 2
        done = run("inspect", folder, "--verbose", stderr=full)
        assert done.returncode == 0
        assert "onnx q4" in done.stdout
        assert run("inspect", folder, stdout=full, stderr=full).returncode == 3


@pytest.mark.parametrize("closed", [(0,), (1,), (0, 1, 2)], ids=str)
def test_closed_streams_are_as_if_they_led_nowhere(folder: Path, closed: tuple[int, ...]) -> None:
    done = run("inspect", folder, preexec_fn=closing(*closed))
    assert done.returncode == 0
    assert ("onnx q4" in done.stdout) == (1 not in closed)
    assert done.stderr == ""


def test_an_error_is_not_printed_into_a_result() -> None:
    done = run(*NOTHING, preexec_fn=closing(2))
    assert (done.returncode, done.stdout) == (2, "")


def test_a_closed_standard_output_is_not_given_to_the_next_file(folder: Path, tmp_path: Path) -> None:
    """The lowest free number is what a file that is opened gets."""
    code = (
        "import os, sys; from lfm2_export import streams\n"
        "with streams.prepared(own=True):\n"
        f"    number = os.open({str(tmp_path / 'file')!r}, os.O_RDWR | os.O_CREAT)\n"
        "    os.write(1, b'results'); os.write(2, b'errors')\n"
        "    sys.exit(0 if number > 2 else 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], preexec_fn=closing(1, 2))
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize(("arguments", "code"), [(("inspect", "."), 0), (("--help",), 0), (NOTHING, 2)])
def test_a_reader_who_leaves_changes_no_code(folder: Path, arguments: Sequence[str], code: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run(*arguments, stdout=writing, cwd=folder)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        assert run(*arguments, stderr=writing, cwd=folder).returncode == code
    finally:
        os.close(writing)


# All at once: two scripts, bytes that are no text, line breaks, what steers a terminal, markup and emoji of rich's.
NAME = "größe 文 " + os.fsdecode(b"\xff") + "\r\n\x1b[2J\x9b[/x]:smile:"
ENCODINGS = {
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
    "ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "locale C": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_name_can_be_printed_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    folder = write_artifact(tmp_path / NAME).path
    codec = encoding if encoding in ("utf-8", "latin-1") else "ascii"

    def printed(*arguments: str | Path) -> tuple[int, str, str]:
        environment = {**os.environ, **ENCODINGS[encoding]}
        done = subprocess.run([*CLI, *arguments], capture_output=True, env=environment, timeout=60)
        return done.returncode, done.stdout.decode(codec), done.stderr.decode(codec)

    code, out, err = printed("inspect", folder, "--json")
    assert (code, err) == (0, "")
    name = json.loads(out)["name"]
    assert name.endswith("[/x]:smile:")
    if encoding != "locale C":  # where letters are no text either; what is none stands as escapes
        assert name == as_unicode(str(folder))
    code, table, err = printed("inspect", folder)
    assert (code, err) == (0, "")
    assert "[/x]:smile:" in table
    code, out, err = printed("run", f"{folder}-2", "--prompt", "a")
    assert (code, out) == (2, "")
    assert "no such directory" in err
    assert not [c for c in table + err if not c.isprintable() and c != "\n"]
    assert err.count("\n") == 1
