"""The page at ``/`` over HTTP: its files and no others, what they may do, and who gets them. What it does is tested in
``tests/web``."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2 as httpx
import pytest

import lfm2_export.server
from lfm2_export.server.access import Access
from tests.server.conftest import Running, Serve
from tests.server.script_runner import scripted

FILES = Path(lfm2_export.server.__file__).parent / "page"
URLS = {"/" if file.name == "index.html" else f"/{file.name}": file for file in FILES.iterdir()}


@pytest.fixture(scope="module")
def locked(serve: Serve) -> Running:
    return serve(scripted("Hello"), access=Access(key="secret"))


@pytest.fixture(scope="module")
def open_to_all(serve: Serve) -> Running:
    return serve(scripted("Hello"))


def test_the_page_comes_without_the_key_and_the_api_does_not(locked: Running) -> None:
    with locked.http() as client:
        for url, file in URLS.items():
            response = client.get(url)
            assert (response.status_code, response.content) == (200, file.read_bytes())
            assert response.headers["content-type"].startswith(f"text/{_kind(file)}")
        for url in ("/v1/models", "/metrics"):
            assert client.get(url).status_code == 401


def _kind(file: Path) -> str:
    return {".html": "html", ".css": "css", ".js": "javascript"}[file.suffix]


def test_the_page_may_load_and_ask_this_server_alone(locked: Running) -> None:
    with locked.http() as client:
        policies = {client.get(url).headers["content-security-policy"] for url in URLS}
    assert len(policies) == 1
    rules = dict(rule.strip().split(" ", 1) for rule in policies.pop().split(";"))
    assert rules["default-src"] == "'none'"
    assert {rules[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert rules["frame-ancestors"] == "'none'"


def test_nothing_in_the_page_is_from_elsewhere_or_inline() -> None:
    """The policy would refuse it; and no text becomes HTML."""
    for file in FILES.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\bon\w+=", text)
    assert not re.search(r"<script(?![^>]* src=)|<style|style=", (FILES / "index.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path",
    [
        "/app.py",
        "/page/index.html",
        "/../app.py",
        "/..%2fapp.py",
        "/%2e%2e/%2e%2e/cli.py",
        "//etc/passwd",
        "/index.html",
    ],
)
def test_no_other_file_is_given(open_to_all: Running, path: str) -> None:
    url = httpx.URL(open_to_all.url).copy_with(raw_path=path.encode())  # as it is, dots and all
    assert httpx.get(url).status_code == 404


def test_a_name_that_points_to_this_machine_gets_no_page(locked: Running) -> None:
    with locked.http(Host="evil.example") as client:
        assert client.get("/").status_code == 403


def test_models_say_whether_they_generate_text(open_to_all: Running) -> None:
    with open_to_all.http() as client:
        assert [model["kind"] for model in client.get("/v1/models").json()["data"]] == ["decoder"]


def test_metrics_tell_the_servers_memory(open_to_all: Running) -> None:
    found = re.search(r"^process_resident_memory_bytes (\d+)$", open_to_all.http().get("/metrics").text, re.MULTILINE)
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not say how much memory a process has")
    assert found is not None
    print(f"{int(found[1]):,} bytes")
    assert 20e6 < int(found[1]) < 20e9
