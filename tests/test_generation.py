"""Settings, sampling, the loop and conversations, on a runner without a model (``HashRunner``)."""

from __future__ import annotations

import logging
from itertools import cycle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_export.backends.base import Runner, check_batch_size
from lfm2_export.chat import Chat
from lfm2_export.errors import ContextLimitError, GenerationError, RunnerError
from lfm2_export.generation import complete, generate
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.sampling import Sampler, candidates, draw, penalize
from tests.hash_runner import TOKENIZER, HashRunner

IM_END = TOKENIZER.token_id("<|im_end|>")

GREEDY = GenerationConfig(max_new_tokens=12)
SAMPLED = GenerationConfig(do_sample=True, temperature=0.8, top_k=0, repetition_penalty=1.1, seed=3, max_new_tokens=12)


def test_the_fake_runner_follows_the_protocol():
    assert isinstance(HashRunner(), Runner)


# Settings


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_p": -0.01},
        {"top_p": 1.01},
        {"top_p": None},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1.0},
        {"max_new_tokens": 0},
        {"max_new_tokens": 3.0},
        {"stop_token_ids": (-1,)},
        {"stop_token_ids": ("</s>",)},
        {"seed": -1},
        {"do_sample": "yes"},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(GenerationError, match=f"^{name}=.* is not usable; expected "):
        GenerationConfig(**options)


def test_numpys_integers_are_integers():
    config = GenerationConfig(
        top_k=np.int64(5), max_new_tokens=np.int32(3), stop_token_ids=(np.uint8(7),), seed=np.int64(0)
    )
    assert config == GenerationConfig(top_k=5, max_new_tokens=3, stop_token_ids=(7,), seed=0)
    assert {type(value) for value in (config.top_k, config.max_new_tokens, config.seed)} == {int}
    assert type(config.stop_token_ids[0]) is int
    with pytest.raises(GenerationError, match=r"top_k=np.False_ is not usable"):
        GenerationConfig(top_k=np.False_)


@pytest.mark.parametrize("size", [2.5, True, "2", None])
def test_rows_are_counted_by_integers(size):
    with pytest.raises(RunnerError, match=r"batch_size=.*: rows are counted by an integer from 1 up"):
        HashRunner().reset(size)
    check_batch_size(np.int64(2), None)


def test_generation_config_json_gives_the_defaults(caplog):
    raw = {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": [7, 2],
        "do_sample": True,
        "temperature": 0.3,
        "min_p": 0.15,
        "top_k": None,
        "num_beams": 4,
        "nonsense": 1,
        "transformers_version": "5.23.0",
    }
    with caplog.at_level(logging.INFO):
        config = GenerationConfig.from_dict(raw)
    assert config == GenerationConfig(do_sample=True, temperature=0.3, min_p=0.15, stop_token_ids=(7, 2))
    assert "not used here: nonsense, num_beams" in caplog.text


def test_one_stop_token_or_none():
    assert GenerationConfig.from_dict({"eos_token_id": 7}).stop_token_ids == (7,)
    assert GenerationConfig.from_dict({}).stop_token_ids == ()


def test_defaults_are_those_of_transformers():
    theirs = pytest.importorskip("transformers").GenerationConfig._get_default_generation_params()
    ours = GenerationConfig()
    for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(ours, name) == theirs[name], name
    assert theirs.get("min_p") is None
    assert ours.min_p == 0


def test_a_bad_value_in_the_file_names_the_file(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text('{"top_p": 7}')
    with pytest.raises(GenerationError, match=r"generation_config.json: top_p=7 is not usable"):
        GenerationConfig.from_file(path)
    path.write_text("[]")
    with pytest.raises(GenerationError, match=r"holds \[\], not a JSON object"):
        GenerationConfig.from_file(path)
    path.write_text("{")
    with pytest.raises(GenerationError, match=r"is not JSON"):
        GenerationConfig.from_file(path)
    assert GenerationConfig.from_file(tmp_path / "none.json") == GenerationConfig()


def test_override_replaces_what_is_given():
    base = GenerationConfig(temperature=0.5, stop_token_ids=(7,))
    assert base.override() == base
    assert base.override(max_new_tokens=3) == GenerationConfig(temperature=0.5, stop_token_ids=(7,), max_new_tokens=3)
    assert base.override(stop_token_ids=()).stop_token_ids == ()


def test_override_with_a_sampling_option_asks_for_sampling():
    base = GenerationConfig()
    assert base.override(temperature=0.7).do_sample
    assert not base.override(seed=1).do_sample  # it only says which tokens would be drawn
    assert not base.override(repetition_penalty=1.1).do_sample
    assert not base.override(top_k=5, do_sample=False).do_sample
    assert base.override(temperature=0).greedy


# Sampling

SETTINGS = [
    {},
    {"temperature": 0.3},
    {"repetition_penalty": 1.3},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 10_000},
    {"top_k": 10**30},
    {"temperature": 1e-30},
    {"temperature": 1e30},
    {"repetition_penalty": 1e30},
    {"repetition_penalty": 1e-30, "temperature": 2.0},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"top_p": 0.0},
    {"min_p": 0.15},
    {"min_p": 1.0},
    {"typical_p": 0.9},
    {"typical_p": 0.2, "top_k": 40, "temperature": 0.7},
    {"typical_p": 1e-9},
    {"typical_p": 1.5},
    {"epsilon_cutoff": 0.01},
    {"epsilon_cutoff": 0.999},
    {"epsilon_cutoff": 1.0, "eta_cutoff": 1.0},
    {"eta_cutoff": 0.02},
    {"eta_cutoff": 0.9, "top_p": 0.9},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7, "repetition_penalty": 0.8},
    {"top_k": 50, "temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05},
]


