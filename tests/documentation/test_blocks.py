"""The code of every page runs as it stands there: shell commands and Python in order, as a reader would paste them, in
a folder of the page's own with the artifact ``out`` (tiny-dense, q4)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import lfm2_export
from documentation.blocks import OUTPUT, RUN, Block, blocks
from documentation.pages import ROOT, sources
from tests.conftest import Exported, Once
from tests.documentation.forking import start

PAGES = {name: blocks(path.read_text(encoding="utf-8")) for name, path in sources().items()}
NODE_MODULES = ROOT / "examples" / "transformers_js" / "node_modules"
HEADERS = ROOT / "build" / "onnxruntime_headers"
# Blocks in other languages that a test below runs.
BY_NAME = {("cpp.md", "cpp"), ("node.md", "js")}


def runs(block: Block) -> bool:
    return block.language in RUN and block.not_run is None


@pytest.fixture(scope="session")
def out(once: Once) -> Path:
    return once("documentation", lambda folder: lfm2_export.export("tiny-dense", scheme="q4", output=folder))


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with this checkout's ``lfm2-export``."""
    made = tmp_path_factory.mktemp("bin")
    server = start(made)
    yield made
    server.kill()
    server.communicate()


@pytest.fixture
def folder(tmp_path: Path, out: Path, command: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page's code runs: ``out`` lies there, and ``lfm2-export`` is this checkout's."""
    work = tmp_path / "page"
    shutil.copytree(out, work / "out")
    monkeypatch.setenv("PATH", f"{command}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(work)
    return work


def run(page: str, found: list[Block]) -> None:
    """Raises AssertionError at the first command that fails, and whatever Python raises."""
    names: dict[str, Any] = {}
    for block in found:
        place = f"{page}:{block.line}"
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
        else:
            done = subprocess.run(["bash", "-e", "-c", block.text], capture_output=True, text=True, timeout=600)
            print(f"{place}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            assert done.returncode == 0, f"{place}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("page", [name for name, found in PAGES.items() if any(map(runs, found))])
def test_a_pages_code_runs(page: str, folder: Path, encoder: Callable[..., Exported]) -> None:
    if page == "encoders.md":
        pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
        for kind in ("embedding", "colbert"):
            shutil.copytree(encoder(kind, ["fp32"]).artifact, folder / kind)
    if page == "genai.md":
        pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai")
    if page == "sweep.md":
        pytest.importorskip("ray", reason="pip install 'lfm2-export[sweep]'")
    run(page, [block for block in PAGES[page] if runs(block)])


def test_control_a_block_that_is_broken_fails(folder: Path) -> None:
    right = Block(line=1, language="sh", text="test -d out\n")
    run("page.md", [right])
    with pytest.raises(AssertionError, match=r"page\.md:3: lfm2-export: nowhere"):
        run("page.md", [right, Block(line=3, language="sh", text="lfm2-export inspect nowhere\ntrue\n")])
    with pytest.raises(lfm2_export.ArtifactError):
        run(
            "page.md", [Block(line=1, language="python", text="import lfm2_export\nlfm2_export.load_runner('nowhere')")]
        )


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_passed_over_in_silence(page: str) -> None:
    left = [f"{page}:{b.line}: {b.language or 'no language'}" for b in PAGES[page] if not accounted_for(page, b)]
    assert not left, f"say before it why it does not run (<!-- not run: ... -->), or mark it as {OUTPUT}: {left}"


def accounted_for(page: str, block: Block) -> bool:
    return block.not_run is not None or block.language in (*RUN, OUTPUT) or (page, block.language) in BY_NAME


def test_control_a_block_without_a_word_is_seen() -> None:
    silent, told = blocks("```kotlin\nval x = 1\n```\n\n<!-- not run: needs a phone -->\n```kotlin\nval x = 1\n```\n")
    assert (silent.line, told.line, told.not_run) == (2, 7, "needs a phone")
    assert not accounted_for("android.md", silent)
    assert accounted_for("android.md", told)
    assert not runs(told)


def code(page: str, language: str) -> str:
    (block,) = (block for block in PAGES[page] if block.language == language)
    return block.text


def test_javascript_of_the_page_runs(folder: Path) -> None:
    if shutil.which("node") is None or not (NODE_MODULES / "@huggingface" / "transformers").is_dir():
        pytest.skip("Transformers.js is not installed: cd examples/transformers_js && npm ci")
    (folder / "node_modules").symlink_to(NODE_MODULES)
    (folder / "chat.mjs").write_text(code("node.md", "js"))
    done = subprocess.run(["node", "chat.mjs"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_cpp_of_the_page_gives_our_tokens(folder: Path) -> None:
    """Compiled as it stands, against the wheel's own library."""
    compiler = shutil.which("c++")
    library = next((Path(str(onnxruntime.__file__)).parent / "capi").glob("libonnxruntime.so.*"), None)
    if compiler is None or library is None or not HEADERS.is_dir():
        pytest.skip("no C++ compiler, or no header of ONNX Runtime: .ci/run fetches it")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    (folder / "greedy.cpp").write_text(code("cpp.md", "cpp"))
    flags = ["-std=c++20", "-Wall", "-I", HEADERS, "greedy.cpp", "-L", folder, "-lonnxruntime", f"-Wl,-rpath,{folder}"]
    built = subprocess.run([compiler, *map(str, flags), "-o", "greedy"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]

    ids = lfm2_export.Tokenizer.from_dir("out").encode("The return value is")
    runner = lfm2_export.load_runner("out", kernels="stock")
    logits, ours = runner.prefill([ids]), []
    while len(ours) < 16:
        ours.append(int(logits.argmax()))
        logits = runner.decode([ours[-1]])
    command = ["./greedy", "out/onnx/model_q4.onnx", "16", *map(str, ids)]
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    print(done.stdout, ours)
    assert list(map(int, done.stdout.split())) == ours
