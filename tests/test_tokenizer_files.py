"""tokenizer_config.json and its companions as strangers write them: checked as data, refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from random import Random

import pytest

import lfm2_export
from lfm2_export.errors import ArtifactError
from lfm2_export.files import TEXT_LIMIT
from lfm2_export.messages import MESSAGE_LIMIT
from lfm2_export.text import Tokenizer
from lfm2_export.tokenizer_files import TOKENIZER_LIMIT

BUNDLED = Path(lfm2_export.__file__).parent / "assets" / "tiny-moe"
NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json")
USER = {"role": "user", "content": "Hello"}


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "tokenizer"
    path.mkdir()
    for name in NAMES:
        shutil.copy(BUNDLED / name, path)
    return path


def configured(folder: Path, **changes) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def refusal(folder: Path) -> str:
    started = time.monotonic()
    with pytest.raises(ArtifactError) as info:
        Tokenizer.from_dir(folder)
    message = str(info.value)
    assert time.monotonic() - started < 10
    assert message.isprintable()
    assert len(message) <= MESSAGE_LIMIT
    print(message)
    return message


def token(content: object = "<new>", **flags: object) -> dict[str, object]:
    return {"content": content, **flags}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"bos_token": "\ud800"}, "has no Unicode text at character 0"),
        ({"eos_token": "ab\udfff"}, "has no Unicode text at character 2"),
        ({"pad_token": {"content": "\udc00x"}}, "has no Unicode text at character 0"),
        ({"image_token": "<\ud83d>"}, "has no Unicode text at character 1"),
        ({"extra_special_tokens": ["\ud800"]}, "has no Unicode text"),
        ({"extra_special_tokens": {"a_token": "\ud800"}}, "has no Unicode text"),
        ({"additional_special_tokens": [{"content": "\ud800"}]}, "has no Unicode text"),
        ({"added_tokens_decoder": {"7": token("\ud800")}}, "has no Unicode text"),
        ({"bos_token": "x" * 5000}, "has 5000 characters, more than 4096"),
        ({"bos_token": "x" * 10**6}, "has 1000000 characters, more than 4096"),
        ({"image_token": "é" * 10**6}, "has 1000000 characters, more than 4096"),
        ({"extra_special_tokens": ["x" * 10**6]}, "has 1000000 characters, more than 4096"),
        ({"added_tokens_decoder": {"7": token("x" * 10**6)}}, "has 1000000 characters, more than 4096"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder=[] is no object of tokens"),
        ({"added_tokens_decoder": ["x"] * 10**5}, "is no object of tokens"),
        ({"added_tokens_decoder": None}, "added_tokens_decoder=None is no object"),
        ({"added_tokens_decoder": {"²": token()}}, "has '²' for an id"),
        ({"added_tokens_decoder": {"": token()}}, "has '' for an id"),
        ({"added_tokens_decoder": {"1.5": token()}}, "has '1.5' for an id"),
        ({"added_tokens_decoder": {"9" * 5000: token()}}, "for an id"),
        ({"added_tokens_decoder": {"x" * 10**6: token()}}, "for an id"),
        ({"added_tokens_decoder": {"7": None}}, "the token None has no content"),
        ({"added_tokens_decoder": {"7": "<x>"}}, "the token '<x>' has no content"),
        ({"added_tokens_decoder": {"7": {}}}, "the token {} has no content"),
        ({"added_tokens_decoder": {"7": token(None)}}, "the token None is no text"),
        ({"added_tokens_decoder": {"7": token(7)}}, "the token 7 is no text"),
        ({"added_tokens_decoder": {"7": token(["x"] * 10**5)}}, "is no text"),
        ({"added_tokens_decoder": {"7": token(10**4000)}}, "is no text"),
        ({"added_tokens_decoder": {"7": token(lstrip="yes")}}, "lstrip='yes' of '<new>' is neither true nor false"),
        ({"added_tokens_decoder": {"7": token(special=1)}}, "special=1 of '<new>' is neither true nor false"),
        ({"added_tokens_decoder": {"7": token(normalized=None)}}, "normalized=None of '<new>' is neither"),
        ({"added_tokens_decoder": {"7": token(rstrip=["x" * 10**6])}}, "of '<new>' is neither true nor false"),
        ({"added_tokens_decoder": {"7": token("\x1b[31m\n" * 99, special=2)}}, "is neither true nor false"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_tokens_that_are_damaged_are_said_in_one_line(folder, changes, fault):
    message = refusal(configured(folder, **changes))
    assert f"{folder / 'tokenizer_config.json'}: its tokens are damaged (" in message
    assert fault in message
    assert message.endswith("; restore it or export again")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"chat_template": "a\ud800"}, "chat_template has no Unicode text at character 1"),
        ({"chat_template": "x" * (TEXT_LIMIT + 1)}, f"chat_template has {TEXT_LIMIT + 1} characters, more than"),
        ({"chat_template": [{"name": "default", "template": "\ud800"}]}, "has no Unicode text"),
    ],
    ids=["surrogate", "large", "named"],
)
def test_a_template_in_the_config_is_checked_too(folder, changes, fault):
    (folder / "chat_template.jinja").unlink()
    assert fault in refusal(configured(folder, **changes))


@pytest.mark.parametrize(
    "template",
    [None, 7, {}, [], ["x"], [{"name": ["default"], "template": "x"}], [{"template": "x"}], [{"name": "default"}]],
    ids=str,
)
def test_a_template_that_is_none_is_none(folder, template):
    (folder / "chat_template.jinja").unlink()
    assert not Tokenizer.from_dir(configured(folder, chat_template=template)).has_chat_template


@pytest.mark.parametrize(
    "changes",
    [
        {"bos_token": None, "eos_token": 7, "pad_token": ["x"], "cls_token": {"content": 3}},
        {"extra_special_tokens": 7, "additional_special_tokens": "x"},
        {"extra_special_tokens": [None, 7, {}, [], {"content": None}]},
        {"extra_special_tokens": {"a": None, "b": [], "c": {"content": "<c>", "lstrip": True}}},
        {"model_max_length": 10**400, "x" * 10**5: "y" * 10**5, "nested": json.loads("[" * 50 + "]" * 50)},
        {"added_tokens_decoder": {"99999999999999999999": token(), "-1": token("<minus>"), "0": token("")}},
    ],
    ids=lambda value: str(value)[:50],
)
def test_values_that_say_nothing_about_tokens_change_nothing(folder, changes):
    text = "Hello <|im_start|> world"
    assert Tokenizer.from_dir(configured(folder, **changes)).encode(text) == Tokenizer.from_dir(BUNDLED).encode(text)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is not JSON"),
        (b"[]", "holds [], not a JSON object"),
        (b"[" * 200_000, "is not JSON (maximum recursion depth"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON (Exceeds the limit"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b'{"a": "' + b"x" * (17 << 20) + b'"}', "bytes, more than the 16777216 that such a file may have"),
    ],
    ids=["empty", "list", "deep", "digits", "bytes", "large"],
)
def test_a_file_that_is_no_json_object_is_refused(folder, name, content, fault):
    if name == "special_tokens_map.json":
        (folder / "tokenizer_config.json").write_text("{}")
    (folder / name).write_bytes(content)
    message = refusal(folder)
    assert message.startswith(f"{folder / name}: {fault}" if "bytes" not in fault else f"{folder / name}: has ")
    assert fault in message


@pytest.mark.parametrize(
    ("name", "limit"),
    [("tokenizer.json", TOKENIZER_LIMIT), ("tokenizer_config.json", 16 << 20), ("chat_template.jinja", TEXT_LIMIT)],
)
def test_a_size_is_known_before_a_file_is_read(folder, name, limit):
    os.truncate(folder / name, limit + 1)
    assert f"{folder / name}: has {limit + 1} bytes, more than the {limit} that" in refusal(folder)
    os.truncate(folder / name, 10**12)
    assert f"{folder / name}: has {10**12} bytes" in refusal(folder)


@pytest.mark.skipif(os.name != "posix", reason="special files are POSIX's")
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_only_regular_files_of_the_folder_are_read(folder, name):
    path = folder / name
    path.rename(folder.parent / name)
    os.mkfifo(path)
    assert refusal(folder).startswith(f"{path}: is not a regular file")
    path.unlink()
    for target in (folder.parent / name, Path("/dev/zero"), Path("/proc/self/environ")):
        path.symlink_to(target)
        assert refusal(folder).startswith(f"{path}: is a link that leaves its folder")
        path.unlink()
    path.mkdir()
    assert refusal(folder).startswith(f"{path}: is a folder where a file is needed")
    path.rmdir()
    (folder.parent / name).rename(folder / "elsewhere")
    path.symlink_to("elsewhere")
    assert Tokenizer.from_dir(folder).render_chat([USER]) == Tokenizer.from_dir(BUNDLED).render_chat([USER])


def test_ten_thousand_special_tokens_are_read_at_once(folder):
    extra = [f"<|extra_{index}|>" for index in range(10_000)]
    declared = {str(1000 + index): token(f"<|more_{index}|>", special=bool(index % 2)) for index in range(10_000)}
    configured(folder, extra_special_tokens=extra, added_tokens_decoder=declared)
    Tokenizer.from_dir(folder)
    started = time.monotonic()
    tokenizer = Tokenizer.from_dir(folder)
    print(f"{time.monotonic() - started:.2f} s")
    assert time.monotonic() - started < 3
    first = tokenizer.token_id("<|more_0|>")
    assert [tokenizer.token_id(f"<|more_{index}|>") for index in range(10_000)] == list(range(first, first + 10_000))
    assert [tokenizer.token_id(text) for text in extra] == list(range(first + 10_000, first + 20_000))


FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


@pytest.mark.parametrize("seed", range(4))
def test_many_tokens_mean_what_they_mean_to_transformers(folder, seed):
    """Declared, extra, named, known to tokenizer.json, several of these at once, with other flags in each place."""
    random = Random(seed)

    def flags() -> dict[str, bool]:
        return {flag: random.random() < 0.4 for flag in random.sample(FLAGS, random.randint(0, 5))}

    known = ["<|im_start|>", "<|im_end|>", "<|fim_mid|>", "<|tool_call_start|>", "<|reserved_0|>"]
    texts = [*known, *(f"<t{index}>" for index in range(60)), "the", " a"]
    declared = {str(ident): token(random.choice(texts), **flags()) for ident in random.sample(range(3000), 70)}
    extra: list[object] = [
        random.choice([text, {"__type": "AddedToken", "content": text, **flags()}])
        for text in random.choices(texts, k=40)
    ]
    configured(
        folder,
        added_tokens_decoder=declared,
        extra_special_tokens=extra,
        eos_token=random.choice(texts),
        image_token=random.choice(texts),
        sep_token={"__type": "AddedToken", "content": random.choice(texts), **flags()},
        split_special_tokens=seed == 3,
    )
    if seed == 2:  # special_tokens_map.json then counts, and the tokens of tokenizer.json
        path = folder / "tokenizer_config.json"
        path.write_text(
            json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "added_tokens_decoder"})
        )
    raw = json.loads((folder / "tokenizer.json").read_text())
    for entry in raw["added_tokens"]:
        entry |= {"special": random.random() < 0.5}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_dir(folder)
    text = " ".join(f"a {text} b{text}c the{text}" for text in texts)
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("seed", range(2))
def test_an_older_file_of_added_tokens_is_read_as_by_transformers(folder: Path, seed: int) -> None:
    random = Random(seed)
    path = folder / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k != "added_tokens_decoder"}
    path.write_text(json.dumps(kept | {"extra_special_tokens": ["<extra>"]}))
    known = {
        entry["content"]: entry["id"] for entry in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    texts = ["<mine>", "<other> ", "Caf\u00e9", "<extra>", *random.sample(sorted(known), 3)]
    # New ids, the token's own, another's, and that of an ordinary token.
    ids = {text: random.choice([9000 + i, known.get(text, 9000 + i), 3, 700 + i]) for i, text in enumerate(texts)}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_dir(folder)
    text = " ".join(f"a {text} b{text}c CAF\u00c9 the{text}" for text in [*texts, *known])
    found = ours.encode(text)
    assert found == theirs(text)["input_ids"]
    for skip in (True, False):
        assert ours.decode(found, skip_special_tokens=skip) == theirs.decode(found, skip_special_tokens=skip)
    # The control: without the file it is another text.
    (folder / "added_tokens.json").unlink()
    assert Tokenizer.from_dir(folder).encode(text) != found


@pytest.mark.parametrize("content", ['{"<mine>": "7"}', '{"<mine>": -1}', '{"<mine>": 1.5}', '{"\\ud800": 7}', "[7]"])
def test_an_older_file_of_added_tokens_that_is_none_is_refused(folder: Path, content: str) -> None:
    path = folder / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k != "added_tokens_decoder"}
    path.write_text(json.dumps(kept))
    (folder / "added_tokens.json").write_text(content)
    assert "added_tokens.json: " in refusal(folder)
