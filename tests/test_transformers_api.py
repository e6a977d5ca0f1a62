"""transformers' generate on our class gives what it gives on transformers' own model.

The runner below computes with transformers' eager model, one row at a time and without padding: whatever differs is the
class's doing. Tests on exported programs follow at the end.
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.backends.base import Mark, Snapshot, check_fits, check_indices, check_rows
from lfm2_export.backends.onnx import variants
from lfm2_export.errors import ArtifactError, ContextLimitError, GenerationError, RunnerError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lfm2_export.transformers_api import ExportedModelForCausalLM  # noqa: E402
from tests.shows import shows  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(lfm2_export.__file__).parent / "assets" / "tiny-moe"


class EagerRunner:
    """The Runner protocol on a transformers model; each row has a cache of its own."""

    def __init__(self, model, context_length: int = 4096, can_score: bool = True):
        self.model, self.context_length, self.can_score = model, context_length, can_score
        self.vocab_size, self.max_batch_size = model.config.vocab_size, None
        self.runs: list[int] = []
        self.chunk_sizes: list[int | None] = []
        self.reset()

    @property
    def batch_size(self) -> int:
        return len(self.caches)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([cache.get_seq_length() for cache in self.caches], dtype=np.int64)

    def reset(self, batch_size: int = 1) -> None:
        self.caches = [transformers.DynamicCache(config=self.model.config) for _ in range(batch_size)]

    def prefill_scored(self, input_ids, *, chunk_size=None) -> list[np.ndarray]:
        rows = check_rows(input_ids, self.batch_size, self.vocab_size)
        check_fits(self.lengths, [len(row) for row in rows], self.context_length)
        self.runs.append(sum(map(len, rows)))
        with torch.no_grad():
            return [
                self.model(torch.from_numpy(row)[None], past_key_values=cache, use_cache=True).logits[0].numpy()
                for row, cache in zip(rows, self.caches, strict=True)
            ]

    def prefill(self, input_ids, *, chunk_size=None) -> np.ndarray:
        self.chunk_sizes.append(chunk_size)
        return np.stack([logits[-1] for logits in self.prefill_scored(input_ids)])

    def decode(self, tokens) -> np.ndarray:
        return self.prefill(np.asarray(tokens)[:, None])

    def score(self, input_ids, *, chunk_size=None) -> np.ndarray:
        raise NotImplementedError

    def snapshot(self) -> Snapshot:
        return Snapshot(program_id="eager", lengths=self.lengths, tensors={"caches": copy.deepcopy(self.caches)})

    def restore(self, snapshot: Snapshot) -> None:
        self.caches = copy.deepcopy(snapshot.tensors["caches"])

    def mark(self) -> Mark:
        raise NotImplementedError

    rewind = is_valid = mark

    def reorder(self, indices) -> None:
        self.caches = [copy.deepcopy(self.caches[i]) for i in check_indices(indices, self.batch_size)]


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=2660,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
        initializer_range=0.3,
        eos_token_id=7,
    )
    return transformers.Lfm2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture
def ours(theirs):
    return ExportedModelForCausalLM(EagerRunner(theirs), theirs.config, theirs.generation_config)


def chat_ids(tokenizer, text="What is a list?", **options):
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", tokenize=True, **options
    )


def both(ours, theirs, inputs, **options):
    """The same call on both models, each from the same random state."""
    results = []
    for model in (ours, theirs):
        torch.manual_seed(11)
        results.append(model.generate(**inputs, **options))
    return results


def test_the_documented_example(ours, theirs, tokenizer):
    """A BatchEncoding as the only positional argument, as on the model's page; transformers itself refuses that."""
    input_ids = chat_ids(tokenizer, "What is C. elegans?").to(ours.device)
    options = {"do_sample": True, "temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05, "max_new_tokens": 48}
    torch.manual_seed(0)
    output = ours.generate(input_ids, **options)
    torch.manual_seed(0)
    expected = theirs.generate(**input_ids, **options)
    assert output.tolist() == expected.tolist()
    assert tokenizer.decode(output[0], skip_special_tokens=False).startswith("<|startoftext|><|im_start|>user")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 1.5},
        {"num_beams": 4},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
        {"num_beams": 2, "length_penalty": 0.3, "early_stopping": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"no_repeat_ngram_size": 2},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"guidance_scale": 1.5},
        {"min_new_tokens": 20, "max_new_tokens": 24},
        {"max_time": 1000.0},
    ],
    ids=str,
)
def test_generation_modes_equal_transformers(ours, theirs, tokenizer, options):
    found, expected = both(ours, theirs, chat_ids(tokenizer), **{"max_new_tokens": 16} | options)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_left_padded_batches_equal_transformers(ours, theirs, tokenizer, options):
    texts = ["def", "Return a list of the words in the string", "a b"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    assert (inputs["attention_mask"] == 0).any()
    found, expected = both(ours, theirs, inputs, max_new_tokens=12, **options)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_same_row_alone(ours, tokenizer, side):
    texts = ["def", "Return a list of the words in the string", "a b"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
    found = ours.generate(**inputs, max_new_tokens=8, eos_token_id=-1)
    for row, text in enumerate(texts):
        alone = ours.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, eos_token_id=-1)
        assert found[row, -8:].tolist() == alone[0, -8:].tolist()


def test_chunked_prefill_is_the_runners_and_takes_left_padding(ours, theirs, tokenizer):
    texts = ["def", "Return a list of the words in the string", "a b"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    found, expected = both(ours, theirs, inputs, max_new_tokens=12, prefill_chunk_size=2)
    assert found.tolist() == expected.tolist()
    assert ours.runner.chunk_sizes[0] == 2
    assert ours.generation_config.prefill_chunk_size is None


def test_dictionary_output_equals_transformers(ours, theirs, tokenizer):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 5}
    found, expected = both(ours, theirs, chat_ids(tokenizer), **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        for ours_step, their_step in zip(getattr(found, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(ours_step, their_step, atol=1e-4, rtol=0)
    transition = ours.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    assert transition.shape == (1, 5)


def test_a_streamer_gets_every_token(ours, tokenizer):
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    inputs = chat_ids(tokenizer)
    output = ours.generate(**inputs, max_new_tokens=12, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_stopping_criteria_and_stop_strings(ours, theirs, tokenizer):
    inputs = chat_ids(tokenizer)

    def at_length(ids, scores, **_):
        return torch.full((ids.shape[0],), ids.shape[1] >= inputs["input_ids"].shape[1] + 3)

    found, expected = both(ours, theirs, inputs, max_new_tokens=16, stopping_criteria=[at_length])
    assert found.tolist() == expected.tolist()
    assert found.shape[1] == inputs["input_ids"].shape[1] + 3
    found, expected = both(ours, theirs, inputs, max_new_tokens=24, stop_strings=["e"], tokenizer=tokenizer)
    assert found.tolist() == expected.tolist()


def test_a_logits_processor_of_the_callers_own(ours, tokenizer):
    class Only(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([42]), 0.0)

    inputs = chat_ids(tokenizer)
    output = ours.generate(**inputs, max_new_tokens=4, logits_processor=[Only()])
    assert output[0, -4:].tolist() == [42] * 4


def test_a_tensor_alone_and_no_input_at_all(ours, theirs, tokenizer):
    ids = chat_ids(tokenizer)["input_ids"]
    assert ours.generate(ids, max_new_tokens=6).tolist() == theirs.generate(ids, max_new_tokens=6).tolist()
    assert ours.generate(max_new_tokens=4).tolist() == theirs.generate(max_new_tokens=4).tolist()


def test_a_generation_config_object(ours, theirs, tokenizer):
    config = transformers.GenerationConfig(
        max_new_tokens=6, do_sample=True, top_k=3, eos_token_id=[7, 2], pad_token_id=0
    )
    found, expected = both(ours, theirs, chat_ids(tokenizer), generation_config=config)
    assert found.tolist() == expected.tolist()


# Caches


def test_a_returned_cache_goes_on_with_new_tokens_only(ours, theirs, tokenizer):
    first = ours.generate(**chat_ids(tokenizer), max_new_tokens=6, return_dict_in_generate=True)
    cache, runner = first.past_key_values, ours.runner
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    more = tokenizer("<|im_end|>\nAnd then?", add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = torch.cat([first.sequences, more], dim=1)
    runner.runs.clear()
    found = ours.generate(whole, past_key_values=cache, max_new_tokens=6)
    assert runner.runs[0] == more.shape[1] + 1
    assert found.tolist() == theirs.generate(whole, max_new_tokens=6).tolist()


def test_copied_caches_go_their_own_ways(ours, theirs, tokenizer):
    inputs = chat_ids(tokenizer)
    cache = ours(**inputs, use_cache=True).past_key_values
    ends = [torch.tensor([[token]]) for token in (30, 40, 50)]
    for end in ends:
        whole = torch.cat([inputs["input_ids"], end], dim=1)
        found = ours.generate(whole, past_key_values=copy.deepcopy(cache), max_new_tokens=5)
        assert found.tolist() == theirs.generate(whole, max_new_tokens=5).tolist()


def test_interleaved_generations_do_not_mix(ours, theirs, tokenizer):
    """Two threads on one model: the runner's single state changes hands between their steps."""
    prompts = [chat_ids(tokenizer, text)["input_ids"] for text in ("One", "What is a tuple good for?", "a")]
    expected = [theirs.generate(ids, max_new_tokens=10).tolist() for ids in prompts]
    found: dict[int, list] = {}

    def run(index):
        found[index] = ours.generate(prompts[index], max_new_tokens=10).tolist()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(3)] == expected


def test_cache_of_another_kind_is_refused(ours, theirs, tokenizer):
    other = ExportedModelForCausalLM(EagerRunner(theirs), theirs.config)
    cache = other(**chat_ids(tokenizer)).past_key_values
    for bad in (transformers.DynamicCache(), cache):
        with pytest.raises(GenerationError, match=r"(past_key_values|cache): a \w+ is not a state of this model"):
            ours.generate(**chat_ids(tokenizer), past_key_values=bad)


def test_a_cache_cannot_be_cropped(ours, tokenizer):
    cache = ours(**chat_ids(tokenizer)).past_key_values
    with pytest.raises(GenerationError, match=r"a conv state cannot be rewound"):
        cache.crop(1)


def test_a_reset_cache_starts_over(ours, tokenizer):
    inputs = chat_ids(tokenizer)
    first = ours(**inputs)
    first.past_key_values.reset()
    again = ours(**inputs, past_key_values=first.past_key_values)
    torch.testing.assert_close(again.logits, first.logits)


# The forward pass


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("logits_to_keep", [0, 1, 3, torch.tensor([0, 2])], ids=str)
def test_forward_equals_transformers(ours, theirs, tokenizer, padding, logits_to_keep):
    texts = ["Return a list of the words in the string"] + (["a short one"] if padding else [])
    inputs = tokenizer(texts, return_tensors="pt", padding=bool(padding), padding_side=padding)
    with torch.no_grad():
        expected = theirs(**inputs, logits_to_keep=0).logits
    found = ours(**inputs, logits_to_keep=logits_to_keep).logits
    mask = inputs["attention_mask"].bool()
    if isinstance(logits_to_keep, int) and logits_to_keep == 1:
        last = mask.long().cumsum(1).argmax(1)
        torch.testing.assert_close(found[:, 0], expected[torch.arange(len(texts)), last], atol=1e-4, rtol=0)
        return
    columns = (
        logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else torch.arange(mask.shape[1])[-logits_to_keep:]
    )
    kept = mask[:, columns]
    assert found.shape == expected[:, columns].shape
    torch.testing.assert_close(found[kept], expected[:, columns][kept], atol=1e-4, rtol=0)


def test_loss_equals_transformers(ours, theirs, tokenizer):
    inputs = tokenizer(["Return a list of all words", "a b"], return_tensors="pt", padding=True, padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = ours(**inputs, labels=labels)
    with torch.no_grad():
        expected = theirs(**inputs, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=0)
    assert found.logits.shape == expected.logits.shape


def test_the_loss_is_divided_by_the_items_of_the_batch(ours, theirs, tokenizer):
    inputs = tokenizer("Return a list of all words", return_tensors="pt")
    options = {"labels": inputs["input_ids"], "num_items_in_batch": 40}
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs, **options).loss, theirs(**inputs, **options).loss, atol=1e-4, rtol=0)


def test_loss_of_a_padded_row_is_that_of_the_row_alone(ours, tokenizer):
    """transformers predicts the first token from the padding before it."""
    text = "Return a list of all words"
    alone = tokenizer(text, return_tensors="pt")["input_ids"]
    inputs = tokenizer(text, return_tensors="pt", padding="max_length", max_length=20, padding_side="left")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert (labels == -100).any()
    torch.testing.assert_close(ours(**inputs, labels=labels).loss, ours(alone, labels=alone).loss)
    with pytest.raises(GenerationError, match=r"labels have shape"):
        ours(alone, labels=alone[:, 1:])


def test_forward_as_a_tuple_and_without_cache(ours, tokenizer):
    inputs = chat_ids(tokenizer)
    assert ours(**inputs, use_cache=False).past_key_values is None
    logits, cache = ours(**inputs, return_dict=False)
    assert logits.shape[-1] == ours.runner.vocab_size
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_all_logits_without_a_scoring_graph_come_token_by_token(theirs, tokenizer):
    bare = ExportedModelForCausalLM(EagerRunner(theirs, can_score=False), theirs.config)
    inputs = tokenizer("Return a list", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(bare(**inputs).logits, theirs(**inputs).logits, atol=1e-4, rtol=0)


def test_forward_takes_what_transformers_does_not_read_or_what_changes_nothing(ours, tokenizer):
    inputs = tokenizer("Return a list", return_tensors="pt")
    expected = ours(**inputs).logits
    nothing = {"output_hidden_states": False, "output_attentions": None, "output_router_logits": False}
    unread = {"token_type_ids": torch.zeros_like(inputs["input_ids"]), "cache_position": torch.arange(4)}
    found = ours(**inputs, **nothing, **unread, is_causal=True, cu_seq_lens_q=None, return_dict=True).logits
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_usual_position_ids_are_accepted_and_others_refused(ours, tokenizer):
    inputs = tokenizer(["a b c d", "a"], return_tensors="pt", padding=True, padding_side="left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    ours(**inputs, position_ids=positions)
    with pytest.raises(GenerationError, match=r"position_ids: an exported program counts"):
        ours(**inputs, position_ids=positions + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 4)}, "inputs_embeds: an exported program starts at token ids"),
        ({"output_attentions": True}, "output_attentions=True: an exported program gives logits only"),
        ({"output_hidden_states": True}, "output_hidden_states=True: an exported program gives logits only"),
        ({"output_router_logits": True}, "output_router_logits=True: an exported program gives logits only"),
        ({"is_causal": False}, "is_causal=False: an exported program attends to what came before"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "cu_seq_lens_q=.*: rows packed into one are not possible"),
        ({"output_hidden_state": True}, r"no option 'output_hidden_state' \(did you mean output_hidden_states\?\)"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "padding between tokens"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "row 0 has no token"),
        ({"attention_mask": torch.tensor([[1, 1]])}, r"attention_mask has shape \[1, 2\]; \[1, 3\] expected"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, r"attention_mask has shape \[1, 1, 3, 3\]"),
        ({"input_ids": None}, "input_ids with shape"),
    ],
    ids=str,
)
def test_forward_refuses_what_a_program_cannot_follow(ours, options, message):
    with pytest.raises(GenerationError, match=message):
        ours(**{"input_ids": torch.tensor([[1, 2, 3]])} | options)


def test_masks_and_batches_must_agree_with_the_cache(ours):
    cache = ours(torch.tensor([[1, 2, 3]])).past_key_values
    with pytest.raises(GenerationError, match=r"input_ids has 2 rows, but past_key_values has 1"):
        ours(torch.tensor([[1], [2]]), past_key_values=cache)
    with pytest.raises(GenerationError, match=r"attention_mask differs from the one"):
        ours(torch.tensor([[1]]), attention_mask=torch.tensor([[0, 1, 1, 1]]), past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bogus_option": 1}, "bogus_option"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"custom_generate": "someone/recipe"}, "custom_generate"),
        ({"custom_generate": "someone/recipe", "trust_remote_code": True}, "custom_generate"),
        ({"cache_implementation": "paged"}, "paged"),
        ({"token_type_ids": torch.zeros(1, 8)}, "token_type_ids"),
        ({"output_hidden_states": True}, "output_hidden_states"),
    ],
    ids=str,
)
def test_generate_refuses_by_name(ours, tokenizer, options, message):
    with pytest.raises((GenerationError, ValueError), match=message):
        ours.generate(**chat_ids(tokenizer), max_new_tokens=4, **options)


def test_an_input_given_twice_is_refused(ours, tokenizer):
    inputs = chat_ids(tokenizer)
    with pytest.raises(GenerationError, match=r"generate: attention_mask was given twice"):
        ours.generate(inputs, attention_mask=inputs["attention_mask"], max_new_tokens=2)


def test_generation_ends_where_the_context_is_full(theirs, tokenizer, caplog):
    inputs = chat_ids(tokenizer)
    length = inputs["input_ids"].shape[1]
    small = ExportedModelForCausalLM(EagerRunner(theirs, context_length=length + 5), theirs.config)
    output = small.generate(**inputs, max_new_tokens=100, eos_token_id=-1)
    assert output.shape[1] == length + 6
    assert "context is full" in caplog.text
    with pytest.raises(ContextLimitError, match=r"do not fit the context limit"):
        small.generate(torch.ones(1, length + 6, dtype=torch.long), max_new_tokens=1)


# On an exported program

# The model's page, word for word.
EXAMPLE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

# Load model and tokenizer
model_id = "LiquidAI/LFM2-8B-A1B"
model = AutoModelForCausalLM.from_pretrained(
    model_id,
    device_map="auto",
    dtype="bfloat16",
#    attn_implementation="flash_attention_2" <- uncomment on compatible GPU
)
tokenizer = AutoTokenizer.from_pretrained(model_id)

# Generate answer
prompt = "What is C. elegans?"
input_ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": prompt}],
    add_generation_prompt=True,
    return_tensors="pt",
    tokenize=True,
).to(model.device)

