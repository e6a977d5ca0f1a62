from lfm2_export.messages import as_unicode
"""Commands whose standard streams are closed, full, unread or of another encoding."""
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
from __future__ import annotations
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
import json
from lfm2_export.messages import as_unicode
import os
from lfm2_export.messages import as_unicode
import subprocess
from lfm2_export.messages import as_unicode
import sys
from lfm2_export.messages import as_unicode
from collections.abc import Callable, Sequence
from lfm2_export.messages import as_unicode
from pathlib import Path
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
import pytest
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
from tests.artifacts import write_artifact
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
CLI = (sys.executable, "-m", "lfm2_export.cli")
from lfm2_export.messages import as_unicode
FULL = Path("/dev/full")
from lfm2_export.messages import as_unicode
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
from lfm2_export.messages import as_unicode
NOTHING = ("inspect", "no-such-thing")
from lfm2_export.messages import as_unicode
SAID = "lfm2-export: standard output: cannot be written (No space left on device); free space, or send the output"
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
@pytest.fixture(scope="module")
from lfm2_export.messages import as_unicode
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
from lfm2_export.messages import as_unicode
    """What ``inspect`` describes."""
from lfm2_export.messages import as_unicode
    return write_artifact(tmp_path_factory.mktemp("streams") / "größe").path
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
def closing(*descriptors: int) -> Callable[[], None]:
from lfm2_export.messages import as_unicode
    def close() -> None:
from lfm2_export.messages import as_unicode
        for descriptor in descriptors:
from lfm2_export.messages import as_unicode
            os.close(descriptor)
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
    return close
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
from lfm2_export.messages import as_unicode
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
from lfm2_export.messages import as_unicode
    return subprocess.run([*CLI, *arguments], text=True, timeout=60, **{**streams, **options})  # type: ignore[call-overload]
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
@needs_full
from lfm2_export.messages import as_unicode
@pytest.mark.parametrize(
from lfm2_export.messages import as_unicode
    "arguments",
from lfm2_export.messages import as_unicode
    [("inspect", "."), ("inspect", ".", "--json"), ("support",), ("--help",), ("run", "-h"), ("--version",)],
from lfm2_export.messages import as_unicode
)
from lfm2_export.messages import as_unicode
def test_a_full_disk_below_standard_output_is_a_line_and_code_3(folder: Path, arguments: Sequence[str]) -> None:
from lfm2_export.messages import as_unicode
    with open(FULL, "w") as full:
from lfm2_export.messages import as_unicode
        done = run(*arguments, stdout=full, cwd=folder)
from lfm2_export.messages import as_unicode
    assert done.returncode == 3
from lfm2_export.messages import as_unicode
    assert done.stderr.startswith(SAID)
from lfm2_export.messages import as_unicode
    assert len(done.stderr.splitlines()) == 1
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
@needs_full
from lfm2_export.messages import as_unicode
def test_a_full_disk_below_standard_error_changes_no_code(folder: Path) -> None:
from lfm2_export.messages import as_unicode
    with open(FULL, "w") as full:
from lfm2_export.messages import as_unicode
        assert run(*NOTHING, stderr=full).returncode == 2
from lfm2_export.messages import as_unicode
        done = run("inspect", folder, "--verbose", stderr=full)
from lfm2_export.messages import as_unicode
        assert done.returncode == 0
from lfm2_export.messages import as_unicode
        assert "onnx q4" in done.stdout
from lfm2_export.messages import as_unicode
        assert run("inspect", folder, stdout=full, stderr=full).returncode == 3
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
@pytest.mark.parametrize("closed", [(0,), (1,), (0, 1, 2)], ids=str)
from lfm2_export.messages import as_unicode
def test_closed_streams_are_as_if_they_led_nowhere(folder: Path, closed: tuple[int, ...]) -> None:
from lfm2_export.messages import as_unicode
    done = run("inspect", folder, preexec_fn=closing(*closed))
from lfm2_export.messages import as_unicode
    assert done.returncode == 0
from lfm2_export.messages import as_unicode
    assert ("onnx q4" in done.stdout) == (1 not in closed)
from lfm2_export.messages import as_unicode
    assert done.stderr == ""
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
def test_an_error_is_not_printed_into_a_result() -> None:
from lfm2_export.messages import as_unicode
    done = run(*NOTHING, preexec_fn=closing(2))
from lfm2_export.messages import as_unicode
    assert (done.returncode, done.stdout) == (2, "")
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
def test_a_closed_standard_output_is_not_given_to_the_next_file(folder: Path, tmp_path: Path) -> None:
from lfm2_export.messages import as_unicode
    """The lowest free number is what a file that is opened gets."""
