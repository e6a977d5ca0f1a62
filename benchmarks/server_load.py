"""A server under load: clients with prompts and answers of mixed lengths, a third of them going away in mid-stream.

In: an artifact's folder. Out: answers, requests a second, time to the first token, how many requests shared a pass,
memory, on stdout; exit code 1 where an answer that ended is not what the same request gives alone (greedy), or an
answer ended in an error.

    python -m benchmarks.server_load DIR --clients 16 --seconds 300

``server_compare.py`` measures the server beside llama.cpp's.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai
import psutil

from lfm2_export import GenerationConfig, Tokenizer, complete, load_runner

_TOPICS = ("a list", "a dictionary", "a file", "os.path", "a generator", "json", "a class", "an iterator")
_CACHE_MB = 64


def asked(number: int) -> tuple[list[dict[str, str]], int]:
    """One of 96 requests: messages, and how many tokens their answer may have."""
    topic = _TOPICS[number % len(_TOPICS)]
    messages = [{"role": "user", "content": f"What is {topic}? " * (1 + number % 12 * 3)}]
    if number % 3 == 0:
        messages = [{"role": "system", "content": "You explain Python. " * 20}, *messages]
    return messages, 4 + number % 7 * 12


class Load:
    """What the clients saw."""

    def __init__(self, url: str, model: str, seconds: float):
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        self.model, self.end = model, time.monotonic() + seconds
        self.answers: list[tuple[int, str]] = []
        self.firsts: list[float] = []
        self.left = 0
        self.errors: list[str] = []

    def run(self, seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < self.end:
            try:
                self._ask(chance.randrange(96), leave=chance.random() < 1 / 3)
            except openai.OpenAIError as error:
                self.errors.append(repr(error))

    def _ask(self, number: int, *, leave: bool) -> None:
        messages, new = asked(number)
        started, pieces = time.monotonic(), list[str]()
        options: dict[str, Any] = {"model": self.model, "messages": messages, "max_tokens": new, "stream": True}
        with self.client.chat.completions.create(**options) as stream:
            for chunk in stream:
                if not any(pieces) and chunk.choices[0].delta.content:
                    self.firsts.append(time.monotonic() - started)
                pieces.append(chunk.choices[0].delta.content or "")
                if leave and len(pieces) > 3:
                    self.left += 1
                    return
        self.answers.append((number, "".join(pieces)))


def alone(folder: Path, numbers: set[int]) -> dict[int, str]:
    tokenizer, runner = Tokenizer.from_dir(folder), load_runner(folder)
    settings = GenerationConfig.from_file(folder / "generation_config.json")
    answers = {}
    for number in numbers:
        messages, new = asked(number)
        (done,) = complete(runner, [tokenizer.encode_chat(messages)], settings.override(max_new_tokens=new))
        answers[number] = tokenizer.decode(done.tokens, skip_special_tokens=None, stop_tokens=settings.stop_tokens)
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description="a server under load")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    command = [sys.executable, "-m", "lfm2_export.cli", "serve", str(options.folder), "--port", "0"]
    server = subprocess.Popen([*command, "--cache-memory", str(_CACHE_MB)], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    url = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+/v1", line)))
    load = Load(url, options.folder.resolve().name, options.seconds)
    threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would stop the server
    memory = measured(load, options.clients, psutil.Process(server.pid), options.seconds)
    shared = tokens_a_pass(url)
    server.terminate()
    server.wait()
    print(f"{shared:.1f} requests shared a pass over the program (mean)")
    return told(load, memory, options)


def tokens_a_pass(url: str) -> float:
    """Tokens that a decode step brought: one for each request that shared it. A request's first token needs none."""
    with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics") as response:
        lines = response.read().decode().splitlines()
    tokens, firsts, steps = (
        sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))
        for name in (
            "lfm2_generated_tokens_total",
            "lfm2_time_to_first_token_seconds_count",
            "lfm2_decode_steps_total",
        )
    )
    return (tokens - firsts) / steps


def told(load: Load, memory: list[int], options: argparse.Namespace) -> int:
    expected = alone(options.folder, {number for number, _ in load.answers})
    wrong = [number for number, text in load.answers if text != expected[number]]
    count = len(load.answers)
    print(f"{options.clients} clients, {options.seconds:g} s: {count} answers, {load.left} left in mid-stream")
    print(f"{(count + load.left) / options.seconds:.1f} requests/s, {len(load.errors)} errors {load.errors[:1]}")
    print(f"first text after {statistics.median(load.firsts):.2f} s (median)")
    print(f"{len(wrong)} answers ({len(expected)} different requests) are not those of the request alone")
    print(f"memory after each quarter, with {_CACHE_MB} MB for states: {memory} MB")
    return 1 if wrong or load.errors else 0


def measured(load: Load, clients: int, server: psutil.Process, seconds: float) -> list[int]:
    """Runs the clients; the server's memory after each quarter of the time, in MB."""
    threads = [threading.Thread(target=load.run, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    memory = []
    for _ in range(4):
        time.sleep(seconds / 4)
        memory.append(server.memory_info().rss >> 20)
    for thread in threads:
        thread.join()
    return memory


if __name__ == "__main__":
    sys.exit(main())