output = model.generate(
    input_ids,
    do_sample=True,
    temperature=0.3,
    min_p=0.15,
    repetition_penalty=1.05,
    max_new_tokens=512,
)

print(tokenizer.decode(output[0], skip_special_tokens=False))
"""


@pytest.fixture(scope="module")
def folder(artifact):
    return artifact("tiny-moe")


@pytest.fixture(scope="module")
def program(folder):
    return ExportedModelForCausalLM.from_pretrained(folder, scheme="fp32", threads=1)


@pytest.fixture(scope="module")
def eager():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_the_documented_example_runs_with_only_the_class_changed(folder, capsys):
    source = EXAMPLE.replace(
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "from lfm2_export import ExportedModelForCausalLM\nfrom transformers import AutoTokenizer",
    )
    source = source.replace("AutoModelForCausalLM.from", "ExportedModelForCausalLM.from")
    source = source.replace("LiquidAI/LFM2-8B-A1B", str(folder))
    exec(compile(source, "example", "exec"), {})
    prompt = "<|startoftext|><|im_start|>user\nWhat is C. elegans?<|im_end|>\n<|im_start|>assistant\n"
    printed = capsys.readouterr().out
    assert printed.startswith(prompt)
    assert len(printed) > len(prompt) + 10


@shows("transformers", "sampling", "chat", family="lfm2_moe", scheme="fp32")
@pytest.mark.parametrize("seed", [0, 5])
def test_the_documented_options_give_the_tokens_of_the_eager_model(program, eager, tokenizer, seed):
    inputs = chat_ids(tokenizer, "What is C. elegans?")
    options = {"do_sample": True, "temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05, "max_new_tokens": 512}
    torch.manual_seed(seed)
    found = program.generate(inputs, **options)
    torch.manual_seed(seed)
    assert found.tolist() == eager.generate(**inputs, **options).tolist()


def shown(feature: str, **options: object) -> object:
    mark = shows("transformers", feature, "rows", "padding", family="lfm2_moe", scheme="fp32")
    return pytest.param(options, marks=mark, id=str(options))


@pytest.mark.parametrize(
    "options",
    [
        shown("greedy"),
        shown("sampling", do_sample=True),
        shown("sampling", do_sample=True, temperature=0.3, min_p=0.15, repetition_penalty=1.05),
        shown("beams", num_beams=4),
        shown("beams", num_beams=2, do_sample=True, num_return_sequences=2),
    ],
)
def test_an_exported_program_gives_the_tokens_of_the_eager_model(program, eager, tokenizer, options):
    texts = ["Return", "What is the difference between a list and a tuple?", "class A(object):"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    found, expected = both(program, eager, inputs, max_new_tokens=24, **options)
    assert found.tolist() == expected.tolist()


@shows("transformers", "logits", "padding", family="lfm2_moe", scheme="fp32")
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_an_exported_program(program, eager, tokenizer, side):
    texts = ["Return", "What is the difference between a list and a tuple?"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
    with torch.no_grad():
        expected = eager(**inputs).logits
    found = program(**inputs).logits
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-4, rtol=0)
    padded = found[~mask]
    assert len(padded) > 0
    assert not padded.any()


@pytest.fixture(scope="module")
def exact(artifact) -> ExportedModelForCausalLM:
    if variants.own_library() is None:
        pytest.skip("no compiler for our operators")
    return ExportedModelForCausalLM.from_pretrained(artifact("tiny-dense"), scheme="q4", threads=1)


REPEATED = "The files are a.txt, b.txt, c.txt. Say it again: The files are a.txt, b.txt,"


def generated(model, tokenizer, **options) -> list[int]:
    ids = torch.tensor([tokenizer(REPEATED)["input_ids"]])
    return model.generate(ids, max_new_tokens=60, **options)[0].tolist()


@shows("transformers", "speculation", family="lfm2", scheme="q4")
@pytest.mark.parametrize("sampled", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7}])
def test_proposals_change_no_token(exact, artifact, tokenizer, caplog, sampled):
    def tokens(**options):
        torch.manual_seed(3)
        with caplog.at_level("INFO"):
            return generated(exact, tokenizer, **sampled, **options)

    plain = tokens()
    assert tokens(prompt_lookup_num_tokens=5) == plain
    assert "speculation, lookup: " in caplog.text
    assistant = ExportedModelForCausalLM.from_pretrained(artifact("tiny-dense"), scheme="q8", threads=1)
    kept = assistant(torch.tensor([[1, 2, 3]])).past_key_values
    want = assistant(torch.tensor([[4]]), past_key_values=copy.deepcopy(kept)).logits
    assert tokens(assistant_model=assistant) == plain
    assert torch.equal(assistant(torch.tensor([[4]]), past_key_values=kept).logits, want)  # its own state came back
    stop = exact.generation_config.eos_token_id
    config = transformers.GenerationConfig(prompt_lookup_num_tokens=4, max_new_tokens=60, eos_token_id=stop)
    assert tokens(generation_config=config) == plain
    assert config.prompt_lookup_num_tokens == 4
    assert tokens() == plain


@shows("transformers", "speculation", family="lfm2", scheme="q4")
def test_a_drafter_as_assistant_changes_no_token(exact, tokenizer, taught, artifact, caplog):
    drafter = lfm2_export.load_drafter(taught, threads=1)
    ids = torch.tensor([tokenizer("Once upon a time there")["input_ids"][:4]])
    plain = exact.generate(ids, max_new_tokens=40, do_sample=False)
    with caplog.at_level("INFO"):
        found = exact.generate(ids, max_new_tokens=40, do_sample=False, assistant_model=drafter)
    assert torch.equal(found, plain)
    assert "speculation, assistant: " in caplog.text
    assert torch.equal(exact.generate(ids, max_new_tokens=40, do_sample=False), plain)
    other = ExportedModelForCausalLM.from_pretrained(artifact("tiny-moe"), scheme="q4", threads=1)
    with pytest.raises(ArtifactError, match="generate: assistant_model: drafts for 'tiny-dense', not for tiny-moe"):
        other.generate(ids, max_new_tokens=4, assistant_model=drafter)


def test_several_rows_are_decoded_plainly_and_that_is_said(exact, tokenizer, caplog):
    ids = torch.tensor([tokenizer(REPEATED)["input_ids"]] * 2)
    plain = exact.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(exact.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3), plain)
    beams = exact.generate(ids[:1], max_new_tokens=8, do_sample=False, num_beams=2)
    found = exact.generate(ids[:1], max_new_tokens=8, do_sample=False, num_beams=2, prompt_lookup_num_tokens=3)
    assert torch.equal(found, beams)
    assert caplog.text.count("speculation is for one row; 2 are decoded plainly") >= 1


def test_proposals_that_cannot_be_verified_are_refused(ours, exact, artifact, tokenizer):
    with pytest.raises(GenerationError, match="were both given"):
        generated(exact, tokenizer, prompt_lookup_num_tokens=3, assistant_model=ours)
    with pytest.raises(GenerationError, match="is the model itself"):
        generated(exact, tokenizer, assistant_model=exact)
    with pytest.raises(GenerationError, match=r"assistant_model is a Linear; open an artifact"):
        generated(exact, tokenizer, assistant_model=torch.nn.Linear(1, 1))
    with pytest.raises(RunnerError, match="give a number from 1 to 64"):
        generated(exact, tokenizer, prompt_lookup_num_tokens=0)
    stock = ExportedModelForCausalLM.from_pretrained(artifact("tiny-dense"), scheme="q4", kernels="stock", threads=1)
    with pytest.raises(RunnerError, match="may change tokens here"):
        generated(stock, tokenizer, prompt_lookup_num_tokens=3)
    assert len(generated(stock, tokenizer, prompt_lookup_num_tokens=3, speculate_inexact=True)) > 20
