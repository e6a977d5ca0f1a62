"""Counters in Prometheus's text format (version 0.0.4)."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from lfm2_export import memory

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_COUNTERS = {
    "lfm2_prompt_tokens_total": "Tokens of prompts that were answered",
    "lfm2_cached_tokens_total": "Of these, tokens whose state was kept from before",
    "lfm2_generated_tokens_total": "Steps of generation that brought a token",
    "lfm2_decode_steps_total": "Passes over the program that brought each running request a token",
    "lfm2_abandoned_requests_total": "Requests whose client went away before their answer ended",
}
_GAUGES = {
    "lfm2_requests_waiting": "Requests in the queue",
    "lfm2_requests_running": "Requests that are being answered",
    "lfm2_requests_parallel_limit": "Requests that may be answered at once; 1 where rows cannot be joined",
    "lfm2_running_state_bytes": "Bytes of the states of requests that are being answered",
    "lfm2_prefix_cache_bytes": "Bytes of states that are kept",
    "lfm2_prefix_cache_entries": "States that are kept",
}
_RESPONSES = "lfm2_http_responses_total"
_MEMORY = "process_resident_memory_bytes"
_FIRST = "lfm2_time_to_first_token_seconds"
_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """For any thread. ``models``: whose counters are there from the beginning, at zero."""

    def __init__(self, models: Iterable[str]):
        self._lock = threading.Lock()
        self._models = list(models)
        self._counts = {(name, model): 0.0 for name in _COUNTERS for model in self._models}
        self._responses: dict[tuple[str, int], int] = {}
        self._firsts = {model: [0] * (len(_BOUNDS) + 1) for model in self._models}
        self._seconds = dict.fromkeys(self._models, 0.0)

    def add(self, name: str, model: str, count: float = 1) -> None:
        with self._lock:
            self._counts[name, model] += count

    def observe(self, model: str, seconds: float) -> None:
        """A request's time from its arrival to its first token."""
        with self._lock:
            self._firsts[model][sum(seconds > bound for bound in _BOUNDS)] += 1
            self._seconds[model] += seconds

    def responded(self, path: str, status: int) -> None:
        with self._lock:
            self._responses[path, status] = self._responses.get((path, status), 0) + 1

    def text(self, gauges: Mapping[str, Mapping[str, float]]) -> str:
        """All of it; ``gauges``: by model and name."""
        with self._lock:
            lines = [*self._counter_lines(), *_gauge_lines(gauges), *self._response_lines(), *self._first_lines()]
            lines += _memory_lines()
        return "\n".join(lines) + "\n"

    def _counter_lines(self) -> Iterable[str]:
        for name, what in _COUNTERS.items():
            yield from _head(name, what, "counter")
            yield from (_line(name, self._counts[name, model], model=model) for model in self._models)

    def _response_lines(self) -> Iterable[str]:
        yield from _head(_RESPONSES, "Responses by path and status", "counter")
        for (path, status), count in sorted(self._responses.items()):
            yield _line(_RESPONSES, count, path=path, status=str(status))

    def _first_lines(self) -> Iterable[str]:
        yield from _head(_FIRST, "Time from a request's arrival to its first token", "histogram")
        for model in self._models:
            counts = self._firsts[model]
            for index, bound in enumerate((*map(str, _BOUNDS), "+Inf")):
                yield _line(f"{_FIRST}_bucket", sum(counts[: index + 1]), model=model, le=bound)
            yield _line(f"{_FIRST}_sum", self._seconds[model], model=model)
            yield _line(f"{_FIRST}_count", sum(counts), model=model)


def _gauge_lines(gauges: Mapping[str, Mapping[str, float]]) -> Iterable[str]:
    for name, what in _GAUGES.items():
        yield from _head(name, what, "gauge")
        yield from (_line(name, values[name], model=model) for model, values in gauges.items())


def _memory_lines() -> Iterable[str]:
    """Under the name that Prometheus' own clients give it."""
    resident = memory.resident()
    if resident is not None:
        yield from _head(_MEMORY, "Bytes of the server that are in memory", "gauge")
        yield f"{_MEMORY} {resident}"


def _head(name: str, what: str, kind: str) -> tuple[str, str]:
    return f"# HELP {name} {what}", f"# TYPE {name} {kind}"


def _line(name: str, value: float, **labels: str) -> str:
    inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{inside}}} {value:g}" if value != int(value) else f"{name}{{{inside}}} {int(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
