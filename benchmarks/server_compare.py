"""Our server and llama.cpp's side by side: requests a second, and the time to the first token, under 1, 4, 16 clients.

    python -m benchmarks.server_compare 350m [--clients 1,4,16] [--seconds 60] [--rounds 3] [--keep FOLDER]

Random weights at a published model's shape, as our artifact (q4 in groups of 64) and as a .gguf (Q4_0): about as many
bits a weight. llama-server is built here, from the sources that llama-cpp-python ships on the package index: a quarter
of an hour on two cores. Both answer as many requests at once, on as many threads. Each client sends one request after
the other: a prompt of 32 to 256 tokens that nobody sent before, and 16 to 64 tokens to generate, streamed, drawn from
one seed for both. The servers take turns (A B A B ...), each started anew, so that whatever else the machine does falls
on both; figures are medians over the rounds. Clients run on the same machine, and take their share of it.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.llama_cpp import LlamaServer, get_llama_server
from benchmarks.processes import BenchmarkError
from benchmarks.synthetic import REAL_SHAPES
from benchmarks.toolchain import find_compiler
from lfm2_export.errors import Lfm2ExportError

OURS, RIVAL = "lfm2-export", "llama-server"
_PROMPT, _NEW = (32, 256), (16, 64)
_CONTEXT = 512  # a slot's of llama-server; ours takes what a request needs
_PATIENCE_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the clients of one server saw: ``seconds`` until the last answer; ``firsts`` seconds to the first token."""

    seconds: float
    tokens: int
    firsts: tuple[float, ...]

    @property
    def requests_per_s(self) -> float:
        return len(self.firsts) / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def first_s(self) -> float:
        return statistics.median(self.firsts)


@dataclass
class Clients:
    """Ask a server at ``port`` one request after the other, until ``end``."""

    port: int
    end: float
    vocab_size: int
    numbers: Iterator[int]
    firsts: list[float] = field(default_factory=list)
    tokens: int = 0
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        while time.monotonic() < self.end and not self.faults:
            with self.lock:
                number = next(self.numbers)
            try:
                first, tokens = ask(self.port, *request(number, self.vocab_size))
            except (OSError, http.client.HTTPException, BenchmarkError) as error:
                self.faults.append(f"{type(error).__name__}: {error}")
                return
            with self.lock:
                self.firsts.append(first)
                self.tokens += tokens


def request(number: int, vocab_size: int) -> tuple[list[int], int]:
    """A prompt, without the tokens that mean something, and how many tokens are to follow."""
    chance = random.Random(number)
    prompt = [chance.randrange(1000, vocab_size) for _ in range(chance.randint(*_PROMPT))]
    return prompt, chance.randint(*_NEW)


