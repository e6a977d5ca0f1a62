"""Arguments that make no sense: one line under 400 characters that names place, value and remedy; no traceback."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2_export import cli
from lfm2_export.backends import get_backend
from lfm2_export.errors import Lfm2ExportError, ResourceError
from lfm2_export.parity import page
from lfm2_export.parity.figures import Hop
from lfm2_export.parity.report import ParityReport
from lfm2_export.parity.sample import TEXT_LIMIT
from tests.checkpoints import tiny_config, write_random_checkpoint

NAME = "x\x1b[2J[/x]\n" + os.fsdecode(b"\xff")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("arguments") / "checkpoint", tiny_config("lfm2"), seed=1)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command in an empty folder, which stays empty; its one line."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)

    def run(*arguments: str | Path, code: int = 2) -> str:
        assert cli.main([str(argument) for argument in arguments]) == code
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("lfm2-export: ")
        assert len(line) < 400
        assert line.isprintable()
        assert list(place.iterdir()) == []
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--scheme", ""), ("no scheme was given", "--scheme q4")),
        (("--scheme", ",,"), ("no scheme was given", "--scheme q4")),
        (("--scheme", NAME), ("x\\x1b[2J[/x]", "schemes")),
        (("--backend", ""), ("no backend was given", "onnx, executorch")),
        (("--backend", NAME), ("backend 'x\\x1b[2J[/x]", "onnx, executorch")),
        (("--algorithm", NAME), ("x\\x1b[2J[/x]", "refit")),
        (("--group-size", "0"), ("--group-size 0", "32")),
        (("--group-size", "-32"), ("--group-size -32", "32")),
        (("--group-size", "9" * 30), ("--group-size 999", "32")),
        (("--group-size", "9" * 5000), ("--group-size", "invalid int value", "export --help")),
        (("--group-size", "nan"), ("--group-size", "'nan'")),
        (("--exclude", "["), ("--exclude [: matches no weight", "closest to [: model.")),
        (("--exclude", ""), ("matches no weight",)),
        (("--exclude", NAME), ("x\\x1b[2J[/x]", "matches no weight")),
        (("--exclude", "(a+)+" * 5000), ("matches no weight", "closest to (a+)+(a+)")),
        (("--algorithm", "gptq"), ("gptq needs statistics", "--calibrate default, or --statistics FILE")),
        (("--calibrate", ""), ("--calibrate", "names nothing")),
        (("--calibrate", NAME), ("x\\x1b[2J[/x]", "no such file; give --calibrate one that is there")),
        (("--calibrate", "default"), ("has no tokenizer.json", "pass --calibrate self")),
        (("--calibrate", "default", "--algorithm", "round"), ("round uses no statistics; leave --calibrate out",)),
        (("--calibrate", "default", "--scheme", "fp32"), ("--calibrate default: scheme fp32 quantizes nothing",)),
        (("--statistics", NAME), ("x\\x1b[2J[/x]", "no such file; make it with --calibrate default")),
        (("--statistics", "config.json", "--calibrate", "self", "--algorithm", "refit"), ("refit uses no statistics",)),
        (("--moe-op", NAME), ("--moe-op", "x\\x1b[2J[/x]", "stock")),
        (("--embedding-bits", "5"), ("--embedding-bits", "5", "4, 8")),
        (("--revision", ""), ("--revision", "names nothing")),
        (("--backend", "executorch", "--scheme", "fp32", "--max-context", "0"), ("--max-context 0", "pass 2 to 512")),
        (("--backend", "executorch", "--scheme", "fp32", "--max-context", "9" * 40), ("--max-context 99", "2 to 512")),
        (("--no-such-option", NAME), ("unrecognized arguments", "--no-such-option", "--help")),
    ],
    ids=lambda value: " ".join(value)[:40].encode("ascii", "backslashreplace").decode() if value else "",
)
def test_export_refuses(
    refused: Callable[..., str], checkpoint: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    line = refused("export", checkpoint, "-o", "made", *arguments)
    for word in words:
        assert word in line


@pytest.mark.parametrize("verb", [("export", "tiny-dense", "-o"), ("inspect",), ("run", "--prompt", "a"), ("bench",)])
@pytest.mark.parametrize("name", ["", " ", "\t"], ids=["empty", "space", "tab"])
def test_an_empty_name_is_not_taken_for_the_current_folder(
    refused: Callable[..., str], verb: tuple[str, ...], name: str
) -> None:
    line = refused(*verb, name)
    assert f"{name!r} names nothing; give a name, or . for this folder" in line


def test_the_python_api_takes_no_empty_name_either(checkpoint: Path) -> None:
    import lfm2_export

    with pytest.raises(Lfm2ExportError, match="output='' names no folder"):
        lfm2_export.export(checkpoint, output="")


NO_VALUES: dict[str, list[object]] = {
    "checkpoint": [None, 5, b"a", ["tiny-dense"], True, object()],
    "output": [None, 5, b"a", [], 2**70],
    "backend": [None, 5, [5], b"onnx", {}],
    "scheme": [5, b"q4", [5], {}, (name for name in ["q4"])],
    "exclude": [None, 5, b"a", [5], 2**70],
    "algorithm": [5, [], b"refit", object()],
    "calibrate": [5, b"default", ["default"], True, object()],
    "statistics": [5, b"a", [], True, 2**70],
    "group_size": ["32", 32.0, float("nan"), True, [32]],
    "max_context": ["128", 128.0, True, [128], object()],
    "moe_op": [5, b"both", [], object()],
    "embedding_bits": ["8", 8.0, True, object()],
    "revision": [5, b"main", []],
}


@pytest.mark.parametrize("name", NO_VALUES)
def test_the_python_api_says_which_argument_is_of_another_kind(name: str, tmp_path: Path) -> None:
    import lfm2_export

    for value in NO_VALUES[name]:
        asked = {"checkpoint": "tiny-dense", "output": tmp_path / "made", name: value}
        if name in get_backend("executorch").OPTIONS:
            asked |= {"backend": "executorch", "scheme": "8da4w"}
        with pytest.raises(Lfm2ExportError, match=rf"^{name}=.* expected$") as caught:
            lfm2_export.export(**asked)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 400
    assert list(tmp_path.iterdir()) == []


def test_a_single_pattern_is_not_a_list_of_letters(tmp_path: Path) -> None:
    import lfm2_export

    with pytest.raises(Lfm2ExportError, match=r"--exclude model\.nothing: matches no weight"):
        lfm2_export.export("tiny-dense", exclude="model.nothing", output=tmp_path / "made")


@pytest.mark.parametrize(
    "name", [NAME, "[/x]", "a\nb", "x" * 5000, "\0"], ids=["all", "markup", "lines", "long", "nul"]
)
@pytest.mark.parametrize(
    "verb", [("inspect",), ("run", "--prompt", "a"), ("chat",), ("bench",), ("export", "-o", "made"), ("parity", "a")]
)
def test_names_of_nothing_are_shown_on_one_line(refused: Callable[..., str], verb: tuple[str, ...], name: str) -> None:
    refused(*verb, name)


def test_an_export_into_a_folder_of_any_name_says_where(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    name, shown = "[/x]a\nb[bold]\x1b[2Jc", "[/x]a b[bold]\\x1b[2Jc"
    assert cli.main(["export", str(checkpoint), "--scheme", "fp32", "-o", str(tmp_path / name)]) == 0
    assert cli.main(["inspect", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert not [c for c in out if not c.isprintable() and c != "\n"]
    assert " ".join(out.split()).count(shown) == 2
    assert (tmp_path / name / "lfm2_export.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seed", "-1"), ("--seed -1", "from 0")),
        (("--seed", "9" * 5000), ("--seed", "invalid int value")),
        (("--temperature", "nan"), ("--temperature nan",)),
        (("--temperature", "inf"), ("--temperature inf",)),
        (("--temperature", "-1"), ("--temperature -1",)),
        (("--top-p", "2"), ("--top-p 2",)),
        (("--top-p", "nan"), ("--top-p nan",)),
        (("--top-k", "-1"), ("--top-k -1",)),
        (("--min-p", "2"), ("--min-p 2",)),
        (("--repetition-penalty", "0"), ("--repetition-penalty 0",)),
        (("--max-new-tokens", "0"), ("--max-new-tokens 0",)),
        (("--max-new-tokens", "1e3"), ("--max-new-tokens", "'1e3'")),
        (("--threads", "0"), ("--threads 0",)),
        (("--threads", "1000000000"), ("--threads 1000000000", "cores")),
        (("--threads", "9" * 40), ("--threads 9999", "cores")),
        (("--kernels", NAME), ("--kernels", "auto")),
        (("--kv-cache", ""), ("--kv-cache", "float")),
        (("--scheme", ""), ("has no", "program")),
        (("--scheme", NAME), ("x\\x1b[2J[/x]", "export it")),
        (("--backend", NAME), ("x\\x1b[2J[/x]", "export it")),
        (("--prompt", ""), ("--prompt is empty",)),
        (("--prompt", " \n\t"), ("--prompt is empty",)),
        (("--prompt", "a\udcff"), ("--prompt: character 1 ('\\udcff')", "UTF-8")),
        (("--system", "\udcff", "--raw"), ("--system", "UTF-8")),
    ],
    ids=lambda value: " ".join(value)[:40].encode("ascii", "backslashreplace").decode() if value else "",
)
def test_run_refuses(
    refused: Callable[..., str],
    artifact: Callable[[str], Path],
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    line = refused("run", artifact("tiny-moe"), "--kernels", "stock", "--prompt", "a", *arguments)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    "arguments",
    [("--max-new-tokens", "1" + "0" * 30), ("--seed", "1" + "0" * 30), ("--top-k", "9" * 20), ("--prompt", "a\0b")],
    ids=" ".join,
)
def test_run_takes_numbers_of_any_size_and_any_text(
    capsys: pytest.CaptureFixture[str],
    artifact: Callable[[str], Path],
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["run", str(artifact("tiny-moe")), "--kernels", "stock", "--prompt", "What is a list?", *arguments]
    command += [] if "--max-new-tokens" in arguments else ["--max-new-tokens", "2"]
    assert cli.main(command) == 0
    assert capsys.readouterr().err.startswith("onnx q4 on ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt-tokens", "-1"), ("--prompt-tokens -1",)),
        (("--new-tokens", "9" * 40), ("do not fit the context",)),
        (("--rounds", "0"), ("--rounds 0",)),
    ],
)
def test_bench_refuses(
    refused: Callable[..., str],
    artifact: Callable[[str], Path],
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    line = refused("bench", artifact("tiny-moe"), *arguments)
    for word in words:
        assert word in line


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 30)


TEXTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file; give --text one that is there"),
    "folder": (Path.mkdir, "is a folder where a file is needed"),
    "fifo": (os.mkfifo, "is not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "loop": (lambda path: path.symlink_to(path.name), "cannot be"),
    "sparse": (_sparse, "more than the 16.8 MB of text that are read; cut a piece out of it"),
    "binary": (
        lambda path: path.write_bytes(bytes(range(256)) * 99),
        "is not UTF-8 text (invalid start byte at byte 128)",
    ),
    "empty": (Path.touch, "has 0 tokens; at least 96 are needed"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_parity_reads_text_from_a_regular_file_of_some_size(
    refused: Callable[..., str], artifact: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    make, word = TEXTS[kind]
    make(tmp_path / kind)
    line = refused("parity", artifact("tiny-moe"), "tiny-moe", "--scheme", "fp32", "--text", tmp_path / kind)
    assert f"{tmp_path / kind}: " in line
    assert word in line
    assert TEXT_LIMIT == 16 << 20


REPORTS: dict[str, Callable[[Path], Path]] = {
    "no folder": lambda folder: folder / "missing" / "report.html",
    "a folder": lambda folder: folder,
    "a pipe": lambda folder: _fifo(folder / "pipe"),
    "below a file": lambda folder: _file(folder / "file") / "report.html",
    "too long": lambda folder: folder / ("x" * 300),
}


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _file(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("kind", REPORTS)
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    refused: Callable[..., str], tmp_path: Path, kind: str
) -> None:
    path = REPORTS[kind](tmp_path)
    line = refused("parity", "no-artifact", "no-checkpoint", "--report", path)
    assert "the report cannot be written (" in line
    assert line.endswith("; give another file")


def test_a_report_that_can_be_written_is_not_made_before_the_work(refused: Callable[..., str], tmp_path: Path) -> None:
    kept, link = tmp_path / "kept.html", tmp_path / "link.html"
    kept.write_text("an older page")
    link.symlink_to("target.html")
    for name in ("kept.html", "link.html", "new.html", "\x1b[x]\n.html"):
        assert "no-checkpoint" in refused("parity", "no-artifact", "no-checkpoint", "--report", tmp_path / name)
    assert kept.read_text() == "an older page"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "kept.html", "link.html"]
    assert stat.S_ISLNK(os.lstat(link).st_mode)


def _report(name: str) -> ParityReport:
    hop = Hop(name="model", title="title", figures=(), controls=(), summary={})
    return ParityReport(artifact=name, checkpoint=name, text=name, model=hop, programs=(), versions={})


def test_a_report_holds_any_name(tmp_path: Path) -> None:
    page.write(_report(f"<script>{NAME}"), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;x" in text
    assert "\\udcff" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_below_the_report_is_the_machines_fault() -> None:
    with pytest.raises(ResourceError, match=r"^/dev/full: the report cannot be written \(No space left on device\)"):
        page.write(_report("name"), "/dev/full")
