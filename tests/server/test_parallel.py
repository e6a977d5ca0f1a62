"""Requests that are answered together: each gets what it would get alone, whoever else comes, goes or is given up.

``Batch`` is driven step by step, so that every interleaving comes from a seed; over HTTP it is in ``test_answers.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2_export import complete, load_runner
from lfm2_export.backends.base import JoinsRows
from lfm2_export.backends.onnx import buffers, variants
from lfm2_export.backends.onnx.buffers import StateBuffers
from lfm2_export.constraints import Constraint
from lfm2_export.errors import GenerationError, ResourceError
from lfm2_export.generation import continue_from
from lfm2_export.logprobs import choice_of
from lfm2_export.server import batching
from lfm2_export.server.batching import Batch
from lfm2_export.server.generating import Asked, Done, Piece
from lfm2_export.server.job import Job, Output
from lfm2_export.server.metrics import Metrics
from lfm2_export.server.prefixes import PrefixCache
from lfm2_export.server.rows import rows_of, why_alone
from lfm2_export.server.served import Model
from tests.server.conftest import opened
from tests.server.script_runner import scripted

pytestmark = pytest.mark.skipif(variants.own_library() is None, reason="no compiler for our operators")
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}}, "required": ["ok"]}
WORDS = ("list", "dict", "file", "loop", "class", "string", "what is", "the", "def f(x):", "import os")
# How requests differ beside their prompts; ``grammar``: their text is JSON of SCHEMA.
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"config": {"do_sample": True, "temperature": 1.3, "seed": 5}},
    {"config": {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": 6}, "top_logprobs": 2},
    {"grammar": True},
    {"stops": ("e", "\n")},
    {"config": {"repetition_penalty": 1.2}, "top_logprobs": 0},
    {"grammar": True, "config": {"do_sample": True, "temperature": 1.0, "seed": 7}},
)


@dataclass
class Request:
    """What is asked for, and what came. ``patience``: pieces after which its client goes away; None: it waits."""

    kind: dict[str, Any]
    prompt: tuple[int, ...]
    new: int
    patience: int | None = None
    outputs: list[Output] = field(default_factory=list)

    @property
    def pieces(self) -> list[Piece]:
        return [output for output in self.outputs if isinstance(output, Piece)]

    @property
    def done(self) -> Done | None:
        return next((output for output in self.outputs if isinstance(output, Done)), None)

    def asked(self, model: Model) -> Asked:
        config = replace(model.settings, max_new_tokens=self.new, **self.kind.get("config", {}))
        options = {name: value for name, value in self.kind.items() if name not in ("config", "grammar")}
        return Asked(prompt=self.prompt, config=config, constraint=self.constraint(model), **options)

    def constraint(self, model: Model) -> Constraint | None:
        return model.grammars.of_schema(SCHEMA) if "grammar" in self.kind else None

    def job(self, model: Model) -> Job:
        def deliver(output: Output) -> None:
            self.outputs.append(output)
            if self.patience is not None and len(self.outputs) >= self.patience:
                job.cancel()

        job = Job(asked=self.asked(model), deliver=deliver)
        return job


def said(request: Request) -> tuple[str, str, int, list[Any]]:
    """An answer, as ``alone`` says it."""
    assert request.done is not None, request.outputs[-1]
    choices = [choice for piece in request.pieces for choice in piece.logprobs]
    text = "".join(piece.text for piece in request.pieces)
    return text, request.done.finish_reason, request.done.completion_tokens, choices


class Alone:
    """The same request on a runner that does nothing else, by the library's own loop."""

    def __init__(self, folder: Path, model: Model):
        self._runner, self._model = load_runner(folder, scheme="q4", threads=1), model
        self._known: dict[str, tuple[str, str, int, list[Any]]] = {}

    def __call__(self, request: Request) -> tuple[str, str, int, list[Any]]:
        key = repr((request.kind, request.prompt, request.new))
        if key not in self._known:
            self._known[key] = self._answer(request)
        return self._known[key]

    def _answer(self, request: Request) -> tuple[str, str, int, list[Any]]:
        asked, tokenizer, tokens, choices = request.asked(self._model), self._model.tokenizer, list[int](), list[Any]()
        self._runner.reset()
        logits = self._runner.prefill([list(request.prompt)])
        reason, text = "length", ""
        for event in continue_from(self._runner, logits, [request.prompt], asked.config, constraint=asked.constraint):
            tokens.append(event.token)
            if asked.top_logprobs is not None and event.token not in asked.config.stop_tokens:
                assert event.logits is not None
                choices.append(choice_of(event.token, event.logits, asked.top_logprobs, tokenizer))
            text = tokenizer.decode(tokens, skip_special_tokens=None, stop_tokens=asked.config.stop_tokens)
            ends = [text.index(stop) for stop in asked.stops if stop in text]
            if ends or event.finish_reason == "stop":
                text, reason = text[: min(ends, default=len(text))], "stop"
                break
        return text, reason, len(tokens), choices


