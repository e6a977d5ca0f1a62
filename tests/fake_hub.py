"""As much of the Hub's HTTP interface as downloads and pushes take, on this machine.

In: the files of ``org/model``. Out: a server on 127.0.0.1 that huggingface_hub is pointed at; what is pushed lies in
``pushed``, by repository.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {
    "org/nothing": (404, "RepoNotFound"),
    "org/gated": (403, "GatedRepo"),
    "org/broken": (500, ""),
}
TOKEN = "hf_right"
_COMMIT_CALL = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/(?P<verb>preupload|commit|branch)/(?P<revision>.+)")


@dataclass(kw_only=True)
class Hub:
    """``files``: of ``org/model``, which a test may change; ``asked``: paths of files that were given out;
    ``settings``: of repositories that were made; ``pushed``: by repository and branch; ``large``: bytes from which a
    file goes through LFS."""

    files: dict[str, bytes]
    asked: list[str] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    pushed: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    large: int = 50_000


class FakeHub(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def place(self) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host!s}:{port}"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        for name, (status, code) in REFUSALS.items():
            if name in path:
                self.answer(b"{}", status, {"X-Error-Code": code})
                return
        if path.endswith(("/revision/main", f"/revision/{COMMIT}")):
            self.answer(json.dumps({"id": "org/model", "sha": COMMIT, "siblings": []}).encode())
            return
        if "/revision/" in path:
            self.answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
            return
        if "/tree/" in path:
            self.answer(json.dumps([self.entry(name) for name in self.hub.files]).encode())
            return
        revision, _, name = path.partition("/resolve/")[2].partition("/")
        if revision not in ("main", COMMIT):
            self.answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
            return
        data = self.hub.files.get(name)
        if data is None:
            self.answer(b"{}", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        if self.command == "GET":
            self.hub.asked.append(name)
        self.answer(data, headers={"ETag": f'"{sha256(data)}"', "X-Repo-Commit": COMMIT})

    def entry(self, name: str) -> dict[str, Any]:
        data = self.hub.files[name]
        lfs = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
        return {"type": "file", "path": name, "size": len(data), "oid": "0" * 40, "lfs": lfs}

    def do_PUT(self) -> None:
        data = self.body()
        self.hub.objects[sha256(data)] = data
        self.answer(b"")

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(b'{"error": "Invalid username or password."}', 401)
            return
        if path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
            return
        if path == "/api/repos/create":
            self.create(json.loads(body))
            return
        if path.endswith("/info/lfs/objects/batch"):
            self.say({"transfer": "basic", "objects": [self.to_upload(o) for o in json.loads(body)["objects"]]})
            return
        found = _COMMIT_CALL.fullmatch(path)
        if found is None:
            self.answer(b"{}", 404)
            return
        {"preupload": self.preupload, "commit": self.commit, "branch": self.branch}[found["verb"]](
            found["id"], found["revision"], body
        )

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        if name in REFUSALS:
            self.answer(b'{"error": "You do not have the rights"}', 403)
            return
        if name in self.hub.settings:
            self.answer(json.dumps({"url": f"{self.place}/{name}"}).encode(), 409)
            return
        self.hub.settings[name] = asked
        self.say({"url": f"{self.place}/{name}", "name": name})

    def to_upload(self, one: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.place}/lfs/{one['oid']}"
        return {**one, "actions": {"upload": {"href": href, "header": {}}}}

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        files = json.loads(body)["files"]
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["size"] >= self.hub.large else "regular"} for f in files]
        self.say({"files": [{**one, "shouldIgnore": False, "oid": None} for one in modes]})

    def commit(self, name: str, revision: str, body: bytes) -> None:
        files = self.hub.pushed.setdefault((name, revision), {})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        url = f"{self.place}/{name}/commit/{COMMIT}"
        self.say({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def branch(self, name: str, revision: str, body: bytes) -> None:
        self.hub.pushed.setdefault((name, revision), {})
        self.say({})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def say(self, value: object) -> None:
        self.answer(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub's in ``folder``, and a Hub that cannot be reached."""
    cache = folder / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    use_endpoint(monkeypatch, f"http://127.0.0.1:{closed_port()}")
    return cache


@contextlib.contextmanager
def serving(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running Hub with these files of ``org/model``."""
    hub = Hub(files=files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (FakeHub,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield hub
    server.shutdown()
    server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
