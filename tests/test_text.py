"""Text in and out: the same ids and prompts as transformers, and streams that equal the whole text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lfm2_export
from lfm2_export.errors import ArtifactError, GenerationError
from lfm2_export.text import StreamDecoder, Tokenizer

FOLDER = Path(lfm2_export.__file__).parent / "assets" / "tiny-moe"
TOKENIZER = Tokenizer.from_dir(FOLDER)

USER = {"role": "user", "content": 'What is <b>C. elegans</b>? 😀 "é"'}
ASSISTANT = {"role": "assistant", "content": "  A worm.\n"}
SYSTEM = {"role": "system", "content": "Answer briefly."}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds <things> & más",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}

texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(FOLDER)


def copy_tokenizer(target: Path, **config) -> Path:
    for name in ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json", "config.json"):
        shutil.copy(FOLDER / name, target)
    original = json.loads((FOLDER / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(original | config))
    return target


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize(
    "text", ["", "Hello  world\n\n", "😀👩‍👩‍👧 naïve", "<|im_start|>user\nhi<|im_end|>", "\ufffd\x00 x" * 9]
)
def test_encode_equals_transformers(theirs, text, add_special_tokens):
    expected = theirs(text, add_special_tokens=add_special_tokens)["input_ids"]
    assert TOKENIZER.encode(text, add_special_tokens=add_special_tokens) == expected


@pytest.mark.parametrize(("text", "position"), [("\ud800", 0), ("ab\udcff", 2)])
def test_text_that_is_no_unicode_is_refused_with_its_place(text, position):
    expected = (
        rf"text: character {position} \('\\u{ord(text[-1]):x}'\) is not Unicode text; give the text as valid UTF-8"
    )
    with pytest.raises(GenerationError, match=expected):
        TOKENIZER.encode(text)
    with pytest.raises(GenerationError, match="is not Unicode text"):
        TOKENIZER.encode_chat([{"role": "user", "content": text}])


@pytest.mark.parametrize("ids", [[-1], [1, 2**32], [1.5], ["a"]])
def test_ids_that_are_none_are_refused(ids):
    with pytest.raises(GenerationError, match=r"decode: \[.*\] are not all token ids; pass integers from 0 up"):
        TOKENIZER.decode(ids)


def test_encode_puts_the_bos_token_first():
    assert TOKENIZER.encode("a")[0] == TOKENIZER.token_id(TOKENIZER.special_tokens["bos_token"])


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30), skip=st.booleans())
def test_decode_equals_transformers(theirs, ids, skip):
    assert TOKENIZER.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize(
    "options",
    [
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"eos_token": "<|new_end|>"},
        {"extra_special_tokens": ["<|brand_new|>"]},
        {"extra_special_tokens": {"image_token": "<|image|>"}},
        {"image_token": "<|image|>"},
        {"additional_special_tokens": ["<|brand_new|>"]},
        {"extra_special_tokens": ["<|brand_new|>"], "additional_special_tokens": ["<|image|>"]},
        {"extra_special_tokens": {"a_token": "<|brand_new|>"}, "additional_special_tokens": ["<|image|>"]},
        {"extra_special_tokens": [], "additional_special_tokens": ["<|image|>"]},
        {"extra_special_tokens": [{"__type": "AddedToken", "content": "<|image|>", "lstrip": True}]},
        {"model_specific_special_tokens": {"a": "<|image|>"}},
        {"model_specific_special_tokens": {"a": "<|image|>"}, "b_token": "<|brand_new|>"},
        {"split_special_tokens": True},
        {"split_special_tokens": True, "extra_special_tokens": ["<|brand_new|>"]},
        {"pad_token": None},
        {"bos_token": {"__type": "AddedToken", "content": "<|startoftext|>", "lstrip": True}},
    ],
    ids=lambda options: ",".join(options),
)
def test_tokenizer_config_means_what_it_means_to_transformers(tmp_path, options):
    folder = copy_tokenizer(tmp_path, **options)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_dir(folder)
    text = "a <|new_end|> b<|brand_new|>  c <|image|><|startoftext|> d"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == theirs.decode(
        theirs(text)["input_ids"], skip_special_tokens=True
    )


@pytest.mark.parametrize("key", ["extra_special_tokens", "additional_special_tokens"])
def test_special_tokens_map_goes_on_from_the_list_of_the_config(tmp_path, key):
    folder = copy_tokenizer(tmp_path, extra_special_tokens=["<|image|>"])
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "added_tokens_decoder"}))
    (folder / "special_tokens_map.json").write_text(json.dumps({key: ["<|brand_new|>"]}))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    text = "a<|brand_new|> b <|image|>c"
    assert Tokenizer.from_dir(folder).encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("special", [True, False])
def test_a_token_is_special_where_only_the_config_says_so(tmp_path, special, split):
    markers = {"10": "<|tool_call_start|>", "14": "<|reserved_0|>"}
    declared = {ident: {"content": text, "special": special, "normalized": False} for ident, text in markers.items()}
    folder = copy_tokenizer(tmp_path, added_tokens_decoder=declared, split_special_tokens=split)
    raw = json.loads((folder / "tokenizer.json").read_text())
    for entry in raw["added_tokens"]:
        entry["special"] = not special
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours, text = Tokenizer.from_dir(folder), "a <|tool_call_start|>[f()]<|tool_call_end|> b<|reserved_0|><|im_end|>"
    assert ours.encode(text) == theirs(text)["input_ids"]
    ids = [token for marker in ours.encode(text) for token in (marker, 10, 14)]
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    folder = copy_tokenizer(tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    text = "one two three four five six seven"
    assert Tokenizer.from_dir(folder).encode(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, [TOOL], [TOOL, TOOL]], ids=["no_tools", "tool", "tools"])
@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [SYSTEM, USER],
        [SYSTEM, USER, ASSISTANT, USER],
        [USER, {"role": "tool", "content": "{}"}],
        [USER, {"role": "user", "content": [{"type": "text", "text": "é"}], "name": None}],
    ],
    ids=["user", "system", "turns", "tool_result", "parts"],
)
def test_chat_prompt_equals_transformers(theirs, messages, tools, add_generation_prompt):
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    assert TOKENIZER.render_chat(messages, **options) == theirs.apply_chat_template(messages, tokenize=False, **options)
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
    assert TOKENIZER.encode_chat(messages, **options) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m['content'] }}{% endfor %}",
        "{{ messages | tojson(indent=2) }}|{{ tools | tojson }}|{{ [1, 'é'] | tojson(ensure_ascii=True) }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}!",
        "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ dict(x=1) }}{{ dict.fromkeys(['b']) }}",
        "{{ strftime_now('%Y') }}{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}{{ extra }}",
        "{{ messages[1].reasoning_content }}|{{ messages[1].thinking }}|{{ messages[1].reasoning }}",
        "    {%- if true %}\n    x\n    {% endif %}\ny",
    ],
)
def test_template_features_equal_transformers(theirs, tmp_path, template):
    folder = copy_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    messages = [USER, {"role": "assistant", "content": "b", "reasoning": "why", "gone": None}]
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, extra=[1, 2.5, None])
    found = Tokenizer.from_dir(folder).render_chat(
        messages, add_generation_prompt=False, variables={"extra": [1, 2.5, None]}
    )
    assert found == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            r"chat template: roles must alternate \(TemplateError\)",
        ),
        ("{{ messages", "chat template, line 1: "),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ namespace(__class__=1) }}", r"namespace cannot have the attribute '__class__'"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "namespace cannot have the attribute '_x'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(999999) %}{% endfor %}", "OverflowError"),
    ],
)
def test_a_failing_template_is_one_line(tmp_path, template, message):
    folder = copy_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(GenerationError, match=message) as info:
        Tokenizer.from_dir(folder).render_chat([USER])
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "no messages"),
        (["hello"], {}, "message 0 is 'hello'"),
        ([{"content": "x"}], {}, "message 0 is"),
        ([{"role": "user", "content": object()}], {}, "message 0 holds a object; only JSON values"),
        ([USER], {"tools": [print]}, "tool 0 is <built-in function print>; a JSON schema"),
    ],
)
def test_bad_conversations_are_refused(messages, options, message):
    with pytest.raises(GenerationError, match=message):
        TOKENIZER.render_chat(messages, **options)


def test_template_may_be_in_tokenizer_config(tmp_path):
    named = [
        {"name": "tool_use", "template": "t"},
        {"name": "default", "template": "{{ messages[0].role }}!"},
    ]
    for config in ({"chat_template": "{{ messages[0].role }}!"}, {"chat_template": named}):
        folder = copy_tokenizer(tmp_path, **config)
        (folder / "chat_template.jinja").unlink()
        assert Tokenizer.from_dir(folder).render_chat([USER]) == "user!"


def test_no_template_is_reported(tmp_path):
    folder = copy_tokenizer(tmp_path)
    (folder / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.from_dir(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(GenerationError, match=r"no chat template; pass a plain prompt"):
        tokenizer.encode_chat([USER])


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"tokenizer.json: no such file"):
        Tokenizer.from_dir(tmp_path)
    folder = copy_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"tokenizer_config.json: is not JSON \(Expecting property name"):
        Tokenizer.from_dir(folder)
    copy_tokenizer(tmp_path, added_tokens_decoder={"7": {"special": True}})
    with pytest.raises(ArtifactError, match=r"its tokens are damaged \(the token {'special': True} has no content\)"):
        Tokenizer.from_dir(folder)
    copy_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"abc\xff")
    with pytest.raises(ArtifactError, match=r"chat_template.jinja: byte 3 is not UTF-8; bring back"):
        Tokenizer.from_dir(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer.json: not a readable tokenizer"):
        Tokenizer.from_dir(folder)


def assert_streams(ids: list[int], skip: bool | None = True) -> list[str]:
    decoder = StreamDecoder(TOKENIZER, skip_special_tokens=skip)
    pieces = [decoder.push(token) for token in ids] + [decoder.finish()]
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=skip)
    return pieces


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_any_text_streams_whole_and_without_broken_characters(text):
    pieces = assert_streams(TOKENIZER.encode(text))
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40), skip=st.sampled_from([True, False, None]))
def test_any_tokens_stream_to_what_decode_gives(ids, skip):
    assert_streams(ids, skip)


BYTES = [TOKENIZER.token_id(token) for token in ("ðŁĺĢ", "ð", "Ł", "ĺ", "Ģ", "ï", "¿", "½", "ÿ", "a", "<|im_end|>")]


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.sampled_from([b for b in BYTES if b is not None]), max_size=60),
    skip=st.sampled_from([True, False, None]),
)
def test_streams_of_broken_bytes(ids, skip):
    """Invalid, unfinished and genuine U+FFFD sequences, long enough to be cut."""
    assert_streams(ids, skip)


def test_an_emoji_of_several_tokens_appears_at_once():
    ids = TOKENIZER.encode("a😀b", add_special_tokens=False)
    assert len(ids) >= 4, "the bundled tokenizer is expected to split this emoji"
    pieces = [piece for piece in assert_streams(ids) if piece]
    assert "😀" in pieces
    assert "\ufffd" not in "".join(pieces)


def test_an_unfinished_character_shows_at_the_end_only():
    ids = TOKENIZER.encode("a😀", add_special_tokens=False)[:-1]
    decoder = StreamDecoder(TOKENIZER)
    assert decoder.push_all(ids) == "a"
    assert decoder.finish() == "\ufffd"


def test_a_stream_of_invalid_bytes_stays_fast():
    token = TOKENIZER.token_id("ÿ")
    decoder = StreamDecoder(TOKENIZER)
    for _ in range(500):
        decoder.push(token)
        assert len(decoder._pending) <= 20


MARKED = (
    "<|startoftext|><|im_start|>assistant\n<|tool_call_start|>[f()]<|tool_call_end|> ok<|im_end|><|pad|><|endoftext|>"
)


def test_a_reply_is_read_with_its_markers_and_without_what_frames_it():
    ids = TOKENIZER.encode(MARKED, add_special_tokens=False)
    decoder = StreamDecoder(TOKENIZER)
    assert decoder.push_all(ids) + decoder.finish() == "assistant\n<|tool_call_start|>[f()]<|tool_call_end|> ok"
    assert TOKENIZER.decode(ids) == MARKED
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "assistant\n[f()] ok"
    stops = (TOKENIZER.token_id("<|tool_call_end|>"),)
    assert (
        TOKENIZER.decode(ids, skip_special_tokens=None, stop_tokens=stops) == "assistant\n<|tool_call_start|>[f()] ok"
    )


def test_what_frames_a_text_is_known_by_its_role(tmp_path):
    options = {"eos_token": "<turn>", "pad_token": "<|reserved_0|>", "extra_special_tokens": ["<think>"]}
    tokenizer = Tokenizer.from_dir(copy_tokenizer(tmp_path, **options))
    ids = tokenizer.encode("<think>a<turn><|reserved_0|><|reserved_1|>")
    assert tokenizer.decode(ids, skip_special_tokens=None) == "<think>a<|reserved_1|>"