def requests(model: Model, seed: int, count: int) -> list[Request]:
    """Prompts of 1 to 300 tokens, of which some begin alike; a third are given up on the way."""
    chance, made = np.random.default_rng(seed), []
    for index in range(count):
        words = list(chance.choice(WORDS, int(chance.integers(1, 120))))
        text = ("You explain Python. " * 20 if chance.random() < 0.3 else "") + " ".join(words)
        made.append(
            Request(
                kind=KINDS[index % len(KINDS)],
                prompt=tuple(model.tokenizer.encode(text)),
                new=int(chance.integers(1, 40)),
                patience=int(chance.integers(1, 9)) if chance.random() < 1 / 3 else None,
            )
        )
    return made


def play(batch: Batch, model: Model, waiting: Sequence[Request], seed: int) -> None:
    """Requests come at random; until all have ended."""
    chance, left = np.random.default_rng(seed), list(waiting)
    for _ in range(10_000):
        if left and batch.takes and chance.random() < 0.4:
            batch.begin(left.pop(0).job(model))
        if not left and not batch.jobs:
            return
        batch.work()
    raise AssertionError("it never ends")


def batch_of(model: Model, parallel: int = 5, cache_bytes: int = 3 << 20) -> Batch:
    rows = rows_of(model.runner, parallel)
    assert rows.limit == parallel
    return Batch(model.name, rows, model.tokenizer, PrefixCache(cache_bytes), Metrics([model.name]))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return opened(folder)


@pytest.fixture(scope="module")
def alone(folder: Path, model: Model) -> Alone:
    return Alone(folder, model)


@pytest.mark.parametrize("seed", range(3))
def test_every_answer_is_that_of_the_request_alone(model: Model, alone: Alone, seed: int) -> None:
    asked = requests(model, seed, 21)
    play(batch_of(model), model, asked, seed)
    ended = [request for request in asked if request.done is not None]
    print(f"{len(ended)} of {len(asked)} ended, the others were given up; {sum(len(r.pieces) for r in asked)} pieces")
    assert len(ended) >= 10
    for request in ended:
        assert said(request) == alone(request)
    for request in asked:
        if request.done is None:
            text = "".join(piece.text for piece in request.pieces)
            assert request.patience is not None
            assert text == alone(request)[0][: len(text)]


