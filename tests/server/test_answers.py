"""Answers of the server through OpenAI's own client, on a real program."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from lfm2_export import GenerationConfig, Tokenizer, complete, load_runner
from lfm2_export.backends.onnx.variants import own_library
from tests.server.conftest import Running, Serve, opened
from tests.shows import shows

QUESTION: Any = [{"role": "user", "content": "What is a dictionary?"}]


def alone(folder: Path, messages: Any, new: int) -> str:
    """The greedy answer of a runner that does nothing else."""
    tokenizer, runner = Tokenizer.from_dir(folder), load_runner(folder, scheme="q4", threads=1)
    settings = GenerationConfig.from_file(folder / "generation_config.json").override(max_new_tokens=new)
    (done,) = complete(runner, [tokenizer.encode_chat(messages)], settings)
    return tokenizer.decode(done.tokens, skip_special_tokens=None, stop_tokens=settings.stop_tokens)


@shows("serve", "greedy", "chat", family="lfm2", scheme="q4")
def test_a_chat_completion_is_the_models_greedy_answer(server: Running, folder: Path) -> None:
    answer = server.openai().chat.completions.create(model="tiny-dense", messages=QUESTION, max_tokens=40)
    assert answer.choices[0].message.content == alone(folder, QUESTION, 40)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@shows("serve", "streaming", family="lfm2", scheme="q4")
def test_a_stream_is_the_whole_answer_in_pieces(server: Running, folder: Path) -> None:
    stream = server.openai().chat.completions.create(
        model="tiny-dense", messages=QUESTION, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == alone(folder, QUESTION, 8)
    assert len(pieces) > 5
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage.completion_tokens == 8


def test_models_and_health(server: Running) -> None:
    (model,) = server.openai().models.list().data
    assert server.openai().models.retrieve("tiny-dense").id == model.id == "tiny-dense"
    assert server.http().get("/health").json() == {"status": "ok"}


def test_a_plain_completion_of_text_or_tokens(server: Running, folder: Path) -> None:
    tokens = Tokenizer.from_dir(folder).encode("def f(")
    texts = [
        server.openai().completions.create(model="tiny-dense", prompt=prompt, max_tokens=6).choices[0].text
        for prompt in ("def f(", tokens, [tokens])
    ]
    assert texts[0] == texts[1] == texts[2] != ""
    other = server.openai().completions.create(model="tiny-dense", prompt="class A", max_tokens=6).choices[0].text
    assert other != texts[0]


@shows("serve", "sampling", family="lfm2", scheme="q4")
def test_sampling_follows_its_seed(server: Running) -> None:
    def sampled(seed: int, temperature: float) -> str:
        answer = server.openai().chat.completions.create(
            model="tiny-dense", messages=QUESTION, max_tokens=24, seed=seed, temperature=temperature
        )
        return str(answer.choices[0].message.content)

    assert sampled(1, 1.5) == sampled(1, 1.5)
    assert len({sampled(seed, 1.5) for seed in range(4)}) > 1
    assert len({sampled(seed, 0) for seed in range(4)}) == 1


def test_stop_strings_end_the_text_and_never_show(server: Running, folder: Path) -> None:
    whole = alone(folder, QUESTION, 40)
    stop = whole[8:20]
    create = server.openai().chat.completions.create
    answer = create(model="tiny-dense", messages=QUESTION, max_tokens=40, stop=[stop, "never"])
    assert answer.choices[0].message.content == whole[:8]
    assert answer.choices[0].finish_reason == "stop"
    stream = create(model="tiny-dense", messages=QUESTION, max_tokens=40, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole[:8]


def test_logprobs_are_the_programs_own(server: Running) -> None:
    create = server.openai().chat.completions.create
    answer = create(model="tiny-dense", messages=QUESTION, max_tokens=5, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    for entry in entries:
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0, "greedy: the likeliest"
        assert [one.logprob for one in entry.top_logprobs] == sorted(
            (o.logprob for o in entry.top_logprobs), reverse=True
        )
        assert bytes(entry.bytes).decode() == entry.token
    stream = create(model="tiny-dense", messages=QUESTION, max_tokens=5, logprobs=True, stream=True)
    streamed = [e.token for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == [entry.token for entry in entries]
    plain = server.openai().completions.create(model="tiny-dense", prompt="def f(", max_tokens=3, logprobs=2)
    assert "".join(plain.choices[0].logprobs.tokens) == plain.choices[0].text
    assert plain.choices[0].logprobs.text_offset[1] == len(plain.choices[0].logprobs.tokens[0])


def is_exact(server: Running) -> bool:
    """Whether answers have the bits of the same request alone: they must, wherever our kernels run."""
    exact = server.models.all()[0].model.runner.verifies_exactly
    assert exact == (own_library() is not None)
    return exact


@shows("serve", "prefixes", family="lfm2", scheme="q4")
def test_a_second_turn_prefills_only_what_is_new_and_answers_as_alone(server: Running, folder: Path) -> None:
    """On our kernels, where a token's logits do not depend on how a prompt was cut."""
    client, messages = server.openai(), [*QUESTION]
    cached = []
    for text in ("And a list?", "And what is a tuple?", "Why?"):
        answer = client.chat.completions.create(model="tiny-dense", messages=messages, max_tokens=24)
        said = answer.choices[0].message.content
        cached.append((answer.usage.prompt_tokens_details.cached_tokens, answer.usage.prompt_tokens))
        if is_exact(server):
            assert said == alone(folder, messages, 24)
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": text}]
    print("cached and prompt tokens of each turn:", cached)
    for (kept, _), (_, before) in zip(cached[1:], cached[:-1], strict=True):
        assert kept >= before, "all of the turn before"
    assert 0 < server.count("lfm2_prefix_cache_bytes") <= 512 << 20