def our_scores(logits: np.ndarray, seen: np.ndarray, config: GenerationConfig) -> np.ndarray:
    """The scores of all tokens, minus infinity where one cannot be drawn."""
    scores = np.full(len(logits), -np.inf, dtype=np.float32)
    tokens, kept = candidates(penalize(logits, seen, config.repetition_penalty), config)
    scores[tokens] = kept
    return scores


def transformers_scores(logits, history, *, top_k=0, min_p=0.0, **options):
    """What transformers' generate would draw from: its own factory chooses the processors and their order."""
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig as TheirConfig
    from transformers import GenerationMixin, PreTrainedConfig

    class Model(GenerationMixin):
        config = PreTrainedConfig()

    config = TheirConfig(do_sample=True, num_beams=1, top_k=top_k, min_p=min_p or None, **options)
    ids = torch.tensor([history])
    processors = Model()._get_logits_processor(config, input_ids_seq_length=len(history), encoder_input_ids=ids)
    return processors(ids, torch.from_numpy(logits)[None])[0].numpy()


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_distribution_equals_transformers(options):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, rng.choice([0.1, 2, 8]), 1000).astype(np.float32)
        history = rng.integers(0, 1000, 30).tolist()
        seen = np.zeros(1000, dtype=bool)
        seen[history] = True
        before = logits.copy()
        ours = our_scores(logits, seen, GenerationConfig(do_sample=True, **{"top_k": 0} | options))
        np.testing.assert_allclose(ours, transformers_scores(logits, history, **options), atol=1e-6, rtol=1e-6)
        np.testing.assert_array_equal(logits, before)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12, unique=True),
    history=st.lists(st.integers(0, 11), min_size=1, max_size=5),
    temperature=st.floats(0.05, 3),
    top_k=st.integers(0, 15),
    top_p=st.sampled_from([0.0, 0.001, 0.37, 0.83, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.71, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.7]),
)
def test_small_distributions_equal_transformers(logits, history, temperature, top_k, top_p, min_p, penalty):
    row = np.array(logits, dtype=np.float32)
    history = [token % len(row) for token in history]
    seen = np.isin(np.arange(len(row)), history)
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": penalty,
    }
    expected = transformers_scores(row, history, **options)
    found = our_scores(row, seen, GenerationConfig(do_sample=True, **options))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_ties_at_the_edge_of_top_k_all_stay():
    scores = our_scores(
        np.array([1, 3, 2, 2, 2], dtype=np.float32),
        np.zeros(5, dtype=bool),
        GenerationConfig(do_sample=True, top_k=2),
    )
    assert np.isfinite(scores).tolist() == [False, True, True, True, True]


