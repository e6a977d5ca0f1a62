"""Chat as Python code uses it: history, stop strings, logprobs, async, an artifact's own settings."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.chat import Chat
from lfm2_export.errors import GenerationError
from lfm2_export.generation import complete
from lfm2_export.generation_config import GenerationConfig
from tests.hash_runner import TOKENIZER, HashRunner

SHORT = GenerationConfig(max_new_tokens=12)


def chat(config: GenerationConfig = SHORT, **options) -> Chat:
    return Chat(HashRunner(vocab_size=TOKENIZER.vocab_size), TOKENIZER, config, **options)


def test_a_history_is_what_the_model_is_given() -> None:
    history = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day."},
    ]
    asked = {"role": "user", "content": "And then?"}
    (expected,) = complete(
        HashRunner(vocab_size=TOKENIZER.vocab_size), [TOKENIZER.encode_chat([*history, asked])], SHORT
    )
    one = chat(messages=history)
    assert "".join(one.send("And then?")) == TOKENIZER.decode(expected.tokens)
    assert one.messages[:4] == [*history, asked]
    assert "".join(chat(messages=history[:1]).send("And then?")) != TOKENIZER.decode(expected.tokens)
    one.clear()
    assert one.messages == history[:1]
    for messages, options in (("Hello", {}), ([1], {}), (history, {"system": "Two."})):
        with pytest.raises(GenerationError, match=r"^(messages=|chat: a system message is given twice)"):
            chat(messages=messages, **options)


def test_a_stop_string_ends_a_reply_and_leaves_no_trace() -> None:
    plain = "".join(chat().send("Hello"))
    stop = plain[len(plain) // 2 : len(plain) // 2 + 3]
    cut = plain.partition(stop)[0]
    assert cut
    one = chat(stop=["never there", stop])
    assert "".join(one.send("Hello")) == cut
    assert one.finish_reason == "stop"
    assert one.messages[-1] == {"role": "assistant", "content": cut}
    # The next turn sees what is in the history, and nothing else.
    fresh = chat(messages=one.messages)
    assert "".join(one.send("More")) == "".join(fresh.send("More")).partition(stop)[0]
    untouched = chat(stop="never there")
    assert "".join(untouched.send("Hello")) == plain
    assert untouched.finish_reason == "length"


def test_logprobs_are_those_of_the_tokens_that_were_chosen() -> None:
    kept = chat(logprobs=3)
    text = "".join(kept.send("Hello"))
    assert "".join(choice.chosen.text for choice in kept.logprobs) == text
    assert len(kept.logprobs) == 12
    runner = HashRunner(vocab_size=TOKENIZER.vocab_size)
    ids = TOKENIZER.encode_chat([{"role": "user", "content": "Hello"}])
    logits = runner.prefill([ids])[0].astype(np.float64)
    expected = np.sort(logits - np.log(np.exp(logits).sum()))[::-1][:3]
    first = kept.logprobs[0]
    assert first.chosen == first.top[0]  # greedy
    assert np.allclose([one.logprob for one in first.top], expected, atol=1e-6)
    assert chat().logprobs == []
    with pytest.raises(GenerationError, match="logprobs=-1: give how many"):
        chat(logprobs=-1)


def test_a_reply_can_be_awaited_while_other_work_goes_on() -> None:
    expected = "".join(chat().send("Hello"))
    seen: list[str] = []

    async def work() -> str:
        ticks = asyncio.create_task(tick())
        text = "".join([piece async for piece in chat().asend("Hello")])
        ticks.cancel()
        return text

    async def tick() -> None:
        while True:
            seen.append("tick")
            await asyncio.sleep(0)

    assert asyncio.run(work()) == expected
    assert len(seen) > 3


def test_a_reply_that_nobody_awaits_any_more_is_closed_and_the_conversation_goes_on() -> None:
    one = chat()

    async def leave_after_two() -> None:
        pieces = one.asend("Hello")
        for _ in range(2):
            await anext(pieces)
        await pieces.aclose()

    asyncio.run(leave_after_two())
    expected = "".join(chat().send("Hello"))
    said = one.messages[-1]["content"]
    assert said
    assert expected.startswith(said)
    assert "".join(one.send("More"))


def test_cancelling_waits_for_the_token_under_way() -> None:
    begun, go = threading.Event(), threading.Event()

    class Slow(HashRunner):
        def decode(self, tokens):
            begun.set()
            assert go.wait(20)
            return super().decode(tokens)

    one = Chat(Slow(vocab_size=TOKENIZER.vocab_size), TOKENIZER, SHORT)

    async def cancelled() -> None:
        async def read() -> None:
            async for _ in one.asend("Hello"):
                pass

        task = asyncio.create_task(read())
        await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()  # the step holds the runner
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert one.messages[-1]["role"] == "assistant"
    assert "".join(one.send("More"))


def test_settings_and_stop_tokens_are_the_artifacts(tmp_path: Path) -> None:
    def settings(generation: dict | None, config: dict) -> GenerationConfig:
        for name, content in (("generation_config.json", generation), ("config.json", config)):
            if content is not None:
                (tmp_path / name).write_text(json.dumps(content))
        return GenerationConfig.from_artifact(tmp_path)

    assert settings(None, {"eos_token_id": [7, 8]}).stop_token_ids == (7, 8)
    assert settings({"max_new_tokens": 9}, {"eos_token_id": 7}) == GenerationConfig(
        max_new_tokens=9, stop_token_ids=(7,)
    )
    stated = {"eos_token_id": 3, "do_sample": True, "temperature": 0.3}
    found = settings(stated, {"eos_token_id": 7})
    assert (found.stop_token_ids, found.temperature, found.do_sample) == ((3,), 0.3, True)


def test_settings_of_what_is_no_artifact_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(GenerationError, match=r"has neither generation_config\.json nor config\.json"):
            GenerationConfig.from_artifact(place)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"config": {"temperature": 1}}, "config is .*; give a GenerationConfig"),
        ({"stop": [3]}, "stop holds 3; give strings"),
        ({"stop": ""}, "stop holds ''; give strings"),
    ],
)
def test_what_no_conversation_can_be_held_with_is_refused_by_name(given: dict, words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        chat(**given)


def test_a_conversation_on_an_artifact_stops_where_its_model_does(tmp_path: Path) -> None:
    folder = lfm2_export.export("tiny-dense", scheme="fp32", output=tmp_path / "made").path
    one = Chat.from_artifact(folder, scheme="fp32", system="Answer in one sentence.", threads=1)
    assert one.config == GenerationConfig.from_artifact(folder)
    assert one.config.stop_token_ids
    assert repr(one) == "Chat(1 messages, 0 tokens in the runner)"
    assert repr(lfm2_export.load_runner(folder)) == "OnnxRunner(2,660 tokens known, 0 of 4,096 held)"
    "".join(one.send("What is a dictionary?"))
    assert one.finish_reason == "stop"
    graph = lfm2_export.Artifact.open(folder / "onnx" / "model.onnx")
    other = Chat.from_artifact(graph, config=GenerationConfig(max_new_tokens=2))
    "".join(other.send("What is a dictionary?"))
    assert other.finish_reason == "length"