from lfm2_export.messages import as_unicode
    code = (
from lfm2_export.messages import as_unicode
        "import os, sys; from lfm2_export import streams\n"
from lfm2_export.messages import as_unicode
        "with streams.prepared(own=True):\n"
from lfm2_export.messages import as_unicode
        f"    number = os.open({str(tmp_path / 'file')!r}, os.O_RDWR | os.O_CREAT)\n"
from lfm2_export.messages import as_unicode
        "    os.write(1, b'results'); os.write(2, b'errors')\n"
from lfm2_export.messages import as_unicode
        "    sys.exit(0 if number > 2 else 1)"
from lfm2_export.messages import as_unicode
    )
from lfm2_export.messages import as_unicode
    done = subprocess.run([sys.executable, "-c", code], preexec_fn=closing(1, 2))
from lfm2_export.messages import as_unicode
    assert done.returncode == 0
from lfm2_export.messages import as_unicode
    assert (tmp_path / "file").read_bytes() == b""
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
@pytest.mark.parametrize(("arguments", "code"), [(("inspect", "."), 0), (("--help",), 0), (NOTHING, 2)])
from lfm2_export.messages import as_unicode
def test_a_reader_who_leaves_changes_no_code(folder: Path, arguments: Sequence[str], code: int) -> None:
from lfm2_export.messages import as_unicode
    reading, writing = os.pipe()
from lfm2_export.messages import as_unicode
    os.close(reading)
from lfm2_export.messages import as_unicode
    try:
from lfm2_export.messages import as_unicode
        done = run(*arguments, stdout=writing, cwd=folder)
from lfm2_export.messages import as_unicode
        assert done.returncode == code
from lfm2_export.messages import as_unicode
        assert "Traceback" not in done.stderr
from lfm2_export.messages import as_unicode
        assert "Exception ignored" not in done.stderr
from lfm2_export.messages import as_unicode
        assert run(*arguments, stderr=writing, cwd=folder).returncode == code
from lfm2_export.messages import as_unicode
    finally:
from lfm2_export.messages import as_unicode
        os.close(writing)
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
# All at once: two scripts, bytes that are no text, line breaks, what steers a terminal, markup and emoji of rich's.
from lfm2_export.messages import as_unicode
NAME = "größe 文 " + os.fsdecode(b"\xff") + "\r\n\x1b[2J\x9b[/x]:smile:"
from lfm2_export.messages import as_unicode
ENCODINGS = {
from lfm2_export.messages import as_unicode
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
from lfm2_export.messages import as_unicode
    "ascii": {"PYTHONIOENCODING": "ascii:strict"},
from lfm2_export.messages import as_unicode
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
from lfm2_export.messages import as_unicode
    "locale C": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
from lfm2_export.messages import as_unicode
}
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
@pytest.mark.parametrize("encoding", ENCODINGS)
from lfm2_export.messages import as_unicode
def test_any_name_can_be_printed_in_any_encoding(tmp_path: Path, encoding: str) -> None:
from lfm2_export.messages import as_unicode
    folder = write_artifact(tmp_path / NAME).path
from lfm2_export.messages import as_unicode
    codec = encoding if encoding in ("utf-8", "latin-1") else "ascii"
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
    def printed(*arguments: str | Path) -> tuple[int, str, str]:
from lfm2_export.messages import as_unicode
        environment = {**os.environ, **ENCODINGS[encoding]}
from lfm2_export.messages import as_unicode
        done = subprocess.run([*CLI, *arguments], capture_output=True, env=environment, timeout=60)
from lfm2_export.messages import as_unicode
        return done.returncode, done.stdout.decode(codec), done.stderr.decode(codec)
from lfm2_export.messages import as_unicode

from lfm2_export.messages import as_unicode
    code, out, err = printed("inspect", folder, "--json")
from lfm2_export.messages import as_unicode
    assert (code, err) == (0, "")
from lfm2_export.messages import as_unicode
    assert json.loads(out)["name"] == as_unicode(str(folder))  # what is no text stands as escapes
from lfm2_export.messages import as_unicode
    code, table, err = printed("inspect", folder)
from lfm2_export.messages import as_unicode
    assert (code, err) == (0, "")
from lfm2_export.messages import as_unicode
    assert "[/x]:smile:" in table
from lfm2_export.messages import as_unicode
    code, out, err = printed("run", f"{folder}-2", "--prompt", "a")
from lfm2_export.messages import as_unicode
    assert (code, out) == (2, "")
from lfm2_export.messages import as_unicode
    assert "no such directory" in err
from lfm2_export.messages import as_unicode
    assert not [c for c in table + err if not c.isprintable() and c != "\n"]
from lfm2_export.messages import as_unicode
    assert err.count("\n") == 1