def test_draw_follows_the_probabilities():
    scores = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    random = np.random.default_rng(0)
    drawn = [draw(np.array([0, 2, 3]), scores, random) for _ in range(20_000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20_000, [0.5, 0, 0.3, 0.2], atol=0.015)


@pytest.mark.parametrize("options", [{"do_sample": False, "temperature": 0.5}, {"do_sample": True, "temperature": 0}])
def test_greedy_takes_the_best_after_the_repetition_penalty(options):
    logits = np.array([1.0, 2.0, 1.9, -1.0], dtype=np.float32)
    assert Sampler(GenerationConfig(**options), 4).choose(logits) == 1
    assert Sampler(GenerationConfig(**options, repetition_penalty=1.2), 4, history=[1]).choose(logits) == 2


def test_generated_tokens_count_as_repeated():
    sampler = Sampler(GenerationConfig(repetition_penalty=2.0), 3)
    logits = np.array([2.0, 1.9, 1.8], dtype=np.float32)
    assert [sampler.choose(logits) for _ in range(4)] == [0, 1, 2, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_reported(bad):
    with pytest.raises(GenerationError, match=r"the program gave (nan|inf) as its largest logit"):
        Sampler(GREEDY, 3).choose(np.array([0, bad, 1], dtype=np.float32))


# The loop


def greedy_by_hand(runner: HashRunner, prompt: list[int], steps: int) -> list[int]:
    row = list(prompt)
    for _ in range(steps):
        row.append(int(np.argmax(runner.logits_of(row))))
    return row[len(prompt) :]


def test_greedy_generation_takes_the_best_token_each_time():
    runner = HashRunner()
    (result,) = complete(runner, [[1, 2, 3]], GREEDY)
    assert result.tokens == greedy_by_hand(runner, [1, 2, 3], 12)
    assert (result.finish_reason, result.prompt_tokens) == ("length", 3)
    assert runner.rows == [[1, 2, 3, *result.tokens[:-1]]]


def test_tokens_arrive_one_by_one():
    runner = HashRunner()
    events = generate(runner, [[1, 2]], GREEDY)
    assert runner.prefilled == [[2]]
    assert runner.rows == [[1, 2]]
    first = next(events)
    assert (first.row, first.finish_reason) == (0, None)
    assert runner.rows == [[1, 2]]
    next(events)
    assert runner.rows == [[1, 2, first.token]]


@pytest.mark.parametrize("which", [0, 4])
def test_any_of_several_stop_tokens_ends_a_row(which):
    by_hand = greedy_by_hand(HashRunner(), [5], 12)
    stop = by_hand[which]
    (result,) = complete(HashRunner(), [[5]], GREEDY.override(stop_token_ids=(39 if stop != 39 else 38, stop)))
    assert result.finish_reason == "stop"
    assert result.tokens == by_hand[: by_hand.index(stop) + 1]


def test_generation_ends_when_the_context_is_full():
    (result,) = complete(HashRunner(context_length=8), [[1, 2, 3]], GREEDY)
    # Positions 3 to 7 take five tokens; the sixth is chosen from the last one's logits and needs no position.
    assert (result.finish_reason, len(result.tokens)) == ("context", 6)


def test_a_prompt_beyond_the_context_is_refused_before_anything_changes():
    runner = HashRunner(context_length=3)
    runner.prefill([[9]])
    with pytest.raises(
        ContextLimitError, match=r"row 1: 4 tokens do not fit the context limit of 3; shorten the prompt"
    ):
        generate(runner, [[1], [1, 2, 3, 4]], GREEDY)
    assert runner.rows == [[9]]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "row 1 is empty"),
        ([[1, 40]], {}, "token id 40 is not in the vocabulary of 40"),
        ([[1]], {"stop_token_ids": (40,)}, "stop token 40 is not in the vocabulary of 40"),
    ],
)
def test_unusable_prompts_are_refused_at_once(prompts, options, message):
    runner = HashRunner()
    with pytest.raises((GenerationError, RunnerError), match=message):
        generate(runner, prompts, GREEDY.override(**options))
    assert runner.rows == [[]]


@pytest.mark.parametrize("max_batch_size", [None, 1, 2])
@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_rows_of_a_batch_equal_each_row_alone(config, max_batch_size):
    prompts = [[1], [2, 3, 4], [5, 6], [7, 8, 9, 10, 11]]
    config = config.override(stop_token_ids=tuple(range(8)), do_sample=config.do_sample)
    results = complete(HashRunner(max_batch_size=max_batch_size), prompts, config)
    assert len({len(result.tokens) for result in results}) > 1, "rows should end at different times"
    for row, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        sampler, history = Sampler(config, 40, prompt, row), list(prompt)
        while True:
            history.append(sampler.choose(HashRunner().logits_of(history)))
            if history[-1] in config.stop_token_ids or len(history) - len(prompt) == 12:
                break
        assert result.tokens == history[len(prompt) :]
        assert result.finish_reason == ("stop" if history[-1] < 8 else "length")


def test_a_seed_repeats_a_run_and_another_does_not():
    def run(seed):
        return complete(HashRunner(), [[1, 2]], SAMPLED.override(seed=seed))[0].tokens

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1) == complete(HashRunner(), [[1, 2], [3]], SAMPLED.override(seed=1))[0].tokens


