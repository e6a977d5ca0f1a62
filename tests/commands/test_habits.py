"""What people type out of habit: short options, a prompt without an option, slips of the pen, pipes."""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2_export import cli
from lfm2_export.commands import COMMANDS, talk
from lfm2_export.commands import run as run_command
from lfm2_export.commands.completion import SHELLS
from lfm2_export.commands.examples import EXAMPLES, FIRST_STEPS
from lfm2_export.commands.parser import CommandLine
from lfm2_export.generation_config import GenerationConfig
from tests.artifacts import program, write_artifact
from tests.hash_runner import TOKENIZER, HashRunner

VERBS = [command.name for command in COMMANDS]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def called(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return called


class Stdin(io.TextIOWrapper):
    def __init__(self, data: bytes, terminal: bool):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def said(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``said("run", "DIR", ...)`` on a runner without a model, with something else on standard input."""
    opened = talk.Opened(
        program=program(),
        runner=HashRunner(vocab_size=TOKENIZER.vocab_size),
        tokenizer=TOKENIZER,
        config=GenerationConfig(max_new_tokens=6),
    )
    monkeypatch.setattr(run_command, "open_for_text", lambda options: opened)

    def called(*arguments: str, typed: bytes = b"typed", terminal: bool = False) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", Stdin(typed, terminal))
        return run(*arguments)

    return called


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_parse(run: Run, verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    examples = [line.strip() for line in out.partition("examples:\n")[2].splitlines()]
    assert examples == [f"lfm2-export {example}" for example in EXAMPLES[verb]]
    for example in (*EXAMPLES[verb], *FIRST_STEPS):
        shell = example.partition(" < ")[0].partition(" > ")[0]
        assert CommandLine().parse(shlex.split(shell)).verb == shlex.split(shell)[0]


@pytest.mark.parametrize("verb", VERBS)
def test_help_states_every_default(verb: str) -> None:
    stated = 0
    for action in CommandLine().verbs[verb]._actions:
        text = str(action.help)
        if action.default in (None, False, argparse.SUPPRESS) or action.default == []:
            continue
        stated += 1
        assert f"default: {action.default}" in text or f"{action.default} (default" in text
    print(f"{verb}: {stated} defaults")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("exprot tiny-moe -o x", "'exprot' (did you mean export?)"),
        ("run x hello --temprature 1", "--temprature (did you mean --temperature?) 1; see `lfm2-export run --help`"),
        ("run x hello --kernels=stok", "'stok' (did you mean stock?)"),
        ("export tiny-moe -o x --scheme q44", "'q44' is unknown (did you mean q4?)"),
        ("export tiny-moe -o x --scheme Q8", "'Q8' is unknown (did you mean q8?)"),
        ("export tiny-moe -o x --backend onx", "'onx' is unknown (did you mean onnx?)"),
    ],
)
def test_a_slip_of_the_pen_is_told_what_it_was_meant_to_be(run: Run, typed: str, meant: str) -> None:
    code, out, err = run(*shlex.split(typed))
    assert (code, out) == (2, "")
    assert meant in err
    assert len(err.splitlines()) == 1


def test_nothing_is_guessed_where_nothing_is_near(run: Run) -> None:
    for typed in ("zzz", "run x hello --xyzzy", "export tiny-moe -o x --scheme zzzzz"):
        code, _, err = run(*shlex.split(typed))
        assert code == 2
        assert "did you mean" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("What is it?",),
        ("What", "is", "it?"),
        ("-n", "6", "What is it?"),
        ("-n6", "What", "is", "it?"),
        ("-p", "What is it?"),
        ("--prompt", "What is it?", "-t", "1", "-s", "q4"),
    ],
    ids=" ".join,
)
def test_a_prompt_may_stand_anywhere(said: Run, arguments: tuple[str, ...]) -> None:
    expected = said("run", "dir", "-p", "What is it?")
    assert expected[0] == 0
    assert said("run", "dir", *arguments)[:2] == expected[:2]
    assert said("run", "dir", "What is it!")[1] != expected[1]


@pytest.mark.parametrize("arguments", [("--", "-v?"), ("-n", "6", "--", "-v?"), ("-p=-v?",)], ids=" ".join)
def test_a_prompt_may_begin_with_a_dash(said: Run, arguments: tuple[str, ...]) -> None:
    expected = said("run", "dir", typed=b"-v?")
    assert expected[0] == 0
    assert said("run", "dir", *arguments)[:2] == expected[:2]
    assert said("run", "dir", "-n", "6", "-v?")[0] == 2
    assert said("run", "dir", "-n", "6", "--wrong", "--", "-v?")[0] == 2


def test_an_artifact_is_not_inspected_with_what_only_a_checkpoint_has(run: Run, folder: Path) -> None:
    assert run("inspect", folder)[0] == 0
    for option in ("--lora", "--config-from", "--revision"):
        code, out, err = run("inspect", folder, option, "other")
        assert (code, out) == (2, "")
        assert f"{option}: is for checkpoints" in err


def test_a_prompt_is_read_from_a_pipe(said: Run) -> None:
    expected = said("run", "dir", "typed")[1]
    assert said("run", "dir")[:2] == (0, expected)
    assert said("run", "dir", "-")[:2] == (0, expected)
    assert said("run", "dir", "-p", "-", terminal=True)[:2] == (0, expected)
    code, out, err = said("run", "dir", terminal=True)
    assert (code, out) == (2, "")
    assert "a prompt is missing" in err


def test_two_prompts_are_refused(said: Run) -> None:
    code, _, err = said("run", "dir", "one", "-p", "two")
    assert code == 2
    assert "two prompts: 'two' by --prompt, and 'one'; leave one out" in err


def test_short_options_are_the_long_ones() -> None:
    parse = CommandLine().parse
    options = parse(["run", "d", "x", "-n", "3", "-t", "2", "-s", "q8"])
    assert (options.max_new_tokens, options.threads, options.scheme) == (3, 2, "q8")
    options = parse(["bench", "d", "-p", "3", "-n", "4", "-t", "2", "-s", "q8"])
    assert (options.prompt_tokens, options.new_tokens, options.threads, options.scheme) == (3, 4, 2, "q8")
    assert parse(["export", "c", "-o", "d", "-s", "q8"]).scheme == "q8"


@pytest.mark.parametrize("base", [GenerationConfig(), GenerationConfig(do_sample=True, temperature=0.5)])
def test_a_seed_alone_does_not_switch_sampling_on_or_off(base: GenerationConfig) -> None:
    assert base.override(seed=3).do_sample is base.do_sample
    assert GenerationConfig(seed=3).greedy


def test_a_setting_of_sampling_alone_does_in_python_as_on_the_command_line() -> None:
    for given in ({"temperature": 0.3}, {"temperature": 1.0}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.1}):
        assert GenerationConfig(**given) == GenerationConfig().override(**given)
        assert not GenerationConfig(**given).greedy
        assert GenerationConfig(**given, do_sample=False).greedy
    assert GenerationConfig(temperature=0).greedy
    # In a checkpoint's file it is as transformers reads it.
    assert GenerationConfig.from_dict({"temperature": 0.3}).greedy
    assert not GenerationConfig.from_dict({"temperature": 0.3}).override(temperature=0.4).greedy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("habits") / "made").path


def test_a_table_in_a_pipe_is_plain(run: Run, folder: Path) -> None:
    code, out, _ = run("inspect", folder)
    assert code == 0
    lines = out.splitlines()
    assert out.isascii()
    assert not [line for line in lines if line != line.rstrip() or not line]
    columns = [re.split(r" {2,}", line) for line in lines[1:3]]
    assert columns[0][:3] == ["program", "file", "size"]
    assert columns[1][:2] == ["onnx q4", "onnx/model_q4.onnx"]
    assert len(columns[0]) == len(columns[1])


def test_the_module_is_the_command_and_a_pipe_that_closes_is_no_error(folder: Path) -> None:
    """Nobody reads what ``inspect`` prints: its first table fills no pipe, so the reader goes before it starts."""
    command = [sys.executable, "-m", "lfm2_export", "inspect", str(folder)]
    whole = subprocess.run(command, capture_output=True, text=True)
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout.startswith(f"{folder}: ")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 0


def test_json_is_one_object_in_a_pipe(run: Run, folder: Path) -> None:
    assert json.loads(run("inspect", folder, "--json")[1])["kind"] == "artifact"


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize("program", ["lfm2-export", "lfm2x"])
def test_bash_completes_commands_options_and_values(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr("sys.argv", [f"/usr/bin/{program}"])
    code, script, _ = run("completion", "bash")
    assert code == 0
    (tmp_path / "completion.sh").write_text(script)
    (tmp_path / "made").mkdir()

    def completed(*words: str) -> set[str]:
        """What bash offers for the last word."""
        line = shlex.join([program, *words[:-1]]) + " " + words[-1]
        function = f"_shtab_{program.replace('-', '_')}"
        code = f"""
        source {shlex.quote(str(tmp_path / "completion.sh"))}
        COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_CWORD={len(words)}
        COMP_WORDS=({shlex.join([program, *words])})
        {function} {program} {shlex.quote(words[-1])} {shlex.quote(words[-2] if len(words) > 1 else program)}
        printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path)
        return set(done.stdout.split())

    assert completed("ex") == {"export"}
    assert completed("run", "made", "--max") == {"--max-new-tokens"}
    assert completed("export", "x", "--scheme", "q4") == {"q4", "q4f16"}
    assert completed("run", "made", "--backend", "e") == {"executorch"}
    assert {one.rstrip("/") for one in completed("run", "ma")} == {"made"}


def test_every_shell_has_a_script(run: Run) -> None:
    for shell in SHELLS:
        code, script, _ = run("completion", shell)
        assert code == 0
        assert "kv-cache" in script
