"""Chat templates by name: found, chosen and carried as transformers does, and bounded as a stranger's files are."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.chat import Chat
from lfm2_export.errors import ArtifactError, CheckpointError, GenerationError
from lfm2_export.files import TEXT_LIMIT
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.messages import MESSAGE_LIMIT
from lfm2_export.template_files import FOLDER, MOST_TEMPLATES, TEMPLATE
from lfm2_export.text import Tokenizer
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.hash_runner import HashRunner

BUNDLED = Path(lfm2_export.__file__).parent / "assets" / "tiny-dense"
TALK = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "look_up"}}]
CHOICES = [{}, {"tools": TOOLS}, {"chat_template": "rag"}, {"chat_template": "{{ bos_token }}!"}]
CHOICES += [{"chat_template": "default", "tools": TOOLS}, {"chat_template": "rag", "tools": TOOLS}, {"tools": []}]


def body(name: str) -> str:
    return name + ":{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def listing(*names: str) -> list[dict[str, str]]:
    return [{"name": name, "template": body(f"listed {name}")} for name in names]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer without templates."""
    path = tmp_path / "tokenizer"
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copy(BUNDLED / name, path)
    return path


def give(folder: Path, *files: str, config: object = None) -> Path:
    """Writes templates: "default" into chat_template.jinja, the others where further ones lie."""
    for name in files:
        path = folder / TEMPLATE if name == "default" else folder / FOLDER / f"{name.removeprefix('more/')}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(body(f"file {name}"))
    if config is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": config}))
    return folder


SOURCES = [
    {"config": listing("default", "tool_use", "rag")},
    {"config": listing("tool_use", "rag", "default", "default")},
    {"config": listing("rag")},
    {"config": listing("tool_use")},
    {"config": {"default": body("a"), "rag": body("b")}},
    {"config": body("alone")},
    {"files": ("default",), "config": listing("default", "tool_use")},
    {"files": ("default", "tool_use", "rag")},
    {"files": ("default", "rag"), "config": listing("tool_use")},
    {"files": ("tool_use", "rag"), "config": listing("default")},
    {"files": ("default", "more/default", "tool_use")},
    {"files": ("more/default",)},
]


@pytest.mark.parametrize("source", SOURCES, ids=range(len(SOURCES)))
def test_a_template_is_chosen_as_transformers_chooses_it(folder, source):
    give(folder, *source.get("files", ()), config=source.get("config"))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_dir(folder)
    for options in CHOICES:
        asked = options.get("chat_template", "{")
        if asked == "default" and set(ours.chat_templates) == {"default"}:  # to transformers, a text without a variable
            assert ours.render_chat(TALK, **options) == ours.render_chat(TALK)
        elif "{" not in asked and asked not in ours.chat_templates:
            with pytest.raises(GenerationError, match=f"has no chat template '{asked}', only: "):
                ours.render_chat(TALK, **options)
        elif (expected := rendered(theirs, options)) is None:
            with pytest.raises(GenerationError, match=r"has no default chat template, only: .*; pass chat_template="):
                ours.render_chat(TALK, **options)
        else:
            assert ours.render_chat(TALK, **options) == expected


def rendered(theirs, options) -> str | None:
    """By transformers' tokenizer; None where no default is there."""
    if "chat_template" not in options and isinstance(theirs.chat_template, dict):
        chosen = {"default"} | ({"tool_use"} if "tools" in options else set())
        if not chosen & set(theirs.chat_template):
            with pytest.raises(ValueError, match="no default specified"):
                theirs.apply_chat_template(TALK, tokenize=False, **options)
            return None
    return theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True, **options)


def test_a_conversation_keeps_to_its_template(folder):
    tokenizer = Tokenizer.from_dir(give(folder, config=listing("default", "tool_use", "rag")))
    for options, name in (({}, "default"), ({"tools": TOOLS}, "tool_use"), ({"chat_template": "rag"}, "rag")):
        runner = HashRunner(vocab_size=tokenizer.vocab_size)
        chat = Chat(runner, tokenizer, GenerationConfig(max_new_tokens=2), **options)
        list(chat.send("hi"))
        assert tokenizer.decode(runner.rows[0]).startswith(f"listed {name}:[user]hi")


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        Tokenizer.from_dir(folder)
    message = str(caught.value)
    print(message)
    assert message.isprintable()
    assert len(message) <= MESSAGE_LIMIT
    return message


@pytest.mark.skipif(os.name != "posix", reason="elsewhere no file can be called so")
@pytest.mark.parametrize("name", ["..", "a\\b", "x" * 100, "", "a\nb", "-x", "[red]", "a:b", "\udcff"])
def test_names_that_are_none_are_left_out_and_said(folder, caplog, name):
    give(folder, "default", "tool_use")
    (folder / FOLDER / f"{name}.jinja").write_text("x")
    assert set(Tokenizer.from_dir(folder).chat_templates) == {"default", "tool_use"}
    shutil.rmtree(folder / FOLDER)
    (folder / TEMPLATE).unlink()
    give(folder, config=[*listing("default"), {"name": name, "template": "x"}])
    assert set(Tokenizer.from_dir(folder).chat_templates) == {"default"}
    for record in caplog.records:
        assert "no names of chat templates; left out: " in record.getMessage()
    assert len(caplog.records) == 2