def test_without_a_seed_runs_differ():
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=12)
    assert complete(HashRunner(), [[1]], config)[0].tokens != complete(HashRunner(), [[1]], config)[0].tokens


# Conversations


@pytest.fixture
def runner() -> HashRunner:
    return HashRunner(vocab_size=TOKENIZER.vocab_size)


def make_chat(runner: HashRunner, **options) -> Chat:
    return Chat(runner, TOKENIZER, GREEDY.override(stop_token_ids=(IM_END,)), **options)


def test_a_reply_is_what_generate_gives_for_the_whole_conversation(runner):
    chat = make_chat(runner, system="Be brief.")
    pieces = list(chat.send("Hello"))
    prompt = TOKENIZER.encode_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    (expected,) = complete(HashRunner(vocab_size=TOKENIZER.vocab_size), [prompt], chat.config)
    assert "".join(pieces) == TOKENIZER.decode(expected.tokens, skip_special_tokens=None)
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    assert chat.finish_reason == "length"


def test_later_turns_prefill_only_what_is_new(runner):
    chat = make_chat(runner)
    list(chat.send("One"))
    first = chat.prefilled_tokens
    reply_held = list(runner.rows[0])
    list(chat.send("Two"))
    suffix = TOKENIZER.encode(
        "<|im_end|>\n<|im_start|>user\nTwo<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
    )
    # The last token of a reply that ended by its length was chosen but not fed yet.
    assert chat.prefilled_tokens == 1 + len(suffix)
    assert runner.rows[0][: len(reply_held)] == reply_held
    assert first == len(TOKENIZER.encode_chat([{"role": "user", "content": "One"}]))


def test_a_reply_that_stopped_is_followed_by_one_end_of_message(runner, monkeypatch):
    chat = make_chat(runner)
    letters = TOKENIZER.encode("Fine", add_special_tokens=False)
    script = iter([*letters, IM_END] * 2)
    monkeypatch.setattr(runner, "logits_of", lambda row: np.eye(runner.vocab_size, dtype=np.float32)[next(script)] * 9)
    assert "".join(chat.send("A")) == "Fine"
    assert chat.finish_reason == "stop"
    # Prefills and decodes take one answer each; the stop token was never fed.
    monkeypatch.setattr(runner, "logits_of", lambda row: np.eye(runner.vocab_size, dtype=np.float32)[IM_END])
    list(chat.send("B"))
    messages = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "Fine"},
        {"role": "user", "content": "B"},
    ]
    assert runner.rows[0] == TOKENIZER.encode_chat(messages)
    assert chat.messages == [*messages, {"role": "assistant", "content": ""}]


def scripted(runner, monkeypatch, text: str, *end: int) -> None:
    """Makes the runner's likeliest tokens those of ``text`` and ``end``, again and again."""
    script = cycle([*TOKENIZER.encode(text, add_special_tokens=False), *end])
    monkeypatch.setattr(runner, "logits_of", lambda row: np.eye(runner.vocab_size, dtype=np.float32)[next(script)] * 9)


CALL = "Let me see. <|tool_call_start|>[look_up(name='x')]<|tool_call_end|>"


@pytest.mark.parametrize(
    ("skip", "expected"), [(False, CALL), (True, "Let me see. [look_up(name='x')]")], ids=["shown", "skipped"]
)
def test_a_tool_call_streams_with_its_markers_and_stays_in_the_conversation(runner, monkeypatch, skip, expected):
    config = GREEDY.override(stop_token_ids=(IM_END,), max_new_tokens=99)
    chat = Chat(runner, TOKENIZER, config, skip_special_tokens=skip)
    scripted(runner, monkeypatch, CALL, IM_END)
    assert "".join(chat.send("What is x?")) == expected
    assert chat.messages[-1] == {"role": "assistant", "content": CALL}
    held = list(runner.rows[0])
    list(chat.send({"role": "tool", "content": "7"}))
    assert runner.rows[0][: len(held)] == held
    assert TOKENIZER.decode(runner.rows[0]).startswith(TOKENIZER.render_chat(chat.messages[:-1]))


@pytest.mark.parametrize("stop", [IM_END, "<|endoftext|>", "<|tool_call_end|>", "a"])
def test_the_token_that_ends_a_reply_is_no_part_of_its_text(runner, monkeypatch, stop):
    ident = stop if isinstance(stop, int) else TOKENIZER.token_id(stop)
    chat = Chat(runner, TOKENIZER, GREEDY.override(stop_token_ids=(ident,)))
    scripted(runner, monkeypatch, "<|tool_call_start|>f()", ident)
    assert "".join(chat.send("A")) == "<|tool_call_start|>f()"
    assert chat.messages[-1]["content"] == "<|tool_call_start|>f()"


