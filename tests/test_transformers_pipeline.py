"""transformers' pipeline on an exported program: the answers of the eager model, and not a word of warning."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import lfm2_export
from lfm2_export.errors import GenerationError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lfm2_export.transformers_api import ExportedModelForCausalLM  # noqa: E402
from tests.shows import shows  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(lfm2_export.__file__).parent / "assets" / "tiny-moe"


@pytest.fixture(scope="module")
def folder(artifact):
    return artifact("tiny-moe")


@pytest.fixture(scope="module")
def ours(folder):
    return ExportedModelForCausalLM.from_pretrained(folder, scheme="fp32", threads=1)


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def warned():
    """What transformers logs, warnings and worse; it does not pass its records on."""
    records: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger("transformers").addHandler(listener)
    yield records
    logging.getLogger("transformers").removeHandler(listener)


CHAT = [{"role": "user", "content": "What is a list?"}]


@shows("transformers", "greedy", family="lfm2_moe", scheme="fp32")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("The return", {}),
        ("The return", {"return_full_text": False}),
        ("The return", {"return_tensors": True}),
        ("", {}),
        (["The return", "a b c"], {"batch_size": 2}),
        (CHAT, {}),
        ([CHAT, [{"role": "user", "content": "Why?"}]], {"batch_size": 2}),
        ("The return", {"stop_sequence": "e", "max_new_tokens": 8}),
        ("The return", {"num_beams": 2, "num_return_sequences": 2}),
    ],
    ids=str,
)
def test_a_pipeline_answers_as_on_the_eager_model_without_a_warning(ours, theirs, tokenizer, given, options, warned):
    options = {"do_sample": False, "max_new_tokens": 4} | options
    found = transformers.pipeline("text-generation", model=ours, tokenizer=tokenizer)(given, **options)
    assert warned == []
    assert found == transformers.pipeline("text-generation", model=theirs, tokenizer=tokenizer)(given, **options)


def test_the_warning_is_there_for_a_model_that_generates_no_text(ours, tokenizer, warned):
    """The control: what the tests above must not find."""

    class Unheard(ExportedModelForCausalLM):
        pass

    transformers.pipeline("text-generation", model=Unheard(ours.runner, ours.config), tokenizer=tokenizer)
    assert [message[:49] for message in warned] == ["The model 'Unheard' is not supported for text-gene"[:49]]


@pytest.mark.parametrize("device", ["cpu", -1, torch.device("cpu")], ids=str)
def test_a_pipeline_takes_the_cpu_and_refuses_another_device_by_name(ours, tokenizer, device, warned):
    assert transformers.pipeline("text-generation", model=ours, tokenizer=tokenizer, device=device).model is ours
    assert warned == []
    with pytest.raises(GenerationError, match=r"to=device\(type='cuda', index=0\): exported programs run on the CPU"):
        transformers.pipeline("text-generation", model=ours, tokenizer=tokenizer, device="cuda:0")


@shows("transformers", "streaming", family="lfm2_moe", scheme="fp32")
def test_a_pipeline_streams(ours, tokenizer, capsys, warned):
    generate = transformers.pipeline("text-generation", model=ours, tokenizer=tokenizer)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    (answer,) = generate("The return", max_new_tokens=6, do_sample=False, streamer=streamer, return_full_text=False)
    assert capsys.readouterr().out.strip() == answer["generated_text"].strip()
    assert warned == []


def test_transformers_own_models_are_found_as_before():
    config = transformers.AutoConfig.from_pretrained(FOLDER)
    with torch.device("meta"):
        assert type(transformers.AutoModelForCausalLM.from_config(config)) is transformers.Lfm2MoeForCausalLM