def test_there_are_only_so_many_and_so_large_ones(folder):
    names = [f"t{index}" for index in range(MOST_TEMPLATES)]
    give(folder, *names)
    assert len(Tokenizer.from_dir(folder).chat_templates) == MOST_TEMPLATES
    give(folder, "default")  # one more than the files in the folder of further ones
    assert f"holds {MOST_TEMPLATES + 1} chat templates, more than {MOST_TEMPLATES}; remove" in refusal(folder)
    give(folder, "one")
    assert f"{FOLDER}: holds {MOST_TEMPLATES + 1} chat templates" in refusal(folder)
    for index in range(1_000):
        (folder / FOLDER / f"many{index}.jinja").touch()
    assert "holds 1017 chat templates" in refusal(folder)
    shutil.rmtree(folder / FOLDER)
    give(folder, "a", "b", "c")
    for name in "abc":
        os.truncate(folder / FOLDER / f"{name}.jinja", TEXT_LIMIT)
    assert f" characters, more than {2 * TEXT_LIMIT}; remove some" in refusal(folder)
    os.truncate(folder / FOLDER / "b.jinja", 10**12)
    assert "b.jinja: has 1000000000000 bytes, more than" in refusal(folder)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ([{"name": f"t{i}", "template": "x"} for i in range(100_000)], "holds 100000 chat templates, more than"),
        ([{"name": f"t{i}", "template": "x" * TEXT_LIMIT} for i in range(3)], "its chat templates have 3145728 char"),
        ([{"name": "a", "template": "x" * (TEXT_LIMIT + 1)}], "chat_template 'a' has 1048577 characters, more than"),
        ([{"name": "a", "template": "x\ud800"}], "chat_template 'a' has no Unicode text at character 1"),
    ],
    ids=["many", "large", "one", "surrogate"],
)
def test_a_list_of_the_config_is_bounded_too(folder, config, fault):
    assert fault in refusal(give(folder, config=config))


@pytest.mark.skipif(os.name != "posix", reason="special files are POSIX's")
def test_only_regular_files_of_the_folder_are_read(folder, tmp_path):
    give(folder, "default", "tool_use")
    path = folder / FOLDER / "x.jinja"
    (tmp_path / "secret").write_text("x")
    for target in (tmp_path / "secret", Path("/dev/zero"), Path("/proc/self/environ")):
        path.symlink_to(target)
        assert f"{path}: is a link that leaves its folder" in refusal(folder)
        path.unlink()
    os.mkfifo(path)
    assert f"{path}: is not a regular file" in refusal(folder)
    path.unlink()
    path.mkdir()
    assert f"{path}: is a folder where a file is needed" in refusal(folder)
    path.rmdir()
    path.write_bytes(b"a\xff")
    assert f"{path}: byte 1 is not UTF-8" in refusal(folder)
    elsewhere = tmp_path / "elsewhere"
    (folder / FOLDER).rename(elsewhere)
    (folder / FOLDER).symlink_to(elsewhere)
    assert "is a link that leaves its folder" in refusal(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = write_random_checkpoint(tmp_path / "checkpoint", tiny_config("lfm2"), seed=3)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, path)
    return path


@pytest.mark.parametrize("source", ["files", "list"])
def test_an_artifact_has_all_templates(checkpoint, tmp_path, source):
    """For us and for transformers; onnxruntime-genai and Transformers.js, which know tokenizer_config.json alone, find
    the default there (a list would keep genai from opening the tokenizer)."""
    names = ("default", "tool_use", "rag")
    give(checkpoint, *(names if source == "files" else ()), config=listing(*names) if source == "list" else None)
    if source == "files":
        (checkpoint / FOLDER / "rag.jinja").write_bytes(b"rag \r\n\xc3\xa9{{ messages[0].content }}")
    made = lfm2_export.export(checkpoint, scheme="fp32", output=tmp_path / "made").path
    expected, ours = Tokenizer.from_dir(checkpoint), Tokenizer.from_dir(made)
    assert ours.chat_templates == expected.chat_templates
    files = Artifact.open(made).manifest.files
    for name in ("tool_use", "rag"):
        assert (made / FOLDER / f"{name}.jinja").read_bytes() == expected.chat_templates[name].encode()
        assert f"{FOLDER}/{name}.jinja" in files
    config = json.loads((made / "tokenizer_config.json").read_text())
    assert config["chat_template"] == expected.chat_templates["default"]
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(made)
    for options in ({}, {"tools": TOOLS}, {"chat_template": "rag"}):
        text = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True, **options)
        assert text == expected.render_chat(TALK, **options)


@pytest.mark.parametrize("content", [b"\xff", b"x" * (TEXT_LIMIT + 1)], ids=["bytes", "size"])
def test_a_damaged_template_is_refused_before_any_weight_is_read(checkpoint, tmp_path, content):
    give(checkpoint, "default", "tool_use")
    (checkpoint / FOLDER / "tool_use.jinja").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tool_use.jinja: "):
        lfm2_export.export(checkpoint, scheme="fp32", output=tmp_path / "made")
    assert not (tmp_path / "made").exists()