@shows("serve", "prefixes", family="lfm2", scheme="q4")
def test_prompts_that_begin_alike_share_that_beginning(serve: Serve, folder: Path) -> None:
    server = serve(opened(folder, "shared"))
    system = {"role": "system", "content": "You are a guide to the standard library. " * 12}

    def cached(text: str) -> tuple[int, int]:
        messages: Any = [system, {"role": "user", "content": text}]
        usage = server.openai().chat.completions.create(model="shared", messages=messages, max_tokens=1).usage
        return usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens

    counts = [cached(text) for text in ("What is os?", "Why io?", "How does math work?")]
    print("cached and prompt tokens:", counts)
    assert counts[0][0] == counts[1][0] == 0, "the second shows where they part"
    assert counts[2][0] > 100


def test_without_memory_for_states_nothing_is_kept(serve: Serve, folder: Path) -> None:
    from lfm2_export.server.limits import Limits

    server = serve(opened(folder, "bare"), limits=Limits(cache_bytes=0))
    for _ in range(2):
        usage = server.openai().chat.completions.create(model="bare", messages=QUESTION, max_tokens=2).usage
        assert usage.prompt_tokens_details.cached_tokens == 0
    assert server.count("lfm2_prefix_cache_entries") == 0


def test_eight_clients_at_once_get_the_answers_that_they_would_get_alone(server: Running, folder: Path) -> None:
    """Of different lengths, with conversations that share their beginnings."""
    words = ("list", "dict", "set", "module", "class", "string", "file", "loop")
    asked = [
        ([{"role": "user", "content": f"What is a {word}? " * (1 + 9 * i)}], 4 + 5 * i) for i, word in enumerate(words)
    ]

    def ask(messages: Any, new: int) -> str:
        stream = server.openai().chat.completions.create(
            model="tiny-dense", messages=messages, max_tokens=new, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: ask(*one), [*asked, *asked]))
    expected = [alone(folder, messages, new) for messages, new in asked]
    assert len(set(expected)) > 4, "a control: they are not all the same"
    if is_exact(server):
        assert answers == expected * 2


def test_a_request_over_the_context_is_told(server: Running) -> None:
    messages: Any = [{"role": "user", "content": "a b c " * 4000}]
    with pytest.raises(openai.BadRequestError, match="the model's context 4096; shorten it") as error:
        server.openai().chat.completions.create(model="tiny-dense", messages=messages)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tokens of the prompt and 4096 of the answer"):
        server.openai().chat.completions.create(model="tiny-dense", messages=QUESTION, max_tokens=4096)


def test_an_unknown_model_is_a_404(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt-5', only tiny-dense"):
        server.openai().chat.completions.create(model="gpt-5", messages=QUESTION)


def test_metrics_are_in_prometheus_form(server: Running) -> None:
    response = server.http().get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    values = [line for line in lines if not line.startswith("#")]
    assert all(line.rpartition(" ")[2].replace(".", "", 1).isdigit() for line in values), json.dumps(values)
    assert {line.partition("{")[0] for line in values} >= {"lfm2_generated_tokens_total", "lfm2_http_responses_total"}
