"""``examples/web``: the same page computes in the browser, on wasm and on WebGPU, and says Python's tokens."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Once
from tests.shows import shows
from tests.web.conftest import ANSWERED, EXAMPLE, READY, Drive, greedily, python_answer, say

QUESTIONS = ("What is a string?", "How do I sort a list?")
# Of both bundled models, far from a tie on each.
QUESTION = QUESTIONS[0]
# Chromium's own software GPU, which takes a second of CPU for each token and has no float16; WebAssembly compiled once.
WEBGPU = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--js-flags=--liftoff-only",
)
ON_WEBGPU = 4
CORES = "Object.defineProperty(navigator, 'hardwareConcurrency', {value: 6})"
TOKENS = ("attribute", "article.assistant", "data-token-ids")


@pytest.fixture(scope="session")
def page(once: Once, chromium: str) -> Path:
    """The built page."""

    def build(folder: Path) -> None:
        command = ["npm", "run", "build", "--prefix", str(EXAMPLE), "--", "--outDir", str(folder), "--logLevel", "warn"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]

    return once("web-page", build)


@contextmanager
def serving(page: Path, artifact: Path) -> Iterator[str]:
    """The URL of ``serve.mjs``."""
    command = ["node", str(EXAMPLE / "serve.mjs"), str(artifact), "0", str(page)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), process.communicate()
        yield line.split()[0]
    finally:
        process.kill()
        process.communicate()


@shows("page-wasm", "greedy", "chat", family="lfm2", scheme="q4")
def test_on_wasm_it_says_pythons_tokens_and_asks_nobody_else(
    artifact: Callable[[str], Path], page: Path, drive: Drive
) -> None:
    folder = artifact("tiny-dense")
    steps = [READY, ("text", "#where"), *greedily(), *say(QUESTION), ANSWERED, TOKENS]
    again = [("click", "#new"), *say(QUESTIONS[1]), ANSWERED, TOKENS, ("text", "#figures"), ("text", "article")]
    with serving(page, folder) as url:
        (visit,) = drive({"url": url, "before": CORES, "steps": [*steps, *again]})
    expected = [python_answer(folder, question) for question in QUESTIONS]
    found = [[int(token) for token in value.split()] for value in (visit.values[9], visit.values[-3])]
    print(visit.values)
    assert found == [answer.tokens for answer in expected]
    assert found[0] != found[1]
    assert visit.values[-1] == [QUESTIONS[1], expected[1].text]
    assert visit.values[1] == ["in this browser on wasm, 3 threads; WebGPU finds no GPU here"]
    assert "tokens/s" in visit.values[-2][0]
    assert all(request.startswith(url) for request in visit.requests)


@shows("page-webgpu", "greedy", family="lfm2", scheme="q4")
@shows("page-wasm", "greedy", family="lfm2_moe", scheme="q4")
def test_on_webgpu_a_dense_model_says_pythons_tokens_and_what_it_cannot_run_goes_to_wasm(
    artifact: Callable[[str], Path], page: Path, drive: Drive
) -> None:
    """onnxruntime's WebGPU has no QMoE as LFM2's router wants it."""
    dense, moe = artifact("tiny-dense"), artifact("tiny-moe")
    steps = [READY, ("text", "#where"), *greedily(ON_WEBGPU), *say(QUESTION), ANSWERED, TOKENS]
    with serving(page, dense) as first, serving(page, moe) as second:
        visits = drive({"url": first, "steps": steps}, {"url": second, "steps": steps}, arguments=WEBGPU)
    where = [visit.values[1][0] for visit in visits]
    print(where)
    if "finds no GPU" in where[0]:
        pytest.skip("this Chromium has no software GPU")
    for visit, folder in zip(visits, (dense, moe), strict=True):
        found = [int(token) for token in visit.values[-1].split()]
        assert found == python_answer(folder, QUESTION).tokens[:ON_WEBGPU]
    assert visits[0].values[-1] != visits[1].values[-1]
    assert where[0].startswith("in this browser on WebGPU (")
    assert where[1].startswith("in this browser on wasm, ")
    assert "WebGPU failed: Separate router_weights" in where[1]


@pytest.fixture
def copied(artifact: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact("tiny-dense"), tmp_path / "copied"))


def test_an_artifact_that_is_gone_is_a_line_on_the_page(copied: Path, page: Path, drive: Drive) -> None:
    fault = [("wait", "#fault:not([hidden])"), ("text", "#fault")]
    with serving(page, copied) as url:
        shutil.rmtree(copied)
        (visit,) = drive({"url": url, "steps": fault})
    assert visit.values[-1] == [
        "No artifact: lfm2_export.json is not there. Start with: npm start -- DIR (lfm2-export's output)."
    ]


def test_only_the_page_and_the_files_that_the_artifact_lists_are_served(copied: Path, page: Path) -> None:
    (copied / "secret.txt").write_text("mine")
    with serving(page, copied) as url:
        host = url.removeprefix("http://")

        def status(path: str, **headers: str) -> int:
            connection = http.client.HTTPConnection(host, timeout=20)
            connection.request("GET", path, headers=headers)
            return connection.getresponse().status

        assert [status(path) for path in ("/", "/artifact/config.json", "/artifact/onnx/model_q4.onnx")] == [200] * 3
        assert status("/artifact/onnx/model_q4.onnx_data", Range="bytes=0-9") == 206
        refused = ["/artifact/secret.txt", "/artifact/../../etc/passwd", "/artifact/%2e%2e/secret.txt", "/artifact/"]
        assert [status(path) for path in [*refused, "/../serve.mjs", "//etc/passwd"]] == [404] * 6
        assert status("/", Host="evil.example") == 403


def test_what_is_no_artifact_is_refused_in_a_line(copied: Path, page: Path, tmp_path: Path) -> None:
    def told(*arguments: str) -> str:
        done = subprocess.run(["node", str(EXAMPLE / "serve.mjs"), *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        return done.stderr

    manifest = json.loads((copied / "lfm2_export.json").read_text())
    manifest["files"]["../secret.txt"] = manifest["files"]["config.json"]
    (copied / "lfm2_export.json").write_text(json.dumps(manifest))
    assert "no artifact; give the folder" in told()
    assert f"{tmp_path}: has no lfm2_export.json; give a folder" in told(str(tmp_path), "0", str(page))
    assert '"../secret.txt" leaves the folder' in told(str(copied), "0", str(page))
    assert "the page is not built; npm run build" in told(str(copied), "0", str(tmp_path))
