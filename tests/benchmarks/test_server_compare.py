"""Two servers compared: the same requests for both, what a client sees, medians and ratios; no server is built here."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks import server_compare
from benchmarks.llama_cpp import LlamaServer
from benchmarks.processes import BenchmarkError
from benchmarks.server_compare import OURS, RIVAL, Served, ask, free_port, measured, request, running, table
from benchmarks.server_models import padded_tokenizer

USAGE: Any = {"choices": [], "usage": {"completion_tokens": 7}}


def text(said: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": said}]}


class Server(HTTPServer):
    events: Sequence[dict[str, Any]] = (text(""), text("a"), text("b"), USAGE)
    status = 200


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.server.status)
        self.end_headers()
        for event in self.server.events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_a_client_counts_from_the_first_text_to_the_usage(server: Server) -> None:
    first, tokens = ask(server.server_port, [1, 2], 7)
    assert (first > 0, tokens) == (True, 7)
    for events in ((text(""), USAGE), (text("a"),)):
        server.events = events
        with pytest.raises(BenchmarkError, match="without text, or without its usage"):
            ask(server.server_port, [1, 2], 7)
    server.status = 500
    with pytest.raises(BenchmarkError, match="status 500"):
        ask(server.server_port, [1, 2], 7)


def test_clients_ask_until_the_time_is_over_and_a_fault_ends_it(server: Server) -> None:
    run = measured(server.server_port, 60_000, 3, 0.3, 0)
    assert run.tokens == 7 * len(run.firsts) > 21
    server.events = ()
    with pytest.raises(BenchmarkError, match="without text"):
        measured(server.server_port, 60_000, 2, 0.3, 0)


def test_both_get_the_same_requests() -> None:
    assert request(5, 60_000) == request(5, 60_000) != request(6, 60_000)
    for number in range(50):
        prompt, new = request(number, 60_000)
        assert (32 <= len(prompt) <= 256, 16 <= new <= 64, min(prompt) >= 1000) == (True, True, True)


def test_a_server_that_ends_says_why() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(BenchmarkError, match="it does not answer: no such model"), running(command, free_port()):
        pass


def test_commands_and_the_table(tmp_path: Path) -> None:
    ours = server_compare.our_command(tmp_path, 1234, 2, 16)
    rival = server_compare.rival_command(LlamaServer(path=tmp_path / "x", package=""), tmp_path / "m", 1234, 2, 16)
    assert ours[3:] == ["serve", str(tmp_path), "--port", "1234", "--threads", "2", "--parallel", "16"]
    assert rival[rival.index("-np") + 1] == "16"
    assert rival[rival.index("-c") + 1] == str(16 * 512)
    found = {
        (OURS, 4): [Served(seconds=2, tokens=20, firsts=(0.1, 0.2, 0.3, 0.4))] * 2,
        (RIVAL, 4): [Served(seconds=4, tokens=20, firsts=(0.5, 0.5, 0.5, 0.5))],
        (OURS, 16): [Served(seconds=1, tokens=2, firsts=(1.0,))],
    }
    lines = [line.split() for line in table(found, [4, 16]).splitlines()[1:]]
    assert lines == [
        ["4", OURS, "2.00", "10.0", "0.25"],
        ["4", RIVAL, "1.00", "5.0", "0.50"],
        ["4", "ratio", "2.00", "2.00", "0.50"],
        ["16", OURS, "1.00", "2.0", "1.00"],
    ]


def test_every_id_has_a_token() -> None:
    tokenizer = padded_tokenizer(4000)
    ids = {*tokenizer["model"]["vocab"].values(), *(added["id"] for added in tokenizer["added_tokens"])}
    assert ids == set(range(4000))