def ask(port: int, prompt: Sequence[int], new: int) -> tuple[float, int]:
    """Seconds to the first text, and how many tokens came.

    Raises:
        BenchmarkError, OSError, HTTPException: there was no whole answer.
    """
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    started, first, usage = time.monotonic(), None, None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise BenchmarkError(f"status {response.status}: {response.read(300)!r}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if first is None and any(choice.get("text") for choice in event.get("choices", ())):
                first = time.monotonic() - started
            usage = event.get("usage") or usage
    finally:
        connection.close()
    if first is None or usage is None:
        raise BenchmarkError("an answer without text, or without its usage")
    return first, usage["completion_tokens"]


def measured(port: int, vocab_size: int, clients: int, seconds: float, first_number: int) -> Served:
    """Raises: BenchmarkError: a request failed."""
    ask(port, *request(first_number, vocab_size))  # what is loaded on first use is loaded
    started = time.monotonic()
    asking = Clients(port, started + seconds, vocab_size, itertools.count(first_number + 1))
    threads = [threading.Thread(target=asking.run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if asking.faults:
        raise BenchmarkError(f"{len(asking.faults)} clients failed: {asking.faults[0]}")
    return Served(seconds=time.monotonic() - started, tokens=asking.tokens, firsts=tuple(asking.firsts))


@contextmanager
def running(command: Sequence[str], port: int) -> Iterator[int]:
    """A server's port, once it answers at /health.

    Raises:
        BenchmarkError: it ended before.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + _PATIENCE_S
            while not _is_healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = " ".join(re.sub(r"\s+", " ", log.read()).split()[-40:])
                    raise BenchmarkError(f"{Path(command[0]).name}: it does not answer: {said}")
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()
            process.wait()


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def our_command(artifact: Path, port: int, threads: int, parallel: int) -> list[str]:
    command = [sys.executable, "-m", "lfm2_export.cli", "serve", str(artifact), "--port", str(port)]
    return [*command, "--threads", str(threads), "--parallel", str(parallel)]


def rival_command(server: LlamaServer, model: Path, port: int, threads: int, parallel: int) -> list[str]:
    return server.command(model, port=port, threads=threads, parallel=parallel, context=_CONTEXT)


def table(found: dict[tuple[str, int], list[Served]], clients: Sequence[int]) -> str:
    """Medians over the rounds; ours over the rival's where both are there."""
    lines = [f"{'clients':>8}  {'server':<14} {'requests/s':>11} {'tokens/s':>9} {'first token, s':>15}"]
    for count in clients:
        medians = {}
        for system in (OURS, RIVAL):
            if runs := found.get((system, count)):
                medians[system] = [_median(runs, of) for of in (_REQUESTS, _TOKENS, _FIRST)]
                lines.append(f"{count:>8}  {system:<14} " + "{:>11.2f} {:>9.1f} {:>15.2f}".format(*medians[system]))
        if len(medians) == 2:
            ratios = [ours / its for ours, its in zip(medians[OURS], medians[RIVAL], strict=True)]
            lines.append(f"{count:>8}  {'ratio':<14} " + "{:>11.2f} {:>9.2f} {:>15.2f}".format(*ratios))
    return "\n".join(lines)


_REQUESTS: Callable[[Served], float] = lambda run: run.requests_per_s  # noqa: E731
_TOKENS: Callable[[Served], float] = lambda run: run.tokens_per_s  # noqa: E731
_FIRST: Callable[[Served], float] = lambda run: run.first_s  # noqa: E731


def _median(runs: Sequence[Served], of: Callable[[Served], float]) -> float:
    return statistics.median(map(of, runs))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(REAL_SHAPES), metavar="SHAPE", help=", ".join(REAL_SHAPES))
    parser.add_argument("--clients", type=_numbers, default=(1, 4, 16), metavar="N,N", help="default: 1,4,16")
    parser.add_argument("--seconds", type=float, default=60, help="of each measurement (default: 60)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=16, metavar="N", help="requests at once (default: 16)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where files are looked for, and left")
    parser.add_argument("--systems", type=_systems, default=(OURS, RIVAL), help=f"default: {OURS},{RIVAL}")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="lfm2-export-") as scratch:
            print(table(compared(options, options.keep or Path(scratch)), options.clients))
    except Lfm2ExportError as error:
        print(f"server_compare: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def compared(options: argparse.Namespace, folder: Path) -> dict[tuple[str, int], list[Served]]:
    from benchmarks.server_models import prepare

    rival = get_llama_server(find_compiler()) if RIVAL in options.systems else None
    pair = prepare(folder, options.shape)
    found: dict[tuple[str, int], list[Served]] = {}
    numbers = itertools.count(step=100_000)
    for turn, count in itertools.product(range(options.rounds), options.clients):
        first = next(numbers)
        for system in options.systems:
            port = free_port()
            command = our_command(pair.artifact, port, options.threads, options.parallel)
            if system == RIVAL and rival is not None:
                command = rival_command(rival, pair.rival, port, options.threads, options.parallel)
            with running(command, port):
                run = measured(port, pair.vocab_size, count, options.seconds, first)
            found.setdefault((system, count), []).append(run)
            print(
                f"round {turn + 1}, {count} clients, {system}: {len(run.firsts)} requests, "
                f"{run.requests_per_s:.2f}/s, first token after {run.first_s:.2f} s",
                file=sys.stderr,
            )
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _systems(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if not set(chosen) <= {OURS, RIVAL}:
        raise argparse.ArgumentTypeError(f"give some of {OURS},{RIVAL}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