def test_regenerate_prefills_nothing_and_repeats_with_the_same_settings(runner):
    chat = make_chat(runner)
    list(chat.send("One"))
    reply = "".join(chat.send("Two"))
    prefills = len(runner.prefilled)
    assert "".join(chat.regenerate()) == reply
    assert chat.prefilled_tokens == 0
    assert len(runner.prefilled) == prefills
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_edit_goes_back_to_the_turn_before(runner):
    chat, fresh = make_chat(runner), make_chat(HashRunner(vocab_size=TOKENIZER.vocab_size))
    list(chat.send("One"))
    held = len(runner.rows[0])
    list(chat.send("Two"))
    edited = "".join(chat.edit("Three"))
    assert chat.prefilled_tokens < held
    list(fresh.send("One"))
    assert "".join(fresh.send("Three")) == edited
    assert chat.messages == fresh.messages


def test_regenerate_keeps_the_tokens_that_earlier_replies_were_written_with(runner):
    """A reply's text may have another tokenization than the one that the model chose."""
    chat = make_chat(runner)
    for text in ("One", "Two", "Three"):
        list(chat.send(text))
        before = list(runner.rows[0])
    list(chat.regenerate())
    assert chat.prefilled_tokens == 0
    assert runner.rows[0] == before


def test_a_reply_may_be_closed_early(runner):
    chat = make_chat(runner)
    reply = chat.send("One")
    shown = next(reply) + next(reply)
    reply.close()
    assert chat.messages[-1] == {"role": "assistant", "content": shown}
    assert chat.finish_reason is None
    held = list(runner.rows[0])
    list(chat.send("Two"))
    assert runner.rows[0][: len(held)] == held


def test_two_conversations_on_one_runner_do_not_mix(runner):
    expected = []
    for text in ("One", "Other"):
        alone = make_chat(HashRunner(vocab_size=TOKENIZER.vocab_size))
        expected.append(["".join(alone.send(text)), "".join(alone.send("More"))])
    chats = [make_chat(runner), make_chat(runner)]
    first = ["".join(chats[0].send("One")), "".join(chats[1].send("Other"))]
    second = ["".join(chats[0].send("More")), "".join(chats[1].send("More"))]
    assert [list(pair) for pair in zip(first, second, strict=True)] == expected


USES = {
    "reset": lambda runner: runner.reset(),
    "prefill": lambda runner: runner.prefill([[1]]),
    "another conversation": lambda runner: make_chat(runner).send("Other"),
}


@pytest.mark.parametrize("read", [0, 1, 3])
@pytest.mark.parametrize("use", USES)
def test_a_reply_ends_where_the_runner_is_used_for_something_else(runner, use, read):
    chat = make_chat(runner)
    reply = chat.send("One")
    shown = "".join(next(reply) for _ in range(read))
    USES[use](runner)
    with pytest.raises(GenerationError, match=rf"used for something else after {read} tokens of this reply; read a"):
        next(reply)
    alone = make_chat(HashRunner(vocab_size=TOKENIZER.vocab_size))
    same = alone.send("One")
    assert "".join(next(same) for _ in range(read)) == shown
    same.close()
    assert chat.messages == alone.messages
    assert "".join(chat.send("Two")) == "".join(alone.send("Two"))


def test_a_new_turn_takes_the_place_of_a_reply_that_is_being_written(runner):
    chat = make_chat(runner)
    old = chat.send("One")
    next(old)
    new = chat.send("Two")
    with pytest.raises(GenerationError, match="used for something else after 1 tokens"):
        next(old)
    list(new)
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["One", "Two"]
    assert chat.messages[-1]["role"] == "assistant"


def test_a_conversation_beyond_the_context_is_refused_and_kept(runner):
    chat = make_chat(runner)
    reply = "".join(chat.send("One"))
    runner.context_length = len(runner.rows[0]) + 5
    with pytest.raises(ContextLimitError, match=r"do not fit the context limit"):
        chat.send("A message that is far too long for this context " * 3)
    assert chat.messages == [{"role": "user", "content": "One"}, {"role": "assistant", "content": reply}]


def test_clear_keeps_the_system_message(runner):
    chat = make_chat(runner, system="S")
    list(chat.send("One"))
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "S"}]


def test_regenerate_needs_a_reply(runner):
    with pytest.raises(GenerationError, match=r"there is no assistant message yet"):
        make_chat(runner).regenerate()
    with pytest.raises(GenerationError, match=r"there is no user message yet"):
        make_chat(runner).edit("x")