def test_a_join_that_swaps_rows_is_noticed(model: Model, alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    right = StateBuffers.join

    def swapped(self: StateBuffers, *args: Any) -> None:
        right(self, *args)
        for array in (*self.conv.values(), *self.kv.values()):
            array[[0, -1]] = array[[-1, 0]]

    monkeypatch.setattr(StateBuffers, "join", swapped)
    asked = requests(model, 0, 14)
    play(batch_of(model), model, asked, 0)
    wrong = [request for request in asked if request.done and said(request) != alone(request)]
    print(f"{len(wrong)} of {sum(request.done is not None for request in asked)} answers differ")
    assert len(wrong) > 3


def plain(model: Model, text: str, new: int, **options: Any) -> Request:
    return Request(kind={}, prompt=tuple(model.tokenizer.encode(text)), new=new, **options)


def test_a_long_prompt_does_not_stop_those_that_are_answered(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_PART", 16)
    batch, first = batch_of(model, cache_bytes=0), plain(model, "def f(x):", 200)
    late = plain(model, "what is a list? " * 60, 2)
    batch.begin(first.job(model))
    batch.work()
    batch.begin(late.job(model))
    steps = 0
    while not late.pieces:
        before = len(first.pieces)
        batch.work()
        steps += len(first.pieces) - before
    parts = -(-len(late.prompt) // 16)
    print(f"{len(late.prompt)} tokens of a prompt in {parts} parts, {steps} tokens of the other answer meanwhile")
    assert steps == parts > 10


def test_the_state_after_an_answer_is_kept_and_is_that_of_its_tokens(model: Model, folder: Path) -> None:
    prefixes, lone = PrefixCache(64 << 20), load_runner(folder, scheme="q4", threads=1)
    batch = Batch(model.name, rows_of(model.runner, 3), model.tokenizer, prefixes, Metrics([model.name]))
    prompts = [
        model.tokenizer.encode_chat([{"role": "user", "content": f"What is a {what}?"}])
        for what in ("list", "dictionary", "file")
    ]
    asked = [Request(kind={}, prompt=tuple(prompt), new=12) for prompt in prompts]
    play(batch, model, asked, 1)
    for request in asked:
        config = request.asked(model).config
        (answer,) = complete(lone, [request.prompt], config)
        held = [*request.prompt, *answer.tokens[:-1]]
        kept = prefixes.longest([*held, 5])
        assert kept is not None
        assert kept.length == len(held) > len(request.prompt) + 5
        lone.reset()
        lone.prefill([held])
        for name, tensor in lone.snapshot().tensors.items():
            np.testing.assert_array_equal(kept.snapshot.tensors[name], tensor, err_msg=name)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, is_short: Callable[[int, int], bool]) -> None:
    """Room for so many rows and positions is refused."""
    right = buffers.check_state_fits

    def check(spec: Any, rows: int, positions: int) -> None:
        if is_short(rows, positions):
            raise ResourceError("no room")
        right(spec, rows, positions)

    monkeypatch.setattr(buffers, "check_state_fits", check)


def test_a_row_that_has_no_room_waits_until_another_leaves(
    model: Model, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, lambda rows, _: rows > 2)
    asked = [plain(model, text, 20) for text in ("list", "dict of", "what is a file?", "loop")]
    play(batch_of(model), model, asked, 3)
    assert [said(request) for request in asked] == [alone(request) for request in asked]


def test_where_an_answer_cannot_grow_it_ends_and_the_others_go_on(
    model: Model, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, lambda rows, positions: rows > 1 and positions > 64)
    asked = [plain(model, "list", 20), plain(model, "what is a file? " * 9, 60), plain(model, "import", 20)]
    assert len(asked[1].prompt) < 64
    play(batch_of(model), model, asked, 3)
    assert [said(request) for request in asked[::2]] == [alone(request) for request in asked[::2]]
    assert isinstance(asked[1].outputs[-1], ResourceError)
    assert len(asked[1].pieces) > 1


def test_a_row_whose_sampler_fails_ends_alone(model: Model, alone: Alone) -> None:
    class Fails:
        def allowed(self) -> np.ndarray:
            return np.full(model.runner.vocab_size, self.count < 4)

        def accept(self, token: int) -> None:
            self.count += 1

        count = 0

    batch, good, bad = batch_of(model), plain(model, "list", 20), plain(model, "dict", 20)
    broken = bad.job(model)
    broken.asked = replace(broken.asked, constraint=Fails())
    batch.begin(good.job(model))
    batch.work()
    batch.begin(broken)
    play(batch, model, [], 0)
    assert said(good) == alone(good)
    assert isinstance(bad.outputs[-1], GenerationError)
    assert len(bad.pieces) == 4


def test_others_are_answered_one_at_a_time_and_it_is_said(folder: Path) -> None:
    stock = load_runner(folder, scheme="q4", threads=1, kernels="stock")
    assert isinstance(stock, JoinsRows)
    assert rows_of(stock, 4).limit == 1
    assert why_alone(stock) == "these kernels give other bits to rows that are computed together"
    assert why_alone(scripted("Hi").runner) == "this runner has the state of one"
    assert why_alone(opened(folder).runner) is None
